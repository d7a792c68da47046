"""Block-by-block calibrated quantization: statistics, solutions and memory of one block at a time.

All calibration samples are suspended before the same block (`lmms_plugin.quant_backends.calibration.suspension`). The
block moves to the device, every sample passes through it, its layers are solved and packed, and the next block follows.

Every layer is calibrated on its inputs in the unquantized model, unless the backend is `sequential`: then on the
outputs of the quantized blocks before its own. The authors of AWQ and MBQ do the former; it makes the result for a
layer independent of what else the plan quantizes. Those of GPTQ do the latter; each block then compensates for some of
the error of the ones before it. An `asymmetric` backend sees both: every sample has a twin that passes through the
dense block before it is quantized.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from loguru import logger
from torch import Tensor, nn
from tqdm import tqdm

from lmms_plugin.quant_backends.backend import CalibratedBackend, Solution
from lmms_plugin.quant_backends.calibration.capture import Gathering, Groups, Note, Sharing, chunks, observe, watching
from lmms_plugin.quant_backends.calibration.gradients import (
    measure_sensitivities,
    measure_token_weights,
    weigh_modalities,
)
from lmms_plugin.quant_backends.calibration.journal import Journal, Solved
from lmms_plugin.quant_backends.calibration.kept_statistics import KeptStatistics, WantedParts
from lmms_plugin.quant_backends.calibration.memory import Residence, Shelf, return_freed_memory, statistics_budget
from lmms_plugin.quant_backends.calibration.suspension import Suspended, SuspendedCall, doors, in_a_pass
from lmms_plugin.quant_backends.layers.modalities import reading
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.statistics import (
    TOKEN_ROLES,
    InputStatistics,
    Sensitivity,
    held_back_rows,
    is_image_role,
)
from lmms_plugin.quant_backends.structure.blocks import find_blocks
from lmms_plugin.quant_backends.structure.components import dense_linear, expect_finite
from lmms_plugin.quant_backends.structure.experts import expert_of

Measured = TypeVar("Measured")

UNCALIBRATED = "uncalibrated"
"""What follows a method's name where too few inputs reached a layer."""

FEWEST_ROWS = 32
"""Rows below which an expert is quantized as if it had none.

On made-up inputs of 512 columns AWQ at 4 bits did better than rounding on unseen rows from 4 rows on; GPTQ needs more
than 128, and with fewer the rows that it holds back say so.
"""

WHOLE_MODEL = ""
"""The name of the one block of a model that cannot be cut."""


class Route(NamedTuple):
    """Order in which a sample passes through the blocks of a model.

    Attributes:
        groups: Block -> its layers to quantize, grouped by shared input; blocks in the order of their turns.
        strays: Layers to quantize that were called outside their block.
        repeated: Blocks with such layers that were called more than once.
    """

    groups: dict[str, Groups]
    strays: tuple[str, ...]
    repeated: tuple[str, ...]


@dataclass
class SampleState:
    """Calibration sample on its way through the model.

    Attributes:
        index: Index of the sample.
        roles: Layer -> role of each position; empty where no role is needed.
        suspended: Suspended pass; None where the model is one block, which it enters with `inputs`.
        inputs: Keyword arguments of the model.
        weights: Layer -> weight of each position; empty where tokens are not weighed.
        is_image: (1, positions) which positions are image tokens; None where no role is needed.
        is_dense: Whether it passes through dense blocks alone, as the twin of another sample.
    """

    index: int
    roles: Mapping[str, Tensor]
    inputs: Mapping[str, Any]
    suspended: Suspended | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    is_image: Tensor | None = None
    is_dense: bool = False

    @property
    def call(self) -> SuspendedCall | None:
        """Return the call that the sample waits for; None when it has passed through."""
        return SuspendedCall(WHOLE_MODEL, (), dict(self.inputs)) if self.suspended is None else self.suspended.call


