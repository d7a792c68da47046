"""Two models on the same documents, one after the other through the `lmms-eval` command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

from lmms_plugin import harness_log
from lmms_plugin.arguments import OF_THE_CACHE, ModelArguments, read_arguments
from lmms_plugin.quant_backends import GGUF, SERVED, backend_name, get, model_name, names, option_types
from lmms_plugin.utils.processes import guard, installed
from lmms_plugin.utils.suggest import unknown

_SPEC = re.compile(r"([A-Za-z_][\w-]*)(?::(.*))?", re.S)


class ModelSpec(NamedTuple):
    """Model as a user names it: `quant_none:pretrained=demo`.

    Attributes:
        model: Name of the model in lmms-eval.
        arguments: Its model arguments, as after `--model_args`.
    """

    model: str
    arguments: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a model's name and arguments.

        Raises:
            ValueError: It is no name of a model, or its arguments are not `name=value,...`.
        """
        found = _SPEC.fullmatch(text)
        if found is None:
            raise ValueError(
                f"expected a model and its arguments such as quant_none:pretrained=demo, got {text!r:.200}; to compare "
                "two finished runs leave out --tasks"
            )
        read_arguments(found[2] or "")
        return cls(found[1], found[2] or "")

    @property
    def _by_server(self) -> bool:
        return self.model.removesuffix("_simple") in map(model_name, (SERVED, GGUF))

    def expect_unquantized(self) -> None:
        """Refuse a model whose weights, keys or values would be quantized.

        Raises:
            ValueError: It is another model than quant_none, or an argument quantizes the key-value cache.
        """
        quantized = [name for name in read_arguments(self.arguments) if name in OF_THE_CACHE]
        if quantized or self.model != model_name("none"):
            raise ValueError(f"expected the unquantized model (quant_none), got {(quantized or [self.model])[0]}")

    def expect_possible(self) -> None:
        """Refuse an unknown model of this package, and arguments that cannot be, before another model is run.

        What a server is asked for is not looked at.

        Raises:
            ValueError: There is no such model, or a method refuses an argument.
            FileNotFoundError: The checkpoint's folder or the plan file does not exist.
        """
        method = backend_name(self.model.removesuffix("_simple"))
        if method is None or self._by_server:
            return
        if method not in names():
            raise unknown("model", self.model, map(model_name, (*names(), SERVED, GGUF)))
        given = read_arguments(self.arguments)
        ModelArguments.expect_possible(given)
        get(method, **ModelArguments.parse(given, option_types(method)).options)

    def with_reference(self, reference: Self) -> Self:
        """Return the model with the argument that forces another model's answers through it.

        Args:
            reference: Unquantized model.

        Raises:
            ValueError: The reference is quantized, or to be run in another way than this model, or a server runs this
                one.
        """
        reference.expect_unquantized()
        if self._by_server or backend_name(self.model.removesuffix("_simple")) is None:
            raise ValueError(
                f"expected a quantized model that is loaded here (quant_rtn, ...), got {self.model}: run both by "
                "themselves, and name their results without --tasks"
            )
        its, own = read_arguments(reference.arguments), read_arguments(self.arguments)
        if "reference" in own:
            raise ValueError(f"{self.model} has a reference of its own: leave reference={own['reference']} out")
        default = ModelArguments.pretrained
        path = its.pop("pretrained", default)
        if other := next((name for name, value in its.items() if own.get(name) != value), None):
            raise ValueError(
                f"the reference is run as the model is: expected {other}={its[other]} among the arguments of "
                f"{self.model}, too"
            )
        named = "none" if path == own.get("pretrained", default) else path
        return self._replace(arguments=",".join(filter(None, (self.arguments, f"reference={named}"))))

    def with_evidence(self) -> Self:
        """Return the model with the arguments that keep evidence, if it is one of this package's."""
        if not self._by_server and backend_name(self.model) is None:
            return self
        given = read_arguments(self.arguments)
        added = ["parity=True"] if "parity" not in given else []
        # What differs is to be found out, and not to end the run.
        added += ["mismatch=warn"] if self._by_server and "mismatch" not in given else []
        return self._replace(arguments=",".join(filter(None, (self.arguments, *added))))


def finished(text: str) -> Path:
    """Return the path of a finished run.

    Raises:
        ValueError: Nothing is there, and the text names a model instead.
    """
    path = Path(text)
    if not path.exists() and (":" in text or backend_name(text) is not None):
        raise ValueError(f"expected the results of a finished run, got the model {text!r:.200}: --tasks runs it now")
    return path


def command_of(
    spec: ModelSpec, tasks: str, folder: Path, limit: float | None, batch_size: str | None
) -> tuple[str, ...]:
    """Return the command that runs one model.

    Raises:
        ValueError: No task is named, or the limit is neither a number of documents nor a share of them.
    """
    if not tasks.strip(" ,"):
        raise ValueError(f"--tasks: expected names of tasks, as shapes_rec,shapes_shift, got {tasks!r}")
    if limit is not None and not (0.0 < limit < 1.0 or (limit >= 1.0 and float(limit).is_integer())):
        raise ValueError(f"--limit: expected a number of documents, or a share of them below 1, got {limit:g}")
    asked = ("--model", spec.model, "--model_args", spec.arguments, "--tasks", tasks)
    more = [] if limit is None else ["--limit", f"{limit:.12g}"]
    more += [] if batch_size is None else ["--batch_size", batch_size]
    return ("lmms-eval", *asked, *more, "--log_samples", "--output_path", str(folder))


def run(command: Sequence[str], folder: Path) -> None:
    """Run one command of lmms-eval to its end; its log goes to `log.txt` in the folder.

    Raises:
        RuntimeError: It left no results; tells the last error of its log in one line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    program, *arguments = command
    process = guard.start([installed.command(program), *arguments], log)
    try:
        status = process.wait()
    finally:
        guard.end(process)
    if status or not any(folder.rglob("*_results.json")):
        told = harness_log.failure(log.read_text(encoding="utf-8", errors="replace"), status)
        raise RuntimeError(f"{command[command.index('--model') + 1]}: {told}")
