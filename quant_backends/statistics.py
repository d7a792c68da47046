"""Input statistics of linear layers: sums over their inputs, by token role on request."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lmms_plugin.quant_backends.layers.codes import all_finite, rows_per_block
from lmms_plugin.quant_backends.layers.linear import QuantizedLinear
from lmms_plugin.quant_backends.layers.modalities import MODALITIES

ROLES = ("image", "text", "answer")
"""What a position of a calibration sample can hold, in the order of the numbers that stand for them: an image feature,
the rest of the prompt, the answer to it."""

WEIGHED = ("image", "answer")
"""The roles whose rows are summed apart."""

TOKEN_WEIGHTS = ("gradient", "modality")
"""What the weight of a token can come from: the loss gradient there, or the mean over all tokens of its role."""

UNWEIGHTED = "unweighted"
"""What follows the name of a method that weighs tokens, in the report of a layer whose inputs have no weights."""

TOKEN_ROLES = "token_roles"
"""Key under which a calibration sample says the role of each of its positions, beside the model's own inputs."""

SYMMETRIC_COLUMNS = 256
"""Columns of a symmetric matrix that are multiplied at once: fewer leave out more, but fill a processor less well."""

HELD_BACK = 4
"""One calibration row in so many is held back from fitting where a method judges its result by rows it has not seen."""

SAMPLE_ROWS = 512
"""Rows kept of each role, as many as AWQ's authors look at."""


class Sensitivity(NamedTuple):
    """Sensitivity of the answers' loss to the output of a block.

    Attributes:
        image: Mean |gradient| over the elements at image positions, 0 or above.
        answer: Mean |gradient| over the elements at answer positions, above 0.
        ratio: Weight of an image position relative to an answer position: image / answer, or the median of
            corresponding blocks where that is more.
    """

    image: float
    answer: float
    ratio: float


def held_back_rows(sample: int, samples: int) -> slice:
    """Return which input rows of one of several calibration samples are held out from fitting.

    The rows of one sample resemble one another, so whole samples are held out, every fourth one; of fewer than four
    samples every fourth row.
    """
    if samples < HELD_BACK:
        return slice(HELD_BACK - 1, None, HELD_BACK)
    return slice(None) if sample % HELD_BACK == HELD_BACK - 1 else slice(0)


def is_image_role(roles: Tensor) -> Tensor:
    """Return which of some roles, indices into `ROLES`, are those of image tokens."""
    return roles == ROLES.index("image")


def squared_errors(delta: Tensor, gram: Tensor) -> Tensor:
    """Return δ G δᵀ = Σ (x · δ)² over the inputs x for each row δ of a weight's error.

    Products and sums over some columns are taken in float32, by which sums over a layer were off by a millionth at
    most, also with inputs of very different sizes.

    Args:
        delta: (rows, columns) float32.
        gram: (columns, columns) float32, G = Σ x xᵀ.

    Returns:
        (rows,) float64.
    """
    total = torch.zeros(len(delta), dtype=torch.float64, device=delta.device)
    for start in range(0, len(gram), SYMMETRIC_COLUMNS):
        stop = min(start + SYMMETRIC_COLUMNS, len(gram))
        part = delta[:, start:stop]
        # G is symmetric: terms between these columns and those before them count twice, and are computed once.
        fed = torch.mm(part, gram[start:stop, start:stop])
        if start:
            fed.addmm_(delta[:, :start], gram[:start, start:stop], alpha=2)
        total += fed.mul_(part).sum(1)
    return total


@dataclass
class RowSample:
    """Uniform random sample of rows from a stream of unknown length (reservoir sampling), reproducible.

    Attributes:
        rows: (up to `limit`, columns), in the order in which they came and in their own dtype.
        limit: Largest number of rows to keep.
        is_image: (rows,) bool, which of them are image tokens, on the CPU; empty where rows have no roles.
    """

    rows: Tensor
    limit: int = SAMPLE_ROWS
    is_image: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    _lots: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64), repr=False)
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0), repr=False)

    def add(self, x: Tensor, is_image: Tensor | None = None) -> None:
        """Add the rows of x (rows, columns), of which some may be image tokens: the lowest random numbers stay."""
        lots = torch.cat([self._lots, torch.rand(len(x), dtype=torch.float64, generator=self._generator)])
        kept = lots.argsort()[: self.limit].sort().values
        self.rows = torch.cat([self.rows.to(x.dtype), x])[kept.to(x.device)]
        self._lots = lots[kept]
        if is_image is not None:
            self.is_image = torch.cat([self.is_image, is_image.cpu()])[kept]


