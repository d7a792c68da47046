"""Answers of a reference forced through a quantized model, against plain forward passes, and what is refused."""

from dataclasses import replace

import pytest
import torch
from helpers.prefix import QUESTIONS, Documents, ask, instance
from PIL import Image
from transformers import AutoModelForImageTextToText

from lmms_plugin.protocol.prompts import Grounding, Prompt
from lmms_plugin.protocol.response import Response
from lmms_plugin.utils import tensor_files
from lmms_plugin.utils.processes import free_memory
from lmms_plugin.vlm import kept_reference, reference_loading, reference_model
from lmms_plugin.vlm import wrapper as models
from lmms_plugin.vlm.kept_reference import digest_of

pytestmark = pytest.mark.model


EVERY = tuple(range(len(QUESTIONS)))


def load(path, model=models.QuantRtn, **arguments):
    vlm = model(pretrained=str(path), device="cpu", reference="none", **arguments)
    vlm.task_dict = {"toy": {"test": Documents(QUESTIONS)}}
    return vlm


def asked(vlm, questions=EVERY):
    return [Response.decode(one) for one in vlm.generate_until([instance(k) for k in questions])]


@pytest.fixture(scope="module")
def quantized(checkpoint):
    return load(checkpoint("qwen2_5_vl"), bits=2, group_size=16)


@pytest.fixture(scope="module")
def answers(quantized):
    return asked(quantized)


def forward(model, inputs, ids):
    """Log-probabilities at each of the ids behind a prompt, from one forward pass."""
    given = torch.tensor([ids])
    whole = dict(inputs, input_ids=torch.cat([inputs["input_ids"], given], dim=1))
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = torch.cat([whole["mm_token_type_ids"], torch.zeros_like(given)], dim=1)
    begin = inputs["input_ids"].shape[1] - 1
    with torch.no_grad():
        return model(**whole).logits[0, begin : begin + len(ids)].log_softmax(-1).double()


def test_divergences_are_those_of_plain_forward_passes(quantized, answers):
    reference = AutoModelForImageTextToText.from_pretrained(quantized.arguments.pretrained).eval()
    for k in (0, 1):
        prompt = quantized.reader.read(ask(QUESTIONS[k]), "toy")
        inputs = quantized.chat.encode([prompt]).inputs
        with torch.no_grad():
            written = reference.generate(**inputs, max_new_tokens=8, do_sample=False)
        ids = written[0, inputs["input_ids"].shape[1] :].tolist()
        p, q = forward(reference, inputs, ids), forward(quantized.model, inputs, ids)
        found = answers[k].forced
        assert len(found.divergences) == len(ids)
        assert found.divergences == pytest.approx((p.exp() * (p - q)).sum(1).tolist(), rel=1e-3, abs=1e-6)
        assert list(found.agreed) == (p.argmax(1) == q.argmax(1)).tolist()
        for tokens, logs in ((found.reference, p), (found.model, q)):
            expected = logs.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
            assert [token.logprob for token in tokens] == pytest.approx(expected, abs=1e-4)
        # Two bits do something to these models.
        assert max(found.divergences) > 0.01


def test_answers_are_those_without_a_reference_and_come_in_parts_of_any_size(quantized, answers, monkeypatch):
    monkeypatch.setattr(reference_model, "MOST_AT_ONCE", 3)
    for one, other in zip(asked(quantized), answers, strict=True):
        assert one.forced.divergences == pytest.approx(other.forced.divergences, rel=1e-3, abs=1e-6)
    alone = models.QuantRtn(
        pretrained=quantized.arguments.pretrained, device="cpu", bits=2, group_size=16, batch_size=8
    )
    alone.task_dict = quantized.task_dict
    assert [one.text for one in asked(alone)] == [one.text for one in answers]
    assert all(one.forced is None for one in asked(alone, [0]))


def test_an_unquantized_model_is_nowhere_from_its_reference(checkpoint):
    for one in asked(load(checkpoint("qwen2_5_vl"), models.QuantNone), [0, 1, 2]):
        assert max(one.forced.divergences) < 1e-6
        assert all(one.forced.agreed)
        assert one.text == "".join(token.text for token in one.forced.reference)


def test_the_speed_of_a_run_is_that_of_its_own_answers(quantized, answers):
    usage = quantized.responder.usage
    before = usage.tokens
    (one,) = asked(quantized, [0])
    assert quantized.responder.usage.tokens - before == len(one.tokens)


def test_too_little_memory_for_both_is_told_in_one_line(checkpoint, monkeypatch):
    monkeypatch.setattr(reference_loading.DenseBudget, "left", lambda self, device: 100)
    with pytest.raises(ValueError, match=r"both models do not fit in memory together: it takes .* are left for it"):
        _ = load(checkpoint("qwen2_5_vl"), bits=4, group_size=16).model
    assert free_memory.free_host_bytes() > 100


