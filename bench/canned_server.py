"""A server that gives every chat completion one of two answers after a while; `bench.served` runs it as a process.

    python -m bench.canned_server MODELS_JSON ANSWER_JSON ANSWER_WITH_LOG_PROBABILITIES_JSON SECONDS

It prints its port. Bodies are read and thrown away, with as little of the processor's time as a server can take: of
each only the end is looked at, where our client and others ask for log-probabilities.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

_END = b"\r\n\r\n"
_LENGTH = b"content-length:"
_ASKED = b'"logprobs":true'
_TAIL = 4096
"""Bytes at the end of a body that are looked at; fields of a request come behind its messages."""


def reply(content: bytes) -> bytes:
    """Return a whole response of HTTP."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


class Canned(asyncio.BufferedProtocol):
    """One connection."""

    def __init__(self, models: bytes, plain: bytes, telling: bytes, seconds: float) -> None:
        self.models, self.plain, self.telling, self.seconds = models, plain, telling, seconds
        self.buffer = bytearray(1 << 18)
        self.head = self.tail = b""
        self.left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        """Return where bytes are written, over the earlier ones."""
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Read a head, or count a part of a body."""
        if self.left:
            self._body(bytes(self.buffer[max(0, nbytes - _TAIL) : nbytes]), nbytes)
            return
        self.head += bytes(self.buffer[:nbytes])
        end = self.head.find(_END)
        if end < 0:
            return
        head = self.head[:end].lower()
        if head.startswith(b"get"):
            self.transport.write(self.models)
        else:
            length = head.partition(_LENGTH)[2].partition(b"\r")[0]
            self.left, self.tail = int(length), b""
            begun = self.head[end + len(_END) :]
            self._body(begun[-_TAIL:], len(begun))
        self.head = b""

    def _body(self, end: bytes, size: int) -> None:
        """Note the end of a part of a body of some size; answer after the last part."""
        self.tail = (self.tail + end)[-_TAIL:]
        self.left -= size
        if not self.left:
            answer = self.telling if _ASKED in self.tail else self.plain
            asyncio.get_running_loop().call_later(self.seconds, self.transport.write, answer)


async def serve(models: bytes, plain: bytes, telling: bytes, seconds: float) -> None:
    """Serve for ever."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Canned(models, plain, telling, seconds), "127.0.0.1", 0, backlog=256)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    read = [reply(Path(name).read_bytes()) for name in sys.argv[1:4]]
    asyncio.run(serve(*read, seconds=float(sys.argv[4])))
