"""The HTTP client: JSON in, JSON out, patient with a busy server, and every other failure told in one line."""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property, lru_cache
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter
from tenacity.nap import sleep_using_event
from tenacity.stop import stop_when_event_set

_BUSY = frozenset({429, 503})
_PASSING = frozenset({408, 425, 500, 502, 504, 529}) | _BUSY
_LONGEST_WAIT = 600.0
"""Seconds that a server may ask to be left alone."""
_SAID = 300
"""Characters of a server's words in a message."""
_SOCKETS = 4096
"""Of the latest connections; older ones have ended."""
_STANDS_FOR_IMAGE = re.compile(rb'"(image:[0-9a-f]{32})"')
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TOO_LONG = re.compile(r"context (length|size|window)|maximum context|exceed_context|max_model_len|too long", re.I)
_TOO_LARGE = re.compile(r"image.{0,40}(too large|too big|exceeds)|(too large|exceeds).{0,40}image", re.I)


class ServerError(ValueError):
    """A server that does not answer as it should; the message is one line with what helps."""


class RequestRefused(ServerError):
    """A request that the server will never answer.

    Attributes:
        status: Status code of HTTP.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Passing(ServerError):
    """A failure that may pass.

    Attributes:
        wait: Seconds that the server asks to wait; None if it does not.
        busy: Whether the server has too much to do.
        status: Status of HTTP; None where none came.
    """

    def __init__(
        self, message: str, wait: float | None = None, *, busy: bool = False, status: int | None = None
    ) -> None:
        super().__init__(message)
        self.wait = wait
        self.busy = busy
        self.status = status


@dataclass
class Client:
    """Talks to one server; safe to call from several threads.

    Attributes:
        base_url: Address of the API.
        key: Secret that is sent to this server and to no other; never part of a message.
        key_variable: Environment variable that the key comes from, for messages.
        timeout: Seconds for one response.
        retries: Number of further attempts after a failure that may pass.
        busy: Function called whenever the server says that it has too much to do.
        expect_running: Function called after a failure that may pass; raises an error if the server has ended.
        connections: Sockets of the latest connections, open or ended.
    """

    base_url: str
    key: str | None = field(default=None, repr=False)
    key_variable: str = ""
    timeout: float = 600.0
    retries: int = 8
    busy: Callable[[], None] = field(default=lambda: None, repr=False)
    expect_running: Callable[[], None] = field(default=lambda: None, repr=False)
    connections: deque[socket.socket] = field(default_factory=lambda: deque(maxlen=_SOCKETS), init=False, repr=False)
    _ended: threading.Event = field(default_factory=threading.Event, init=False, repr=False)
    _idle: list[httpx.HTTPTransport] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        self.base_url = self.base_url.rstrip("/")

    @property
    def root(self) -> str:
        """The server's address without the API's path."""
        return self.base_url.removesuffix("/v1")

    def get(self, url: str) -> dict[str, Any]:
        """Fetch a JSON object, without a second try.

        Raises:
            ServerError: there is none.
        """
        return self._once("GET", url, None)

    def chat(
        self, body: Mapping[str, Any], images: Mapping[str, bytes] | None = None, *, patient: bool = True
    ) -> dict[str, Any]:
        """Ask for an answer.

        Args:
            body: Body of a request to `/chat/completions`.
            images: Name -> data URL of what stands in the body by its name (see `SentImage`).
            patient: Whether to try again after a failure that may pass.

        Returns:
            The response; it has choices.

        Raises:
            ServerError: there is no answer, after all tries.
        """
        content = _encoded(body, images or {})
        url = f"{self.base_url}/chat/completions"
        return self._patiently(lambda: _expect_choices(self._once("POST", url, content), self.base_url), patient)

    def post(
        self, url: str, body: Mapping[str, Any], images: Mapping[str, bytes] | None = None, *, patient: bool = True
    ) -> dict[str, Any]:
        """Ask something else than the chat API; see `chat`."""
        content = _encoded(body, images or {})
        return self._patiently(lambda: self._once("POST", url, content), patient)

    def end(self) -> None:
        """Break off waiting, and every request under way; the client is of no use afterwards."""
        self._ended.set()
        while self._idle:
            self._idle.pop().close()
        # Closed by another thread, a socket would leave the one that waits for it waiting, or reading from whichever
        # socket gets its number next.
        for connection in list(self.connections):
            _shut(connection)

    @contextmanager
    def _connected(self) -> Iterator[httpx.HTTPTransport]:
        """Lend one connection: where threads share several, each request looks through all of them."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = httpx.HTTPTransport(verify=self._tls, proxy=self.proxy)
        try:
            yield connection
        finally:
            if self._ended.is_set():
                connection.close()
            else:
                self._idle.append(connection)

    def _note_socket(self, event: str, details: Mapping[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            connection = details["return_value"].get_extra_info("socket")
            self.connections.append(connection)
            if self._ended.is_set():
                _shut(connection)

    @cached_property
    def proxy(self) -> str | None:
        """Return the proxy that the environment names for this server; none stands between us and our own machine."""
        address = httpx.URL(self.base_url)
        if address.host in _LOOPBACK or proxy_bypass(address.netloc.decode("ascii")):
            return None
        named = getproxies()
        proxy = named.get(address.scheme) or named.get("all")
        return proxy if not proxy or "://" in proxy else f"http://{proxy}"

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return httpx.create_ssl_context()

    def _patiently(self, ask: Callable[[], dict[str, Any]], patient: bool) -> dict[str, Any]:
        tries = self.retries + 1 if patient else 1
        retrying = Retrying(
            retry=retry_if_exception_type(Passing),
            stop=stop_after_attempt(tries) | stop_when_event_set(self._ended),
            wait=_pause,
            sleep=sleep_using_event(self._ended),
            before_sleep=self._note,
            reraise=True,
        )
        try:
            return retrying(ask)
        except Passing as error:
            self.expect_running()
            if tries == 1:
                raise
            raise ServerError(f"{error} (tried {tries} times)") from error

    def _note(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, Passing) and error.busy:
            self.busy()
        self.expect_running()

    def _request(self, method: str, url: str, content: list[bytes] | None) -> httpx.Request:
        headers = {"Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        if content is not None:
            headers |= {"Content-Type": "application/json", "Content-Length": str(sum(map(len, content)))}
        timeout = httpx.Timeout(self.timeout, connect=min(10.0, self.timeout)).as_dict()
        extensions = {"timeout": timeout, "trace": self._note_socket}
        sent = None if content is None else iter(content)
        return httpx.Request(method, _address(url), headers=headers, content=sent, extensions=extensions)

    def _once(self, method: str, url: str, content: list[bytes] | None) -> dict[str, Any]:
        try:
            request = self._request(method, url, content)
            with self._connected() as connection:
                if self._ended.is_set():
                    raise ServerError("the run has ended")
                # A client of httpx would look for cookies, authentication, hooks and redirects each time, which takes
                # as long as the rest.
                response = connection.handle_request(request)
                try:
                    response.read()
                finally:
                    response.close()
        except httpx.ConnectError as error:
            raise Passing(
                f"no server answers at {self.base_url} ({self._words(str(error))}): start it, or check host and port"
            ) from error
        except httpx.TimeoutException as error:
            raise Passing(f"{url} did not answer within {self.timeout:g} s (timeout=)") from error
        except (httpx.HTTPError, OSError) as error:
            raise Passing(
                f"{url} broke off in the middle of a response ({type(error).__name__}: {self._words(str(error))}): the "
                "server may have died, its log says why"
            ) from error
        except RuntimeError as error:
            raise ServerError("the run has ended") from error
        return self._read(response, url)

    def _read(self, response: httpx.Response, url: str) -> dict[str, Any]:
        status = response.status_code
        if response.is_redirect:
            place = response.headers.get("location", "?")
            raise RequestRefused(
                f"{url} redirects to {self._words(place)}, which is not followed: give that address as base_url", status
            )
        if status != 200:
            self._refuse(response, url)
        try:
            value = json.loads(response.content)
        except (ValueError, RecursionError) as error:
            if _is_html(response):
                raise RequestRefused(f"{url} answers with HTML, not JSON: {self._where()}", status) from error
            raise Passing(f"{url} sent half a response or no JSON: {self._words(response.text)!r}") from error
        if not isinstance(value, dict):
            raise RequestRefused(f"{url}: expected a JSON object, got {self._words(response.text)!r}", status)
        if value.get("error") or value.get("object") == "error":
            raise ServerError(f"{url} answers 200 with an error inside: {self._words(_message(value))}")
        return value

    def _refuse(self, response: httpx.Response, url: str) -> None:
        """Raise what a status other than 200 means."""
        status = response.status_code
        said = self._words(_said(response))
        if status in _PASSING:
            raise Passing(f"{url} answers {status}: {said}", _asked_wait(response), busy=status in _BUSY, status=status)
        if status in (401, 403):
            given = f"the key in {self.key_variable}" if self.key else "a request without key"
            raise RequestRefused(f"{self.base_url} refuses {given} ({status}): {said}; set {self.key_variable}", status)
        if _is_html(response) and status != 413:
            raise RequestRefused(f"{url} answers {status} with HTML, not JSON: {self._where()}", status)
        if status == 413 or _TOO_LARGE.search(said):
            hint = "; the image is too large for the server: max_pixels= makes it smaller, or raise the server's limit"
        elif _TOO_LONG.search(said):
            hint = "; prompt and answer do not fit: serve with a longer context, or lower max_pixels= or max_new_tokens"
        elif status == 404:
            hint = f"; {self._where()}, and model= a name that it serves"
        else:
            hint = ""
        raise RequestRefused(f"{url} answers {status}: {said}{hint}", status)

    def _where(self) -> str:
        return f"base_url must be the address of the API, mostly {self.root}/v1"

    def _words(self, text: str) -> str:
        """A stranger's words in one line and without the key."""
        line = " ".join(text.split())
        line = line.replace(self.key, "***") if self.key else line
        return line if len(line) <= _SAID else f"{line[:_SAID]}…"


@lru_cache(maxsize=64)
def _address(url: str) -> httpx.URL:
    return httpx.URL(url)


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _encoded(body: Mapping[str, Any], images: Mapping[str, bytes]) -> list[bytes]:
    """Return a body as JSON in parts, images in their places; each is encoded once, however often it is sent."""
    content = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    if not images:
        return [content]
    parts = _STANDS_FOR_IMAGE.split(content)
    for at in range(1, len(parts), 2):
        image = images.get(parts[at].decode("ascii"))
        parts[at] = b'"%b"' % (parts[at] if image is None else image)
    return parts


def _pause(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, Passing) and error.wait is not None:
        return error.wait
    return float(wait_exponential_jitter(multiplier=0.25, max=30.0, jitter=0.25)(state))


def _asked_wait(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError):
            return None
    return min(max(seconds, 0.0), _LONGEST_WAIT) if seconds == seconds else None


def _is_html(response: httpx.Response) -> bool:
    return "html" in response.headers.get("content-type", "") or response.content.lstrip()[:1] == b"<"


def _said(response: httpx.Response) -> str:
    try:
        value = json.loads(response.content)
    except (ValueError, RecursionError):
        return response.text
    return _message(value) if isinstance(value, dict) else response.text


def _message(value: Mapping[str, Any]) -> str:
    """The words of an error, in whichever of the usual places they are."""
    error = value.get("error")
    if isinstance(error, Mapping):
        error = error.get("message") or error
    return str(error or value.get("message") or value.get("detail") or dict(value))


def _expect_choices(value: dict[str, Any], base_url: str) -> dict[str, Any]:
    choices = value.get("choices")
    if not (isinstance(choices, list) and choices and isinstance(choices[0], Mapping)):
        raise ServerError(
            f"{base_url}: expected choices in the response, got {', '.join(map(str, value)) or 'nothing'}"
        )
    _expect_form(choices[0], base_url)
    return value


def _expect_form(choice: Mapping[str, Any], base_url: str) -> None:
    """Refuse values of another type than OpenAI's chat API has; all of them may be missing."""
    told = _part(choice, "logprobs", Mapping, base_url) or {}
    _part(_part(choice, "message", Mapping, base_url) or {}, "content", str, base_url)
    for entry in _part(told, "content", list, base_url) or ():
        if not isinstance(entry, dict):
            raise _strange("logprobs.content", entry, base_url)
        for other in _part(entry, "top_logprobs", list, base_url) or ():
            if not isinstance(other, dict):
                raise _strange("top_logprobs", other, base_url)


def _part(of: Mapping[str, Any], name: str, kind: type[Any], base_url: str) -> Any:
    value = of.get(name)
    if value is not None and not isinstance(value, kind):
        raise _strange(name, value, base_url)
    return value


def _strange(name: str, value: Any, base_url: str) -> ServerError:
    return ServerError(f"{base_url}: expected {name} as in OpenAI's chat API, got {value!r:.80}")