@dataclass
class SequentialQuantizer:
    """Quantizer of the layers of one model with a calibrated backend.

    Attributes:
        model: Unquantized model, in evaluation mode.
        backend: Backend that solves groups of layers.
        specs: Module name -> spec.
        replace: Callback that puts a solved layer into the model, given its name.
        of_sequence: Layers whose input rows are the positions of the sequence.
        residence: Offloading of blocks.
        shelf: Offloading of waiting activations.
        journal: Store of finished blocks; None keeps nothing.
        kept: Statistics and gradients that other runs of the same dense model left, and will take; None for none.
        budget: Number of bytes for the statistics gathered at one time; a single layer may exceed it. None for what is
            free.
    """

    model: nn.Module
    backend: CalibratedBackend
    specs: Mapping[str, QuantSpec]
    replace: Callable[[str, Solved], None]
    of_sequence: frozenset[str] = frozenset()
    residence: Residence = field(default_factory=Residence)
    shelf: Shelf = field(default_factory=Shelf)
    journal: Journal | None = None
    kept: KeptStatistics | None = None
    budget: int | None = None
    _sensitivities: Mapping[str, Sensitivity] = field(default_factory=dict, init=False, repr=False)
    _count: int = field(default=0, init=False, repr=False)
    _has_roles: bool = field(default=False, init=False, repr=False)
    _scarce: list[tuple[float, str, int, int]] = field(default_factory=list, init=False, repr=False)

    @torch.no_grad()
    def run(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Quantize every layer.

        Args:
            batches: Keyword arguments of one forward pass each, one calibration sample each.

        Raises:
            ValueError: There is no sample, or weights or inputs of a layer are not finite; the message names the layer.
            RuntimeError: A sample takes a different route through the model than the first one.
        """
        if not batches:
            raise ValueError(f"{self.backend.name} was given no calibration sample")
        self._count = len(batches)
        self._has_roles = any(TOKEN_ROLES in batch for batch in batches)
        samples = [self._sample(index, batch) for index, batch in enumerate(batches)]
        blocks = find_blocks(self.model, tuple(self.specs))
        self.residence.settle(self.model, blocks)
        route = self._explore(blocks, samples[0])
        if route.strays:
            blocks = _cut_out(blocks, route.strays)
            self.residence.settle(self.model, blocks)
            route = self._explore(blocks, samples[0])
        self._sensitivities = self._weigh_roles(batches)
        self._weigh_tokens(batches, samples)
        if route.repeated:
            logger.warning(
                f"{route.repeated[0]} runs more than once in one pass: {type(self.model).__name__} is calibrated as a "
                "whole, which takes the memory of all its blocks"
            )
            self.residence.enter_all()
            self._solve(WHOLE_MODEL, tuple(self.specs), [], self.model, samples)
        elif (known := self._kept_groups(blocks)) is not None:
            self._run_kept(blocks, known)
        else:
            self._make_room(route)
            twins = [self._twin(index, batch) for index, batch in enumerate(batches) if self.backend.asymmetric]
            self._run_blocks(blocks, route, samples + twins)
        self.residence.enter_all()
        self._warn_of_scarce_rows()
        if self.journal is not None:
            self.journal.remove()

    def _sample(self, index: int, batch: Mapping[str, Any]) -> SampleState:
        inputs = {key: value for key, value in batch.items() if key != TOKEN_ROLES}
        roles = dict.fromkeys(self.of_sequence, batch[TOKEN_ROLES]) if TOKEN_ROLES in batch else {}
        is_image = is_image_role(batch[TOKEN_ROLES]).unsqueeze(0) if TOKEN_ROLES in batch else None
        return SampleState(index, roles, inputs, is_image=is_image)

    def _twin(self, index: int, batch: Mapping[str, Any]) -> SampleState:
        twin = self._sample(self._count + index, batch)
        twin.is_dense = True
        return twin

    def _weigh_tokens(self, batches: Sequence[Mapping[str, Any]], samples: Sequence[SampleState]) -> None:
        """Give every sample the weights of its tokens, where the backend asks for some."""
        layers = [name for name in self.specs if name in self.of_sequence]
        source = self.backend.weighs_tokens_by
        if source is None or not layers:
            return
        found: Mapping[str, Sequence[Tensor]]
        if source == "modality":
            roles = [batch[TOKEN_ROLES] for batch in batches]
            found = weigh_modalities(self._measured_sensitivities(layers, batches), roles)
        else:
            found = self._measured_weights(layers, batches)
        for sample in samples:
            sample.weights = {layer: weights[sample.index] for layer, weights in found.items()}

    def _weigh_roles(self, batches: Sequence[Mapping[str, Any]]) -> Mapping[str, Sensitivity]:
        layers = [name for name in self.specs if name in self.of_sequence]
        if not self.backend.by_role or not layers:
            return {}
        known = None if self.journal is None else self.journal.noted("sensitivities")
        if known is not None:
            return {layer: Sensitivity(*values) for layer, values in known.items()}
        found = self._measured_sensitivities(layers, batches)
        if self.journal is not None:
            self.journal.note("sensitivities", found)
        return found

    def _measured_sensitivities(
        self, layers: Sequence[str], batches: Sequence[Mapping[str, Any]]
    ) -> Mapping[str, Sensitivity]:
        return self._measured(
            KeptStatistics.sensitivities,
            lambda: measure_sensitivities(self.model, layers, batches, self.residence),
            KeptStatistics.keep_sensitivities,
        )

    def _measured_weights(
        self, layers: Sequence[str], batches: Sequence[Mapping[str, Any]]
    ) -> Mapping[str, Sequence[Tensor]]:
        return self._measured(
            KeptStatistics.token_weights,
            lambda: measure_token_weights(self.model, layers, batches, self.residence),
            KeptStatistics.keep_token_weights,
        )

    def _measured(
        self,
        known: Callable[[KeptStatistics], Measured | None],
        measure: Callable[[], Measured],
        keep: Callable[[KeptStatistics, Measured], None],
    ) -> Measured:
        """Return what gradients tell as another run kept it, else measure it and keep it."""
        with self._alone():
            found = None if self.kept is None else known(self.kept)
            if found is None:
                found = measure()
                if self.kept is not None:
                    keep(self.kept, found)
        return found

    def _alone(self) -> AbstractContextManager[None]:
        """Have other runs wait for gradients that this one measures: to measure them takes as long as to wait."""
        return nullcontext() if self.kept is None else self.kept.calibration.alone("gradients")

    @property
    def _shared(self) -> KeptStatistics | None:
        """Return where statistics of the dense model are kept; None where those of quantized blocks are needed."""
        return None if self.backend.sequential or self.backend.asymmetric else self.kept

    @property
    def _wanted(self) -> WantedParts:
        return WantedParts.by(self.backend, roles=self._has_roles)

    def _kept_groups(self, blocks: Mapping[str, tuple[str, ...]]) -> dict[str, Groups] | None:
        """Return the groups of layers of all blocks; None unless the statistics of all of them are kept."""
        if self._shared is None:
            return None
        found: dict[str, Groups] = {}
        for name in (name for name, layers in blocks.items() if layers):
            groups = self._shared.groups(name, self._wanted)
            if groups is None:
                return None
            found[name] = groups
        return found

    def _make_room(self, route: Route) -> None:
        """Decide whether the statistics of all layers can be kept for other runs."""
        if self._shared is not None:
            leaders = [group[0] for groups in route.groups.values() for group in groups]
            columns = {name: dense_linear(self.model, name).in_features for name in leaders}
            kept = self._wanted.kept
            sizes = {name: InputStatistics.memory(each, **kept) for name, each in columns.items()}
            self._shared.has_room(sizes, self._wanted)

    def _explore(self, blocks: Mapping[str, tuple[str, ...]], sample: SampleState) -> Route:
        """Trace the route of one sample through the unquantized model."""
        groups: dict[str, Groups] = {}
        strays: list[str] = []
        repeated: list[str] = []

        def note_stray(name: str, _: Tensor) -> None:
            if in_a_pass() and name not in blocks:
                strays.append(name)

        with self._passes(blocks, [sample]) as forwards, watching(self.model, self.specs, note_stray):
            while (call := sample.call) is not None:
                name = call.name
                if name in groups and blocks[name]:
                    repeated.append(name)
                del call
                self.residence.enter(name)
                for layer in blocks[name]:
                    expect_finite(layer, dense_linear(self.model, layer).weight)
                sharing = Sharing()
                self._through(sample, blocks[name], forwards[name], sharing.note)
                groups[name] = sharing.groups
                del sharing
                self.residence.leave(name)
        return Route(groups, tuple(dict.fromkeys(strays)), tuple(repeated))

    @contextmanager
    def _passes(
        self, blocks: Mapping[str, tuple[str, ...]], samples: Sequence[SampleState]
    ) -> Iterator[dict[str, Callable[..., Any]]]:
        """Start the passes of some samples, and close them in any case."""
        with doors({name: self.model.get_submodule(name) for name in blocks}) as forwards:
            try:
                for sample in samples:
                    sample.suspended = Suspended(partial(self.model, **sample.inputs))
                    self._onward(sample, None)
                yield forwards
            finally:
                for sample in samples:
                    if sample.suspended is not None:
                        sample.suspended.close()
                    sample.suspended = None

    def _through(
        self, sample: SampleState, names: Sequence[str], forward: Callable[..., Any], note: Note, *, onward: bool = True
    ) -> None:
        """Run a sample through the block that it waits for, and on to the next one unless it is needed here again."""
        self.shelf.take(sample.index)
        call = sample.call
        if call is None:
            raise RuntimeError(f"calibration sample {sample.index} waits for no block")
        # Quantized blocks, through which sequential methods pass samples, may round inputs by modality.
        with reading(sample.is_image):
            output = observe(self.model, names, forward, call, note)
        if onward:
            del call
            self._onward(sample, output)
        else:
            self.shelf.put(sample.index, call[1:])

    def _onward(self, sample: SampleState, output: Any) -> None:
        if sample.suspended is not None:
            call = sample.suspended.advance(output)
            if call is not None:
                self.shelf.put(sample.index, call[1:])

    def _run_blocks(self, blocks: Mapping[str, tuple[str, ...]], route: Route, samples: Sequence[SampleState]) -> None:
        # A block that the first sample never reached goes before all others that wait, whose turns come later.
        turn = {name: index for index, name in enumerate(route.groups)}
        unsolved = {name for name, layers in blocks.items() if layers}
        solved: set[str] = set()
        progress = tqdm(total=len(unsolved), desc="Quantizing blocks", leave=False, disable=None)
        with self._passes(blocks, samples) as forwards, progress:
            while unsolved and (waiting := {sample.call.name for sample in samples if sample.call is not None}):
                name = min(waiting, key=lambda name: turn.get(name, -1))
                if name in solved:
                    raise RuntimeError(f"a calibration sample came to {name} after it was quantized")
                present = [sample for sample in samples if sample.call is not None and sample.call.name == name]
                self.residence.enter(name)
                if blocks[name]:
                    self._solve(name, blocks[name], route.groups.get(name, []), forwards[name], present)
                    unsolved.discard(name)
                    solved.add(name)
                    progress.update()
                else:
                    self._pass_on(forwards[name], present)
                self.residence.stay(name)
                return_freed_memory()
        for name in sorted(unsolved):
            self.residence.enter(name)
            if self._shared is not None:
                self._shared.keep_groups(name, ())
            self._put({layer: self._without_inputs(layer) for layer in blocks[name]})
            self.residence.stay(name)

    def _run_kept(self, blocks: Mapping[str, tuple[str, ...]], known: Mapping[str, Groups]) -> None:
        """Quantize every block by the statistics that are kept: no sample passes through the model."""
        for name, groups in tqdm(known.items(), desc="Quantizing blocks", leave=False, disable=None):
            self.residence.enter(name)
            solved = None if self.journal is None else self.journal.load(name, self.model)
            if solved is None:
                solved = self._with_all(blocks[name], self._solutions_of_kept(groups))
                if self.journal is not None:
                    self.journal.save(name, solved)
            self._put(solved)
            self.residence.stay(name)
            return_freed_memory()

    def _solve(
        self,
        block: str,
        layers: tuple[str, ...],
        groups: Groups,
        forward: Callable[..., Any],
        samples: Sequence[SampleState],
    ) -> None:
        """Quantize the layers of one block and move the samples on."""
        solved = None if self.journal is None else self.journal.load(block, self.model)
        if solved is None:
            known = None if self._shared is None else self._shared.groups(block, self._wanted)
            if known is None:
                groups = self._completed(groups, layers, forward, samples)
                found = self._solutions(groups, forward, samples)
                if self._shared is not None:
                    self._shared.keep_groups(block, groups)
            else:
                found = self._solutions_of_kept(known)
                self._pass_on(forward, samples)
            solved = self._with_all(layers, found)
            if self.journal is not None:
                self.journal.save(block, solved)
        elif not self.backend.sequential:
            self._pass_on(forward, samples)
        twins = [sample for sample in samples if sample.is_dense]
        self._pass_on(forward, twins)
        self._put(solved)
        if self.backend.sequential:
            self._pass_on(forward, [sample for sample in samples if not sample.is_dense])

    def _completed(
        self, groups: Groups, layers: tuple[str, ...], forward: Callable[..., Any], samples: Sequence[SampleState]
    ) -> Groups:
        """Add the groups of layers that the first sample does not call, such as rarely used experts."""
        groups = list(groups)
        missing = [name for name in layers if not any(name in group for group in groups)]
        for sample in samples:
            if not missing:
                break
            sharing = Sharing()
            self._through(sample, missing, forward, sharing.note, onward=False)
            groups += sharing.groups
            missing = [name for name in missing if not any(name in group for group in sharing.groups)]
        return groups

    def _solutions(
        self, groups: Groups, forward: Callable[..., Any], samples: Sequence[SampleState]
    ) -> dict[str, Solved]:
        """Gather statistics, as many at a time as fit the budget, and solve."""
        solved: dict[str, Solved] = {}
        if not groups:
            return solved
        device = dense_linear(self.model, groups[0][0]).weight.device
        budget = statistics_budget(device) if self.budget is None else self.budget
        weighted, asymmetric = self.backend.weighs_tokens_by is not None, self.backend.asymmetric
        kept = {"by_role": self.backend.by_role, "holds_back": self.backend.holds_back, "weighted": weighted}
        lots = list(chunks(self.model, groups, budget, **kept, asymmetric=asymmetric))
        twins = {sample.index - self._count: sample for sample in samples if sample.is_dense}
        for number, lot in enumerate(lots, start=1):
            gathering = Gathering(self.model, lot, **kept, keeps_rows=self.backend.keeps_rows)
            # With the last statistics gathered, samples move on at once: everything between here and the next block
            # stays unchanged.
            onward = number == len(lots) and not self.backend.sequential
            for sample in samples:
                if not sample.is_dense:
                    self._gather(gathering, sample, twins.get(sample.index), forward, onward=onward)
            while gathering.statistics:
                statistics = gathering.statistics.pop(0)
                if self._shared is not None:
                    self._shared.keep(statistics, self._wanted)
                solved |= self._solved_by(statistics)
        return solved

    def _solutions_of_kept(self, groups: Groups) -> dict[str, Solved]:
        """Solve by kept statistics, of one group at a time."""
        solved: dict[str, Solved] = {}
        assert self._shared is not None
        for group in groups:
            device = dense_linear(self.model, group[0]).weight.device
            solved |= self._solved_by(self._shared.load(group, self._wanted, device))
        return solved

    def _solved_by(self, statistics: InputStatistics) -> dict[str, Solved]:
        """Solve layers that share their inputs; `_with_all` handles those that are missing in the result."""
        if statistics.rows < FEWEST_ROWS and expert_of(self.model, statistics.names[0]) is not None:
            return {}
        self._note_rows(statistics)
        statistics.sensitivity = self._sensitivities.get(statistics.names[0])
        dense = [dense_linear(self.model, name) for name in statistics.names]
        found = self._solved_by_format(dense, statistics)
        return {
            name: Solved(layer, statistics.output_error(linear.weight, layer), method, plain_rows)
            for name, linear, (layer, method, plain_rows) in zip(statistics.names, dense, found, strict=True)
        }

    def _with_all(self, layers: Sequence[str], solved: dict[str, Solved]) -> dict[str, Solved]:
        """Return the solutions of a block with those of its layers that too few inputs reached."""
        return solved | {name: self._without_inputs(name) for name in layers if name not in solved}

    def _solved_by_format(self, dense: Sequence[nn.Linear], statistics: InputStatistics) -> list[Solution]:
        """Return the solutions of layers that share their inputs, those of each format solved together."""
        backends = [self.backend.for_spec(self.specs[name]) for name in statistics.names]
        found: dict[int, Solution] = {}
        for backend in dict.fromkeys(backends):
            places = [place for place, own in enumerate(backends) if own == backend]
            names = tuple(statistics.names[place] for place in places)
            # The sums are those of the shared inputs whatever the layers.
            part = dataclasses.replace(statistics, names=names)
            solutions = backend.solve([dense[place] for place in places], [self.specs[name] for name in names], part)
            found |= dict(zip(places, solutions, strict=True))
        return [found[place] for place in range(len(dense))]

    def _gather(
        self,
        gathering: Gathering,
        sample: SampleState,
        twin: SampleState | None,
        forward: Callable[..., Any],
        *,
        onward: bool,
    ) -> None:
        """Add a sample's inputs to the statistics, beside those of its twin in the unquantized model."""
        unquantized: dict[str, list[Tensor]] = {}
        if twin is not None:
            self._through(twin, gathering.names, forward, gathering.noting_dense(unquantized), onward=False)
        rows = held_back_rows(sample.index, self._count)
        note = gathering.noting(sample.roles, rows, weights=sample.weights, dense=unquantized)
        self._through(sample, gathering.names, forward, note, onward=onward)
        gathering.expect_finite(sample.index)

    def _note_rows(self, statistics: InputStatistics) -> None:
        columns = len(statistics.gram)
        if statistics.rows < self.backend.rows_per_column * columns:
            self._scarce.append((statistics.rows / columns, statistics.names[0], statistics.rows, columns))

    def _warn_of_scarce_rows(self) -> None:
        if not self._scarce:
            return
        ratio, name, rows, columns = min(self._scarce)
        wanted = self.backend.rows_per_column
        enough = math.ceil(self._count * wanted / max(ratio, 1e-9))
        logger.warning(
            f"{self.backend.name} wants {wanted} calibration inputs for each column of a layer; {len(self._scarce)} "
            f"groups of layers have fewer and may come out little better than rounded, above all {name} ({rows} for "
            f"{columns} columns): {self._count} samples were given, calibration_samples={enough} would do"
        )

    def _without_inputs(self, name: str) -> Solved:
        dense = dense_linear(self.model, name)
        expect_finite(name, dense.weight)
        spec = self.specs[name]
        layer = self.backend.for_spec(spec).without_inputs(dense, spec)
        return Solved(layer, None, f"{self.backend.name}, {UNCALIBRATED}")

    def _pass_on(self, forward: Callable[..., Any], samples: Sequence[SampleState]) -> None:
        for sample in samples:
            self._through(sample, (), forward, _ignore)

    def _put(self, solved: Mapping[str, Solved]) -> None:
        for name, entry in solved.items():
            self.replace(name, entry)


def _ignore(name: str, x: Tensor) -> None:
    """Ignore an input."""


def _cut_out(blocks: Mapping[str, tuple[str, ...]], strays: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Make each layer of a block whose layers are called outside it a block of its own."""
    cut: dict[str, tuple[str, ...]] = {}
    for block, layers in blocks.items():
        if set(layers).isdisjoint(strays):
            cut[block] = layers
        else:
            cut |= {layer: (layer,) for layer in layers}
    return cut
