"""Selector network: from a model's hidden states at its answer to the probability that the answer is right.

The Selector of arXiv 2602.13289, after Whitehead et al. (arXiv 2204.13631) and, for generating models, Dancette et al.
(arXiv 2306.08751): max-pooled hidden states over the image and over the question, the state from which the first token
of the answer is predicted, and the answer's log-probability go through two hidden layers. The target is the score of
the answer in [0, 1] (right or wrong, or a soft accuracy), the loss its cross-entropy; the model itself stays unchanged.
Here inputs are standardised, training starts from Platt scaling of MaxProb (the answer's probability alone; the network
adds to that, initially nothing), and it stops when the loss on held-out images has not fallen for a while (theirs: the
area under the risk–coverage curve, which does not see miscalibration).
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from lmms_plugin.selector.features import FeatureOrigin, Features
from lmms_plugin.utils import files
from lmms_plugin.utils.chance import uniform
from lmms_plugin.utils.reading.readable import readable

Floats = npt.NDArray[np.float64]
METADATA = "selector"
NEWTON_STEPS = 25


@dataclass(frozen=True)
class SelectorSettings:
    """Training settings of a selector.

    Attributes:
        hidden: Number of units of each of the two hidden layers.
        dropout: Dropout rate of the hidden units.
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        batch_size: Number of answers per step.
        epochs: Largest number of epochs.
        patience: Number of epochs without a lower held-out loss after which training stops.
        held_out: Share of the images used for early stopping, in (0, 1).
        seed: Seed of weights, dropout, order, and choice of held-out images.
    """

    hidden: int = 768
    dropout: float = 0.1
    lr: float = 1e-4
    weight_decay: float = 0.01
    batch_size: int = 64
    epochs: int = 128
    patience: int = 10
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "batch_size", "epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("dropout", "held_out"):
            if not (0.0 if name == "dropout" else 1e-9) <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be a share below 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")


class Epoch(NamedTuple):
    """Mean cross-entropies after one epoch: of the training answers (with dropout) and of the held-out ones."""

    training: float
    held_out: float


@dataclass(frozen=True)
class TrainingRecord:
    """Training record of a selector, as written into its file.

    Attributes:
        origin: Model, quantization and layer for which it is valid.
        target: Quantity that it predicts.
        data: Source of its answers: tasks, run, counts, hash of the documents.
        settings: Training settings.
        images: Numbers of training and held-out images.
        epochs: Losses of every epoch; the first are those of the answer's probability alone, before training.
        best: Index of the epoch that is kept, from 0.
        versions: Versions of this package and of torch.
    """

    origin: FeatureOrigin
    target: str
    data: Mapping[str, Any]
    settings: SelectorSettings
    images: tuple[int, int]
    epochs: tuple[Epoch, ...]
    best: int
    versions: Mapping[str, str]


class Network(nn.Module):
    """Network from standardised features to a logit: Platt scaling of the answer's probability plus a correction."""

    mean: Tensor
    scale: Tensor

    def __init__(self, inputs: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        adding = nn.Linear(hidden, 1)
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.Dropout(dropout),
            nn.ReLU(),
            adding,
        )
        self.start = nn.Linear(1, 1)
        nn.init.zeros_(adding.weight)
        nn.init.zeros_(adding.bias)

    def standardise(self, matrix: Tensor) -> None:
        """Store mean and spread of training inputs (n, inputs); constant inputs are only centred."""
        self.mean.copy_(matrix.mean(0))
        spread = matrix.std(0, correction=0)
        self.scale.copy_(torch.where(spread > 1e-6, spread, 1.0))

    def forward(self, matrix: Tensor) -> Tensor:
        """Return logits (n,) of inputs (n, inputs)."""
        standard = (matrix - self.mean) / self.scale
        logits: Tensor = (self.layers(standard) + self.start(standard[:, -1:])).squeeze(1)
        return logits

    @torch.no_grad()
    def start_from_probability(self, matrix: Tensor, scores: Tensor) -> None:
        """Fit the weight and bias of the log-probability, the last input, to scores by Newton's method."""
        design = torch.ones(len(matrix), 2, dtype=torch.float64)
        design[:, 0] = (matrix[:, -1] - self.mean[-1]) / self.scale[-1]
        weights, ridge = torch.zeros(2, dtype=torch.float64), 1e-3
        for _ in range(NEWTON_STEPS):
            chance = torch.sigmoid(design @ weights)
            curvature = design.T @ (design * (chance * (1 - chance))[:, None]) + ridge * torch.eye(2)
            weights += torch.linalg.solve(curvature, design.T @ (scores.double() - chance) - ridge * weights)
        self.start.weight.copy_(weights[:1, None])
        self.start.bias.copy_(weights[1:])


