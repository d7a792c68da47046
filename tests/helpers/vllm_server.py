"""The real vLLM on the CPU, in an environment of its own, which `VLLM_ENV` names (`make test-served`)."""

import os
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

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
    return Path(environment) / "bin" / "python" if environment else None


@contextmanager
def serving(checkpoint, dtype, log, length=512):
    """Serve a checkpoint until the context ends; yields address and process of a server that has answered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(interpreter()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    command += ["--max-model-len", str(length), "--enforce-eager", "--max-num-seqs", "8", "--block-size", "32"]
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [*command, "--generation-config", "vllm"],
            env={**os.environ, **SETTINGS},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}/v1"
        _wait(server, url, checkpoint, log)
        yield url, server
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait(server, url, checkpoint, log):
    ends = time.monotonic() + LIMIT
    while time.monotonic() < ends:
        if server.poll() is not None:
            raise AssertionError(f"vLLM ended with {server.returncode}:\n{log.read_text()[-3000:]}")
        try:
            # That it answers a question about an image counts, not that it says so.
            QuantServed(pretrained=str(checkpoint), base_url=url, timeout=60)
        except ServerError:
            time.sleep(1)
        else:
            return
    raise AssertionError(f"vLLM did not answer within {LIMIT} s:\n{log.read_text()[-3000:]}")
