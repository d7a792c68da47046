import json

import pytest
import torch
from helpers.prefix import QUESTIONS, answers, ask, load, log, plainly
from helpers.slow_cache import slow_logits

from lmms_plugin.arguments import ModelArguments
from lmms_plugin.protocol.response import Response
from lmms_plugin.quant_backends.plans.cache_spec import CacheSpec
from lmms_plugin.quant_backends.rotations.hadamard import Rotation
from lmms_plugin.vlm import wrapper as models
from lmms_plugin.vlm.contracts.settings import GenerationSettings
from lmms_plugin.vlm.kv_cache.quantizer import expect_plain_cache

# One step of the grid for one element, where the last bit of a sum decides.
STEP = 0.02
WIDTH = {"smolvlm": 16, "qwen2_5_vl": 16, "gemma3": 16}
ARGUMENTS = (
    {"kv_bits": 4},
    {"kv_bits": 2, "kv_image_bits": 8, "kv_keep": "4+6", "kv_group_size": 8},
    {"kv_bits": 16, "kv_image_bits": 2, "kv_part": "keys"},
    {"kv_format": "fp8_e4m3"},
    {"kv_bits": 3, "kv_keys": "token", "kv_rotation": "hadamard"},
)


def named(arguments):
    return ",".join(f"{name}={value}" for name, value in arguments.items())


@pytest.fixture(scope="module")
def vlms(checkpoint):
    """Family → its tiny model, loaded once; a test sets the storage of its caches."""
    loaded = {}

    def of(family, **arguments):
        if family not in loaded:
            loaded[family] = load(checkpoint(family), kv_bits=8)
        vlm = loaded[family]
        runner = vlm.responder.engine.runner
        vlm.cache_quantizer.spec = ModelArguments.parse({"pretrained": "demo", **arguments}).cache_spec
        vlm.cache_quantizer.largest = None
        runner.sharing.verified, runner.sharing.off = False, None
        return vlm

    return of


def logprobs(texts):
    return [[token.logprob for token in Response.decode(text).tokens] for text in texts]


def assert_near(ours, theirs, tolerance=STEP):
    for one, other in zip(logprobs(ours), logprobs(theirs), strict=True):
        assert one == pytest.approx(other, abs=tolerance)


def told(spec, width):
    group = spec.group_of(width) if spec.scaled else None
    return {
        "bits": spec.bits,
        "image_bits": spec.image_bits,
        "format": spec.format,
        "group": group,
        "channel": spec.key_axis == "channel",
        "part": spec.part,
        "first": spec.keep_first,
        "last": spec.keep_last,
        "rotation": Rotation(width, 0)(torch.eye(width, dtype=torch.float64)) if spec.rotated else None,
    }


class TestAgainstAPlainSlowLoop:
    @pytest.mark.parametrize("arguments", ARGUMENTS, ids=named)
    @pytest.mark.parametrize("family", WIDTH)
    def test_every_token_has_the_probability_of_the_definition(self, vlms, family, arguments):
        """Gemma 3 has windows of 64 tokens, of which its prompt has more."""
        vlm = vlms(family, **arguments)
        engine = vlm.responder.engine
        prompt = vlm.reader.read(ask(QUESTIONS[0]), "question")
        inputs = engine.chat.encode([prompt]).inputs
        (answer,) = engine.decoder.generate(inputs, GenerationSettings(max_new_tokens=16))
        spec = vlm.cache_quantizer.spec
        logits = slow_logits(
            vlm.model, inputs, vlm.model.config.image_token_id, answer.ids, **told(spec, WIDTH[family])
        )
        expected = logits.log_softmax(1).gather(1, torch.tensor(answer.ids)[:, None]).flatten().tolist()
        assert [token.logprob for token in answer.tokens] == pytest.approx(expected, abs=1e-4)
        (computed,) = engine.decoder.with_plain_cache.score(inputs, [answer.ids])
        apart = [abs(token.logprob - logprob) for token, logprob in zip(answer.tokens, computed.logprobs, strict=True)]
        assert max(apart) > 1e-3
        # The first token comes from the quantized cache, too; windows of Gemma 3 may have left the image behind.
        assert apart[0] > 1e-5 or family == "gemma3"


