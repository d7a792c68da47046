"""Forward passes that stop at the doors of modules, so that many samples can wait for one block at a time.

Between two blocks of a vision-language model lies code that differs from family to family: masks of sliding and full
attention, rotary positions on several axes, visual features added on the way, hidden states picked by index. None of
it is written down here a second time. Each sample runs the model's own forward in a thread of its own; where it calls
a block, it waits, and whoever drives it runs the block and hands it the output. No two threads ever run at once.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

_running = threading.local()


class SuspendedCall(NamedTuple):
    """A module that a suspended pass wants to be called.

    Attributes:
        name: Of the module.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Abandoned(BaseException):
    """Unwinds a pass that nobody waits for any more; no handler of ordinary errors may catch it."""


class Suspended:
    """One pass, run up to its next door at a time.

    Args:
        run: The pass; it runs without gradients, in a thread of its own.

    Attributes:
        call: The call that the pass waits for; None before it has started and once it is over.
        finished: Whether it has run to its end.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.call: SuspendedCall | None = None
        self.finished = False
        self._run: Callable[[], Any] | None = run
        self._output: Any = None
        self._error: BaseException | None = None
        self._abandoned = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._body, name="calibration sample", daemon=True)

    def advance(self, output: Any = None) -> SuspendedCall | None:
        """Let the pass go on to its next door.

        Args:
            output: What the call it waits for returns; nothing at the start.

        Returns:
            The call at the next door, None when the pass is over.

        Raises:
            Exception: Whatever the pass raised.
        """
        if self.finished:
            raise RuntimeError("this pass is over")
        self._output, self.call = output, None
        if self._thread.ident is None:
            self._thread.start()
        del output
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return self.call

    def close(self) -> None:
        """Unwind the pass and free what it holds."""
        self._abandoned = True
        if self._thread.is_alive():
            self._go.release()
            self._thread.join()
        self._run = self._output = self.call = None

    def wait_for(self, call: SuspendedCall) -> Any:
        """Stop at a door; called from within the pass."""
        self.call = call
        del call
        self._stopped.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned
        output, self._output = self._output, None
        return output

    def _body(self) -> None:
        self._go.acquire()
        run, self._run = self._run, None
        _running.suspended = self
        try:
            # Gradient mode belongs to a thread.
            with torch.no_grad():
                if run is not None and not self._abandoned:
                    run()
        except _Abandoned:
            pass
        except BaseException as error:  # handed over to the thread that waits
            self._error = error
        self.call, self.finished = None, True
        self._stopped.release()


def in_a_pass() -> bool:
    """Return whether the code that asks runs within a suspended pass."""
    return getattr(_running, "suspended", None) is not None


@contextmanager
def doors(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Callable[..., Any]]]:
    """Make suspended passes wait where they call the given modules.

    Hooks on a module run in the pass, around the wait: to the model's own code nothing has changed. Outside of
    suspended passes the modules work as always.

    Args:
        modules: By name; none within another one.

    Yields:
        Name -> the module's forward, for the driver to call.
    """
    forwards: dict[str, Callable[..., Any]] = {name: module.forward for name, module in modules.items()}
    own = {name: vars(module)["forward"] for name, module in modules.items() if "forward" in vars(module)}
    try:
        for name, module in modules.items():
            module.forward = _door(name, forwards[name])
        yield forwards
    finally:
        for name, module in modules.items():
            if name in own:
                module.forward = own[name]
            else:
                vars(module).pop("forward", None)


def _door(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def door(*args: Any, **kwargs: Any) -> Any:
        suspended: Suspended | None = getattr(_running, "suspended", None)
        if suspended is None:
            return forward(*args, **kwargs)
        call = SuspendedCall(name, args, kwargs)
        del args, kwargs
        return suspended.wait_for(call)

    return door
