"""Requests per second of `quant_served`: beside vLLM's own offline `chat`, beside lmms-eval's `openai`, and alone.

    python -m bench.served [--images N] [--repeats N] [--client-images N] [--json FILE]
    VLLM_ENV=FOLDER python -m bench.served      with the real vLLM (see `make test-served`)

The checkpoint is that of `bench.throughput`, a Qwen2.5-VL of 100 million random parameters; seven questions are asked
about each photograph of 640×480, answers are 24 tokens long, and every pass has photographs of its own.

`vllm` cases need VLLM_ENV: the same requests through our client and through lmms-eval's `openai` class with its
defaults, both to one server, and through `LLM.chat` with the same settings, whose engine and worker have processes of
their own, too; they take turns. `ratio` is the other's time over ours (wall clock); `processor_ratio` is the same of
the processor's time, of server and client together, which other work on the machine disturbs less. `waiting` is our
client when the others of an image wait for its first answer, as they do with servers other than vLLM. `ceiling` is the
`openai` class's time over that of the engine alone: no client of this engine on this machine is faster than that class
by more, unless its own work overlaps with the engine's.

`client` cases need no engine: a server in a process of its own answers after 50 ms with the same words each time, 64
requests are in flight. `asking` is what the client sustains when all images have been prepared, with
`processor_ms` of the client's process per request; `preparing` is what reading, resizing and compressing cost; `whole`
is both together, beside lmms-eval's `openai`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from lmms_eval.models.chat.openai import OpenAICompatible
from transformers import AutoProcessor

from bench.reporting import Row, machine, write
from bench.shapes import write_checkpoint
from bench.throughput import ANSWER_TOKENS, documents, messages, requests
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.vlm.contracts.requests import Job, read
from lmms_plugin.vlm.contracts.settings import GenerationSettings
from lmms_plugin.vlm.generation.number_tokens import NumberTokens
from lmms_plugin.vlm.running.scheduling import by_image
from lmms_plugin.vlm.served.load import Flight
from lmms_plugin.vlm.served.model import QuantServed

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.vllm_server import NAME, SETTINGS, interpreter, serving

QUESTIONS = 7
CONTENT = "--chat-template-content-format openai"
"""vLLM takes the short template of this checkpoint for one of plain text, and puts a line break behind images."""
DELAY, IN_FLIGHT = 0.05, 64
LENGTH = 1024
_FOLDER = Path(__file__).parent
Ask = Callable[[dict[str, Any]], list[dict[str, Any]]]


def canned_answer(tokenizer: Any, *, telling: bool) -> dict[str, Any]:
    """An answer of `ANSWER_TOKENS` digits, with the log-probabilities of all others or with none, as vLLM gives it."""
    digits = NumberTokens(tokenizer).ids
    ids = [digits[place % len(digits)] for place in range(ANSWER_TOKENS)]
    others = [{"token": f"token_id:{index}", "logprob": -4.0, "bytes": None} for index in digits]
    content = [{"token": f"token_id:{index}", "logprob": -4.0, "bytes": None, "top_logprobs": others} for index in ids]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}
    choice |= {"logprobs": {"content": content} if telling else None, "token_ids": ids}
    return {"object": "chat.completion", "choices": [choice]}


@contextmanager
def canned(checkpoint: Path, folder: Path) -> Iterator[str]:
    """Address of a server that answers after `DELAY` seconds."""
    tokenizer = AutoProcessor.from_pretrained(checkpoint).tokenizer
    pages: dict[str, Any] = {
        "models": {"object": "list", "data": [{"id": NAME, "object": "model"}]},
        "plain": canned_answer(tokenizer, telling=False),
        "telling": canned_answer(tokenizer, telling=True),
    }
    files = [folder / f"{name}.json" for name in pages]
    for file, page in zip(files, pages.values(), strict=True):
        file.write_text(json.dumps(page))
    command = [sys.executable, "-m", "bench.canned_server", *map(str, files), str(DELAY)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        finally:
            server.kill()


def jobs_of(docs: ExpressionDocs, ask: Ask) -> list[Job]:
    """What our engine is handed for documents."""
    instances = requests(docs)
    for instance in instances:
        instance.arguments = (instance.args[0], ask, *instance.args[2:])
    read_requests = read(instances, {"bench": {"test": docs}})
    return [Job(one.first, one, GenerationSettings.from_kwargs(one.options)) for one in read_requests]


def client_rows(checkpoint: Path, folder: Path, images: int, repeats: int) -> Iterator[Row]:
    """What the client alone takes, without and with the evidence that confidence is estimated from."""
    with canned(checkpoint, folder) as url:
        for case, ask in (("plain", messages), ("confidence", comprehension.doc_to_messages)):
            vlm = QuantServed(pretrained=str(checkpoint), base_url=url, concurrency=IN_FLIGHT)
            engine = vlm.responder.engine  # type: ignore[attr-defined]
            jobs = jobs_of(documents(images, QUESTIONS), ask)
            units = by_image(jobs)
            engine.questions(jobs, units[0])
            took = Taken()
            prepared = [engine.questions(jobs, unit) for unit in units]
            yield {"case": f"client_preparing_{case}", "ratio": None, **took.per(len(jobs)), "images": images}
            flight: Flight[int, Any, Any] = Flight(prepared.__getitem__, engine.ask, engine.gate, 1, lambda: None)
            asked = [place for _ in range(repeats) for place in range(len(units))]
            took = Taken()
            answered = sum(1 for _ in flight.results(asked))
            yield {"case": f"client_asking_{case}", "ratio": None, **took.per(answered), "in_flight": IN_FLIGHT}
        yield whole_row(checkpoint, url, max(1, images // 8), repeats)


def whole_row(checkpoint: Path, url: str, images: int, repeats: int) -> Row:
    """A whole run of both clients, preparing included."""
    ways: dict[str, Any] = {
        "ours": QuantServed(pretrained=str(checkpoint), base_url=url, concurrency=IN_FLIGHT),
        "openai": OpenAICompatible(model=NAME, base_url=url, api_key="none"),
    }
    times: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for repeat in range(repeats):
        docs = documents(images, QUESTIONS, seed=repeat)
        for name, model in ways.items():
            model.task_dict = {"bench": {"test": docs}}
            took = Taken()
            model.generate_until(requests(docs))
            times[name].append(took.per(len(docs)))
    return compared("client_whole_vs_openai", times, "openai")


class Taken:
    """Clock of wall and processor since it was made, of this process and of given others with their children."""

    def __init__(self, *others: int) -> None:
        self.others = others
        self.started, self.processor = time.perf_counter(), self._processor()

    def _processor(self) -> float:
        found = [one for pid in self.others for one in (psutil.Process(pid), *_children(pid))]
        return time.process_time() + sum(sum(one.cpu_times()[:2]) for one in found)

    def per(self, count: int) -> dict[str, float]:
        """Rate and costs of so many requests."""
        seconds, processor = time.perf_counter() - self.started, self._processor() - self.processor
        return {
            "requests": count,
            "requests_per_s": count / seconds,
            "processor_ms": 1e3 * processor / count,
            "seconds": seconds,
        }


def _children(pid: int) -> list[psutil.Process]:
    return list(psutil.Process(pid).children(recursive=True))


def compared(case: str, times: dict[str, list[dict[str, float]]], baseline: str, subject: str = "ours") -> Row:
    """One row from medians of passes that took turns."""

    def median(name: str, what: str) -> float:
        return statistics.median(one[what] for one in times[name])

    return {
        "case": case,
        "ratio": median(baseline, "seconds") / median(subject, "seconds"),
        "processor_ratio": median(baseline, "processor_ms") / median(subject, "processor_ms"),
        "requests": times[subject][0]["requests"],
        "requests_per_s": median(subject, "requests_per_s"),
        "baseline_requests_per_s": median(baseline, "requests_per_s"),
        "processor_ms": median(subject, "processor_ms"),
        "baseline_processor_ms": median(baseline, "processor_ms"),
    }


@contextmanager
def offline(checkpoint: Path, folder: Path) -> Iterator[Callable[[Path], dict[str, float]]]:
    """A function that has vLLM's `LLM.chat` answer the conversations of a file."""
    command = [str(interpreter()), "-P", str(_FOLDER / "offline_vllm.py"), str(checkpoint), "float32", str(LENGTH)]
    settings = {**os.environ, **SETTINGS}
    with (
        (folder / "offline.log").open("wb") as log,
        subprocess.Popen(
            [*command, str(ANSWER_TOKENS)],
            env=settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as driver,
    ):
        assert driver.stdin is not None
        assert driver.stdout is not None
        lines = driver.stdout
        if not any(line.strip() == "READY" for line in lines):
            raise RuntimeError(f"vLLM did not start: {(folder / 'offline.log').read_text()[-3000:]}")

        def answer(conversations: Path) -> dict[str, float]:
            count, took = len(json.loads(conversations.read_text())), Taken(driver.pid)
            driver.stdin.write(f"{conversations}\n")  # type: ignore[union-attr]
            driver.stdin.flush()  # type: ignore[union-attr]
            next(line for line in lines if line.startswith('["DONE"'))
            return took.per(count)

        try:
            yield answer
        finally:
            driver.kill()


def sent(engine: Any, docs: ExpressionDocs) -> list[Any]:
    """Conversations as our client sends them."""
    jobs = jobs_of(docs, messages)
    asked = [question for unit in by_image(jobs) for question in engine.questions(jobs, unit)]
    conversations = []
    for question in asked:
        text = json.dumps(question.shown)
        for name, url in question.images.items():
            text = text.replace(name, url.decode())
        conversations.append(json.loads(text))
    return conversations


def engine_rows(checkpoint: Path, folder: Path, images: int, repeats: int) -> Iterator[Row]:
    """Our client and lmms-eval's on one server, and the engine alone, in turns."""
    with (
        serving(checkpoint, "float32", folder / "log", LENGTH, CONTENT) as (url, server),
        offline(checkpoint, folder) as chat,
    ):
        ways: dict[str, Any] = {
            "ours": QuantServed(pretrained=str(checkpoint), base_url=url),
            "openai": OpenAICompatible(model=NAME, base_url=url, api_key="none"),
            "waiting": QuantServed(pretrained=str(checkpoint), base_url=url),
        }
        ways["waiting"].responder.engine.first_alone = True
        times: dict[str, list[dict[str, float]]] = {name: [] for name in (*ways, "offline")}
        for repeat in range(repeats + 1):
            for number, (name, model) in enumerate(ways.items()):
                docs = documents(images, QUESTIONS, seed=10 * repeat + number + 1)
                model.task_dict = {"bench": {"test": docs}}
                took = Taken(server.pid)
                model.generate_until(requests(docs))
                times[name].append(took.per(len(docs)))
            file = folder / "conversations.json"
            file.write_text(
                json.dumps(sent(ways["ours"].responder.engine, documents(images, QUESTIONS, seed=10 * repeat + 9)))
            )
            times["offline"].append(chat(file))
    # The first pass of each warms up.
    later = {name: passes[1:] for name, passes in times.items()}
    for baseline in ("offline", "openai", "waiting"):
        yield {**compared(f"vllm_vs_{baseline}", later, baseline), "passes": later}
    yield compared("ceiling", later, "openai", subject="offline")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and optionally write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2, help="photographs of a pass through vLLM")
    parser.add_argument("--client-images", type=int, default=32, help="photographs of a pass of the client alone")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("client", "vllm"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = folder / "checkpoint"
        print(f"{write_checkpoint(checkpoint) / 1e6:.0f} M parameters; {machine()}")
        if options.only != "vllm":
            rows += _printed(client_rows(checkpoint, folder, options.client_images, options.repeats))
        if options.only != "client":
            if interpreter() is None:
                print("vLLM is left out: VLLM_ENV names no environment with it")
            else:
                rows += _printed(engine_rows(checkpoint, folder, options.images, options.repeats))
    write(options.json, rows)


def _printed(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        print(
            f"{row['case']:<28}{row['requests_per_s']:>10.1f}/s{row['processor_ms']:>10.2f} ms of the processor"
            f"{ratio:>8}{row.get('processor_ratio', 0):>8.2f}",
            flush=True,
        )
        yield row


if __name__ == "__main__":
    main()
