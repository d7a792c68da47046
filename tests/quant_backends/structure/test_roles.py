"""Which position of a calibration sample is image, prompt or answer, in every family; sums over the rows of each."""

import pytest
import torch
from helpers.families import FAMILIES
from transformers import AutoConfig, AutoProcessor

from lmms_plugin.protocol.boxes import Box
from lmms_plugin.protocol.dialects import dialect_for
from lmms_plugin.quant_backends.calibration.inputs import encode, question, shown, token_roles, written_answer
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.statistics import ROLES, SAMPLE_ROWS, InputStatistics, RowSample

IMAGE, TEXT, ANSWER = range(3)

# Placeholders of the image in the encoded text, as each family's processor writes them.
PLACEHOLDERS = {"qwen2_vl": "<|image_pad|>", "qwen2_5_vl": "<|image_pad|>", "qwen3_vl": "<|image_pad|>"}
PLACEHOLDERS |= {"internvl": "<IMG_CONTEXT>", "gemma3": "<image_soft_token>"}


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_of_every_position(checkpoint, family):
    path = checkpoint(family)
    processor, config = AutoProcessor.from_pretrained(path), AutoConfig.from_pretrained(path)
    dialect = dialect_for(family)
    sample = CalibrationSpec("self", 1).load_samples()[0]._replace(box=Box(0.25, 0.25, 0.5, 0.75))
    image, prompt = shown(sample, dialect, processor), question(sample, dialect)
    answer = written_answer(sample, dialect, processor)
    batch = encode(processor, image, prompt, answer)
    roles = token_roles(batch, encode(processor, image, prompt), config)
    ids = batch["input_ids"][0]
    placeholder = processor.tokenizer.convert_tokens_to_ids(PLACEHOLDERS.get(family, "<image>"))
    assert ids[roles == IMAGE].unique().tolist() == [placeholder]
    assert placeholder not in ids[roles != IMAGE]
    written = processor.tokenizer.decode(ids[roles == ANSWER])
    asked = processor.tokenizer.decode(ids[roles == TEXT])
    assert written.strip().startswith(answer.strip())
    assert len(written.strip()) <= len(answer.strip()) + len("<end_of_utterance>")
    assert prompt.strip() in asked
    assert answer.strip() not in asked
    # Answers end the sample: what comes before is all prompt.
    assert torch.equal(roles == ANSWER, torch.arange(len(ids)) >= int((roles == ANSWER).nonzero()[0]))


@pytest.mark.parametrize(
    ("answered", "message"),
    [([1, 2, 3, 4], "no position for its image"), ([9, 2, 3], "no position for its answer")],
)
def test_samples_without_image_or_answer_are_refused(answered, message):
    config = type("Config", (), {"image_token_id": 9})
    with pytest.raises(ValueError, match=message):
        token_roles({"input_ids": torch.tensor([answered])}, {"input_ids": torch.tensor([answered[:3]])}, config)


def test_the_answer_begins_where_the_encodings_part():
    config = type("Config", (), {"image_token_id": 9})
    asked = torch.tensor([[1, 9, 9, 2, 5]])
    answered = torch.tensor([[1, 9, 9, 2, 6, 7]])  # the tokenizer joined the prompt's last character to the answer
    roles = token_roles({"input_ids": answered}, {"input_ids": asked}, config)
    assert [ROLES[role] for role in roles] == ["text", "image", "image", "text", "answer", "answer"]


def test_sums_by_role_are_those_of_their_rows_alone():
    generator = torch.Generator().manual_seed(0)
    statistics = InputStatistics.empty(("layer",), 8, torch.device("cpu"), by_role=True)
    rows, roles = [], []
    for length in (5, 9, 3):
        x, role = torch.randn(1, length, 8, generator=generator), torch.arange(length, dtype=torch.uint8) % 3
        statistics.add(x, role)
        rows.append(x[0])
        roles.append(role)
    x, role = torch.cat(rows), torch.cat(roles)
    torch.testing.assert_close(statistics.gram, x.T @ x)
    assert statistics.rows == 17
    for name, place in (("image", IMAGE), ("answer", ANSWER)):
        mine, part = x[role == place], statistics.roles[name]
        torch.testing.assert_close(part.gram, mine.T @ mine)
        torch.testing.assert_close(part.mean_magnitude, mine.abs().mean(0))
        assert part.rows == len(mine)
        assert torch.equal(part.sample.rows, mine)


def test_rows_that_are_no_positions_count_in_the_total_alone():
    statistics = InputStatistics.empty(("layer",), 8, torch.device("cpu"), by_role=True)
    statistics.add(torch.ones(6, 8))
    assert statistics.rows == 6
    assert statistics.roles == {}
    with pytest.raises(ValueError, match="layer was fed 6 rows, but the roles of 5 are given"):
        statistics.add(torch.ones(6, 8), torch.zeros(5))


def test_sampled_rows_do_not_depend_on_how_they_come_and_stand_for_all():
    stream = torch.arange(4 * SAMPLE_ROWS, dtype=torch.float32).unsqueeze(1)
    whole, parts = RowSample(torch.empty(0, 1)), RowSample(torch.empty(0, 1))
    whole.add(stream)
    for part in stream.split(37):
        parts.add(part)
    assert torch.equal(whole.rows, parts.rows)
    assert len(whole.rows) == len(whole.rows.unique()) == SAMPLE_ROWS
    assert torch.equal(whole.rows, whole.rows.sort(0).values)
    # Uniform on 0..n has mean n / 2 and standard deviation n / √12: five standard errors of the mean.
    n = len(stream)
    assert abs(float(whole.rows.mean()) - n / 2) < 5 * n / (12 * SAMPLE_ROWS) ** 0.5
