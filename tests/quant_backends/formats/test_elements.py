"""Every code of every element type has the value that its specification gives it."""

import math
import struct

import pytest
import torch

from lmms_plugin.quant_backends.formats import elements
from lmms_plugin.quant_backends.formats.codec import NATIVE, to_codes, to_values
from lmms_plugin.quant_backends.formats.entries import FORMATS

ELEMENTS = {one.element.name: one.element for one in FORMATS.values()}


def same(a, b):
    return (math.isnan(a) and math.isnan(b)) or struct.pack("d", a) == struct.pack("d", b)


def by_the_book(code, exponent, mantissa):
    """Value of a small float, from the formula of MX 1.0, section 5.3, without special values."""
    sign = -1.0 if code >> (exponent + mantissa) else 1.0
    power, part = (code >> mantissa) & ((1 << exponent) - 1), code & ((1 << mantissa) - 1)
    bias = 2 ** (exponent - 1) - 1
    if power == 0:
        return sign * 2.0 ** (1 - bias) * (part / 2**mantissa)
    return sign * 2.0 ** (power - bias) * (1 + part / 2**mantissa)


@pytest.mark.parametrize(("name", "exponent", "mantissa"), [("e2m1", 2, 1), ("e2m3", 2, 3), ("e3m2", 3, 2)])
def test_floats_of_4_and_6_bits_follow_the_formula_for_every_code(name, exponent, mantissa):
    for code, value in enumerate(ELEMENTS[name].values):
        assert same(value, by_the_book(code, exponent, mantissa)), code


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_floats_of_8_bits_are_torchs_for_every_code(name):
    theirs = torch.arange(256, dtype=torch.uint8).view(NATIVE[name]).double().tolist()
    assert all(same(a, b) for a, b in zip(ELEMENTS[name].values, theirs, strict=True))


def test_the_tables_of_the_specifications():
    """MX 1.0, tables 1 to 5: largest and smallest numbers; the eight values of E2M1."""
    assert elements.E2M1.values[:8] == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    assert [one.largest for one in (elements.E4M3, elements.E5M2, elements.E3M2, elements.E2M3, elements.E2M1)] == [
        *(448.0, 57344.0, 28.0, 7.5, 6.0)
    ]
    assert [one.values[1] for one in (elements.E4M3, elements.E5M2, elements.E3M2, elements.E2M3)] == [
        *(2.0**-9, 2.0**-16, 0.0625, 0.125)
    ]
    specials = {code: value for code, value in enumerate(elements.E5M2.values) if not math.isfinite(value)}
    assert specials[0x7C] == math.inf
    assert specials[0xFC] == -math.inf
    assert all(math.isnan(specials.pop(code)) for code in (0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF))
    assert len(specials) == 2
    assert [code for code, value in enumerate(elements.E4M3.values) if math.isnan(value)] == [0x7F, 0xFF]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_four_bit_floats_of_bitsandbytes_are_the_librarys_for_every_code(name):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed = torch.tensor([(code << 4) | (15 - code) for code in range(16)], dtype=torch.uint8)
    state = functional.QuantState(
        torch.ones(1), torch.Size((1, 32)), functional.get_4bit_type(name, "cpu"), 32, name, torch.float32
    )
    theirs = functional.dequantize_4bit(packed.view(-1, 1), state).flatten()
    codes = torch.stack([torch.arange(16), 15 - torch.arange(16)], 1).flatten()
    torch.testing.assert_close(torch.tensor(ELEMENTS[name].values)[codes], theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_in_offset_binary(bits):
    half = 2 ** (bits - 1)
    assert ELEMENTS[f"int{bits}"].values == tuple(float(value) for value in range(-half, half))


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_finite_value_keeps_its_code(name):
    element = ELEMENTS[name]
    codes = torch.tensor([code for code, value in enumerate(element.values) if math.isfinite(value)])
    values = to_values(codes.to(torch.uint8), element)
    assert torch.equal(to_codes(values.clone(), element).long(), codes)


@pytest.mark.parametrize("name", [name for name, one in ELEMENTS.items() if one.mantissa])
def test_the_nearest_value_is_taken_and_ties_go_to_the_even_code(name):
    element = ELEMENTS[name]
    values, codes = torch.tensor([value for value, _ in element.ladder]), [code for _, code in element.ladder]
    between = (values[1:].double() + values[:-1].double()) / 2
    for index, middle in enumerate(between.float()):
        expected = codes[index] if index % 2 == 0 else codes[index + 1]
        assert int(to_codes(middle.view(1), element)) == expected
        for way, step in ((-math.inf, index), (math.inf, index + 1)):
            beside = torch.nextafter(middle, torch.tensor(way)).view(1)
            assert int(to_codes(beside, element)) == codes[step]
    assert all(code % 2 == step % 2 for step, code in enumerate(codes)), "an even step is an even mantissa"


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_the_generic_ladder_rounds_as_torch_does(name):
    """Floats of 8 bits take torch's cast; the search in the table, which all others take, gives the same codes."""
    from dataclasses import replace

    element = ELEMENTS[name]
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-24, 12, (20000,), generator=generator).float()
    x = torch.randn(20000, generator=generator) * exponents.exp2()
    x = torch.cat([x, torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, math.inf, -math.inf])])
    assert torch.equal(to_codes(x.clone(), element), to_codes(x.clone(), replace(element, name="by table")))
    assert to_codes(torch.tensor([math.nan]), element).view(NATIVE[name]).isnan().all()


@pytest.mark.parametrize("name", [name for name, one in ELEMENTS.items() if not one.integer])
def test_values_beyond_the_largest_become_the_largest(name):
    element = ELEMENTS[name]
    found = to_values(to_codes(torch.tensor([1e9, -1e9, math.inf, -math.inf]), element), element)
    assert found.tolist() == [element.largest, -element.largest] * 2
