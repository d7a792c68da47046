"""What is made of a model's hidden states while it answers: features to keep, a learned confidence, or both."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from loguru import logger
from transformers.utils import cached_file

from lmms_plugin.arguments import ModelArguments
from lmms_plugin.confidence.estimators import LEARNED
from lmms_plugin.protocol.prompts import Prompt, RequestError
from lmms_plugin.quant_backends.backend import Backend, CalibratedBackend, WholeModelBackend
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.selector.features import LAST_LAYER, FeatureOrigin, Features, FeatureWriter, key
from lmms_plugin.selector.network import Selector
from lmms_plugin.utils import hashing
from lmms_plugin.vlm.contracts.engine import Generated
from lmms_plugin.vlm.contracts.requests import Job
from lmms_plugin.vlm.generation.decoding import Decoder
from lmms_plugin.vlm.generation.pooling import Pooled, Pooling


@dataclass(frozen=True)
class Wanted:
    """What `--model_args` asks of hidden states, checked before a model is loaded.

    Attributes:
        arguments: of the model.
        origin: of the features, but for the model's fingerprint.
        selector: the learned confidence; None for none.
    """

    arguments: ModelArguments
    origin: FeatureOrigin
    selector: Selector | None

    @classmethod
    def read(cls, arguments: ModelArguments, backend: Backend) -> Wanted | None:
        """Return what is asked for; None if nothing is.

        Raises:
            FileNotFoundError: there is no such file of a selector.
            ValueError: it is damaged, or was trained for another quantization or layer.
        """
        if not (arguments.features or arguments.selector):
            return None
        selector = Selector.load(Path(arguments.selector).expanduser()) if arguments.selector else None
        layer = arguments.feature_layer
        if layer is None:
            layer = selector.record.origin.layer if selector else LAST_LAYER
        model = selector.record.origin.model if selector else ""
        wanted = cls(arguments, FeatureOrigin(model, quantization(arguments, backend), layer), selector)
        wanted._expect_trained_for(wanted.origin)
        return wanted

    def observer(self, path: str, decoder: Decoder, rank: int) -> Observer:
        """Set up for the loaded model.

        Args:
            path: hub id or folder that it was loaded from.
            decoder: the model.
            rank: of this process; only the first speaks.

        Raises:
            ValueError: the selector was trained for another model, the folder of features belongs to another one, or
                the model does not name its image token.
        """
        origin = FeatureOrigin(hashing.of_weights(_folder(path)), self.origin.quantization, self.origin.layer)
        foreign = self._expect_trained_for(origin)
        if foreign and rank == 0:
            logger.warning(
                "The selector was trained for something else ({}): its confidence is {}", foreign, LEARNED[1]
            )
        pooling = Pooling.of(decoder.model, decoder.special, origin.layer)
        writer = None
        if self.arguments.features:
            writer = FeatureWriter(Path(self.arguments.features).expanduser(), origin)
        return Observer(pooling, writer, self.selector, LEARNED[bool(foreign)])

    def _expect_trained_for(self, origin: FeatureOrigin) -> str:
        """Return how the selector's origin differs, where that is allowed; "" if it does not."""
        differences = self.selector.record.origin.differences(origin) if self.selector else []
        layers = [difference for difference in differences if difference.startswith("feature layer")]
        if layers or (differences and not self.arguments.selector_transfer):
            advice = "" if layers else "; selector_transfer=True takes it all the same, and marks the results"
            raise ValueError(
                f"selector: {self.arguments.selector} was trained for another model (its own, then this one): "
                f"{'; '.join(layers or differences)}{advice}"
            )
        return "; ".join(differences)


def quantization(arguments: ModelArguments, backend: Backend) -> dict[str, object]:
    """Return what a quantized model depends on besides the checkpoint, as JSON-ready values."""
    calibration = None
    if isinstance(backend, CalibratedBackend | WholeModelBackend):
        samples = backend.default_samples
        given = arguments.calibration_spec(samples)
        calibration = asdict(given or CalibrationSpec("self", samples=samples, seed=arguments.seed))
    depends_on = {
        "method": backend.name,
        "options": asdict(backend),
        "plan": arguments.quant_plan(backend.default_bits).to_dict(),
        "calibration": calibration,
    }
    # As they come back from a file.
    read: dict[str, object] = json.loads(json.dumps(depends_on))
    return read


def _folder(path: str) -> Path:
    folder = Path(path)
    return folder if folder.is_dir() else Path(cached_file(path, "config.json")).parent


@dataclass(frozen=True)
class Observer:
    """Turns pooled hidden states of answered prompts into features on disk and a confidence.

    Attributes:
        pooling: of the model.
        writer: where features go; None if they are not kept.
        selector: the learned confidence; None for none.
        name: under which its confidence is known.
    """

    pooling: Pooling
    writer: FeatureWriter | None
    selector: Selector | None
    name: str

    def expect_unseen(self, jobs: Iterable[Job]) -> None:
        """Check that no question is about an image that the selector was trained on.

        Raises:
            ValueError: one is; says how many.
        """
        if self.selector is None:
            return
        images = {str(job.request.image[-1]) for job in jobs if isinstance(job.request.image, tuple)}
        if seen := self.selector.seen_among(sorted(images)):
            raise ValueError(
                f"selector: it was trained on {len(seen)} of the {len(images)} images asked about, e.g. {seen[0]}; "
                "a confidence there would look better than it is"
            )

    def observe(
        self, pooled: Pooled, prompts: Sequence[Prompt], jobs: Sequence[Job], answers: Sequence[Generated]
    ) -> list[Mapping[str, float]]:
        """Keep the features of a batch's answers, and return the learned confidence of each by its name.

        Prompts that ask for no confidence are passed over; of an answer without tokens, whose reasoning did not end,
        there is no probability to keep and no confidence.

        Raises:
            RequestError: a prompt shows no image, or its text is not behind it.
        """
        asked = [row for row, prompt in enumerate(prompts) if prompt.wants_confidence]
        confidences: list[Mapping[str, float]] = [{} for _ in prompts]
        if not asked:
            return confidences
        features = _features(pooled, answers).rows(asked)
        for row, is_whole in zip(asked, torch.isfinite(features.image[:, 0] + features.question[:, 0]), strict=True):
            if not is_whole:
                raise RequestError(f"{prompts[row].name}: features need an image and text behind it")
        if self.writer is not None:
            requests = [jobs[row].request for row in asked]
            self.writer.add([key(*request.place, request.repeat) for request in requests], features)
        if self.selector is not None:
            for row, value in zip(asked, self.selector.confidence(features).tolist(), strict=True):
                confidences[row] = {self.name: value} if answers[row].tokens else {}
        return confidences

    def finish(self) -> None:
        """Bring all features onto the disk."""
        if self.writer is not None:
            self.writer.flush()


def _features(pooled: Pooled, answers: Sequence[Generated]) -> Features:
    sums = ((answer.tokens, math.fsum(token.logprob for token in answer.tokens)) for answer in answers)
    logprobs = [total if tokens else math.nan for tokens, total in sums]
    image, question, first = (part.cpu() for part in pooled)
    return Features(image, question, first, torch.tensor(logprobs, dtype=torch.float32))
