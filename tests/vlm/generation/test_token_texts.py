import time
from itertools import pairwise, takewhile

import pytest
from helpers.families import byte_level_tokenizer, sentencepiece_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lmms_plugin.vlm.generation.token_texts import decode, token_texts

PIECES = ("▁", "▁a", "▁the", "a", "cat", "##s", "s</w>", "the</w>", "é", ".", " ", "  ", "Ġ", "Ġcat", "<0x4>", "")
"""Pieces as in all kinds of vocabularies: every decoder has some of its own among them, and some of others."""
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""Names of single bytes, of which `ByteFallback` makes characters."""
MARK, ADDED = "<mark>", "▁ added"


def byte_letters():
    """The letters by which byte-level tokenizers name bytes, by GPT-2's rule."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = (code for code in range(256) if code not in shown)
    names = {code: code for code in shown} | {code: 256 + place for place, code in enumerate(hidden)}
    return [chr(names[code]) for code in range(256)]


def _sequence(*steps):
    return decoders.Sequence(list(steps))


DECODERS = {
    "none": None,
    "byte level": decoders.ByteLevel(),
    "llama": _sequence(
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1, right=0)
    ),
    "gemma": _sequence(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
    "metaspace": decoders.Metaspace(),
    "metaspace and bytes": _sequence(decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")),
    "word pieces": decoders.WordPiece(cleanup=True),
    "ends of words": decoders.BPEDecoder(),
    "two spaces stripped": _sequence(
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=2, right=0)
    ),
    "replaced when fused": _sequence(decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")),
    # These are decoded from the beginning: what follows may change any text before it.
    "several characters replaced": _sequence(decoders.Fuse(), decoders.Replace("ac", "c")),
    "expression": _sequence(decoders.Fuse(), decoders.Replace(Regex("a+"), "b")),
    "repeats dropped": decoders.CTC(pad_token="a", word_delimiter_token="▁"),
}


def _tokenizer(decoder):
    # All bytes twice: as names for the fallback, and as letters of byte-level tokenizers.
    names = [*dict.fromkeys((*PIECES, *BYTES, *byte_letters()))]
    inner = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="a"))
    if decoder is not None:
        inner.decoder = decoder
    inner.add_tokens([AddedToken(ADDED)])
    inner.add_special_tokens([AddedToken(MARK, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=inner)


TOKENIZERS = {name: _tokenizer(decoder) for name, decoder in DECODERS.items()} | {
    "byte-level BPE": byte_level_tokenizer(("<end>", "<box>"), eos_token="<end>"),
    "sentencepiece": sentencepiece_tokenizer(
        ("<s>", "</s>"), prefix_space=True, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ),
    "sentencepiece without prefix": sentencepiece_tokenizer(
        ("<bos>", "<eos>"), prefix_space=False, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def expected(tokenizer, ids):
    """The definition: a token has what it adds to the part that the text so far shares with the whole."""
    whole, ends = decode(tokenizer, ids), [0]
    for count in range(1, len(ids)):
        text = decode(tokenizer, ids[:count])
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(text, whole, strict=False))
        ends.append(max(ends[-1], len(text) if whole.startswith(text) else len(list(shared))))
    return [whole[start:end] for start, end in pairwise([*ends, len(whole)])][: len(ids)]


def bytes_of(tokenizer, raw):
    """Ids of single bytes by either kind of name."""
    vocabulary = tokenizer.get_vocab()
    letters = dict(zip(range(256), byte_letters(), strict=True))
    return [vocabulary.get(BYTES[one], vocabulary.get(letters[one], 0)) for one in raw]


TEXT = st.text(st.sampled_from("a é漢ไ😀\ufffd▁."), max_size=12)
PARTS = st.one_of(
    st.lists(st.integers(0, 10**6), max_size=15),
    st.tuples(TEXT, st.integers(0, 3)).map(lambda pair: pair[0].encode()[: len(pair[0].encode()) - pair[1]]),
    st.binary(max_size=20),
    st.sampled_from((MARK, ADDED, "beyond", "▁", "a")).flatmap(lambda one: st.lists(st.just(one), max_size=14)),
)


def ids_of(tokenizer, parts):
    vocabulary, beyond = tokenizer.get_vocab(), len(tokenizer) + 7
    found = []
    for part in parts:
        if isinstance(part, bytes):
            found += bytes_of(tokenizer, part)
        else:
            found += [vocabulary.get(one, beyond) if isinstance(one, str) else one % len(tokenizer) for one in part]
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(parts=st.lists(PARTS, max_size=5))
def test_texts_are_those_of_the_definition(tokenizer, parts):
    ids = ids_of(tokenizer, parts)
    assert token_texts(tokenizer, ids) == expected(tokenizer, ids)


def test_a_character_of_several_tokens_belongs_to_the_last_of_them_wherever_it_is(tokenizer):
    text = "the cat é 7 😀. 漢字 " * 8
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert token_texts(tokenizer, ids) == expected(tokenizer, ids)
    assert "".join(token_texts(tokenizer, ids)) == decode(tokenizer, ids)


def test_a_long_run_of_bytes_is_text_or_broken_as_a_whole():
    tokenizer = TOKENIZERS["llama"]
    raw = "ภาษาไทย".encode()
    first = tokenizer.convert_tokens_to_ids(["a"])
    texts = token_texts(tokenizer, [*first, *bytes_of(tokenizer, raw)])
    assert [text for text in texts if text] == ["a", *"ภาษาไทย"]
    assert texts[-3:] == ["", "", "ย"]
    cut_off = [*first, *bytes_of(tokenizer, raw[:-1])]
    assert "".join(token_texts(tokenizer, cut_off)) == "a" + "\ufffd" * (len(raw) - 1)
    assert token_texts(tokenizer, cut_off) == expected(tokenizer, cut_off)
    never_text = [*first, *bytes_of(tokenizer, b"\x80" * 20)]
    assert token_texts(tokenizer, never_text) == ["a", *["\ufffd"] * 20]


def test_where_the_end_is_stripped_the_beginnings_are_asked_for():
    """A beginning has lost the space that a longer one shows again."""
    tokenizer = _tokenizer(_sequence(decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", left=0, right=1)))
    ids = tokenizer.convert_tokens_to_ids(["cat", "▁", "▁the", "a", "▁", "▁", "cat"] * 4)
    texts = token_texts(tokenizer, ids)
    assert texts == expected(tokenizer, ids)
    assert texts[:3] == ["cat", "", "  the"]


class Slow(PreTrainedTokenizerFast):
    """A tokenizer with a way of its own to decode, which reads all tokens from the end."""

    def _decode(self, token_ids, **kwargs):
        return "".join(str(index) for index in reversed(token_ids))


def test_a_tokenizer_that_decodes_in_its_own_way_is_asked_for_every_beginning():
    tokenizer = Slow(tokenizer_object=TOKENIZERS["llama"].backend_tokenizer)
    ids = [1, 2, 1] * 20
    assert token_texts(tokenizer, ids) == expected(tokenizer, ids)


@pytest.mark.parametrize("name", ["byte-level BPE", "sentencepiece", "metaspace", "word pieces", "ends of words"])
@pytest.mark.parametrize("text", ["the cat é 😀 ", "漢字ไทย"])
def test_the_time_grows_with_the_number_of_tokens(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text * 800, add_special_tokens=False)
    if len(ids) < 3200:
        ids = (ids or [0]) * (3200 // max(1, len(ids)) + 1)

    def seconds(count):
        times = []
        for _ in range(3):
            start = time.process_time()
            token_texts(tokenizer, ids[:count])
            times.append(time.process_time() - start)
        return min(times)

    # Eight times the tokens take eight times as long; with the square of their number it would be 64.
    assert seconds(3200) < 20 * seconds(400)
