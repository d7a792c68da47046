"""Second stage of the demo's training: with eyes that see, learn to tell which shape is meant.

    python -m demo_training.tune --state runs/demo/state.pt --out runs/tuned --steps 760

Takes up the averaged weights of a run of `demo_training.train`, freezes vision tower and connector, and goes on
reading about scenes of two, then three shapes. A run is a function of (state, seed, steps); with --minutes the learning
rate follows the clock instead.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from demo_training.architecture import build_tokenizer
from demo_training.evaluate import about_scenes, overlaps
from demo_training.packing import look, pack
from demo_training.train import Run, corpus, image_features, muon, read
from lmms_plugin.demo.scenes import Scene, scene

BATCH = 24
LR = 2e-3
EMA = 0.99
WARM_UP = 30
# Scenes that the first stage, which counts from 0, never comes to.
FIRST_SCENE = 10**6
EVALUATED = 40


class Tuning:
    """The language model of a finished first stage, and what changes it.

    Args:
        state: `state.pt` of a run of `demo_training.train`.
        seed: Of that run.
    """

    def __init__(self, state: Path, seed: int) -> None:
        self.run = Run(build_tokenizer(corpus()), seed, BATCH, LR, EMA)
        self.run.load_state(state)
        self.model = self.run.model
        self.model.load_state_dict(self.run.average.state_dict())
        self.seed, self.step, self.drawn = seed, 0, FIRST_SCENE
        named = list(self.model.named_parameters())
        for name, parameter in named:
            parameter.requires_grad_("vision_model" not in name and "connector" not in name)
        trained = [(name, p) for name, p in named if p.requires_grad]
        matrices = [p for name, p in trained if p.ndim == 2 and ".layers." in name]
        rest = [p for name, p in trained if p.ndim != 2 or ".layers." not in name]
        self.trained = matrices + rest
        self.optimizers = [
            muon(matrices, LR),
            torch.optim.AdamW([*rest, *self.run.pointer.parameters()], lr=LR, betas=(0.9, 0.98), weight_decay=0.01),
        ]

    def advance(self, progress: float) -> dict[str, float]:
        """Take one step at `progress` (0 to 1) and return its losses."""
        scenes = self.scenes(2 if progress < 0.25 else 3)
        with torch.no_grad():
            features = image_features(self.model, look(scenes)[0])
        reading = read(self.model, self.run.pointer, features, pack(scenes, self.run.tokenizer))
        (reading.answer + 0.3 * reading.pointing).backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        factor = min(1.0, self.step / WARM_UP) * _fall(progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LR * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(EMA, self.step / (self.step + 10))
        torch._foreach_lerp_(list(self.run.average.parameters()), list(self.model.parameters()), 1 - keep)
        return {name: value.item() for name, value in reading._asdict().items()}

    def accuracy(self, most_objects: int) -> float:
        """Acc@0.5 of the averaged weights on held-out scenes of up to this many shapes."""
        held_out = about_scenes(scene("val", i, seed=3, max_objects=most_objects) for i in range(EVALUATED))
        return float((np.array(overlaps(self.run.average, self.run.processor, held_out)) >= 0.5).mean())

    def scenes(self, most_objects: int) -> list[Scene]:
        """Draw a batch in which five of six lone shapes, about which there is nothing to choose, are left out."""
        scenes: list[Scene] = []
        while len(scenes) < BATCH:
            drawn = scene("train", self.drawn, seed=self.seed, max_objects=most_objects)
            self.drawn += 1
            if len(drawn.objects) > 1 or self.drawn % 6 == 0:
                scenes.append(drawn)
        return scenes


def _fall(progress: float) -> float:
    """1 up to 55 %, then half a cosine down to 0."""
    return 1.0 if progress < 0.55 else 0.5 * (1 + math.cos(math.pi * (progress - 0.55) / 0.45))


def main(argv: list[str] | None = None) -> None:
    """Tune, score on held-out scenes, and write the checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m demo_training.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--steps", type=int, help="length of the run in steps (reproducible)")
    budget.add_argument("--minutes", type=float, help="length of the run in minutes (depends on the machine)")
    parser.add_argument("--state", type=Path, required=True, help="state.pt of the first stage")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint/")
    parser.add_argument("--seed", type=int, default=0, help="of the first stage (default: %(default)s)")
    args = parser.parse_args(argv)
    tuning = Tuning(args.state, args.seed)
    begin = time.monotonic()
    while True:
        seconds = time.monotonic() - begin
        progress = tuning.step / args.steps if args.steps else seconds / 60 / args.minutes
        if progress >= 1:
            break
        report = tuning.advance(progress)
        if tuning.step % 10 == 0:
            print(
                {"step": tuning.step, "seconds": round(seconds)} | {k: round(v, 4) for k, v in report.items()},
                flush=True,
            )
    print({f"acc@0.5, up to {most} shapes": round(tuning.accuracy(most), 3) for most in (2, 3)})
    tuning.run.export(args.out / "checkpoint")


if __name__ == "__main__":
    main()
