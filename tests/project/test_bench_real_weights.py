"""Perplexity as the benchmark on real weights measures it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from lmms_plugin.demo import CHECKPOINT

LENGTH = 512


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from bench import real_weights

    assert real_weights.LENGTH == LENGTH
    return real_weights


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(bench, tokenizer):
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
    torch.nn.init.zeros_(model.lm_head.weight)
    rows = bench.held_out_rows(tokenizer, ["a red circle " * LENGTH], 2 * LENGTH)[:, :64]
    predicted = bench.predictions(model, rows)
    assert bench.perplexity(predicted, rows) == pytest.approx(model.lm_head.out_features, rel=1e-4)


def test_perplexity_is_that_of_the_models_own_loss(bench, tokenizer):
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
    row = bench.held_out_rows(tokenizer, ["Locate the red circle. " * LENGTH], LENGTH)[:, :64]
    with torch.no_grad():
        loss = model(input_ids=row, labels=row).loss
    assert bench.perplexity(bench.predictions(model, row), row) == pytest.approx(float(loss.exp()), rel=1e-4)


def test_divergence_is_that_of_two_coins(bench):
    fair, loaded = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    # ½ ln(½ / ¼) + ½ ln(½ / ¾), and nothing where predictions are equal.
    expected = 0.5 * torch.tensor(4 / 3).log()
    assert bench.divergence([fair, fair], [loaded, fair]) == pytest.approx(float(expected) / 2, rel=1e-6)


def test_rows_are_spread_over_the_text_and_too_little_of_it_is_an_error(bench, tokenizer):
    text = " ".join(f"{number}" for number in range(4000))
    rows = bench.held_out_rows(tokenizer, [text], 2 * LENGTH)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    last = len(ids) // LENGTH - 1
    assert rows.tolist() == [ids[:LENGTH], ids[last * LENGTH : (last + 1) * LENGTH]]
    with pytest.raises(ValueError, match=f"expected {100 * LENGTH} tokens of text, got {len(ids)}"):
        bench.held_out_rows(tokenizer, [text], 100 * LENGTH)


def test_cases_are_quantized_as_for_an_evaluation(bench):
    texts = ["Locate the red circle. " * LENGTH]
    dense, case = bench.run(CHECKPOINT, ["method=rtn,bits=2"], texts, LENGTH)
    assert (dense["case"], dense["ratio"]) == ("method=none", 1)
    assert case["bits_per_weight"] < 3
    assert dense["divergence"] == 0 < case["divergence"]
    assert case["ratio"] == pytest.approx(dense["perplexity"] / case["perplexity"]) != 1
