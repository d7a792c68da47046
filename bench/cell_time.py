"""Where the time of a cell of a study goes: one `lmms-eval` run in a process of its own, processor time by phase.

    python -m bench.cell_time [--shape small] [--methods none rtn awq mbq gptq] [--samples N] [--limit N] [--json FILE]
    python -m bench.cell_time --shared [...]    # every method after one at other bits that has left what it can take

Without `--shape` the model is the demo; with it a random Qwen2.5-VL of `bench/shapes.py`, whose answers say nothing
but take their time. It is the processor's time, which other processes disturb least. Phases are wrapped functions of
this package; what a phase calls of another is not counted twice. `other` is what remains: tasks, logs, the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from bench.reporting import Row, machine, markdown, write

METHODS = ("none", "rtn", "awq", "mbq", "gptq")
PHASES = {
    "prepare": (("lmms_plugin.vlm.wrapper", "prepare"), ("lmms_plugin.vlm.wrapper", "chat_of")),
    "load": (("lmms_plugin.quant_backends.checkpoints.loading", "_load"),),
    "own answers": (("lmms_plugin.quant_backends.checkpoints.loading", "build_batches"),),
    "gradients": (
        ("lmms_plugin.quant_backends.calibration.sequential", "measure_sensitivities"),
        ("lmms_plugin.quant_backends.calibration.sequential", "measure_token_weights"),
    ),
    "statistics": (
        ("lmms_plugin.quant_backends.calibration.sequential", "SequentialQuantizer._explore"),
        ("lmms_plugin.quant_backends.calibration.sequential", "SequentialQuantizer._through"),
        ("lmms_plugin.quant_backends.calibration.sequential", "SequentialQuantizer._gather"),
    ),
    "solve": (("lmms_plugin.quant_backends.checkpoints.loading", "Quantization.finish"),),
    "evaluate": (("lmms_plugin.vlm.jobs", "Generation.generate"),),
}
"""Phase → the functions whose time it is, less that of other phases within them."""


class Phases:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._within: list[float] = []

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time added to a phase."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._within.append(0.0)
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.process_time() - start
                self.seconds[phase] += took - self._within.pop()
                if self._within:
                    self._within[-1] += took

        return call

    def watch(self) -> None:
        """Wrap the functions of all phases."""
        for phase, functions in PHASES.items():
            for module, name in functions:
                owner: Any = sys.modules[module]
                *outer, last = name.split(".")
                for one in outer:
                    owner = getattr(owner, one)
                setattr(owner, last, self.timed(phase, getattr(owner, last)))


def measure(arguments: Sequence[str]) -> Row:
    """Run `lmms-eval` in this process and return the seconds of its phases.

    Args:
        arguments: Arguments of the command.
    """
    import lmms_eval.cli.dispatch
    import lmms_eval.evaluator

    import lmms_plugin.quant_backends.calibration.sequential
    import lmms_plugin.quant_backends.checkpoints.loading
    import lmms_plugin.vlm.jobs
    import lmms_plugin.vlm.wrapper  # noqa: F401

    imported = time.process_time()
    phases = Phases()
    phases.watch()
    sys.argv = ["lmms-eval", *arguments]
    start = time.process_time()
    try:
        lmms_eval.cli.dispatch.main()
    except SystemExit as end:
        if end.code:
            raise
    rest = time.process_time() - start - sum(phases.seconds.values())
    return {"import": imported, **phases.seconds, "other": rest}


def child(method: str, pretrained: str, options: argparse.Namespace, bits: int = 4, shared: str = "") -> Row:
    """Measure a method in a process of its own."""
    given = f"pretrained={pretrained},device=cpu,report=report.json,resume=False,shared_folder={shared}"
    if method != "none":
        given += f",bits={bits}"
    if method not in ("none", "rtn", "hqq"):
        given += f",calibration=self:degenerate=allow,calibration_samples={options.samples}"
    command = ["--model", f"quant_{method}", "--model_args", given, "--tasks", "shapes_rec", "--batch_size", "16"]
    command += [*([] if options.limit is None else ["--limit", str(options.limit)]), "--log_samples"]
    with tempfile.TemporaryDirectory() as folder:
        this = [sys.executable, "-P", "-m", "bench.cell_time", "--child", "--", *command]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(
            [*this, "--output_path", "."], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode or not list(Path(folder).rglob("*_results.json")):
            raise RuntimeError(f"{method} failed:\n{done.stderr[-3000:]}")
    seconds: Row = json.loads(done.stdout.splitlines()[-1])
    return {"case": method, "ratio": None, **seconds, "seconds": sum(seconds.values())}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--shape", help="a name in bench/shapes.py; the demo by default")
    parser.add_argument("--written", type=Path, help="folder with a checkpoint of that shape; written if it is empty")
    parser.add_argument("--samples", type=int, default=32, help="of calibration")
    parser.add_argument("--limit", type=int, help="documents; all 488 by default")
    parser.add_argument("--shared", action="store_true", help="have a run at 3 bits before each, and take what it left")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("command", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run each method in a child process, print a table and write one row each."""
    options = parse()
    if options.child:
        print("\n" + json.dumps(measure(options.command)))
        return
    from bench.shapes import SHAPES, written

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        model = "demo"
        if options.shape is not None:
            model = str(written(options.written or Path(temporary) / "model", SHAPES[options.shape]))
        print(machine(), flush=True)
        for method in options.methods:
            shared = f"{temporary}/shared" if options.shared else ""
            if shared:
                child(method, model, options, 3, shared)
            rows.append(child(method, model, options, 4, shared))
            print(json.dumps({name: value for name, value in rows[-1].items() if name != "ratio"}), flush=True)
            write(options.json, rows)
    heads = ["seconds", *(str(row["case"]) for row in rows)]
    names = [name for name in rows[0] if name not in ("case", "ratio")]
    print("\n".join(markdown(heads, [[name, *(f"{row[name]:.1f}" for row in rows)] for name in names])))


if __name__ == "__main__":
    main()
