"""Component importance: from a grid of runs to the importance of the bits of vision, connector and language.

The method of Das et al. (arXiv 2601.15287): a random forest predicts the score from the bits of each component. Its
impurity importance, permutation importance and mean |SHAP| value, each normalised to 100 %, are averaged to a
consensus. Importances depend on the grid as much as on the model: one 2-bit row that breaks the model outweighs
everything else. Results therefore include the grid and the forest's R² on unseen cells: importances of a forest that
does not predict are meaningless.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from joblib import Parallel, delayed

from lmms_plugin.analysis.logs import find
from lmms_plugin.analysis.logs import table as results_table
from lmms_plugin.arguments import ModelArguments, arguments_of
from lmms_plugin.metrics.bootstrap import affordable
from lmms_plugin.quant_backends import backend_name, get, option_types
from lmms_plugin.quant_backends.extras import require
from lmms_plugin.quant_backends.plans.plan import COMPONENTS, UNTOUCHED_BITS
from lmms_plugin.utils.messages import counted

Floats = npt.NDArray[np.float64]

MEASURES = ("forest", "permutation", "shap")
TREES = 100
REPEATS = 5
FOLDS = 5
LEAST_CELLS = 8
RESAMPLES = 200
ENOUGH_R2 = 0.5
"""R² above which importances mean something."""

# Arguments that define a grid; others say how a run is done, or are what is varied.
_OF_THE_METHOD = ("group_size", "symmetric", "calibration", "calibration_samples")
_OF_THE_MODEL = ("pretrained", "dtype", "min_pixels", "max_pixels", "max_num_frames", "system_prompt", "dialect")


class ComponentCell(NamedTuple):
    """One run: bits per component and its scores.

    Attributes:
        model: Model and revision-defining arguments, as text.
        method: Backend and its settings, as text; "" for a run without quantization.
        bits: Component → bits per weight, 16 for untouched.
        scores: (task, metric) → value of lmms-eval's table.
    """

    model: str
    method: str
    bits: Mapping[str, int]
    scores: Mapping[tuple[str, str], float]


@dataclass(frozen=True, eq=False)
class ComponentGrid:
    """Scores of one metric over the bits of the components.

    Attributes:
        name: Method, model, task and metric, as text.
        components: The k components whose bits vary.
        bits: Bits per weight, shape (n, k).
        scores: Values of the metric, shape (n,).
    """

    name: str
    components: tuple[str, ...]
    bits: npt.NDArray[np.int64]
    scores: Floats

    @property
    def levels(self) -> dict[str, list[int]]:
        """Return component → bits that occur."""
        return {name: np.unique(self.bits[:, k]).tolist() for k, name in enumerate(self.components)}

    @property
    def combinations(self) -> int:
        """Return the number of combinations of those bits."""
        return math.prod(len(levels) for levels in self.levels.values())

    @property
    def file_name(self) -> str:
        """The name with everything but letters, digits, dots and dashes replaced by an underscore."""
        return re.sub(r"[^\w.-]+", "_", self.name)

    def described(self) -> str:
        """Describe the grid in one line."""
        each = " x ".join(f"{name} {{{', '.join(map(str, levels))}}}" for name, levels in self.levels.items())
        different = len(np.unique(self.bits, axis=0))
        return (
            f"{each}: {different} of {counted(self.combinations, 'combination')} in {counted(len(self.scores), 'run')}"
        )


class Importance(NamedTuple):
    """Share of a score's variation over a grid that is due to one component, in percent.

    Attributes:
        component: Name of the component.
        forest: Decrease of impurity in the trees.
        permutation: Loss of R² when its column is shuffled.
        shap: Mean |SHAP| value.
        consensus: Mean of the three.
        low: Lower end of the 95 % interval of the consensus, over resamples of the runs.
        high: Upper end of that interval.
    """

    component: str
    forest: float
    permutation: float
    shap: float
    consensus: float
    low: float
    high: float


class ComponentSensitivity(NamedTuple):
    """Importances of one grid.

    Attributes:
        grid: Grid of runs.
        r2: R² of the forest on cells it was not fitted on; importances mean little where it is low.
        importances: One per component, summing to 100 % in every measure.
    """

    grid: ComponentGrid
    r2: float
    importances: tuple[Importance, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all values as JSON-ready types, the grid included."""
        runs = [
            {"bits": dict(zip(self.grid.components, bits, strict=True)), "score": score}
            for bits, score in zip(self.grid.bits.tolist(), self.grid.scores.tolist(), strict=True)
        ]
        importances = [one._asdict() for one in self.importances]
        return {"grid": self.grid.name, "r2": self.r2, "importances": importances, "runs": runs}