@dataclass(frozen=True, eq=False)
class Selector:
    """Trained selector.

    Attributes:
        network: Network in evaluation mode.
        record: Training record.
        seen: `image_mark` of every image used for training or stopping.
    """

    network: Network
    record: TrainingRecord
    seen: frozenset[int]

    @torch.no_grad()
    def confidence(self, features: Features) -> Floats:
        """Return the probability of being right for n answers, shape (n,), in [0, 1].

        Raises:
            ValueError: Features have another width than those trained on, or are not finite.
        """
        matrix = features.matrix()
        if matrix.shape[1] != self.network.mean.numel():
            raise ValueError(f"expected {self.network.mean.numel()} features per answer, got {matrix.shape[1]}")
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError("expected finite features, got NaN or infinite ones")
        return torch.sigmoid(self.network(matrix).double()).numpy()

    def seen_among(self, images: Sequence[str]) -> list[str]:
        """Return the images that were used in training."""
        return sorted({image for image in images if image_mark(image) in self.seen})

    def save(self, path: Path) -> None:
        """Write everything into one safetensors file; the same selector gives the same bytes."""
        marks = torch.tensor(sorted(self.seen), dtype=torch.int64)
        # One entry, because safetensors writes several in no fixed order.
        metadata = {METADATA: json.dumps(asdict(self.record), sort_keys=True)}
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as unfinished:
            save_file({**self.network.state_dict(), "seen": marks}, unfinished, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> "Selector":
        """Read the result of `save`.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: It is damaged or something else.
        """
        if not path.is_file():
            raise FileNotFoundError(f"selector: there is no file {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"selector: {path} is damaged: {error}") from error
        if METADATA not in metadata:
            raise ValueError(f"selector: {path} was not written by `lmms-plugin selector fit`")
        with readable(f"selector: {path}"):
            record = _record(json.loads(metadata[METADATA]))
            seen = frozenset(tensors.pop("seen").tolist())
            network = Network(tensors["mean"].numel(), record.settings.hidden, record.settings.dropout)
            network.load_state_dict(tensors)
        return cls(network.eval(), record, seen)


def fit(
    features: Features,
    target: npt.ArrayLike,
    images: Sequence[str],
    settings: SelectorSettings,
    *,
    origin: FeatureOrigin,
    predicts: str,
    data: Mapping[str, Any],
) -> Selector:
    """Train a selector; deterministic on one machine.

    Args:
        features: Features of n answers.
        target: Scores (n,) of the answers in [0, 1].
        images: Image (n,) of each answer: answers about one image are all trained on or all held out.
        settings: Training settings.
        origin: Origin of the features.
        predicts: Name of the target.
        data: Source of the answers, JSON-ready.

    Raises:
        ValueError: Arrays differ in length, targets leave [0, 1], features are not finite, there are fewer than two
            images, or all answers to train on have the same score, from which nothing can be learned.
    """
    matrix, scores = features.matrix(), torch.from_numpy(np.array(target, dtype=np.float32))
    held_out = held_out_rows(images, settings)
    _expect_learnable(matrix, scores, images, held_out)
    network, epochs, best = _trained(matrix, scores, held_out, settings)
    apart = {image for image, out in zip(images, held_out.tolist(), strict=True) if out}
    record = TrainingRecord(
        origin,
        predicts,
        {**data, "answers": len(scores), "mean_target": round(float(scores.mean()), 6)},
        settings,
        (len(set(images) - apart), len(apart)),
        tuple(epochs),
        best,
        {name: version(name) for name in ("lmms-plugin", "torch")},
    )
    return Selector(network.eval(), record, frozenset(map(image_mark, images)))


def _trained(
    matrix: Tensor, scores: Tensor, held_out: Tensor, settings: SelectorSettings
) -> tuple[Network, list[Epoch], int]:
    """Return the network as of its best epoch, all epochs, and the number of the best one."""
    inside, outside = ~held_out, held_out
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = Network(matrix.shape[1], settings.hidden, settings.dropout)
        network.standardise(matrix[inside])
        network.start_from_probability(matrix[inside], scores[inside])
        best, state, epochs = 0, copy.deepcopy(network.state_dict()), list[Epoch]()
        for epoch in _epochs(network, (matrix[inside], scores[inside]), (matrix[outside], scores[outside]), settings):
            epochs.append(epoch)
            if epoch.held_out <= min(each.held_out for each in epochs):
                best, state = len(epochs) - 1, copy.deepcopy(network.state_dict())
            if len(epochs) - 1 - best >= settings.patience:
                break
    network.load_state_dict(state)
    return network, epochs, best


def held_out_rows(images: Sequence[str], settings: SelectorSettings) -> Tensor:
    """Return which answers are only for early stopping, shape (n,): those about a share of images chosen by hash."""
    by_chance = sorted(set(images), key=lambda image: uniform(f"selector/{settings.seed}/{image}"))
    if len(by_chance) < 2:
        raise ValueError(f"expected at least 2 images, some to train on and some to hold out, got {len(by_chance)}")
    count = min(max(1, round(settings.held_out * len(by_chance))), len(by_chance) - 1)
    apart = set(by_chance[:count])
    return torch.tensor([image in apart for image in images])


def image_mark(image: str) -> int:
    """Return a 64-bit hash of an image's name."""
    return int.from_bytes(hashlib.blake2b(image.encode(), digest_size=8).digest(), "big", signed=True)


def _expect_learnable(matrix: Tensor, scores: Tensor, images: Sequence[str], held_out: Tensor) -> None:
    if not len(matrix) == len(scores) == len(images):
        raise ValueError(
            f"expected as many scores and images as answers, got {len(matrix)}, {len(scores)}, {len(images)}"
        )
    if not bool(((scores >= 0) & (scores <= 1)).all()):
        raise ValueError("expected scores in [0, 1]")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("expected finite features, got NaN or infinite ones")
    if float(scores[~held_out].min()) == float(scores[~held_out].max()):
        raise ValueError(
            f"expected better and worse answers to learn from, but all score {float(scores[~held_out][0]):g}"
        )


def _epochs(
    network: Network, training: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], settings: SelectorSettings
) -> Iterator[Epoch]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    matrix, scores = training
    network.eval()
    yield Epoch(_loss(network, *training), _loss(network, *held_out))
    for _ in range(settings.epochs):
        total = 0.0
        network.train()
        for batch in torch.randperm(len(matrix)).split(settings.batch_size):
            loss = functional.binary_cross_entropy_with_logits(network(matrix[batch]), scores[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(batch)
        network.eval()
        yield Epoch(total / len(matrix), _loss(network, *held_out))


@torch.no_grad()
def _loss(network: Network, matrix: Tensor, scores: Tensor) -> float:
    return functional.binary_cross_entropy_with_logits(network(matrix), scores).item()


def _record(values: Mapping[str, Any]) -> TrainingRecord:
    read: dict[str, Any] = dict(values)
    read["origin"] = FeatureOrigin.parse(read["origin"])
    read["settings"] = SelectorSettings(**read["settings"])
    read["images"] = tuple(read["images"])
    read["epochs"] = tuple(Epoch(*epoch) for epoch in read["epochs"])
    return TrainingRecord(**read)
