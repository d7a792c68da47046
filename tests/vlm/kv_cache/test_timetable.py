from itertools import pairwise

import pytest
import torch
from helpers.prefix import log
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, LlamaConfig

from lmms_plugin.quant_backends.plans.cache_spec import CacheSpec
from lmms_plugin.vlm.kv_cache.quantizer import CacheQuantizer

IMAGE, TEXT, PAD = 9, 1, 0
HEADS, WIDTH = 2, 32
FULL = LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=WIDTH)
WINDOW = Gemma3TextConfig(num_hidden_layers=1, head_dim=WIDTH, sliding_window=12, layer_types=["sliding_attention"])


def states(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, HEADS, tokens, WIDTH, generator=generator)


def run(rows, widths, spec, chunks=(), config=FULL, new=10, columns=None):
    """Feed prompts and new tokens; return what each token of the answer reads of a row's tokens.

    Args:
        rows: (ids, keys and values of all its tokens) per row.
        widths: columns of the prompts, with padding.
        spec: storage.
        chunks: columns after which a read ends before the last token's.
        config: of the language model.
        new: number of new tokens.
        columns: room.
    """
    ids = torch.tensor([[PAD] * (widths - len(ids)) + list(ids) for ids, _ in rows])
    filled = []
    for prompt, both in rows:
        padding = torch.full((2, HEADS, widths - len(prompt), WIDTH), 1e4)
        filled.append(torch.cat([padding, both[:, :, : len(prompt) + new]], dim=2))
    keys, values = torch.stack(filled, dim=1)
    quantizer = CacheQuantizer(spec, config, IMAGE, reads_last_apart=True)
    cache = quantizer.cache(ids, (ids != PAD).long(), columns=columns)
    ends = [*chunks, widths - 1, *range(widths, widths + new)]
    seen = []
    for start, end in zip([0, *ends], ends, strict=False):
        shown = cache.update(keys[:, :, start:end], values[:, :, start:end], 0)
        if end >= widths:
            seen.append(torch.stack(shown))
    quantizer.note(cache)
    per_row = [
        [one[:, row, :, max(0, one.shape[3] - len(ids) - k) :] for k, one in enumerate(seen)]
        for row, (ids, _) in enumerate(rows)
    ]
    return per_row, quantizer


PROMPTS = ([TEXT] * 5 + [IMAGE] * 14 + [TEXT] * 4, [IMAGE] * 3 + [TEXT] * 9, [TEXT] * 2 + [IMAGE] * 20)
SPECS = (
    CacheSpec(4, 4, group_size=8),
    CacheSpec(2, 8, group_size=4, keep_first=3, keep_last=5),
    CacheSpec(16, 2, group_size=8, part="keys"),
    CacheSpec(8, 8, "fp8_e4m3"),
    CacheSpec(2, 2, group_size=16, key_axis="token", part="values", keep_last=30),
)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name} {spec.group_size}")
class TestATokensPlaceAloneCounts:
    def rows(self):
        return [(ids, states(len(ids) + 10, seed)) for seed, ids in enumerate(PROMPTS)]

    @pytest.mark.parametrize("config", [FULL, WINDOW], ids=["full", "window"])
    def test_neither_padding_nor_other_rows(self, spec, config):
        together, _ = run(self.rows(), 30, spec, config=config)
        for row, both in zip(self.rows(), together, strict=True):
            (alone,), _ = run([row], len(row[0]), spec, config=config)
            for one, other in zip(alone, both, strict=True):
                shared = min(one.shape[2], other.shape[2])
                assert torch.equal(one[:, :, -shared:], other[:, :, -shared:])

    @given(data=st.data())
    def test_not_in_how_many_parts_a_prompt_is_read(self, spec, data):
        chunks = sorted(data.draw(st.sets(st.integers(1, 28), max_size=4)))
        expected, _ = run(self.rows(), 30, spec)
        for ours, theirs in zip(run(self.rows(), 30, spec, chunks, columns=45)[0], expected, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))

    def test_nothing_is_quantized_twice_or_lost(self, spec):
        """What a token reads of the others is what they were, or one rounding of it, and never changes again."""
        for (_, exact), shown in zip(self.rows(), run(self.rows(), 30, spec)[0], strict=True):
            for before, after in pairwise(shown):
                size = before.shape[2]
                changed = (after[:, :, :size] != before).any(dim=(1, 3))
                was_exact = (before == exact[:, :, :size]).all(dim=(1, 3))
                assert not (changed & ~was_exact).any()


