"""Checkpoints that `lmms-plugin quantize` writes, in the real vLLM on the CPU beside `quant_prequantized`.

Each is one more start of the server (`make test-served`). vLLM's kernel for 4-bit weights knows 16-bit activations
alone, so it runs in float16, and ours in float32.
"""

import sys
from pathlib import Path

import datasets
import pytest
import torch
from helpers.environments import run
from helpers.vllm_server import expect_environment, serving

from lmms_plugin.demo import DATA
from lmms_plugin.protocol.response import Response
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.vlm import wrapper
from lmms_plugin.vlm.served.model import QuantServed

pytestmark = [pytest.mark.served, pytest.mark.slow]
BIN = Path(sys.executable).parent
COUNT = 60
WRITTEN = {
    "rtn": "method=rtn,bits=4",
    "gptq": "method=gptq,bits=4,calibration=demo",
    "awq": "method=awq,bits=4,fold=True,calibration=demo",
}
LEAST_EQUAL = 56
MOST = 0.05
"""Nats. Float16 alone differs from float32 by 0.0085 on the dense demo."""


@pytest.fixture(scope="module", params=WRITTEN)
def written(request, tmp_path_factory):
    expect_environment()
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("vLLM's build for processors without AVX-512 has no kernel for 4-bit weights")
    folder = tmp_path_factory.mktemp(request.param)
    command = [
        str(BIN / "lmms-plugin"),
        "quantize",
        f"pretrained=demo,{WRITTEN[request.param]}",
        "-o",
        str(folder / "checkpoint"),
    ]
    run([*command, "--format", "compressed-tensors"], folder)
    return folder / "checkpoint"


def test_answers_and_probabilities_are_those_of_the_evaluated_model(written, instances):
    rows = ExpressionDocs(datasets.load_dataset(DATA, split="test"))
    asked = instances(comprehension.doc_to_messages, COUNT)
    local = wrapper.model_class("prequantized")(pretrained=str(written), device="cpu", dtype="float32")
    with serving(written, "float16", written.parent / "log") as (url, _):
        served = QuantServed(pretrained=str(written), base_url=url)
        for vlm in (local, served):
            vlm.task_dict = {"toy": {"test": rows}}
        theirs = list(map(Response.decode, served.generate_until(asked)))
    mine = list(map(Response.decode, local.generate_until(asked)))
    pairs = list(zip(mine, theirs, strict=True))
    equal = [(one, other) for one, other in pairs if one.text == other.text]
    tokens = [pair for one, other in equal for pair in zip(one.tokens, other.tokens, strict=True)]
    gaps = [abs(one.logprob - other.logprob) for one, other in tokens]
    # Shown by `pytest -rA`; docs/served.md states them.
    print(
        f"{written.parent.name}: {len(equal)} of {COUNT} equal, max {max(gaps):.1e}, mean {sum(gaps) / len(gaps):.1e}"
    )
    assert len(equal) >= LEAST_EQUAL
    assert max(gaps) < MOST
    told = served.account()["served"]["told"]
    assert (told["dtype"], told["quantization"]) == ("torch.float16", "compressed-tensors")
