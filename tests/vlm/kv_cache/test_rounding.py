from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, LlamaConfig, QuantizedCache, T5Config, T5ForConditionalGeneration

from lmms_plugin.quant_backends.plans.cache_spec import CacheSpec
from lmms_plugin.quant_backends.rotations.hadamard import Rotation
from lmms_plugin.vlm.kv_cache.quantizer import CacheQuantizer
from lmms_plugin.vlm.kv_cache.rounding import rounded

DOCS = Path(__file__).parents[3] / "docs" / "kv_cache.md"
FLOATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


@pytest.fixture(scope="module")
def states():
    """Keys and values (rows, heads, tokens, width); some channels of the keys are twelve times the others."""
    keys, values = torch.randn(2, 2, 4, 128, 64, generator=torch.Generator().manual_seed(0))
    keys[..., [3, 17, 40]] *= 12
    return keys, values


def grouped(values):
    """(1 group, tokens, 1 head, width) of (tokens, width)."""
    return torch.tensor(values, dtype=torch.float32)[None, :, None, :]


class TestTheGrid:
    def test_codes_go_from_the_smallest_to_the_largest_of_a_channel(self):
        states = grouped([[0.0, 8.0], [1.0, 8.0], [2.0, 8.0], [3.2, 8.0]])
        found = rounded(states, CacheSpec(2, 2), 2, by_channel=True)
        step = float(torch.tensor(3.2 / 3).half())
        assert found[0, :, 0, 0].tolist() == pytest.approx([0, step, 2 * step, 3 * step])
        assert found[0, :, 0, 1].tolist() == [8.0] * 4

    def test_a_token_has_scales_of_its_own(self):
        states = grouped([[0.0, 3.0, 100.0, 130.0], [0.0, 6.0, 0.0, 0.0]])
        found = rounded(states, CacheSpec(2, 2, group_size=2), 2, by_channel=False)
        assert torch.equal(found, states)

    @given(bits=st.integers(2, 8), seed=st.integers(0, 99), by_channel=st.booleans())
    def test_the_error_is_half_a_step_at_most(self, bits, seed, by_channel):
        states = torch.randn(3, 16, 2, 32, generator=torch.Generator().manual_seed(seed))
        found = rounded(states, CacheSpec(bits, bits), bits, by_channel=by_channel)
        axis = 1 if by_channel else 3
        span = states.amax(axis, keepdim=True) - states.amin(axis, keepdim=True)
        # Scale and zero point have 11 significant bits.
        slack = span * 2**-10 + states.abs().amax(axis, keepdim=True) * 2**-10
        assert ((found - states).abs() <= span / (2**bits - 1) / 2 + slack).all()
        assert len(found.movedim(axis, 0).flatten(1)[:, 0].unique()) <= 2**bits


