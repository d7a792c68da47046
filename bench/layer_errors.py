"""Output errors of quantized layers of a real language model on text that they were not calibrated on.

    python -m bench.layer_errors CHECKPOINT --text FILE [FILE ...] [--cases CASE [CASE ...]] [--json FILE]

CHECKPOINT is one that `bench.real_weights` reads. Layers of some blocks (`--blocks`) are solved by themselves, with the
unquantized model's inputs: of `--tokens` tokens in rows of 512, the last row is unseen, the others calibrate. A case is
written as for `lmms-plugin inspect`, without `pretrained`. `error` is the root mean square over layers of ‖Y − Ŷ‖ /
‖Y‖ in the unseen row, and `ratio` that of the last case of rounding to nearest before it over it.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.reporting import Row, machine, write
from bench.solving import ROW, dense_layers, gather
from lmms_plugin.quant_backends.backend import Backend, CalibratedBackend, DataFreeBackend
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.statistics import InputStatistics, held_back_rows
from lmms_plugin.quantize import Asked

W8A8 = "bits=8,group_size=-1,symmetric=True"
CASES = (
    *(f"method={method},bits=3,group_size=64" for method in ("rtn", "gptq", "awq", "qig")),
    f"method=rtn,{W8A8},activation_format=int8",
    f"method=smoothquant,{W8A8}",
    *(f"method={method},format={form}" for form in ("nvfp4", "mxfp4") for method in ("rtn", "gptq")),
    "method=rtn,format=fp8_e4m3",
)


def solved(backend: Backend, names: tuple[str, ...], layers: Sequence[nn.Linear], spec: QuantSpec, x: Any) -> list[Any]:
    """Return the quantized layers of a group, calibrated on some inputs, each (rows, columns)."""
    if not isinstance(backend, CalibratedBackend):
        assert isinstance(backend, DataFreeBackend)
        return [backend.quantize_linear(layer.weight.data, None, spec) for layer in layers]
    kept = {"holds_back": backend.holds_back, "keeps_rows": backend.keeps_rows}
    entry = InputStatistics.empty(names, layers[0].in_features, torch.device("cpu"), **kept)
    for index, part in enumerate(x):
        entry.add(part, None, held_back_rows(index, len(x)))
    return [solution.layer for solution in backend.solve(layers, [spec] * len(layers), entry)]


@torch.no_grad()
def measure(asked: Asked, groups: Sequence[tuple[tuple[str, ...], list[Tensor], list[Tensor]]]) -> Row:
    """Return the error of a case and what it took."""
    spec = asked.plan.language
    assert spec is not None
    started, errors = time.process_time(), []
    for names, weights, inputs in groups:
        layers, unseen = dense_layers(weights), inputs[-1]
        for layer, found in zip(layers, solved(asked.backend, names, layers, spec, inputs[:-1]), strict=True):
            exact = unseen @ layer.weight.T
            errors.append(float((found(unseen) - exact).norm() / exact.norm()))
    error = math.sqrt(sum(each**2 for each in errors) / len(errors))
    return {"error": error, "processor_seconds": time.process_time() - started}


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="files of plain text")
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--blocks", nargs="+", type=int, default=[10, 29])
    parser.add_argument("--tokens", type=int, default=4 * ROW)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in given.text]
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        gather(given.checkpoint, texts, given.tokens, given.blocks, Path(folder) / "layers")
        groups = torch.load(Path(folder) / "layers")
    rows, plain = [], math.nan
    for case in given.cases:
        asked = Asked.parse(f"pretrained={given.checkpoint},{case}")
        found = measure(asked, groups)
        plain = found["error"] if asked.method == "rtn" else plain
        rows.append({"case": case, "ratio": plain / found["error"]} | found)
        print("  ".join(f"{key} {each:.4g}" if isinstance(each, float) else each for key, each in rows[-1].items()))
        write(given.json, rows)


if __name__ == "__main__":
    main()
