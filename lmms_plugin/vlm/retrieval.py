"""Retrieval checkpoints of BLIP-2, which write nothing: they say how well a caption fits a photograph.

As in the authors' evaluation (LAVIS, `compute_sim_matrix`), the projections of image and text give a similarity (ITC)
for every pair, at the cost of one pass per image and one per caption; the matching head (ITM), which reads both
together, is shown the `NEAREST` captions of every photograph and the `NEAREST` photographs of every caption by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from lmms_plugin.protocol.prompts import PromptReader, RequestError
from lmms_plugin.utils.processes.out_of_memory import while_answering
from lmms_plugin.vlm.assembling import encoded_scores
from lmms_plugin.vlm.contracts.engine import ContinuationScore
from lmms_plugin.vlm.contracts.requests import Request, candidates_of
from lmms_plugin.vlm.contracts.responding import Usage

NEAREST = 128
AT_ONCE = 16
TEXT_TOKENS = 35
WORDS = 50


@dataclass
class Matcher:
    """A retrieval checkpoint, ready to score.

    Attributes:
        model: `Blip2ForImageTextRetrieval`.
        processor: of the same checkpoint.
        batch_size: images, or pairs of image and caption, that go through the model together.
        nearest: how many of each are shown to the matching head.
    """

    model: Any
    processor: Any
    batch_size: int = AT_ONCE
    nearest: int = NEAREST

    @torch.no_grad()
    def scores(self, requests: Sequence[Request], reader: PromptReader, processes: int) -> list[str]:
        """Score the candidates of every request.

        Args:
            requests: each names candidates; those with the same ones form a pool.
            reader: of messages.
            processes: how many share the requests; more than one does not see all photographs of a pool.

        Returns:
            For each request an encoded `Response` with the scores `itc`, cosines, and `itm`, logits, the latter None
            where the matching head was not shown the pair.

        Raises:
            RequestError: a document cannot be read, or a pool is too large to be shared among processes.
        """
        pools: dict[tuple[str, ...], list[int]] = {}
        seen: list[Tensor] = []
        for index, request in enumerate(tqdm(requests, desc="Reading images")):
            messages, texts = candidates_of(request)
            images = reader.read(messages, request.name).images
            if len(images) != 1:
                raise RequestError(f"{request.name}: captions fit one image, got {len(images)}")
            seen.append(self._see(images[0]))
            pools.setdefault(tuple(texts), []).append(index)
        encoded = [""] * len(requests)
        for pool, members in pools.items():
            if processes > 1 and len(pool) > self.nearest:
                raise RequestError(
                    f"{requests[members[0]].name}: the nearest photographs of a caption are looked for among all of "
                    f"them, which {processes} processes share: run one, or pools of at most {self.nearest} captions"
                )
            for index, scores in zip(members, self._of_pool([seen[i] for i in members], pool), strict=True):
                encoded[index] = scores
        return encoded

    def _of_pool(self, seen: Sequence[Tensor], texts: Sequence[str]) -> Iterator[str]:
        read = [self._read(text) for text in texts]
        similarity = self.similarity(seen, read)
        chosen = _nearest(similarity, self.nearest) | _nearest(similarity.T, self.nearest).T
        matched = torch.full_like(similarity, torch.nan)
        pairs = chosen.nonzero().tolist()
        for start in tqdm(range(0, len(pairs), self.batch_size), desc="Matching"):
            part = pairs[start : start + self.batch_size]
            logits = self.matching([seen[i] for i, _ in part], [read[j] for _, j in part])
            for (i, j), logit in zip(part, logits.tolist(), strict=True):
                matched[i, j] = logit
        for cosines, logits in zip(similarity.tolist(), matched.tolist(), strict=True):
            itm = tuple(None if logit != logit else logit for logit in logits)
            yield encoded_scores({"itc": tuple(cosines), "itm": itm})

    def similarity(self, seen: Sequence[Tensor], read: Sequence[Tensor]) -> Tensor:
        """Return the cosine of every pair, shape (images, texts): of a text and the image's query nearest to it."""
        texts = torch.cat([self._text_feature(ids) for ids in read])
        rows = []
        for start in range(0, len(seen), self.batch_size):
            queries = self._image_features(torch.stack([one for one in seen[start : start + self.batch_size]]))
            rows.append((queries @ texts.T).amax(dim=1))
        return torch.cat(rows).float().cpu()

    def matching(self, seen: Sequence[Tensor], read: Sequence[Tensor]) -> Tensor:
        """Return the logit that image and text of each pair fit, shape (pairs,)."""
        embeds = self._on_device(torch.stack(list(seen)))
        longest = max(map(len, read))
        ids = torch.zeros(len(read), longest, dtype=torch.long)
        mask = torch.zeros(len(read), longest, dtype=torch.long)
        for row, text in enumerate(read):
            ids[row, : len(text)], mask[row, : len(text)] = text, 1
        ids, mask = ids.to(embeds.device), mask.to(embeds.device)
        queries = self.model.query_tokens.expand(len(read), -1, -1)
        with while_answering(len(read)):
            output = self.model.qformer(
                query_embeds=self.model.embeddings(input_ids=ids, query_embeds=queries),
                query_length=queries.shape[1],
                attention_mask=torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1),
                encoder_hidden_states=embeds,
                encoder_attention_mask=_all_of(embeds),
            ).last_hidden_state
        head = self.model.itm_head
        logits: Tensor = head(output[:, : queries.shape[1]].to(_dtype(head, self.model)))[:, :, 1].float().mean(1)
        return logits

    def _see(self, image: Image.Image) -> Tensor:
        """Return what the vision tower makes of an image, shape (patches, width), on the CPU."""
        pixels = self.processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
        with while_answering(1):
            states: Tensor = self.model.vision_model(pixel_values=self._on_device(pixels)).last_hidden_state
        return states[0].cpu()

    def _read(self, text: str) -> Tensor:
        """Return the token ids of a caption, shape (tokens,), as the authors clean and cut it."""
        ids = self.processor.tokenizer(cleaned(text), truncation=True, max_length=TEXT_TOKENS)["input_ids"]
        return torch.tensor(ids)

    def _text_feature(self, ids: Tensor) -> Tensor:
        embedded = self.model.embeddings(input_ids=ids[None].to(self.model.device))
        mask = torch.ones(1, len(ids), dtype=torch.long, device=self.model.device)
        states = self.model.qformer(query_embeds=embedded, query_length=0, attention_mask=mask).last_hidden_state
        return self._projected(self.model.text_projection, states[:, 0])

    def _image_features(self, seen: Tensor) -> Tensor:
        embeds = self._on_device(seen)
        queries = self.model.query_tokens.expand(len(seen), -1, -1)
        with while_answering(len(seen)):
            states = self.model.qformer(
                query_embeds=queries, encoder_hidden_states=embeds, encoder_attention_mask=_all_of(embeds)
            ).last_hidden_state
        return self._projected(self.model.vision_projection, states)

    def _projected(self, projection: Any, states: Tensor) -> Tensor:
        return normalize(projection(states.to(_dtype(projection, self.model))).float(), dim=-1)

    def _on_device(self, values: Tensor) -> Tensor:
        return values.to(self.model.device, self.model.dtype)