def analyse(
    grid: ComponentGrid, *, resamples: int = RESAMPLES, seed: int = 0, workers: int = 1
) -> ComponentSensitivity:
    """Estimate the importance of each component, by three measures and their mean.

    Args:
        grid: At least 8 runs in which at least one component's bits vary.
        resamples: Number of resamples of the runs, for the intervals.
        seed: Seed of forest, permutations, folds and resamples.
        workers: Threads that share the resamples; the result is the same for any number.

    Raises:
        ValueError: The grid is too small, a score is not finite, or all scores are equal.
    """
    affordable(resamples)
    n = len(grid.scores)
    if n < LEAST_CELLS or not grid.components:
        raise ValueError(f"{grid.name}: expected at least {LEAST_CELLS} runs that differ in bits, got {n}")
    if not np.isfinite(grid.scores).all():
        raise ValueError(f"{grid.name}: expected finite scores, got {grid.scores[~np.isfinite(grid.scores)][0]}")
    if np.ptp(grid.scores) == 0.0:
        raise ValueError(f"{grid.name}: every run scores {grid.scores[0]:g}, so no component matters more than another")
    shares = _shares(grid.bits, grid.scores, seed)
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, n))
    tasks = (delayed(_shares)(grid.bits[rows], grid.scores[rows], seed) for rows in drawn)
    resampled = np.stack(Parallel(n_jobs=workers, prefer="threads")(tasks)).mean(1)
    # A resample in which the score does not vary is uninformative.
    low, high = np.nanpercentile(resampled, (2.5, 97.5), axis=0)
    consensus = shares.mean(0)
    # A forest assigns a little importance to anything, and more so in a resample, which repeats runs.
    ends = np.stack([np.minimum(low, consensus), np.maximum(high, consensus)])
    importances = tuple(
        Importance(name, *map(float, (*shares[:, k], consensus[k], *ends[:, k])))
        for k, name in enumerate(grid.components)
    )
    return ComponentSensitivity(grid, _r2(grid, seed), importances)


def read(path: Path) -> tuple[list[ComponentCell], list[str]]:
    """Read the runs of our models at or under a path, with reasons why others are left out.

    Raises:
        ValueError: There is no results file.
    """
    cells, left_out = [], []
    for file in find(path):
        results = results_table(file)
        try:
            cells.append(_cell(results))
        except ValueError as error:
            left_out.append(f"{file}: {error}")
    return cells, left_out


def grids(cells: Iterable[ComponentCell], metrics: Sequence[str]) -> Iterator[ComponentGrid]:
    """Yield one grid per model, method, task and metric; runs without quantization are a corner of each.

    Args:
        cells: Runs.
        metrics: Names of metrics, as in lmms-eval's table; a task without the metric gives no grid.
    """
    cells = list(cells)
    methods = sorted({(cell.model, cell.method) for cell in cells if cell.method})
    for model, method in methods:
        own = [cell for cell in cells if cell.model == model and cell.method in (method, "")]
        tasks = sorted({task for cell in own for task, _ in cell.scores})
        for task in tasks:
            for metric in metrics:
                known = [cell for cell in own if (task, metric) in cell.scores]
                if any(cell.method for cell in known):
                    yield _grid(f"{method} {model}, {task} {metric}", known, (task, metric))