class TestBatchesAndPrefixes:
    @pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl", "gemma3", "deepseek_vl2"])
    def test_answers_over_a_shared_prefix_are_those_of_the_plain_way(self, vlms, family):
        vlm = vlms(family, kv_bits=4, kv_keep="2+4")
        with plainly(vlm):
            expected = answers(vlm)
        for batch_size in (1, None):
            assert_near(answers(vlm, batch_size), expected)
        if family != "gemma3":
            assert vlm.responder.engine.runner.sharing.off is None

    def test_bits_of_images_reach_the_shared_prefix(self, vlms):
        vlm = vlms("smolvlm", kv_bits=16, kv_image_bits=2)
        ours = logprobs(answers(vlm))
        vlm = vlms("smolvlm", kv_bits=16, kv_image_bits=8)
        assert max(abs(a[0] - b[0]) for a, b in zip(ours, logprobs(answers(vlm)), strict=True)) > 0.05

    def test_samples_begin_with_the_prompt_each_time(self, vlms):
        vlm = vlms("smolvlm", kv_bits=2)
        engine = vlm.responder.engine
        engine.samples = 2
        try:
            with plainly(vlm):
                expected = answers(vlm)
            found = answers(vlm)
        finally:
            engine.samples = 0
        assert engine.runner.sharing.off is None
        assert [Response.decode(one).samples for one in found] == [Response.decode(one).samples for one in expected]

    def test_beams_are_quantized(self, vlms):
        def plain(doc):
            return ask(doc, with_box=False)

        found = [
            answers(vlms("smolvlm", **arguments), messages=plain, num_beams=3)
            for arguments in ({"kv_bits": 2}, {"kv_bits": 8})
        ]
        assert found[0] != found[1]
        with plainly(vlms("smolvlm", kv_bits=2)) as _:
            assert answers(vlms("smolvlm", kv_bits=2), 2, messages=plain, num_beams=3) == found[0]

    def test_a_model_that_looks_ahead_reads_its_prompt_at_once_and_says_so(self, checkpoint):
        with log("WARNING") as lines:
            vlm = load(checkpoint("paligemma"), kv_bits=4)
            with plainly(vlm):
                answers(vlm)
        assert [line for line in lines if "must read a prompt at once" in line]
        assert vlm.cache_quantizer.reads_last_apart is False


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            ({"kv_bits": 9}, "kv_bits"),
            ({"kv_format": "fp7"}, "kv_format must be one of int, fp8_e4m3, fp8_e5m2"),
            ({"kv_format": "fp8_e4m3", "kv_bits": 4}, "fp8_e4m3 has 8 bits"),
            ({"kv_keep": "4+32"}, "kv_keep says nothing without kv_bits"),
            ({"kv_bits": 4, "kv_keep": "32"}, "numbers of first and last tokens such as 4+32, got '32'"),
            ({"kv_bits": 4, "static_cache": True}, "static_cache: a quantized cache"),
            ({"kv_format": "fp8_e5m2", "kv_keys": "token"}, "kv_keys says nothing about a float without scales"),
            ({"kv_part": "keys"}, "kv_part says nothing without kv_bits"),
            ({"kv_rotation": "hadamard"}, "kv_rotation says nothing without kv_bits"),
            ({"kv_bits": 4, "kv_rotation": "givens"}, "kv_rotation must be one of none, hadamard"),
        ],
        ids=str,
    )
    def test_by_the_arguments(self, arguments, problem):
        with pytest.raises(ValueError, match=problem.replace("+", r"\+")) as error:
            ModelArguments.parse({"pretrained": "demo", **arguments})
        assert "\n" not in str(error.value)

    def test_a_group_that_does_not_divide_a_head(self, checkpoint):
        with pytest.raises(ValueError, match="expected a divisor of the size of a head, 16, got 12"):
            models.QuantNone(pretrained=str(checkpoint("smolvlm")), device="cpu", kv_bits=4, kv_group_size=12)

    def test_an_encoder_decoder(self, checkpoint):
        with pytest.raises(ValueError, match="encoder-decoder, which keeps its prompt in a cross-attention cache"):
            models.QuantNone(pretrained=str(checkpoint("blip2_t5")), device="cpu", kv_bits=4)

    def test_states_that_are_no_keys_and_values_before_weights_are_read(self, checkpoint, tmp_path):
        from transformers import Qwen3_5Config

        config = Qwen3_5Config()
        with pytest.raises(ValueError, match=r"layers that keep other states \(LinearAttentionLayer\)"):
            expect_plain_cache(config, CacheSpec(4, 4), "it")

    def test_a_served_model_names_the_server_s_option(self):
        from lmms_plugin.vlm.served.options import expect_effect

        with pytest.raises(ValueError, match="--kv-cache-dtype"):
            expect_effect({"kv_bits": 4})


def test_results_tell_bits_and_bytes(vlms):
    vlm = vlms("smolvlm", kv_bits=4)
    answers(vlm)
    figures = json.loads(json.dumps(vlm.figures()))
    assert 4 < figures["kv_bits_per_element"] < 16
    assert figures["kv_bytes"] == pytest.approx(
        figures["kv_bytes_16_bits"] * figures["kv_bits_per_element"] / 16, rel=1e-6
    )
    assert figures["bits_per_weight"] > 16
