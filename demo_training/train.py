"""Train the demo checkpoint from scratch on one CPU core.

    python -m demo_training.train --out runs/demo --steps 3600

Scenes are drawn on the fly from the split "train", so no scene is seen twice: first scenes of up to four objects
only to look at, then scenes of one, two, three and four objects to answer questions about. The questions about one
scene share a sequence: each attends to the image and to itself only, and its positions restart after the image, so
that each sees exactly what it sees alone at evaluation. While training, a linear probe on the image tokens must name,
for each cell of the picture, the attributes and the box digits of the object there, and halfway through the language
model a pointer must find the cells of the object meant; both are thrown away at the end. A run is a function of
(seed, steps) on one machine; with --minutes the learning rate follows the clock instead.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Idefics3ForConditionalGeneration, PreTrainedTokenizerFast

from demo_training.architecture import DIALECT, WIDTH, build_model, build_processor, build_tokenizer
from demo_training.evaluate import about_scenes, overlaps
from demo_training.packing import IGNORED, PROBE, Questions, look, pack, visible
from lmms_plugin.demo.scenes import MAX_OBJECTS, scene

# Share of the steps in which only the eyes learn, on LOOK_AT times as many scenes, without the cost of text.
LOOK = 0.2
LOOK_AT = 3
# From here on the eyes also learn from the answers.
LISTEN = 0.3
# Parts of the reading phase after which scenes have two, three and four objects.
LESSONS = (0.06, 0.15, 0.25)


def image_features(model: Idefics3ForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the language model sees of each scene: (B, C, WIDTH)."""
    features: Tensor = model.model.connector(model.model.vision_model(pixel_values=pixels).last_hidden_state)
    return features


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
    loss: Tensor = torch.stack(terms[:4]).sum() + torch.stack(terms[4:]).mean() + 10 * error
    return loss


class Reading(NamedTuple):
    """How well a batch of questions was answered."""

    answer: Tensor  # cross-entropy of the answers' tokens
    pointing: Tensor  # cross-entropy of where, halfway through the layers, each answer token looks
    tens: Tensor  # share of answers whose four tens digits are right, each given the true digits before it


class Pointer(nn.Module):
    """Throw-away heads that say, halfway through the language model, which cells an answer is about."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, asking: Tensor, cells: Tensor) -> Tensor:
        """Log-probabilities (n, C) of tokens (n, WIDTH) looking at their own scenes' cells (n, C, WIDTH)."""
        scores: Tensor = torch.einsum("nd,ncd->nc", self.query(asking), self.key(cells)) / WIDTH**0.5
        return scores.log_softmax(-1)


def read(model: Idefics3ForConditionalGeneration, pointer: Pointer, features: Tensor, questions: Questions) -> Reading:
    """Answer packed questions about scenes whose image features (B, C, WIDTH) are given."""
    text = model.model.text_model
    embedded = text.get_input_embeddings()(questions.ids)
    at_image = questions.ids == model.config.image_token_id
    outputs = text(
        inputs_embeds=embedded.masked_scatter(at_image[..., None], features),
        attention_mask=visible(questions.segments),
        position_ids=questions.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    asked = questions.labels != IGNORED
    logits, labels = model.lm_head(outputs.last_hidden_state[asked]), questions.labels[asked]
    # Every answer has 14 tokens: "[", four times two digits and a separator, the end mark.
    right = (logits.argmax(-1) == labels).view(-1, 14)[:, 1:12:3].all(1).float().mean()
    halfway = outputs.hidden_states[len(text.layers) // 2]
    of = asked.nonzero()[:, 0]
    looks = pointer(halfway[asked], halfway[at_image].view(features.shape)[of])
    pointing = -(questions.shares[of, questions.meant[asked]] * looks).sum(-1).mean()
    return Reading(functional.cross_entropy(logits, labels), pointing, right)


def muon(matrices: list[nn.Parameter], lr: float) -> torch.optim.Muon:
    """Muon whose learning rate is comparable with AdamW's (update RMS 0.2, Liu et al., arXiv 2502.16982)."""
    return torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")


def build_optimizers(model: nn.Module, heads: list[nn.Module], lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head, patches, norms and biases."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = ".layers." in name or "connector" in name
        (matrices if inside and parameter.ndim == 2 else rest).append(parameter)
    rest += [parameter for head in heads for parameter in head.parameters()]
    return [
        muon(matrices, lr),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def schedule(progress: float) -> float:
    """Learning-rate factor, once for looking (up to 1, down to 0.15) and once for reading (up to 0.4, down to 0)."""
    if progress < LOOK:
        return 0.15 + 0.85 * _arch(progress / LOOK, warm=0.05, hold=0.5)
    return 0.4 * _arch((progress - LOOK) / (1 - LOOK), warm=0.03, hold=0.3)


def _arch(part: float, warm: float, hold: float) -> float:
    """Rise from 0 to 1 until `warm`, stay until `hold`, fall to 0 as a half cosine; all in fractions of the phase."""
    if part < hold:
        return min(part / warm, 1.0)
    return 0.5 * (1 + math.cos(math.pi * min((part - hold) / (1 - hold), 1.0)))


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
        self.pointer = Pointer()
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizers = build_optimizers(self.model, [self.probe, self.pointer], lr)
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
            # A language model that knows nothing yet would only unteach the eyes.
            given = features.detach() if progress < LISTEN else features
            reading = read(self.model, self.pointer, given, pack(scenes, self.tokenizer))
            (reading.answer + 0.3 * reading.pointing + 0.3 * seen).backward()
            report |= {name: value.item() for name, value in reading._asdict().items()}
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
            "pointer": self.pointer.state_dict(),
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
        self.pointer.load_state_dict(state["pointer"])
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
    """Most objects per scene at this point: all while only looking, then one more with every lesson."""
    reading = (progress - LOOK) / (1 - LOOK)
    return MAX_OBJECTS if reading < 0 else 1 + sum(reading >= lesson for lesson in LESSONS)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo_training.train", description=__doc__)
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
    held_out = about_scenes(scene("val", i, seed=1) for i in range(60))
    begin = time.monotonic() - run.seconds
    while True:
        run.seconds = time.monotonic() - begin
        progress = run.step / args.steps if args.steps else run.seconds / 60 / args.minutes
        report = run.advance(min(progress, 1.0)) if progress < 1 else {}
        scored = not report or run.step % args.evaluate_every == 0
        if scored:
            if progress >= LOOK:
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
