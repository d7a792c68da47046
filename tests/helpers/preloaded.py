"""A process that holds the libraries of others imported, and becomes an installed command in a copy of itself.

Importing them takes `lmms-eval` far longer than most of what tests have it do. A copy has arguments, environment,
working folder, output and exit status of its own, and imports lmms-eval and this package anew, in the order of any
other start. Run as a program it listens on the socket that its argument names, in a folder of its own, until nobody is
connected any longer.
"""

import atexit
import gc
import importlib
import json
import os
import select
import shutil
import socket
import sys
from pathlib import Path
from typing import Any, BinaryIO

from lmms_plugin.utils.processes.preloaded import LIBRARIES, become


def main() -> None:
    """Serve requests; in a copy, run what was asked for and end as it ends."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        for name in LIBRARIES:
            importlib.import_module(name)
        # Collections would touch, and so copy, what copies share; only the last one needs to see it.
        gc.freeze()
        atexit.register(gc.unfreeze)
        request = _next_of_a_copy(listener)
    if request is None:
        shutil.rmtree(Path(sys.argv[1]).parent)
    else:
        become(request)


def _next_of_a_copy(listener: socket.socket) -> dict[str, Any] | None:
    """Wait for requests; return one in the copy that is to run it, and None when the last client has gone."""
    clients: dict[socket.socket, BinaryIO] = {}
    while True:
        for ready in select.select([listener, *clients], [], [])[0]:
            if ready is listener:
                client, _ = listener.accept()
                clients[client] = client.makefile("rb")
                continue
            line = clients[ready].readline()
            if not line:
                clients.pop(ready).close()
                ready.close()
                if not clients and not select.select([listener], [], [], 0)[0]:
                    return None
            elif os.fork() == 0:
                _answer_for_a_copy(ready)
                for client, file in clients.items():
                    file.close()
                    client.close()
                request: dict[str, Any] = json.loads(line)
                return request
        _reap()


def _answer_for_a_copy(client: socket.socket) -> None:
    """Return in a copy; wait for its end beside it, and tell the client."""
    copy = os.fork()
    if copy == 0:
        return
    _, status = os.waitpid(copy, 0)
    client.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main()