def draw(found: ComponentSensitivity, file: Path) -> None:
    """Draw importances with their intervals, beside the scores by the bits of each component."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Names are data: a dollar sign does not start a formula.
    with rc_context({"text.parse_math": False}):
        _figure(found, Figure).savefig(file, dpi=150)


def _figure(found: ComponentSensitivity, make: Any) -> Any:
    k = len(found.importances)
    figure = make(figsize=(3.2 * (k + 1), 3.4), layout="constrained")
    axes = figure.subplots(1, k + 1)
    names = [one.component for one in found.importances]
    consensus = np.array([one.consensus for one in found.importances])
    reach = np.array([[one.consensus - one.low, one.high - one.consensus] for one in found.importances]).T
    axes[0].bar(names, consensus, yerr=reach.clip(0), color=_COLOURS[:k], capsize=4)
    for offset, measure in zip((-0.2, 0.0, 0.2), MEASURES, strict=True):
        values = [getattr(one, measure) for one in found.importances]
        places = np.arange(k) + offset
        axes[0].scatter(places, values, marker=_MARKERS[measure], color="black", s=22, label=measure, zorder=3)
    axes[0].set(ylabel="importance (%)", ylim=(0, 105), title="consensus, with 95 % interval")
    axes[0].legend(fontsize=8)
    for column, (axis, name) in enumerate(zip(axes[1:], names, strict=True)):
        _draw_levels(axis, found.grid, column)
        axis.set(title=f"{name} bits", xlabel="bits per weight")
    axes[1].set_ylabel(found.grid.name.rpartition(" ")[2])
    figure.suptitle(f"{found.grid.name}; R² on unseen runs {found.r2:.2f}", fontsize=9)
    return figure


_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
_MARKERS = MappingProxyType({"forest": "o", "permutation": "s", "shap": "^"})


def _draw_levels(axis: Any, grid: ComponentGrid, column: int) -> None:
    """Draw every run as a dot, and the mean at each number of bits; bits are spaced evenly."""
    levels = np.unique(grid.bits[:, column])
    places = np.searchsorted(levels, grid.bits[:, column])
    # Runs with equal bits are placed side by side so that they do not overlap.
    spread = np.linspace(-0.2, 0.2, len(places))
    axis.scatter(places + spread, grid.scores, s=8, alpha=0.5, color=_COLOURS[column % len(_COLOURS)])
    means = [grid.scores[places == place].mean() for place in range(len(levels))]
    axis.plot(range(len(levels)), means, color="black", marker="_", markersize=14)
    axis.set_xticks(range(len(levels)), [str(level) for level in levels])


def _cell(results: Mapping[str, Any]) -> ComponentCell:
    config = results.get("config") or {}
    backend = backend_name(str(config.get("model", "")))
    if backend is None:
        raise ValueError(f"expected a model of this package (quant_...), got {config.get('model')!r}")
    arguments = ModelArguments.parse(arguments_of(config.get("model_args")), option_types(backend))
    if arguments.plan is not None:
        raise ValueError("a plan file's rules have no place in a grid of bits per component")
    if backend == "prequantized":
        raise ValueError("a checkpoint that is quantized already does not say its bits per component")
    plan = arguments.quant_plan(get(backend).default_bits)
    specs = {name: getattr(plan, name) for name in COMPONENTS}
    bits: dict[str, int] = {name: UNTOUCHED_BITS if spec is None else spec.bits for name, spec in specs.items()}
    settings = {name: getattr(arguments, name) for name in _OF_THE_METHOD} | dict(arguments.options)
    quantized = any(count != UNTOUCHED_BITS for count in bits.values())
    scores = {
        (task, key.partition(",")[0]): float(value)
        for task, values in results["results"].items()
        for key, value in values.items()
        if isinstance(value, int | float) and abs(value) < 2**63 and "stderr" not in key
    }
    return ComponentCell(
        _different({name: getattr(arguments, name) for name in _OF_THE_MODEL}) or "the default model",
        f"{backend} {_different(settings)}".strip() if quantized else "",
        bits,
        scores,
    )


_DEFAULTS = MappingProxyType({field.name: field.default for field in fields(ModelArguments)})


def _different(values: Mapping[str, Any]) -> str:
    """Return the settings that are not at their defaults, as text."""
    return ",".join(f"{name}={value}" for name, value in values.items() if value != _DEFAULTS.get(name))


def _grid(name: str, cells: Sequence[ComponentCell], score: tuple[str, str]) -> ComponentGrid:
    bits = np.array([[cell.bits[component] for component in COMPONENTS] for cell in cells])
    varying = [k for k in range(len(COMPONENTS)) if np.unique(bits[:, k]).size > 1]
    scores = np.array([cell.scores[score] for cell in cells])
    # A forest draws runs by position, which must not depend on names of files and folders.
    order = np.lexsort((scores, *bits.T[::-1]))
    bits, scores = bits[order], scores[order]
    return ComponentGrid(name, tuple(COMPONENTS[k] for k in varying), bits[:, varying], scores)


def _shares(bits: npt.NDArray[np.int64], scores: Floats, seed: int) -> Floats:
    """Return importances by the three measures in percent, shape (3, k); NaN where the score does not vary."""
    require("shap", extra="sensitivity", user="lmms-plugin sensitivity")
    import shap
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    forest = RandomForestRegressor(TREES, random_state=seed).fit(bits, scores)
    permuted = permutation_importance(forest, bits, scores, n_repeats=REPEATS, random_state=seed).importances_mean
    explained = shap.TreeExplainer(forest).shap_values(bits)
    measured = np.stack([forest.feature_importances_, permuted.clip(0.0), np.abs(explained).mean(0)])
    total = measured.sum(1, keepdims=True)
    shares: Floats = np.divide(100.0 * measured, total, out=np.full_like(measured, np.nan), where=total > 0)
    return shares


def _r2(grid: ComponentGrid, seed: int) -> float:
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.metrics import r2_score
    from sklearn.model_selection import KFold, cross_val_predict

    folds = KFold(min(FOLDS, len(grid.scores)), shuffle=True, random_state=seed)
    forest = RandomForestRegressor(TREES, random_state=seed)
    return float(r2_score(grid.scores, cross_val_predict(forest, grid.bits, grid.scores, cv=folds)))
