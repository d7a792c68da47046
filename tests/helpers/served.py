"""Servers of OpenAI's API in the ways of several engines: they answer with the embedded demo, and fail when told to."""

import base64
import io
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from PIL import Image

from lmms_plugin.protocol.prompts import Prompt

ENGINES = ("vllm", "sglang", "lmdeploy", "llamacpp", "tensorrt_llm", "ollama", "ollama_cloud")
BLIND = ("ollama_cloud",)
"""Those that give no log-probabilities."""
SCORING = ("vllm", "sglang")
"""Those that tell likelihoods of given texts."""
OPENAIS = {
    *(
        "model",
        "messages",
        "max_tokens",
        "temperature",
        "top_p",
        "presence_penalty",
        "frequency_penalty",
        "n",
        "stream",
    ),
    *("seed", "stop", "logprobs", "top_logprobs"),
}


class DemoModel:
    """The embedded demo as a server has it: from messages of the API to tokens with their log-probabilities.

    Its faults, for tests of what finds them: `seen` turns an image into what the processor gets, `system` is a message
    that nobody asked for, `longest` cuts answers off, `options` of generation are its own, and `processed` takes
    log-probabilities after penalties.
    """

    def __init__(self, seen=lambda image: image, system=None, longest=10**6, processed=False, **options):
        from lmms_plugin.vlm.wrapper import QuantNone

        vlm = QuantNone(pretrained="demo", device="cpu")
        self.chat, self.model, self.ends = vlm.chat, vlm.model, vlm.responder.engine.decoder.ends
        self.tokenizer = self.chat.tokenizer
        self.lock = threading.Lock()
        self.seen, self.longest, self.processed, self.options = seen, longest, processed, options
        said = {"role": "system", "content": [{"type": "text", "text": system}]}
        self.before = [] if system is None else [said]

    def encoded(self, body):
        """Return the model's inputs for messages of the API, whose last is continued where the body says so."""
        messages = [{**one, "content": [self._part(part) for part in one["content"]]} for one in body["messages"]]
        messages = [*self.before, *messages]
        if not body.get("continue_final_message"):
            return self.chat.encode([Prompt("request", tuple(messages))]).inputs
        return self.chat.processor.apply_chat_template(
            messages, continue_final_message=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    def answer(self, body):
        """Return ids of the prompt, ids of the answer, and for each of these the log-probabilities of all tokens."""
        inputs = self.encoded(body)
        drawn = {"do_sample": True, "temperature": body["temperature"]} if body["temperature"] else {"do_sample": False}
        with self.lock, torch.no_grad():
            torch.manual_seed(body.get("seed", 0))
            made = self.model.generate(
                **inputs,
                **drawn,
                **self.options,
                max_new_tokens=min(body["max_tokens"], self.longest),
                eos_token_id=list(self.ends),
                output_logits=True,
                output_scores=True,
                return_dict_in_generate=True,
            )
        prompt = inputs["input_ids"][0].tolist()
        ids = made.sequences[0, len(prompt) :].tolist()
        return prompt, ids, [step[0].log_softmax(-1) for step in (made.scores if self.processed else made.logits)]

    def read(self, inputs):
        """Return ids of a whole prompt, and for each but the first the log-probabilities of all tokens in its place."""
        with self.lock, torch.no_grad():
            logits = self.model(**inputs).logits[0]
        return inputs["input_ids"][0].tolist(), list(logits.log_softmax(-1))[:-1]

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _part(self, part):
        if part["type"] == "text":
            return part
        return {"type": "image", "image": self.seen(_picture(part["image_url"]["url"]))}


def _picture(url):
    content = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    return Image.open(io.BytesIO(content)).convert("RGB")


@dataclass
class Reply:
    """What goes over the wire."""

    content: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    type: str = "application/json"
    cut: int = 0
    """Bytes that are promised and never sent."""

    @classmethod
    def of(cls, value, status=200, **headers):
        return cls(json.dumps(value).encode(), status, headers)


@dataclass
class FakeServer:
    """One engine's way of the API. `fault` may turn a request with its number into another reply."""

    model: DemoModel
    engine: str = "vllm"
    version: str = "0.32.0"
    fault: Callable[[int, dict[str, Any]], Reply | None] = lambda number, body: None
    change: Callable[[dict[str, Any]], Any] = lambda response: None
    models: tuple[str, ...] = ("demo",)
    key: str | None = None
    port: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    in_flight: list[int] = field(default_factory=lambda: [0, 0])
    lock: Any = field(default_factory=threading.Lock)

    def __enter__(self):
        self.http = _Quiet(("127.0.0.1", self.port), _handler(self))
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    @cached_property
    def _gets(self):
        owner = {"ollama": "library", "ollama_cloud": "library"}.get(self.engine, self.engine)
        listed = [{"id": name, "object": "model", "owned_by": owner, "max_model_len": 512} for name in self.models]
        pages = {"/v1/models": {"object": "list", "data": listed}}
        if self.engine == "vllm":
            config = {"model_config": {"dtype": "torch.float32", "quantization": None, "logprobs_mode": "raw_logprobs"}}
            pages |= {"/version": {"version": self.version}, "/server_info": {"vllm_config": config}}
        if self.engine == "sglang":
            pages["/get_server_info"] = {"version": "0.5.23", "quantization": "awq", "dtype": "float16"}
        if self.engine == "llamacpp":
            pages["/props"] = {
                "build_info": "b11434",
                "model_path": "/models/demo.gguf",
                "model_ftype": "Q4_K - Medium",
            }
        return pages

    def get(self, path):
        page = self._gets.get(path.partition("?")[0])
        return Reply.of({"detail": "Not Found"}, 404) if page is None else Reply.of(page)

    def post(self, body):
        with self.lock:
            number = len(self.requests)
            self.requests.append(body)
        broken = self.fault(number, body)
        if broken is not None:
            return broken
        if body.get("model", self.models[0]) not in self.models:
            return _refusal(404, f"The model `{body['model']}` does not exist.")
        if self.engine == "tensorrt_llm" and (strange := sorted(body.keys() - OPENAIS)):
            return _refusal(400, f"Extra inputs are not permitted: {strange[0]}")
        if body.get("top_logprobs", 0) > 20:
            return _refusal(400, "Requested sample logprobs of more than 20")
        response = self.generation(body) if "text" in body else self.completion(body)
        self.change(response)
        return Reply.of(response)

    def generation(self, body):
        """Answer as SGLang's `/generate` does: of the prompt's tokens from `logprob_start_len` on."""
        pictures = [_picture(url) for url in body["image_data"]]
        inputs = self.model.chat.processor(text=[body["text"]], images=[pictures], return_tensors="pt")
        ids, steps = self.model.read(inputs)
        start = body["logprob_start_len"]
        told = list(zip(ids[1:], steps, strict=True))[start:]
        best = [step.argmax().item() for _, step in told]
        values = [[None, ids[start], None], *([step[index].item(), index, None] for index, step in told)]
        top = [None, *([[step[index].item(), index, None]] for index, (_, step) in zip(best, told, strict=True))]
        meta = {"prompt_tokens": len(ids), "input_token_logprobs": values, "input_top_logprobs": top}
        return {"text": "?", "meta_info": meta}

    def completion(self, body):
        prompt, ids, steps = self.model.answer(body)
        ended = ids[-1] in self.model.ends
        shown = ids[:-1] if ended else ids
        text = self.model.text(shown)
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "stop" if ended else "length",
            "logprobs": None,
        }
        response = {"object": "chat.completion", "model": body["model"], "choices": [choice]}
        response["usage"] = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        if self.engine == "vllm" and body.get("return_token_ids"):
            response["prompt_token_ids"], choice["token_ids"] = prompt, ids
        if self.engine == "vllm" and body.get("prompt_logprobs") is not None:
            read, steps_read = self.model.read(self.model.encoded(body))
            places = zip(read[1:], steps_read, strict=True)
            response["prompt_logprobs"] = [None, *(_place(index, step) for index, step in places)]
        if body.get("logprobs") and self.engine not in BLIND:
            entries = zip(ids, steps, strict=True)
            choice["logprobs"] = {"content": [self._entry(index, step, body) for index, step in entries]}
        return response

    def _entry(self, index, step, body):
        named = body.get("logprob_token_ids") if self.engine == "vllm" else None
        others = named or step.topk(body.get("top_logprobs", 0)).indices.tolist()
        others = [*others, index] if named and index not in named else others
        entry = self._token(index, step, body)
        return {**entry, "top_logprobs": [self._token(other, step, body) for other in others]}

    def _token(self, index, step, body):
        text = self.model.text([index])
        told = {"token": text, "logprob": step[index].item(), "bytes": list(text.encode())}
        if self.engine == "vllm" and body.get("return_tokens_as_token_ids"):
            told["token"] = f"token_id:{index}"
        return {"id": index, **told} if self.engine == "llamacpp" else told


def _place(index, step):
    rank = int((step >= step[index]).sum())
    return {str(index): {"logprob": step[index].item(), "rank": rank, "decoded_token": "?"}}


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Say nothing of clients that hang up."""


def _refusal(status, message):
    return Reply.of({"error": {"message": message, "type": "BadRequestError", "code": status}}, status)


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self._send(server.get(self.path))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            given = self.headers.get("Authorization")
            server.keys.append(given)
            if server.key is not None and given != f"Bearer {server.key}":
                self._send(_refusal(401, f"Incorrect API key provided: {given}"))
                return
            with server.lock:
                server.in_flight[0] += 1
                server.in_flight[1] = max(server.in_flight)
            try:
                reply = server.post(body)
            finally:
                with server.lock:
                    server.in_flight[0] -= 1
            self._send(reply)

        def _send(self, reply):
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.type)
            self.send_header("Content-Length", str(len(reply.content) + reply.cut))
            for name, value in reply.headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(reply.content)
            if reply.cut:
                self.close_connection = True

        def log_message(self, *_):
            pass

    return Handler
