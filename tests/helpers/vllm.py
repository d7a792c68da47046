"""The command that serves the embedded demo in the real vLLM on the CPU, from an environment of its own."""

import os
from pathlib import Path

import pytest

from lmms_plugin.demo import CHECKPOINT

LIMIT = 300
"""Seconds until the server must have answered."""
SETTINGS = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_SERVER_DEV_MODE": "1",
}


def launch(dtype: str = "float32") -> str:
    """The command, with `{port}`; the test is skipped where no environment is named."""
    environment = os.environ.get("VLLM_ENV")
    if not environment:
        pytest.skip("VLLM_ENV names no environment with vLLM; make test-served makes one")
    settings = " ".join(f"{name}={value}" for name, value in SETTINGS.items())
    python = Path(environment).absolute() / "bin" / "python"
    options = f"--model {CHECKPOINT} --served-model-name demo --host 127.0.0.1 --port {{port}} --max-model-len 512"
    options += f" --enforce-eager --max-num-seqs 8 --dtype {dtype} --block-size 32"
    return f"{settings} {python} -m vllm.entrypoints.openai.api_server {options}"
