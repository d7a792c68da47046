import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, QuantizedCache

from lmms_plugin.quant_backends.plans.cache_spec import CacheSpec
from lmms_plugin.vlm.kv_cache.quantizer import CacheQuantizer
from lmms_plugin.vlm.kv_cache.rounding import rounded

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

    def ours(self, states, spec):
        mask = torch.ones(2, 128, dtype=torch.long)
        cache = CacheQuantizer(spec, self.CONFIG, None, reads_last_apart=False).cache(mask, mask)
        cache.update(*states, 0)
        return cache.layers[0].keys, cache.layers[0].values

    def theirs(self, states, backend, **options):
        cache = QuantizedCache(backend=backend, config=self.CONFIG, **options)
        cache.update(*states, 0)
        layer = cache.layers[0]
        return layer._dequantize(layer._quantized_keys), layer._dequantize(layer._quantized_values)

    @pytest.mark.slow
    @pytest.mark.parametrize("bits", [4, 2])
    def test_quanto_s_grid_is_ours_per_token(self, states, bits):
        pytest.importorskip("optimum.quanto")
        theirs = self.theirs(states, "quanto", nbits=bits, q_group_size=64)
        ours = self.ours(states, CacheSpec(bits, bits, group_size=64, key_axis="token"))
        for one, other in zip(ours, theirs, strict=True):
            assert (one - other).norm() < 0.03 * other.norm()

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
