"""Rotation of a model before it is quantized: what a user asks for, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass

HADAMARD = "hadamard"
ROTATIONS = (HADAMARD,)

ROTATED_INPUTS = "inputs of down projections are rotated at run time"
"""Why compressed-tensors cannot hold a model with rotated and rounded inputs."""


@dataclass(frozen=True)
class RotationSpec:
    """Rotation of the decoder's activations that leaves the outputs of the dense model as they are.

    Attributes:
        seed: Seed of all random signs and blocks.
        online: Whether inputs of down projections are rotated at run time too, for layers that round their inputs.
        vision: Whether the vision tower is rotated, too.
    """

    seed: int
    online: bool
    vision: bool = False

    @classmethod
    def of(cls, name: str | None, seed: int, *, online: bool, vision: bool = False) -> RotationSpec | None:
        """Return the rotation that a user names; None for none.

        Raises:
            ValueError: There is no such rotation, the seed is negative, or a seed is given without a rotation.
        """
        if name is None and seed:
            raise ValueError(f"rotation_seed={seed} needs a rotation ({', '.join(ROTATIONS)})")
        if name is None and vision:
            raise ValueError(f"rotate_vision=True needs a rotation ({', '.join(ROTATIONS)})")
        if name is None:
            return None
        if name not in ROTATIONS:
            raise ValueError(f"rotation must be one of {', '.join(ROTATIONS)}, got {name!r}")
        if seed < 0:
            raise ValueError(f"rotation_seed must be 0 or more, got {seed}")
        return cls(seed, online, vision)
