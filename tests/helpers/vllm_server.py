"""The real vLLM on the CPU, in an environment of its own, which `VLLM_ENV` names (`make test-served`)."""

import os
from contextlib import contextmanager
from pathlib import Path

import pytest

from lmms_plugin.demo import CHECKPOINT
from lmms_plugin.utils.processes.launch_command import LaunchCommand
from lmms_plugin.utils.processes.servers import Server
from lmms_plugin.vlm.served.client import ServerError
from lmms_plugin.vlm.served.model import QuantServed

LIMIT = 300
"""Seconds until a server must have answered."""
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
NAME = "demo"


def interpreter():
    """Path of the environment's Python; None where no environment is named."""
    environment = os.environ.get("VLLM_ENV")
    return Path(environment).absolute() / "bin" / "python" if environment else None


def expect_environment():
    """Skip the test where no environment is named."""
    if interpreter() is None:
        pytest.skip("VLLM_ENV names no environment with vLLM; make test-served makes one")


def launch(checkpoint=CHECKPOINT, dtype="float32", length=512, more=""):
    """The command that serves a checkpoint, with `{port}` and further options."""
    settings = " ".join(f"{name}={value}" for name, value in SETTINGS.items())
    options = f"--model {checkpoint} --served-model-name {NAME} --host 127.0.0.1 --port {{port}} --dtype {dtype}"
    options += f" --max-model-len {length} --enforce-eager --max-num-seqs 8 --block-size 32 --generation-config vllm"
    return f"{settings} {interpreter()} -m vllm.entrypoints.openai.api_server {options} {more}"


@contextmanager
def serving(checkpoint, dtype, log, length=512, more=""):
    """Serve a checkpoint until the context ends; yields the address of the API and the server, which has answered."""
    with Server.of(LaunchCommand.parse(launch(checkpoint, dtype, length, more)), log) as server:
        url = f"{server.address}/v1"
        # That it answers a question about an image counts, not that it says so.
        server.wait(
            lambda seconds: QuantServed(pretrained=str(checkpoint), base_url=url, timeout=seconds), LIMIT, ServerError
        )
        yield url, server