def test_another_vocabulary_is_refused_before_weights_are_read(checkpoint):
    with pytest.raises(ValueError, match="has another vocabulary than"):
        models.QuantRtn(
            pretrained=str(checkpoint("qwen2_5_vl")), device="cpu", bits=4, reference=str(checkpoint("llava"))
        )


def test_a_quantized_checkpoint_is_no_reference_of_itself(checkpoint):
    with pytest.raises(ValueError, match="is quantized itself; name the checkpoint that it was made of"):
        models.QuantPrequantized(pretrained=str(checkpoint("qwen2_5_vl")), device="cpu", reference="none")


@pytest.fixture
def generating(monkeypatch):
    """Answers that references have written, one after the other."""
    original, written = reference_model.DistributionKeeper.row, []

    def row(self, index, length):
        written.append(1)
        return original(self, index, length)

    monkeypatch.setattr(reference_model.DistributionKeeper, "row", row)
    return written


def test_runs_share_the_answers_of_a_reference_to_the_last_bit(checkpoint, tmp_path, generating, monkeypatch):
    monkeypatch.setattr(reference_model, "MOST_AT_ONCE", 4)
    path, shared = checkpoint("qwen2_5_vl"), {"shared_folder": str(tmp_path)}
    for bits in (2, 4):
        alone = asked(load(path, bits=bits, group_size=16))
        assert sum(generating) == len(QUESTIONS)
        generating.clear()
        assert asked(load(path, bits=bits, group_size=16, **shared)) == alone
        # The second one has its answers from the first.
        assert sum(generating) == (len(QUESTIONS) if bits == 2 else 0)
        generating.clear()
    # A part whose file is damaged is answered again, and no other.
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == -(-len(QUESTIONS) // 4)
    content = files[0].read_bytes()
    kept, about = tensor_files.read_with(files[0])
    # They are mapped from the file that is about to change.
    kept = {name: one.clone() for name, one in kept.items()}
    files[0].write_bytes(content[:-5] + bytes(5))
    assert asked(load(path, bits=4, group_size=16, **shared)) == alone
    assert 0 < sum(generating) <= 4
    again, told = tensor_files.read_with(files[0])
    assert told == about
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_an_answer_to_another_question_is_not_taken(checkpoint, tmp_path, generating):
    path, shared = checkpoint("qwen2_5_vl"), {"shared_folder": str(tmp_path)}
    asked(load(path, bits=4, group_size=16, **shared), [0, 1])
    generating.clear()
    changed = load(path, bits=4, group_size=16, **shared)
    # The same places of a dataset that has changed.
    changed.task_dict = {"toy": {"test": Documents(QUESTIONS[::-1])}}
    plain = load(path, bits=4, group_size=16)
    plain.task_dict = changed.task_dict
    assert asked(changed, [0, 1]) == asked(plain, [0, 1])
    assert sum(generating) == 4


def test_answers_that_find_no_room_are_not_kept(checkpoint, tmp_path, generating, monkeypatch):
    monkeypatch.setattr(kept_reference.KeptReference.__init__, "__defaults__", (1000,))
    path, shared = checkpoint("qwen2_5_vl"), {"shared_folder": str(tmp_path)}
    first, second = (asked(load(path, bits=4, group_size=16, **shared), [0, 1]) for _ in range(2))
    assert first == second
    assert sum(generating) == 4
    assert not list(tmp_path.rglob("*.safetensors"))


def test_questions_differ_by_all_that_is_shown_and_said(tmp_path):
    video = tmp_path / "a.mp4"
    video.write_bytes(b"frames")
    image = {"type": "image", "image": Image.new("RGB", (8, 8), "red")}
    text, shown = {"type": "text", "text": "what?"}, {"type": "video", "video": str(video)}
    conversations = [
        [("user", [image, text])],
        [("user", [text, image])],
        [("system", [image, text])],
        [("user", [image]), ("assistant", [text])],
        [("user", [shown, text])],
    ]
    prompts = [Prompt("", tuple({"role": r, "content": c} for r, c in one)) for one in conversations]
    prompts += [replace(prompts[0], grounding=Grounding("what?", (8, 8), digits)) for digits in (False, True)]
    digests = [digest_of(prompt) for prompt in prompts]
    assert len(set(digests)) == len(prompts)
    assert digests == [digest_of(replace(prompt, name="another place")) for prompt in prompts]
    video.write_bytes(b"others")
    assert [digest_of(prompt) for prompt in prompts if prompt.videos] != [digests[4]]
