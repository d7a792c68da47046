"""llama.cpp's server that ships in the wheel `xllamacpp`, as a program: `python -m ... --model FILE --port PORT`.

It runs in a process of its own, so that a crash of native code never takes an evaluation along.
"""

from __future__ import annotations

import argparse
import signal
import sys
from types import ModuleType
from typing import Any

from lmms_plugin.quant_backends.extras import require

FLASH_ATTENTION = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}
"""What a user says -> what llama.cpp calls it."""
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")


def main(arguments: list[str] | None = None) -> None:
    """Serve until the process is ended.

    Args:
        arguments: Of the command line; those of this process by default.
    """
    given = _parser().parse_args(arguments)
    library = require("xllamacpp", extra="gguf", user="llama.cpp's server")
    server = library.Server(parameters(library, given))
    sys.stdout.write(f"listening at {server.listening_address}\n")
    sys.stdout.flush()
    while True:
        signal.pause()


def parameters(library: ModuleType, given: argparse.Namespace) -> Any:
    """Return `xllamacpp.CommonParams` for arguments of the command line."""
    made = library.CommonParams()
    made.model.path = given.model
    if given.mmproj:
        made.mmproj.path = given.mmproj
    made.model_alias = {given.alias}
    made.hostnames = ["127.0.0.1"]
    made.port = given.port
    made.n_ctx = given.context * given.slots
    made.n_parallel = given.slots
    made.cpuparams.n_threads = given.threads
    made.cpuparams_batch.n_threads = given.threads
    kind = library.ggml_type[f"GGML_TYPE_{given.kv.upper()}"]
    made.cache_type_k, made.cache_type_v = kind, kind
    flash = f"LLAMA_FLASH_ATTN_TYPE_{FLASH_ATTENTION[given.flash_attention]}"
    made.flash_attn_type = library.llama_flash_attn_type[flash]
    made.image_min_tokens, made.image_max_tokens = given.image_min_tokens, given.image_max_tokens
    made.n_gpu_layers = given.gpu_layers
    made.use_jinja = True
    # The web page, and the search for parameters that fit the memory, which would change what was asked for.
    made.ui = False
    made.fit_params = False
    return made


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mmproj", default="")
    parser.add_argument("--alias", default="model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--context", type=int, default=4096, help="tokens of prompt and answer, for each slot")
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kv", choices=KV_TYPES, default="f16")
    parser.add_argument("--flash-attention", choices=FLASH_ATTENTION, default="auto")
    parser.add_argument("--image-min-tokens", type=int, default=-1)
    parser.add_argument("--image-max-tokens", type=int, default=-1)
    parser.add_argument("--gpu-layers", type=int, default=-1)
    return parser


if __name__ == "__main__":
    main()
