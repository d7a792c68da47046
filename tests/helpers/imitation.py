"""A server process that answers with the embedded demo in the way of an engine: `python imitation.py --port PORT`.

It dies in the middle if it is told to, as servers do whose engine fails at a request.
"""

import argparse
import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main():
    """Serve until it is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--dies-at", type=int, help="number of the chat request at which the process ends")
    asked = parser.parse_args()

    from helpers.served import DemoModel, FakeServer

    def fault(number, _):
        if number == asked.dies_at:
            print("RuntimeError: no kernel image is available for execution on the device", flush=True)
            os._exit(3)

    with FakeServer(DemoModel(), asked.engine, port=asked.port, fault=fault):
        threading.Event().wait()


if __name__ == "__main__":
    main()
