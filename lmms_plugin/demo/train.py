"""Train the demo checkpoint from scratch on one CPU core.

    python -m lmms_plugin.demo.train --out runs/demo --steps 6000

Scenes are drawn on the fly from the split "train", so no scene is seen twice. The questions about one scene share a
sequence: each attends to the image and to itself only, and its positions restart after the image, so that each
sees exactly what it sees alone at evaluation. While training, a linear probe on the image tokens must name, for each
cell of the picture, the attributes and the box digits of the object there; the probe is thrown away at the end.
A run is a function of (seed, steps); with --minutes the learning rate follows the clock instead.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Idefics3ForConditionalGeneration, PreTrainedTokenizerFast

from lmms_plugin.demo.architecture import DIALECT, WIDTH, build_model, build_processor, build_tokenizer
from lmms_plugin.demo.evaluate import overlaps
from lmms_plugin.demo.muon import Muon
from lmms_plugin.demo.packing import IGNORED, PROBE, Questions, look, pack, visible
from lmms_plugin.demo.scenes import MAX_OBJECTS, scene

# Share of the steps in which only the eyes learn, on LOOK_AT times as many scenes, without the cost of text.
LOOK = 0.26
LOOK_AT = 3


def image_features(model: Idefics3ForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the language model sees of each scene: (B, C, WIDTH)."""
    return model.model.connector(model.model.vision_model(pixel_values=pixels).last_hidden_state)


def probe_loss(said: Tensor, wanted: Tensor) -> Tensor:
    """How badly the probe names what each cell shows.

    Args:
        said: (B, C, sum(PROBE) + 4): class scores, then the corners of the box as fractions of the image.
        wanted: (B, C, len(PROBE)): classes, IGNORED where nothing is to be said.

    Returns:
        Cross-entropies summed over attributes, plus their mean over digits, plus the absolute error of the corners.
    """
    *parts, corners = said.split([*PROBE, 4], dim=-1)
    terms = [functional.cross_entropy(p.flatten(0, 1), wanted[..., i].flatten()) for i, p in enumerate(parts)]
    shown = wanted[..., 4] != IGNORED
    digits = wanted[..., 4:][shown].float()
    error = (corners[shown] - (digits[:, ::2] / 10 + digits[:, 1::2] / 100)).abs().mean()
    return torch.stack(terms[:4]).sum() + torch.stack(terms[4:]).mean() + 10 * error


