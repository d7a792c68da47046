"""A real vLLM on the CPU, in the environment that the variable VLLM_ENV names."""

import os
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from lmms_plugin.vlm.served.client import ServerError
from lmms_plugin.vlm.served.model import QuantServed

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


@contextmanager
def vllm_server(checkpoint, log, *, dtype="float32"):
    """Yield the address of a server of a checkpoint that has answered a question about an image."""
    environment = os.environ.get("VLLM_ENV")
    if not environment:
        pytest.skip("VLLM_ENV names no environment with vLLM; make test-served makes one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(environment) / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(checkpoint), "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "512", "--enforce-eager", "--max-num-seqs", "8", "--dtype", dtype]
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [*command, "--block-size", "32"],
            env={**os.environ, **SETTINGS},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}/v1"
        _wait(server, checkpoint, address, log)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait(server, checkpoint, address, log):
    ends = time.monotonic() + LIMIT
    while time.monotonic() < ends:
        if server.poll() is not None:
            pytest.fail(f"vLLM ended with {server.returncode}:\n{log.read_text()[-3000:]}")
        try:
            QuantServed(pretrained=str(checkpoint), base_url=address, timeout=60)
        except ServerError:
            time.sleep(2)
        else:
            return
    pytest.fail(f"vLLM did not answer within {LIMIT} s:\n{log.read_text()[-3000:]}")