class TestWhatIsQuantized:
    def exact(self, shown, both):
        """Whether each token's keys, and values, are as computed."""
        return (shown == both[:, :, : shown.shape[2]]).all(dim=(1, 3)).tolist()

    def shown(self, ids, spec, step=0):
        both = states(len(ids) + 10, 7)
        ((*steps,),), _ = run([(ids, both)], len(ids), spec)
        return self.exact(steps[step], both)

    def test_groups_end_where_images_end_and_the_last_one_waits(self):
        keys, values = self.shown([TEXT] * 3 + [IMAGE] * 6 + [TEXT] * 6, CacheSpec(2, 2, group_size=4))
        assert keys == [False] * 13 + [True] * 2
        assert values == [False] * 15
        keys, _ = self.shown([TEXT] * 3 + [IMAGE] * 6 + [TEXT] * 6, CacheSpec(2, 2, group_size=4), step=2)
        assert keys == [False] * 17

    def test_first_and_last_tokens_are_kept(self):
        keys, values = self.shown([TEXT] * 20, CacheSpec(2, 2, group_size=4, keep_first=2, keep_last=5))
        # Of tokens 2 to 14, three whole groups.
        assert keys == [True] * 2 + [False] * 12 + [True] * 6
        assert values == [True] * 2 + [False] * 13 + [True] * 5

    def test_image_tokens_alone(self):
        keys, values = self.shown([TEXT] * 3 + [IMAGE] * 6 + [TEXT] * 3, CacheSpec(16, 2, group_size=4))
        assert keys == values == [True] * 3 + [False] * 6 + [True] * 3

    def test_keys_alone(self):
        keys, values = self.shown([TEXT] * 8, CacheSpec(2, 2, group_size=4, part="keys"))
        assert keys == [False] * 8
        assert values == [True] * 8


class TestSize:
    def size(self, spec, tokens=33, config=FULL):
        _, quantizer = run([([TEXT] * tokens, states(tokens + 10, 0))], tokens, spec, config=config)
        return quantizer.largest

    def test_scales_and_zero_points_are_counted(self):
        # 32 tokens: keys in groups of 32 tokens, values in groups of 32 channels, 32 bits each.
        size = self.size(CacheSpec(4, 4))
        assert (size.tokens, size.elements) == (32, 2 * 32 * HEADS * WIDTH)
        assert size.bits_per_element == 4 + 32 / 32
        assert size.dense_bytes == size.elements * 2

    def test_what_is_kept_takes_16_bits(self):
        size = self.size(CacheSpec(4, 4, keep_last=8))
        # The only group of keys is not complete; 24 of 32 tokens' values are quantized.
        assert size.bits_per_element == (16 + (24 * 5 + 8 * 16) / 32) / 2

    def test_a_float_without_scales_takes_its_bits(self):
        assert self.size(CacheSpec(8, 8, "fp8_e5m2")).bits_per_element == 8

    def test_a_window_holds_its_last_tokens(self):
        size = self.size(CacheSpec(8, 8, "fp8_e4m3"), config=WINDOW)
        assert size.elements == 2 * (12 - 1) * HEADS * WIDTH


@pytest.mark.parametrize(("keep", "told"), [((0, 40), True), ((20, 10), True), ((2, 4), False)], ids=str)
def test_a_cache_of_which_all_prompts_are_kept_is_told_and_counts_16_bits(keep, told):
    spec = CacheSpec(4, 4, group_size=4, keep_first=keep[0], keep_last=keep[1])
    rows = [(ids, states(len(ids) + 1, seed)) for seed, ids in enumerate(PROMPTS)]
    _, quantizer = run(rows, 30, spec, new=1)
    with log("WARNING") as lines:
        bits = quantizer.totals()["kv_bits_per_element"]
    assert (bits == 16) == told
    assert any("the cache of no prompt was quantized at all, although int4" in line for line in lines) == told