class TestRotation:
    @pytest.mark.parametrize("width", [16, 64, 80, 96])
    def test_rotated_queries_and_keys_have_the_logits_of_the_originals(self, width):
        """QuaRot's R3 without rounding: an orthogonal matrix leaves inner products as they are."""
        queries, keys = torch.randn(2, 50, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        rotation = Rotation(width, 0)
        torch.testing.assert_close(rotation(queries) @ rotation(keys).T, queries @ keys.T)
        torch.testing.assert_close(rotation.inverse(rotation(keys)), keys)

    @pytest.mark.parametrize("by_channel", [True, False])
    @pytest.mark.parametrize("format", ["int", "fp8_e4m3"])
    def test_logits_are_those_of_rotated_queries_over_rounded_rotated_keys(self, states, format, by_channel):
        keys, queries = states[0], states[1]
        bits = 4 if format == "int" else 8
        plain, rotated = CacheSpec(bits, bits, format), CacheSpec(bits, bits, format, rotation="hadamard")
        turn = Rotation(64, 0)
        online = turn(queries) @ rounded(turn(keys), plain, bits, by_channel=by_channel).mT
        found = rounded(keys, rotated, bits, by_channel=by_channel)
        torch.testing.assert_close(queries @ found.mT, online, rtol=1e-4, atol=1e-3)
        assert not torch.allclose(found, rounded(keys, plain, bits, by_channel=by_channel), atol=1e-2)

    @pytest.mark.parametrize("bits", [2, 4])
    def test_keys_per_token_with_large_channels_lose_less(self, states, bits):
        """The table of the docs."""
        by_token = states[0].transpose(1, 2)
        by_channel = by_token.unflatten(1, (-1, 32)).flatten(0, 1)
        errors = []
        for keys, grouped in ((by_token, False), (by_channel, True)):
            for rotation in ("none", "hadamard"):
                found = rounded(keys, CacheSpec(bits, bits, rotation=rotation), bits, by_channel=grouped)
                errors.append(float((found - keys).norm() / keys.norm()))
        assert errors[1] < 0.8 * errors[0]
        assert f"| {bits} | {' | '.join(f'{error:.3f}' for error in errors)} |" in DOCS.read_text(encoding="utf-8")

    def test_a_rotated_cache_has_its_name_and_the_bits_of_any_other(self):
        spec = CacheSpec(4, 2, key_axis="token", part="keys", rotation="hadamard")
        assert spec.name == "int4, images int2 keys rotated"
        assert spec.group_bits == CacheSpec(4, 2).group_bits


class TestFloats:
    @pytest.mark.parametrize("name", FLOATS)
    def test_every_value_of_the_format_is_kept(self, name):
        values = torch.arange(256, dtype=torch.uint8).view(FLOATS[name]).float()
        values = values[values.isfinite()].reshape(1, 1, 1, -1)
        assert torch.equal(rounded(values, CacheSpec(8, 8, name), 8, by_channel=True), values)

    @pytest.mark.parametrize(("name", "largest"), [("fp8_e4m3", 448.0), ("fp8_e5m2", 57344.0)])
    def test_what_is_too_large_becomes_the_largest(self, name, largest):
        states = grouped([[1e6, -1e6, 0.0, 1.0]])
        found = rounded(states, CacheSpec(8, 8, name), 8, by_channel=False)
        assert found.flatten().tolist() == [largest, -largest, 0.0, 1.0]

    def test_ties_go_to_even(self):
        found = rounded(grouped([[17.0, 19.0]]), CacheSpec(8, 8, "fp8_e4m3"), 8, by_channel=False)
        assert found.flatten().tolist() == [16.0, 20.0]

    def test_a_scale_brings_a_group_into_range(self):
        states = grouped([[1e4, 5e3, 0.0, 0.0]])
        found = rounded(states, CacheSpec(8, 8, "fp8_e4m3", 4), 8, by_channel=False)
        assert found.flatten().tolist() == pytest.approx([1e4, 5e3, 0, 0], rel=1e-3)

    def test_nothing_but_zeros_stays_so(self):
        for spec in (CacheSpec(4, 4), CacheSpec(8, 8, "fp8_e4m3", 4)):
            assert not rounded(torch.zeros(1, 4, 1, 4), spec, spec.bits, by_channel=True).any()


class TestBesideTransformers:
    """The same keys and values in transformers' caches."""

    CONFIG = LlamaConfig(num_hidden_layers=1, hidden_size=256, num_attention_heads=4, num_key_value_heads=4)
    TABLE = (
        ("transformers, quanto, as it is by default", 4, {"backend": "quanto"}),
        ("ours, `kv_keys=token,kv_group_size=64`", 4, CacheSpec(4, 4, group_size=64, key_axis="token")),
        ("transformers, quanto, `axis_key=-1`", 4, {"backend": "quanto", "axis_key": -1}),
        ("ours, `kv_group_size=64`", 4, CacheSpec(4, 4, group_size=64)),
        ("transformers, HQQ, axis 1", 4, {"backend": "hqq", "axis_key": 1, "axis_value": 1}),
        ("transformers, HQQ, axis 0, as it is by default", 4, {"backend": "hqq"}),
        ("ours, as it is by default", 4, CacheSpec(4, 4)),
        ("transformers, quanto, as it is by default", 2, {"backend": "quanto", "nbits": 2}),
        ("transformers, quanto, `axis_key=-1`", 2, {"backend": "quanto", "nbits": 2, "axis_key": -1}),
        ("transformers, HQQ, axis 1", 2, {"backend": "hqq", "nbits": 2, "axis_key": 1, "axis_value": 1}),
        ("transformers, HQQ, axis 0, as it is by default", 2, {"backend": "hqq", "nbits": 2}),
        ("ours, as it is by default", 2, CacheSpec(2, 2)),
        ("transformers, fp8", 8, {"backend": "fp8"}),
        ("ours, `kv_format=fp8_e4m3`", 8, CacheSpec(8, 8, "fp8_e4m3")),
        ("ours, `kv_format=fp8_e5m2`", 8, CacheSpec(8, 8, "fp8_e5m2")),
    )

    def ours(self, states, spec):
        mask = torch.ones(len(states[0]), 128, dtype=torch.long)
        cache = CacheQuantizer(spec, self.CONFIG, None, reads_last_apart=False).cache(mask, mask)
        cache.update(*states, 0)
        return cache.layers[0].keys, cache.layers[0].values

    def theirs(self, states, backend, **options):
        cache = QuantizedCache(backend=backend, config=self.CONFIG, **options)
        cache.update(*states, 0)
        layer = cache.layers[0]
        return layer._dequantize(layer._quantized_keys), layer._dequantize(layer._quantized_values)

    def row(self, states, name, bits, how):
        """A row of the docs' table: relative errors, and whether the other row of the batch makes a difference."""

        def quantized(given):
            return self.ours(given, how) if isinstance(how, CacheSpec) else self.theirs(given, **how)

        errors = [
            float((one - exact).norm() / exact.norm()) for one, exact in zip(quantized(states), states, strict=True)
        ]
        alone = quantized([one[:1] for one in states])
        beside = quantized([one * torch.tensor([1.0, 10.0])[:, None, None, None] for one in states])
        same = all(torch.equal(one, other[:1]) for one, other in zip(alone, beside, strict=True))
        return [name, str(bits), *(f"{error:.3f}" for error in errors), "no" if same else "yes"]

    @pytest.mark.slow
    def test_the_table_of_the_docs(self, states):
        """With -s it is printed as the docs have it."""
        pytest.importorskip("optimum.quanto")
        pytest.importorskip("hqq")
        rows = [self.row(states, *line) for line in self.TABLE]
        print()
        print("\n".join("| " + " | ".join(row) + " |" for row in rows))
        section = DOCS.read_text(encoding="utf-8").partition("## Beside transformers")[2].partition("\n## ")[0]
        # Below the names of the columns and the line.
        lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
        documented = [line.strip("| ").split(" | ") for line in lines]
        for row, line in zip(rows, documented, strict=True):
            assert (*row[:2], row[4]) == (*line[:2], line[4])
            # Sums of another processor may end on the neighbouring code.
            assert [float(error) for error in row[2:4]] == pytest.approx([float(e) for e in line[2:4]], abs=0.0015)

    @pytest.mark.slow
    @pytest.mark.parametrize("bits", [4, 2])
    @pytest.mark.parametrize(("axis_key", "key_axis"), [(0, "token"), (-1, "channel")])
    def test_quanto_s_grid_is_ours(self, states, bits, axis_key, key_axis):
        """An element may have the neighbouring code where it lies halfway, as quanto keeps scales in 32 bits."""
        pytest.importorskip("optimum.quanto")
        theirs = self.theirs(states, "quanto", nbits=bits, axis_key=axis_key)
        ours = self.ours(states, CacheSpec(bits, bits, group_size=64, key_axis=key_axis))
        for one, other, exact in zip(ours, theirs, states, strict=True):
            slack = 2**-9 * exact.abs().max()
            assert (((one - exact).abs() - (other - exact).abs()).abs() <= slack).all()
            assert ((one - other).abs() > slack).float().mean() < 0.01

    @pytest.mark.parametrize("bits", [4, 2])
    def test_keys_per_channel_are_nearer_than_hqq_s_cache(self, states, bits):
        pytest.importorskip("hqq")
        (theirs, _), (ours, _) = (
            self.theirs(states, "hqq", nbits=bits, axis_key=1, axis_value=1),
            self.ours(states, CacheSpec(bits, bits, group_size=64)),
        )
        assert (ours - states[0]).norm() < 0.7 * (theirs - states[0]).norm()

    def test_the_float_is_as_near_as_transformers_own(self, states):
        pairs = zip(self.theirs(states, "fp8"), self.ours(states, CacheSpec(8, 8, "fp8_e4m3")), states, strict=True)
        for theirs, ours, exact in pairs:
            assert float((ours - exact).norm()) == pytest.approx(float((theirs - exact).norm()), rel=0.1)

    def test_transformers_refuses_windows_and_encoder_decoders(self):
        """As the docs say."""
        window = Gemma3TextConfig(num_hidden_layers=1, layer_types=["sliding_attention"])
        with pytest.raises(ValueError, match="only full attention layers"):
            QuantizedCache(backend="fp8", config=window)
        sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 8}
        model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
        with pytest.raises(ValueError, match="does not support the quantized cache"):
            model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=1, cache_implementation="quantized")
