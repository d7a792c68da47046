"""Every plan file that the documentation shows loads, and fits the model that its first line names."""

import re
from pathlib import Path

import pytest
from helpers import families

from lmms_plugin import demo
from lmms_plugin.quantize import Asked, inspect

PAGES = sorted((Path(__file__).parents[2] / "docs").rglob("*.md"))
PLANS = [
    (page.name, code)
    for page in PAGES
    for code in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    if re.search(r"^(components|rules|roles|skip):", code, re.MULTILINE)
]
BUILDERS = {"Qwen2.5-VL": "qwen2_5_vl", "DeepSeek-VL2": "deepseek_vl2", "Qwen3-VL-MoE": "qwen3_vl_moe"}


def checkpoint(name, folder):
    return demo.CHECKPOINT if name == "demo" else families.build(BUILDERS[name], folder)


def named(code):
    return re.match(r"# ([\w.-]+)", code).group(1)


def quantized(path, code, folder):
    """As a reader of the page runs it; where experts are told apart by use, they are counted first."""
    (folder / "plan.yaml").write_text(code)
    method, calibration = "rtn", ""
    if "frequent" in code:
        calibration = ",calibration=noise,calibration_samples=2"
        if "use.json" in code:
            told = f"pretrained={path},method=awq,group_size=32{calibration},report={folder / 'use.json'}"
            inspect(Asked.parse(told), held_out=0)
            calibration = ""
        else:
            method = "awq"
    plan = f"plan={folder / 'plan.yaml'}"
    text = f"pretrained={path},method={method},group_size=32,{plan}{calibration}"
    return inspect(Asked.parse(text), held_out=0)


def test_there_are_plans():
    assert len(PLANS) >= 4


def test_a_plan_for_another_model_is_refused(tmp_path):
    (code,) = (code for _, code in PLANS if named(code) == "Qwen2.5-VL")
    with pytest.raises(ValueError, match="matches no linear layer"):
        quantized(demo.CHECKPOINT, code, tmp_path)


@pytest.mark.parametrize(("page", "code"), PLANS, ids=[f"{page}, {named(code)}" for page, code in PLANS])
def test_a_documented_plan_fits_the_model_it_names(page, code, tmp_path):
    path = checkpoint(named(code), tmp_path / "model")
    assert any(module.bits for module in quantized(path, code, tmp_path).modules)
