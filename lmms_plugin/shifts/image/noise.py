"""Pixel noise whose distribution depends on the intensity alone, sampled from tables.

A grey level has 256 values, so such noise is a discrete memoryless channel: a (256, 256) matrix whose row v is the
distribution of the output level given the input level v. Walker's alias method (Walker 1977, ACM TOMS 3(3)) draws from
any row with one table look-up per sample, many times faster than a Poisson generator and without approximation.
"""

# OpenCV ships no types here and numpy types much arithmetic as Any.
# mypy: disable-error-code="no-any-return"

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

LEVELS = 256
_TABLES_KEPT = 16
_PIECE = 2**14

Levels = npt.NDArray[np.uint8]
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Channel:
    """Alias tables of a (256, 256) transition matrix.

    Attributes:
        cells: Cells (65536,) uint32, one per input level and column. Its upper 24 bits are the share of the cell that
            yields its own column, in units of 2**-24; its lower 8 bits are the output level that the rest yields.
    """

    cells: npt.NDArray[np.uint32]

    @classmethod
    def from_matrix(cls, matrix: Matrix) -> "Channel":
        """Build the tables; every probability is accurate within 2**-24.

        Args:
            matrix: (256, 256), rows sum to 1: probability of each output level given the input level.

        Raises:
            ValueError: The shape is another or a row is not a probability distribution.
        """
        if matrix.shape != (LEVELS, LEVELS) or matrix.min() < 0 or not np.allclose(matrix.sum(1), 1):
            raise ValueError(f"expected a (256, 256) matrix of rows that sum to 1, got {matrix.shape}")
        # In units of a cell, to 36 significant bits: which of two equally full columns comes first (a Poisson law of
        # mean n has n - 1 as often as n) must not depend on the last bit of an exponential, in which processors differ.
        digits, exponent = np.frexp(matrix / matrix.sum(1, keepdims=True) * LEVELS)
        mass = np.ldexp(np.round(digits * 2**36) / 2**36, exponent)
        # Each turn settles one column per row: what it lacks to fill its own cell is taken from the row's fullest
        # column; a settled cell holds exactly 1 and is never picked again.
        share = np.ones_like(mass)
        alias = np.tile(np.arange(LEVELS, dtype=np.uint32), (LEVELS, 1))
        every = np.arange(LEVELS)
        while True:
            poor, rich = mass.argmin(1), mass.argmax(1)
            lack = 1 - mass[every, poor]
            row = np.flatnonzero(lack > 2.0**-25)
            if not len(row):
                break
            column = poor[row]
            share[row, column], alias[row, column] = mass[row, column], rich[row]
            mass[row, rich[row]] -= lack[row]
            mass[row, column] = 1
        # A full cell is its own alias, so that the largest number of 24 bits serves as 1.
        threshold = np.minimum(np.round(share * 2**24), 2**24 - 1).astype(np.uint32)
        return cls(((threshold << 8) | alias).ravel())

    def sample(self, levels: Levels, rng: np.random.Generator) -> Levels:
        """Draw an output level for every input level, independently; one 32-bit draw each.

        Args:
            levels: Input levels, uint8, any shape.
            rng: Source of randomness.

        Returns:
            uint8, the shape of `levels`.
        """
        flat = levels.ravel()
        output = np.empty_like(flat)
        # In pieces whose intermediate arrays stay in the processor's cache.
        for start in range(0, len(flat), _PIECE):
            piece = slice(start, start + _PIECE)
            output[piece] = self._sample(flat[piece], rng)
        return output.reshape(levels.shape)

    def _sample(self, levels: Levels, rng: np.random.Generator) -> Levels:
        draw = rng.integers(0, 2**32, len(levels), dtype=np.uint32)
        cell = self.cells.take((levels.astype(np.intp) << 8) | (draw & 255))
        return np.where(draw < (cell & ~np.uint32(255)), draw, cell).astype(np.uint8)


@lru_cache(maxsize=_TABLES_KEPT)
def shot_channel(photons: float) -> Channel:
    """Return Poisson noise of an image whose white is `photons` expected counts, scaled back, clipped and floored.

    Args:
        photons: Expected count at level 255, above 0. Fewer photons, more noise.
    """
    counts = np.arange(math.ceil(photons) + 1)
    law = poisson(np.linspace(0, photons, LEVELS), len(counts))
    rest = 1 - law[:, :-1].sum(1)
    # A smaller remainder may be rounding of the sum rather than a probability.
    law[:, -1] = np.where(rest > 1e-9, rest, 0)
    return _collect(law, np.clip(counts / photons, 0, 1) * 255)


@lru_cache(maxsize=_TABLES_KEPT)
def sensor_channel(exposure: float, electrons: float, read_noise: float) -> Channel:
    """Return Poissonian-Gaussian noise of an under-exposed sensor (Foi et al. 2008, IEEE TIP 17(10)).

    Level v is decoded to linear light L by the sRGB curve (IEC 61966-2-1); Poisson(exposure · electrons · L) electrons
    are read with Gaussian noise, divided by `electrons`, clipped, encoded with the sRGB curve and rounded.

    Args:
        exposure: Share of the light of the well-exposed image, in (0, 1].
        electrons: Expected electrons at white in the well-exposed image.
        read_noise: Standard deviation of the read-out noise, electrons, above 0.
    """
    means = exposure * electrons * _srgb_to_linear(np.arange(LEVELS) / 255)
    counts = np.arange(math.ceil(means[-1] + 8 * math.sqrt(means[-1])) + 1)
    # Level j results from readings between the linear light of j - ½ and of j + ½.
    edges = electrons * _srgb_to_linear((np.arange(LEVELS - 1) + 0.5) / 255)
    below = _normal_cdf((edges - counts[:, None]) / read_noise)
    reading = np.diff(below, axis=1, prepend=0, append=1)
    law = poisson(means, len(counts))
    return Channel.from_matrix(np.clip(law / law.sum(1, keepdims=True) @ reading, 0, None))


def poisson(means: Matrix, counts: int) -> Matrix:
    """Return Poisson probabilities of 0 … counts - 1, shape (len(means), counts); a mean of 0 is allowed."""
    k = np.arange(counts)
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, counts)))))
    with np.errstate(divide="ignore", invalid="ignore"):
        log_power = np.where(k == 0, 0.0, k * np.log(means)[:, None])
    return np.exp(log_power - means[:, None] - log_factorial)


def _collect(law: Matrix, outputs: Matrix) -> Channel:
    """Return the channel for probabilities of counts (256, n) and the grey value of each count (n,), floored."""
    matrix = np.zeros((LEVELS, LEVELS))
    np.add.at(matrix.T, outputs.astype(np.uint8), law.T)
    return Channel.from_matrix(matrix)


def _srgb_to_linear(encoded: Matrix) -> Matrix:
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def _normal_cdf(z: Matrix) -> Matrix:
    return 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(z / math.sqrt(2)))
