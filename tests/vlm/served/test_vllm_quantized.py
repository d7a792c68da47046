"""What `lmms-plugin quantize` writes of the demo, in the real vLLM on the CPU, beside the evaluated model."""

import pytest
import torch
from helpers.vllm_server import expect_environment, serving

from lmms_plugin.demo import CHECKPOINT
from lmms_plugin.protocol.response import Response
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
from lmms_plugin.quant_backends.checkpoints.saving import save_quantized
from lmms_plugin.quant_backends.plans.plan import QuantPlan
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.vlm import wrapper
from lmms_plugin.vlm.served.model import QuantServed

pytestmark = [pytest.mark.served, pytest.mark.slow]

CASES = {
    "int8": ({"activation_format": "int8"}, {"group_size": -1, "symmetric": True}),
    "fp8": ({"format": "fp8_e4m3", "activation_format": "fp8_e4m3"}, {}),
}
EQUAL, MEAN, LARGEST = 0.85, 0.01, 0.3
"""Least share of equal answers; mean and largest difference of the log-probabilities of their tokens. Sums in another
order move an input over the edge of a step here and there; a wrong scale, or inputs left alone, move all of them."""


@pytest.mark.parametrize("case", CASES)
def test_w8a8_is_served_as_it_was_evaluated(case, documents, instances, tmp_path):
    expect_environment()
    if case == "int8" and not torch.cpu._is_vnni_supported():
        pytest.skip("vLLM's int8 products on a processor without VNNI are not exact")
    options, plan = CASES[case]
    loaded = load_quantized(
        str(CHECKPOINT),
        backend=get("rtn", **options),
        plan=QuantPlan.from_arguments(bits=8, **plan),
        dtype=torch.float32,
    )
    folder = tmp_path / "saved"
    save_quantized(loaded.model, loaded.processor, loaded.report, folder, form="compressed-tensors")
    asked = instances(comprehension.doc_to_messages, len(documents["toy"]["test"]))
    with serving(folder, "float32", tmp_path / "log") as (url, _):
        local = wrapper.QuantPrequantized(pretrained=str(folder), device="cpu", dtype="float32")
        served = QuantServed(pretrained=str(folder), base_url=url)
        for vlm in (local, served):
            vlm.task_dict = documents
        pairs = list(zip(local.generate_until(asked), served.generate_until(asked), strict=True))
        told = served.account()["served"]["told"]
    assert "compressed-tensors" in str(told["quantization"])
    answers = [(Response.decode(one), Response.decode(other)) for one, other in pairs]
    same = [pair for pair in answers if pair[0].text == pair[1].text]
    gaps = torch.tensor(
        [
            abs(token.logprob - other.logprob)
            for mine, theirs in same
            for token, other in zip(mine.tokens, theirs.tokens, strict=True)
        ]
    )
    print(f"\n{case}: {len(same)} of {len(answers)} equal, mean {gaps.mean():.2g}, largest {gaps.max():.2g}")
    assert len(same) >= EQUAL * len(answers)
    assert gaps.mean() < MEAN
    assert gaps.max() < LARGEST