@dataclass
class Retrieval:
    """Responds to requests with a retrieval checkpoint, which scores candidates and writes nothing; a `Responder`.

    Attributes:
        matcher: the checkpoint.
        reader: of messages.
        name: of the checkpoint, for messages to the user.
        processes: how many share the requests.
        usage: nothing, for it generates no tokens.
    """

    matcher: Matcher
    reader: PromptReader
    name: str
    processes: int = 1
    usage: Usage = field(default_factory=Usage)

    @property
    def batch_size(self) -> int:
        """Images, or pairs of image and caption, that go through the model together."""
        return self.matcher.batch_size

    def generate(self, requests: Sequence[Request]) -> list[str]:
        """Score the candidates of every request; see `Matcher.scores`."""
        self._refuse([request for request in requests if not request.options.get("candidates")])
        return self.matcher.scores(requests, self.reader, self.processes) if requests else []

    def generate_rounds(self, requests: Sequence[Request]) -> list[list[str]]:
        """Refuse every request."""
        self._refuse(requests)
        return []

    def scores(self, requests: Sequence[Request]) -> list[ContinuationScore]:
        """Refuse every request."""
        self._refuse(requests)
        return []

    def _refuse(self, requests: Sequence[Request]) -> None:
        if requests:
            raise RequestError(
                f"{requests[0].name}: {self.name} is a retrieval checkpoint, which writes nothing; "
                "it scores captions (flickr30k_retrieval)"
            )


def is_matcher(model: Any) -> bool:
    """Return whether a model scores captions and writes none."""
    return hasattr(model, "itm_head")


def cleaned(caption: str) -> str:
    """Return a caption as the authors' evaluation reads it: lower case, without punctuation, at most `WORDS` words."""
    text = re.sub(r"\s{2,}", " ", re.sub(r"([.!\"()*#:;~])", " ", caption.lower()))
    return " ".join(text.strip().split(" ")[:WORDS])


def _nearest(similarity: Tensor, count: int) -> Tensor:
    """Return which columns are among the `count` largest of their row, shape of `similarity`, bool."""
    columns = similarity.topk(min(count, similarity.shape[1]), dim=1).indices
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, columns, True)


def _all_of(embeds: Tensor) -> Tensor:
    return torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)


def _dtype(layer: Any, model: Any) -> torch.dtype:
    weight = getattr(layer, "weight", None)
    dtype: torch.dtype = weight.dtype if isinstance(weight, Tensor) else model.dtype
    return dtype
