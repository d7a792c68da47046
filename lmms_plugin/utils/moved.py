"""Module names before 0.2.0: an import by an old name fails with a message that gives the new one.

Old names do not work as aliases: code, YAML and files that use them would otherwise stay outdated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType
from typing import NoReturn

_PACKAGE = "lmms_plugin."
_SINCE = "since lmms-plugin 0.2.0"


class MovedError(Exception):
    """An old name was used; the message gives the new one."""


class MovedModuleError(MovedError, ModuleNotFoundError):
    """The old name is that of a module."""


class MovedAttributeError(MovedError, AttributeError):
    """The old name is that of something in a module that is a package now."""


def refusal(package: str) -> Callable[[str], NoReturn]:
    """Return a module's `__getattr__` for a package that has the name of a module before 0.2.0.

    Args:
        package: Dotted name of the package.
    """
    module = _PACKAGE + moved()[package.removeprefix(_PACKAGE)]

    def refuse(name: str) -> NoReturn:
        told = f"module {package!r} has no attribute {name!r}"
        if name.startswith("_"):
            raise AttributeError(told, name=name)
        raise MovedAttributeError(f"{told}; what was in it is in {module} {_SINCE}", name=name)

    return refuse


class _Finder(MetaPathFinder):
    """Last finder in the path, for modules that no other finder finds."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Refuse an old name.

        Raises:
            ModuleNotFoundError: The name is from before 0.2.0; names the new one.
        """
        if fullname.startswith(_PACKAGE) and (new := moved().get(fullname.removeprefix(_PACKAGE))):
            raise MovedModuleError(f"{fullname} is {_PACKAGE}{new} {_SINCE}", name=fullname)
        return None


def tell() -> None:
    """Make imports by old names fail with a message that gives the new ones."""
    if not any(isinstance(one, _Finder) for one in sys.meta_path):
        sys.meta_path.append(_Finder())


@cache
def moved() -> Mapping[str, str]:
    """Return old → new names of modules below `lmms_plugin`."""
    pairs = (line.split() for line in _MOVED.splitlines())
    return MappingProxyType({old: new for old, new in pairs})


_MOVED = """\
agreeing vlm.generation.self_check
agreement confidence.agreement
boxes protocol.boxes
chance utils.chance
chat vlm.generation.processor
chat_templates protocol.chat_templates
cli cli.main
comparison analysis.comparison
confidence confidence.estimators
dealing vlm.running.sharding
decoding vlm.generation.decoding
demo.mismatches demo.scene_mismatches
demo.progress demo.pace
dialects protocol.dialects
digits confidence.digits
doctor.copies doctor.local_datasets
doctor.extras doctor.optional_libraries
doctor.hub doctor.hub_access
estimators analysis.estimator_ranking
export.board leaderboard.board
export.commands cli.export
export.datasets export.true_documents
export.documents export.asked_documents
export.records export.record_types
export.submission leaderboard.submission
export.verification leaderboard.verification
features selector.features
fingerprint utils.hashing
inspection quantize
installed utils.processes.installed
learning selector.training
located utils.reading.located
matching vlm.retrieval
metrics._ties metrics.bins
metrics.weighted metrics.sums
model vlm.wrapper
number_tokens vlm.generation.number_tokens
observing vlm.generation.observer
packing vlm.running.batching
pipeline vlm.running.pipeline
plain_prompts protocol.plain_prompts
pooling vlm.generation.pooling
prefix vlm.generation.prefix
prompts protocol.prompts
quant_backends.activations quant_backends.statistics
quant_backends.arrival quant_backends.checkpoints.arrival
quant_backends.autoround quant_backends.methods.autoround
quant_backends.awq quant_backends.methods.awq
quant_backends.bitsandbytes quant_backends.methods.bitsandbytes
quant_backends.blocks quant_backends.structure.blocks
quant_backends.blockwise quant_backends.calibration.sequential
quant_backends.calibration quant_backends.calibration.sources
quant_backends.codes quant_backends.layers.codes
quant_backends.components quant_backends.structure.components
quant_backends.expert_use quant_backends.plans.expert_use
quant_backends.experts quant_backends.structure.experts
quant_backends.folding quant_backends.checkpoints.folding
quant_backends.gathering quant_backends.calibration.capture
quant_backends.gptq quant_backends.methods.gptq
quant_backends.held_out quant_backends.calibration.held_out
quant_backends.hf_quantizer quant_backends.checkpoints.hf_quantizer
quant_backends.hqq quant_backends.methods.hqq
quant_backends.inputs quant_backends.calibration.inputs
quant_backends.int8_inputs quant_backends.layers.int8_inputs
quant_backends.journal quant_backends.calibration.journal
quant_backends.kernels quant_backends.layers.kernels
quant_backends.library quant_backends.layers.library
quant_backends.linear quant_backends.layers.linear
quant_backends.loading quant_backends.checkpoints.loading
quant_backends.mbq quant_backends.methods.mbq
quant_backends.memory quant_backends.calibration.memory
quant_backends.model_class quant_backends.structure.model_class
quant_backends.native_kernels quant_backends.layers.native_kernels
quant_backends.none quant_backends.methods.none
quant_backends.packing quant_backends.layers.packing
quant_backends.photographs quant_backends.calibration.photographs
quant_backends.plan quant_backends.plans.plan
quant_backends.prequantized quant_backends.checkpoints.external
quant_backends.probe quant_backends.checkpoints.probe
quant_backends.ptqtp quant_backends.methods.ptqtp
quant_backends.quanto quant_backends.methods.quanto
quant_backends.report quant_backends.plans.quant_report
quant_backends.role_plan quant_backends.plans.role_plan
quant_backends.roles quant_backends.structure.roles
quant_backends.routing quant_backends.calibration.routing
quant_backends.rtn quant_backends.methods.rtn
quant_backends.saved quant_backends.checkpoints.own_format
quant_backends.saving quant_backends.checkpoints.saving
quant_backends.scale_search quant_backends.methods.scale_search
quant_backends.sensitivity quant_backends.calibration.gradients
quant_backends.specs quant_backends.plans.specs
quant_backends.stored_formats quant_backends.checkpoints.compressors
quant_backends.suspension quant_backends.calibration.suspension
quant_backends.synthetic quant_backends.calibration.synthetic
quant_backends.torchao quant_backends.methods.torchao
quant_backends.trits quant_backends.layers.ternary
quant_backends.wide_products quant_backends.layers.wide_products
quiet utils.processes.quiet
readable utils.reading.readable
reasoning protocol.reasoning
reliability analysis.measure
report.axes analysis.axes
report.changes report.figures.changes
report.columns analysis.columns
report.commands cli.report
report.confidence report.figures.reliability
report.contents report.numbers.contents
report.drawing report.figures.drawing
report.figures report.figures.all_figures
report.inlined report.figures.inlined
report.measuring analysis.groups
report.palette report.figures.palette
report.reading report.numbers.results_folder
report.resampling metrics.bootstrap
report.summary report.numbers.summary
report.svg report.figures.svg
report.tables report.numbers.tables
report.tradeoffs report.figures.tradeoffs
report.under_shift report.figures.under_shift
requests vlm.contracts.requests
response protocol.response
results analysis.logs
running vlm.running.runner
scheduling vlm.running.scheduling
second_turn vlm.second_turn
selector selector.network
sensitivity analysis.component_importance
settings vlm.contracts.settings
strength selector.shift_strength
study.accounts analysis.study_files
study.against_reference study.verdicts.against_reference
study.analysis study.verdicts.contrasts
study.arms study.verdicts.arms
study.asked study.file.asked
study.attempt study.run.attempt
study.commands cli.study
study.completeness study.verdicts.completeness
study.component_bits study.verdicts.component_bits
study.conclusions study.verdicts.judging
study.contents study.file.fingerprints
study.cost study.run.cost
study.durable utils.files
study.engine study.run.execution
study.expansion study.file.expansion
study.folder study.store.folder
study.grid study.file.grid
study.guard utils.processes.guard
study.identity study.file.identity
study.local study.run.local
study.on_ray study.run.on_ray
study.planning study.run.planning
study.progress study.run.progress
study.published analysis.reproduction.published
study.reading study.file.reading
study.recording study.run.recording
study.storage study.store.storage
study.tasks study.file.tasks
study.verdict study.verdicts.verdict
study.weights study.run.weights
tasks.annotations tasks.sources.annotations
tasks.captions tasks.captions.captioning
tasks.catalogue tasks.registry.catalogue
tasks.cells tasks.registry.cells
tasks.channel_noise shifts.image.noise
tasks.conventions tasks.sources.conventions
tasks.copies utils.copies
tasks.documents tasks.sources.documents
tasks.expressions tasks.grounding.expressions
tasks.grounding tasks.grounding.comprehension
tasks.grounding_metrics tasks.grounding.aggregations
tasks.images tasks.sources.row_images
tasks.lexicon shifts.language.lexicon
tasks.mentions tasks.grounding.mentions
tasks.mismatches shifts.language.mismatches
tasks.natural tasks.grounding.natural
tasks.natural_scores tasks.grounding.natural_scores
tasks.negation shifts.language.negation
tasks.official_vqa tasks.sources.official_vqa
tasks.opencv shifts.image.opencv
tasks.origins tasks.sources.origins
tasks.phrasing shifts.language.phrasing
tasks.pixel_motion shifts.image.motion
tasks.published tasks.sources.published_files
tasks.questions tasks.vqa.questions
tasks.recent tasks.sources.recent
tasks.refcocoplus tasks.grounding.refcocoplus
tasks.referring tasks.grounding.referring
tasks.rejection tasks.grounding.rejection
tasks.retrieval tasks.retrieval.matching
tasks.reviewed tasks.grounding.reviewed
tasks.reworded tasks.grounding.reworded
tasks.scored_by tasks.grounding.scored_by
tasks.severities shifts.severities
tasks.shifts shifts.image.corruptions
tasks.text_shifts shifts.language.rewording
tasks.textures shifts.image.textures
tasks.vqa tasks.vqa.answering
tasks.vqa_accuracy tasks.vqa.accuracy
tasks.vqa_metrics tasks.vqa.aggregations
tasks.vqa_sources tasks.vqa.datasets
tasks.writing tasks.sources.writing
terminal cli.terminal
token_texts vlm.generation.token_texts
variables utils.variables
verbalised protocol.verbalised
"""