def answer_loss(model: Idefics3ForConditionalGeneration, features: Tensor, batch: Questions) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of the answers' tokens and the share of answers whose tens digits are all right."""
    text = model.model.text_model
    embedded = text.get_input_embeddings()(batch.ids)
    at_image = batch.ids == model.config.image_token_id
    embedded = embedded.masked_scatter(at_image[..., None], features)
    hidden = text(
        inputs_embeds=embedded, attention_mask=visible(batch.segments), position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    asked = batch.labels != IGNORED
    logits, labels = model.lm_head(hidden[asked]), batch.labels[asked]
    # Every answer has 14 tokens: "[", four times two digits and a separator, the end mark.
    right = (logits.argmax(-1) == labels).view(-1, 14)[:, 1:12:3].all(1).float().mean()
    return functional.cross_entropy(logits, labels), right


def build_optimizers(model: nn.Module, probe: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head, patches, norms and biases."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inside = ".layers." in name or "connector" in name
        (matrices if inside and parameter.ndim == 2 else rest).append(parameter)
    rest += list(probe.parameters())
    return [
        Muon(matrices, lr=lr),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def schedule(progress: float) -> float:
    """Learning-rate factor: linear warm-up over 2 %, flat to 35 %, then a cosine to zero."""
    if progress < 0.02:
        return progress / 0.02
    return 1.0 if progress < 0.35 else 0.5 * (1 + math.cos(math.pi * min((progress - 0.35) / 0.65, 1.0)))


class Run:
    """A training run that can be put down and taken up again.

    Args:
        tokenizer: Of the checkpoint to be.
        seed: Of the weights and of the stream of scenes.
        batch_size: Scenes per step.
        lr: Peak learning rate of both optimizers.
        ema: Decay of the running average of the weights, which is what gets saved.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, batch_size: int, lr: float, ema: float) -> None:
        self.tokenizer = tokenizer
        self.processor = build_processor(self.tokenizer)
        self.model = build_model(self.tokenizer, seed)
        self.probe = nn.Linear(WIDTH, sum(PROBE) + 4)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizers = build_optimizers(self.model, self.probe, lr)
        self.seed, self.batch_size, self.lr, self.ema = seed, batch_size, lr, ema
        self.step, self.drawn, self.seconds = 0, 0, 0.0

    def advance(self, progress: float) -> dict[str, float]:
        """Take one step at `progress` (0 to 1) of the run and return its losses."""
        looking = progress < LOOK
        count = LOOK_AT * self.batch_size if looking else self.batch_size
        scenes = [
            scene("train", self.drawn + i, seed=self.seed, max_objects=objects_at(progress)) for i in range(count)
        ]
        self.drawn += count
        pixels, cells = look(scenes)
        features = image_features(self.model, pixels)
        seen = probe_loss(self.probe(features), cells)
        report = {"cells": seen.item()}
        if looking:
            seen.backward()
        else:
            answers, right = answer_loss(self.model, features, pack(scenes, self.tokenizer))
            (answers + 0.3 * seen).backward()
            report |= {"answer": answers.item(), "tens": right.item()}
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * schedule(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # Early on a long average would only remember the random start.
        keep = min(self.ema, self.step / (self.step + 10))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)
        return report

    def save_state(self, path: Path) -> None:
        """Write all that `load_state` needs to go on as if nothing had happened."""
        state = {
            "step": self.step,
            "drawn": self.drawn,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "probe": self.probe.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def load_state(self, path: Path) -> None:
        """Take up the run that `save_state` put down."""
        state = torch.load(path, weights_only=True)
        self.step, self.drawn, self.seconds = state["step"], state["drawn"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.probe.load_state_dict(state["probe"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def export(self, folder: Path) -> None:
        """Write the averaged weights and the processor as an ordinary checkpoint."""
        self.average.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def corpus() -> Iterator[str]:
    """Questions to train the tokenizer on."""
    return (DIALECT.ask(e) for i in range(4000) for o in scene("train", i).objects for e in o.expressions)


def objects_at(progress: float) -> int:
    """Most objects per scene at this point: all while only looking; then one, two, and all again to read about."""
    reading = progress - LOOK
    return 1 if 0 <= reading < 0.03 else 2 if 0 <= reading < 0.1 else MAX_OBJECTS


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lmms_plugin.demo.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--steps", type=int, help="length of the run in steps (reproducible)")
    budget.add_argument("--minutes", type=float, help="length of the run in minutes (depends on the machine)")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint/, state.pt and log.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="scenes per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--ema", type=float, default=0.998, help="decay of averaged weights (default: %(default)s)")
    parser.add_argument("--evaluate-every", type=int, default=500, help="steps between scores (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train, score on held-out scenes of the split "val" now and then, and write the checkpoint."""
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(build_tokenizer(corpus()), args.seed, args.batch_size, args.lr, args.ema)
    if (args.out / "state.pt").exists():
        run.load_state(args.out / "state.pt")
    held_out = [scene("val", i, seed=1) for i in range(60)]
    begin = time.monotonic() - run.seconds
    while True:
        run.seconds = time.monotonic() - begin
        progress = run.step / args.steps if args.steps else run.seconds / 60 / args.minutes
        report = run.advance(min(progress, 1.0)) if progress < 1 else {}
        scored = not report or run.step % args.evaluate_every == 0
        if scored:
            found = np.array(overlaps(run.average, run.processor, held_out))
            report |= {"acc@0.5": float((found >= 0.5).mean()), "iou": float(found.mean())}
            run.save_state(args.out / "state.pt")
            run.export(args.out / "checkpoint")
        if scored or run.step % 25 == 0:
            line = {"step": run.step, "seconds": round(run.seconds), "progress": round(progress, 4)}
            line |= {name: round(value, 4) for name, value in report.items()}
            with (args.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(line, flush=True)
        if progress >= 1:
            return


if __name__ == "__main__":
    main()
