"""Suspended forward passes: they stop before given modules, so that many samples can wait for one block at a time.

Between two blocks of a vision-language model lies code that differs from family to family: masks of sliding and full
attention, rotary positions on several axes, visual features added on the way, hidden states picked by index. None of it
is reimplemented here. Each sample runs the model's own forward pass in a thread of its own; where it calls a block, it
waits until the driver has run the block and returns the output. No two threads ever run at once.
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
    """Call of a module for which a suspended pass waits.

    Attributes:
        name: Name of the module.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Abandoned(BaseException):
    """Exception that unwinds an abandoned pass; handlers of ordinary errors must not catch it."""


class Suspended:
    """Forward pass that runs up to its next suspension at a time.

    Args:
        run: Function that runs the pass, without gradients, in a thread of its own.

    Attributes:
        call: Call that the pass waits for; None before the start and after the end.
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
        """Resume the pass up to its next suspension.

        Args:
            output: Return value of the call it waits for; nothing at the start.

        Returns:
            Next call it waits for; None when the pass is over.

        Raises:
            Exception: Any exception of the pass.
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
        """Suspend the pass at a call; called from within the pass."""
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
            # Gradient mode is per thread.
            with torch.no_grad():
                if run is not None and not self._abandoned:
                    run()
        except _Abandoned:
            pass
        except BaseException as error:  # passed to the waiting thread
            self._error = error
        self.call, self.finished = None, True
        self._stopped.release()


def in_a_pass() -> bool:
    """Return whether the current code runs within a suspended pass."""
    return getattr(_running, "suspended", None) is not None


@contextmanager
def doors(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Callable[..., Any]]]:
    """Suspend passes where they call the given modules.

    Hooks on a module run in the pass, around the wait: the model's own code sees no difference. Outside of suspended
    passes the modules work as always.

    Args:
        modules: Modules by name; none within another one.

    Yields:
        Name -> forward function of the module, for the driver to call.
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