@dataclass
class InputStatistics:
    """Sums over every input row x of a group of layers.

    Attributes:
        names: Names of the layers, which share their input tensors.
        gram: (columns, columns) float32, Σ x xᵀ.
        magnitude: (columns,) float64, Σ |x|.
        rows: Number of summed rows.
        largest: (columns,) float32, the largest |x|; None before the first row.
        by_role: Whether rows of each role are summed separately.
        largest_of: Modality -> the same over its rows alone, of `MODALITIES` those that came; empty where rows have no
            roles.
        sample: Sample of the rows, for errors that no sum gives; None unless roles are separate.
        roles: Statistics of the rows of each role of `WEIGHED`, as far as there are any: none unless roles are
            separate, and none where a layer's rows are not sequence positions, as in the vision tower.
        sensitivity: Sensitivity of the loss to the layers' block; None where it is not known.
        held_back: Statistics of the held-out rows, by which a result is judged; None unless the method holds out any.
            All other sums include them.
        weighted: Statistics of the rows √w·x, where the method weighs each token by a number w; without rows where no
            weights are known.
        mismatch: (columns, columns) float32, Σ (x̃ − x) xᵀ, with x̃ the row in the unquantized model of the row x after
            quantized blocks; None unless the method compares the two, and where rows do not correspond.
    """

    names: tuple[str, ...]
    gram: Tensor
    magnitude: Tensor
    rows: int = 0
    largest: Tensor | None = None
    by_role: bool = False
    largest_of: dict[str, Tensor] = field(default_factory=dict)
    sample: RowSample | None = None
    roles: dict[str, InputStatistics] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None
    held_back: InputStatistics | None = None
    weighted: InputStatistics | None = None
    mismatch: Tensor | None = None

    @classmethod
    def empty(
        cls,
        names: tuple[str, ...],
        columns: int,
        device: torch.device,
        *,
        by_role: bool = False,
        holds_back: bool = False,
        keeps_rows: bool = False,
        weighted: bool = False,
    ) -> InputStatistics:
        """Return statistics without any row.

        Args:
            names: Names of the layers.
            columns: Width of their input.
            device: Device of the sums.
            by_role: Whether to keep rows too, and to sum those of each role separately.
            holds_back: Whether to sum the held-out rows separately too.
            keeps_rows: Whether to keep a sample of the rows.
            weighted: Whether to sum rows weighted by token too.
        """
        gram = torch.zeros(columns, columns, device=device)
        statistics = cls(names, gram, torch.zeros(columns, dtype=torch.float64, device=device), by_role=by_role)
        if by_role or keeps_rows:
            statistics.sample = RowSample(torch.empty(0, columns, device=device))
        if holds_back:
            statistics.held_back = cls.empty(names, columns, device)
        if weighted:
            statistics.weighted = cls.empty(names, columns, device, holds_back=holds_back)
        return statistics

    @staticmethod
    def memory(
        columns: int,
        *,
        by_role: bool = False,
        holds_back: bool = False,
        weighted: bool = False,
        asymmetric: bool = False,
    ) -> int:
        """Return the most bytes that statistics take, without sampled rows."""
        return 4 * columns**2 * (len(WEIGHED) * by_role + (1 + holds_back) * (1 + weighted + asymmetric))

    @property
    def fitting_gram(self) -> Tensor:
        """Return Σ x xᵀ over the rows that are not held out, (columns, columns) float32."""
        return self.gram if self.held_back is None else self.gram - self.held_back.gram

    @property
    def judging_gram(self) -> Tensor:
        """Return Σ x xᵀ over the held-out rows, or over all of them where none are held out."""
        return self.gram if self.held_back is None else self.held_back.gram

    @property
    def fitting_mismatch(self) -> Tensor | None:
        """Return `mismatch` over the rows that are not held out."""
        if self.mismatch is None or self.held_back is None or self.held_back.mismatch is None:
            return self.mismatch
        return self.mismatch - self.held_back.mismatch

    @property
    def judging_mismatch(self) -> Tensor | None:
        """Return `mismatch` over the held-out rows, or over all of them where none are held out."""
        return self.mismatch if self.held_back is None else self.held_back.mismatch

    @property
    def by_importance(self) -> InputStatistics:
        """Return the statistics of the rows weighted by token, or these themselves where no weights are known."""
        weighted = self.weighted
        return self if weighted is None or not weighted.rows or not bool(weighted.gram.any()) else weighted

    @property
    def mean_magnitude(self) -> Tensor:
        """Return mean |x| of each column, float32."""
        return (self.magnitude / self.rows).float()

    @property
    def sampled(self) -> Tensor:
        """Return the sampled rows, (up to `SAMPLE_ROWS`, columns) float32.

        Raises:
            ValueError: No rows are kept.
        """
        if self.sample is None:
            raise ValueError(f"{self.names[0]}: the sums of its inputs were kept, but no rows of them")
        return self.sample.rows.float()

    @property
    def sampled_images(self) -> Tensor:
        """Return which of the sampled rows are image tokens, (rows,) bool; none where rows have no roles."""
        sample = self.sample
        if sample is None or len(sample.is_image) != len(sample.rows):
            return torch.zeros(len(self.sampled), dtype=torch.bool, device=self.gram.device)
        return sample.is_image.to(self.gram.device)

    def expect_finite(self) -> None:
        """Refuse inputs that are not finite.

        Raises:
            ValueError: They hold NaN or infinite values; the message names the layer.
        """
        if not all_finite(self.gram):
            raise ValueError(f"{self.names[0]}: its calibration inputs hold NaN or infinite values")

    def output_error(self, weight: Tensor, layer: QuantizedLinear) -> float:
        """Return ‖X(W − Ŵ)ᵀ‖ / ‖XWᵀ‖ over all rows X, 0 where the outputs are all zero.

        Args:
            weight: W, dense, (rows, columns).
            layer: Layer with the weight Ŵ.
        """
        step = rows_per_block(weight.shape[1])
        error = norm = 0.0
        for start in range(0, len(weight), step):
            dense = weight[start : start + step].float()
            delta = layer.dense_rows(start, start + len(dense)).float() - dense
            error += float(squared_errors(delta, self.gram).sum())
            norm += float(squared_errors(dense, self.gram).sum())
        # Rounding may leave a tiny negative error.
        return math.sqrt(max(error, 0.0) / norm) if norm > 0 else 0.0

    def add(
        self,
        x: Tensor,
        roles: Tensor | None = None,
        held_back: slice = slice(0),
        *,
        weights: Tensor | None = None,
        dense: Tensor | None = None,
    ) -> None:
        """Add the rows of an input (..., columns).

        Args:
            x: Input of the layers.
            roles: (rows,), the index into `ROLES` of each row's role; None where rows are no sequence positions.
            held_back: Mask of the held-out rows; without effect where none are kept separately.
            weights: (rows,) float32, 0 or above, the weight of each row; None where none are known.
            dense: Same input in the unquantized model, where `x` comes from quantized blocks.

        Raises:
            ValueError: The number of roles or of weights differs from that of rows, or the shape of `dense` from `x`'s.
        """
        x = x.detach().reshape(-1, x.shape[-1])
        if weights is not None and self.weighted is not None:
            if len(weights) != len(x):
                raise ValueError(f"{self.names[0]} was fed {len(x)} rows, but the weights of {len(weights)} are given")
            self.weighted.add(x.float() * weights.to(x.device).sqrt().unsqueeze(1), held_back=held_back)
        if dense is not None:
            dense = dense.detach().reshape(-1, dense.shape[-1])
            self._add_mismatch(x, dense)
        if roles is not None:
            if len(roles) != len(x):
                raise ValueError(f"{self.names[0]} was fed {len(x)} rows, but the roles of {len(roles)} are given")
            for role in WEIGHED:
                self._add_role(role, x[(roles == ROLES.index(role)).to(x.device)])
            self._add_modalities(x, is_image_role(roles).to(x.device))
        if self.sample is not None:
            self.sample.add(x, None if roles is None else is_image_role(roles))
        if self.held_back is not None:
            self.held_back.add(x[held_back], dense=None if dense is None else dense[held_back])
        x = x.float()
        self.gram.addmm_(x.T, x)
        magnitude = x.abs()
        self.magnitude += magnitude.sum(0, dtype=torch.float64)
        self.rows += x.shape[0]
        if len(x):
            self.largest = _larger(self.largest, magnitude.amax(0))

    def _add_mismatch(self, x: Tensor, dense: Tensor) -> None:
        if dense.shape != x.shape:
            raise ValueError(
                f"{self.names[0]} was fed {tuple(x.shape)} after quantized blocks, but {tuple(dense.shape)} in the"
                " unquantized model"
            )
        if self.mismatch is None:
            self.mismatch = torch.zeros_like(self.gram)
        self.mismatch.addmm_((dense.float() - x.float()).T, x.float())

    def _add_modalities(self, x: Tensor, is_image: Tensor) -> None:
        for modality, inside in zip(MODALITIES, (is_image, ~is_image), strict=True):
            if bool(inside.any()):
                self.largest_of[modality] = _larger(self.largest_of.get(modality), x[inside].float().abs().amax(0))

    def _add_role(self, role: str, x: Tensor) -> None:
        if not self.by_role or not len(x):
            return
        if role not in self.roles:
            self.roles[role] = InputStatistics.empty(self.names, x.shape[1], self.gram.device)
            self.roles[role].sample = RowSample(x[:0])
        self.roles[role].add(x, x.new_full((len(x),), ROLES.index(role), dtype=torch.uint8))


def _larger(known: Tensor | None, found: Tensor) -> Tensor:
    return found if known is None else torch.maximum(known, found)
