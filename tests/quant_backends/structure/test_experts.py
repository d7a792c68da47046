"""Mixtures of experts: fused stacks are quantized expert by expert, and routed as before."""

import copy
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from helpers.families import MIXTURES
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

from lmms_plugin.protocol.dialects import dialect_for
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.calibration.held_out import output_errors
from lmms_plugin.quant_backends.calibration.inputs import build_batches, encode, to_model
from lmms_plugin.quant_backends.calibration.memory import Residence
from lmms_plugin.quant_backends.calibration.routing import count_tokens
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.calibration.synthetic import scene
from lmms_plugin.quant_backends.checkpoints.hf_quantizer import PackedQuantizer
from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
from lmms_plugin.quant_backends.checkpoints.saving import save_quantized
from lmms_plugin.quant_backends.layers.linear import PackedLinear
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec, Rule
from lmms_plugin.quant_backends.plans.quant_report import QuantReport
from lmms_plugin.quant_backends.quantization import find_outlier_score, quantize, tensor_bytes
from lmms_plugin.quant_backends.structure.components import components
from lmms_plugin.quant_backends.structure.experts import SplitExperts, is_fused, join_experts, split_experts
from lmms_plugin.quant_backends.structure.roles import find_mixtures, find_places

GROUP = 32
FOUR = QuantPlan(language=QuantSpec(4, GROUP))
CALIBRATED = ("awq", "gptq", "mbq")
DATA_FREE = ("rtn", "hqq")
OTHERS = {
    "ptqtp": (3, {"starts": 1, "max_iterations": 5}),
    "quanto": (8, {}),
    "bitsandbytes": (8, {}),
    "torchao": (8, {}),
}
"""Further methods: bits and options."""


class Mixture:
    """One tiny model with its inputs and its logits."""

    def __init__(self, path):
        self.path = path
        self.model = AutoModelForImageTextToText.from_pretrained(path)
        self.processor = AutoProcessor.from_pretrained(path)
        image, expression = scene(np.random.default_rng(0))
        self.inputs = to_model(encode(self.processor, image, f"Where is {expression}?"), self.model)
        self.expected = self.answer(self.model)
        spec = CalibrationSpec("noise", samples=2)
        self.batches, _ = build_batches(
            self.model,
            self.processor,
            spec,
            spec.load_samples(),
            dialect_for(self.model.config.model_type, getattr(self.model.config, "grounding_dialect", None)),
            keep_logits=False,
            by_role=True,
        )

    @torch.no_grad()
    def answer(self, model):
        return model(**self.inputs).logits

    def quantize(self, method, plan=FOUR, **options):
        batches = self.batches if method in CALIBRATED else ()
        return quantize(copy.deepcopy(self.model), get(method, **options), plan, batches)


@pytest.fixture(scope="session")
def mixtures(checkpoint):
    return {family: Mixture(checkpoint(family)) for family in MIXTURES}


@pytest.fixture(params=tuple(MIXTURES))
def mixture(request, mixtures):
    return mixtures[request.param]


# --- taken apart ------------------------------------------------------------------------------------------------------


def test_taken_apart_a_model_answers_as_before_and_weighs_as_much(mixture):
    model = copy.deepcopy(mixture.model)
    fused = {name for name, module in model.named_modules() if is_fused(module)}
    split = split_experts(model)
    assert set(split) == fused
    assert len(split) == 2
    torch.testing.assert_close(mixture.answer(model), mixture.expected, rtol=1e-4, atol=1e-4)
    assert tensor_bytes(model) == tensor_bytes(mixture.model)
    join_experts(model, split, list(split))
    assert torch.equal(mixture.answer(model), mixture.expected)


def test_experts_of_every_layout_that_transformers_declares():
    """Transposed stacks, biases, interleaved gates: those of gpt-oss."""
    torch.manual_seed(0)
    config = GptOssConfig(hidden_size=16, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    parent = nn.Module()
    parent.experts = GptOssExperts(config)
    for parameter in parent.parameters():
        nn.init.normal_(parameter)
    x, chosen = torch.randn(10, 16), torch.stack([torch.randperm(4)[:2] for _ in range(10)])
    weights = torch.rand(10, 2)
    with torch.no_grad():
        expected = parent.experts(x, chosen, weights)
        split_experts(parent)
        assert isinstance(parent.experts, SplitExperts)
        torch.testing.assert_close(parent.experts(x, chosen, weights), expected)


def test_the_sum_of_experts_does_not_depend_on_what_else_is_in_the_batch(mixture):
    model = copy.deepcopy(mixture.model)
    experts = next(iter(split_experts(model).values()))
    torch.manual_seed(0)
    x, count = torch.randn(12, 64), experts.num_experts
    chosen, weights = torch.stack([torch.randperm(count)[:2] for _ in range(12)]), torch.rand(12, 2)
    with torch.no_grad():
        together = experts(x, chosen, weights)
        alone = torch.cat([experts(x[i : i + 1], chosen[i : i + 1], weights[i : i + 1]) for i in range(12)])
        nothing = experts(x[:0], chosen[:0], weights[:0])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert nothing.shape == (0, 64)


# --- quantized --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*DATA_FREE, *CALIBRATED])
def test_every_expert_is_quantized_and_bytes_shrink(mixture, method):
    work = mixture.quantize(method)
    layers = {name for name, part in components(work.model).items() if part == "language"}
    packed = {name for name, module in work.model.named_modules() if isinstance(module, PackedLinear)}
    assert packed == layers
    assert not [module for module in work.modules() if len(module.shape) > 2 and module.component == "language"]
    inside = [module for module in work.modules() if module.role == "routed_experts"]
    assert len(inside) == 2 * sum(experts.num_experts for experts in find_mixtures(work.model).values())
    before = sum(stack.numel() for name, stack in mixture.model.named_parameters() if ".experts." in name)
    assert sum(module.weights for module in inside) == before
    # Four bits, a zero point of one byte and scales in float32 in groups of 32; an input scale for some methods.
    assert 4 < 8 * sum(module.bytes_after for module in inside) / before < 7
    assert torch.isfinite(mixture.answer(work.model)).all()


@pytest.mark.parametrize("method", OTHERS)
def test_so_does_every_other_method(mixtures, method):
    pytest.importorskip({"quanto": "optimum.quanto"}.get(method, method if method != "ptqtp" else "torch"))
    mixture, (bits, options) = mixtures["deepseek_vl2"], OTHERS[method]
    work = mixture.quantize(
        method, QuantPlan(language=QuantSpec(bits, GROUP, symmetric=method == "torchao")), **options
    )
    inside = [module for module in work.modules() if module.role == "routed_experts"]
    assert len(inside) == 24
    assert {module.bits for module in inside} == {bits}
    assert all(module.bytes_after < module.bytes_before / 2 for module in inside)
    assert torch.isfinite(mixture.answer(work.model)).all()


def test_a_quantized_layer_is_its_dequantized_experts_under_the_same_routing(mixture):
    """The reference is transformers' own fused module, with each expert's dequantized weight in its stacks."""
    work = mixture.quantize("rtn", QuantPlan(language=QuantSpec(3, GROUP)))
    reference = copy.deepcopy(mixture.model)
    for name, fused in find_mixtures(reference).items():
        for stack in ("gate_up_proj", "down_proj"):
            rows = [work.model.get_submodule(f"{name}.{e}.{stack}").weight for e in range(fused.num_experts)]
            getattr(fused, stack).data = torch.stack(rows)
    for name, part in components(reference).items():
        if part == "language":
            reference.get_submodule(name).weight.data = work.model.get_submodule(name).weight
    torch.testing.assert_close(mixture.answer(work.model), mixture.answer(reference), rtol=1e-4, atol=1e-4)


def test_routers_keep_their_weights(mixture):
    work = mixture.quantize("rtn")
    for name in find_mixtures(work.model):
        gate = f"{name.rpartition('.')[0]}.gate.weight"
        assert torch.equal(work.model.get_parameter(gate), mixture.model.get_parameter(gate))


@pytest.mark.parametrize("method", DATA_FREE)
def test_quantizing_while_loading_gives_what_quantizing_afterwards_gives(mixture, method):
    loaded = load_quantized(str(mixture.path), backend=get(method), plan=FOUR)
    afterwards = mixture.quantize(method)
    assert torch.equal(mixture.answer(loaded.model), mixture.answer(afterwards.model))
    assert loaded.report.modules == tuple(afterwards.modules())
    assert loaded.report.bytes_after == tensor_bytes(loaded.model) < loaded.report.bytes_before


def test_devices_chosen_by_size_are_chosen_by_packed_size(mixtures):
    """transformers asks how large each weight will be; an expert counts once, in its stack."""
    mixture, sizes = mixtures["qwen3_vl_moe"], {}
    kind = PackedQuantizer.param_element_size

    def spy(self, model, name, param):
        sizes[name] = kind(self, model, name, param) * param.numel()
        return kind(self, model, name, param)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedQuantizer, "param_element_size", spy)
        plan = QuantPlan(language=QuantSpec(4, GROUP), rules=(Rule(r"experts\.[01]\.", None),))
        load_quantized(str(mixture.path), backend=get("rtn"), plan=plan, device_map="auto")
    stack = mixture.model.get_parameter("model.language_model.layers.1.mlp.experts.gate_up_proj")
    # Six of eight experts in half a byte per weight, two in four.
    assert sizes["model.language_model.layers.1.mlp.experts.gate_up_proj"] == stack.numel() * (6 * 0.5 + 2 * 4) / 8
    assert {size for name, size in sizes.items() if re.search(r"experts\.\d", name)} == {0}


def test_outputs_of_experts_are_compared_with_the_dense_model(mixtures):
    mixture = mixtures["qwen3_vl_moe"]
    work = mixture.quantize("rtn")
    names = [module.name for module in work.modules() if module.role == "routed_experts"]
    batches = [{key: value for key, value in batch.items() if key != "token_roles"} for batch in mixture.batches]
    errors = output_errors(copy.deepcopy(mixture.model), work.model, names, batches)
    counted = count_tokens(mixture.model, mixture.batches, Residence())
    for name, error in errors.items():
        experts, expert, _ = re.fullmatch(r"(.*)\.(\d+)\.(\w+)", name).groups()
        assert (error is None) == (counted[experts][int(expert)] == 0)
        assert error is None or 0 < error < 0.5


def test_checkpoints_of_other_tools_with_quantized_experts_are_refused(mixture, tmp_path):
    folder = tmp_path / "gptq"
    shutil.copytree(mixture.path, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.language_model.layers.1.mlp.experts.0.gate_proj"
    tensors[f"{name}.qweight"] = torch.zeros(8, 32, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"holds a quantized {name}, for which the model has no place"):
        load_quantized(str(folder), backend=get("prequantized"), plan=QuantPlan())


def test_weights_that_wait_for_calibration_are_those_of_the_checkpoint(mixture):
    """Nobody draws new ones for experts whose names are in no file: at 8 bits outputs would not be near."""
    spec = CalibrationSpec("noise", samples=2)
    loaded = load_quantized(
        str(mixture.path), backend=get("awq"), plan=QuantPlan(language=QuantSpec(8, GROUP)), calibration=spec
    )
    for name, fused in find_mixtures(mixture.model).items():
        for expert in range(fused.num_experts):
            got = loaded.model.get_submodule(f"{name}.{expert}.down_proj").weight
            dense = fused.down_proj[expert]
            assert float((got - dense).norm() / dense.norm()) < 0.02
    assert not any(parameter.is_meta for parameter in loaded.model.parameters())


def test_dense_experts_do_not_keep_the_stack_of_the_others_in_memory(mixture):
    plan = QuantPlan(language=QuantSpec(4, GROUP), rules=(Rule(r"experts\.[01]\.", None),))
    loaded = load_quantized(str(mixture.path), backend=get("rtn"), plan=plan)
    tensors = {id(t): t for t in (*loaded.model.parameters(), *loaded.model.buffers())}
    kept = [name for name in components(loaded.model) if re.search(r"experts\.[01]\.", name)]
    assert len(kept) == 8
    for name in kept:
        weight = loaded.model.get_submodule(name).weight
        assert weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
        expert = name.rpartition(".experts.")[2].partition(".")[0]
        stack = mixture.model.get_parameter(name.replace(f"experts.{expert}.", "experts."))
        assert torch.equal(weight, stack[int(expert)])
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == loaded.report.bytes_after


def test_experts_of_which_nothing_is_quantized_stay_fused(mixture):
    plan = QuantPlan(language=QuantSpec(4, GROUP), rules=(Rule(r"\.experts\.", None),))
    work = mixture.quantize("rtn", plan)
    assert not any(isinstance(module, SplitExperts) for module in work.model.modules())
    stacks = [module for module in work.modules() if len(module.shape) == 3 and module.component == "language"]
    assert len(stacks) == 4
    assert {module.reason for module in stacks} == {r"the plan leaves '\\.experts\\.' at 16 bits"}


def test_experts_with_few_tokens_are_quantized_without_calibration_and_the_report_says_so(mixture):
    work = mixture.quantize("awq")
    plain = mixture.quantize("rtn")
    bare = [module for module in work.modules() if module.method == "awq, uncalibrated"]
    use = {layer.name: layer for layer in work.expert_use}
    assert bare
    for module in bare:
        experts, _, rest = module.name.rpartition(".experts.")
        layer = use[f"{experts}.experts"]
        expert = int(rest.partition(".")[0])
        assert layer.tokens[expert] < 32
        assert expert in layer.uncalibrated
        one, other = (model.get_submodule(module.name).weight for model in (work.model, plain.model))
        assert torch.equal(one, other)
    for layer in use.values():
        for expert, tokens in enumerate(layer.tokens):
            assert (tokens < 32) == (expert in layer.uncalibrated)


def test_statistics_of_an_expert_are_those_of_its_own_tokens(mixture):
    """MBQ weighs image and answer tokens: an expert has those roles that the tokens sent to it have."""
    seen = {}
    backend = get("mbq")
    solve = type(backend).solve

    def spy(self, layers, specs, statistics):
        seen[statistics.names[0]] = {role: part.rows for role, part in statistics.roles.items()}
        seen[statistics.names[0]]["all"] = statistics.rows
        return solve(self, layers, specs, statistics)

    chosen = {}
    handles = []
    for name, fused in find_mixtures(mixture.model).items():
        note = lambda _, args, name=name: chosen.setdefault(name, []).append(args[1])  # noqa: E731
        handles.append(fused.register_forward_pre_hook(note))
    with torch.no_grad():
        for batch in mixture.batches:
            mixture.model(**{key: value for key, value in batch.items() if key != "token_roles"})
    for handle in handles:
        handle.remove()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(backend), "solve", spy)
        mixture.quantize("mbq")
    roles = torch.cat([batch["token_roles"] for batch in mixture.batches])
    checked = 0
    for name, calls in chosen.items():
        routed = torch.cat(calls)
        for expert in range(find_mixtures(mixture.model)[name].num_experts):
            counts = seen.get(f"{name}.{expert}.gate_up_proj")
            mine = roles[(routed == expert).any(1)]
            if counts is None:
                assert len(mine) < 32
                continue
            checked += 1
            assert counts["all"] == len(mine)
            assert counts.get("image", 0) == int((mine == 0).sum())
            assert counts.get("answer", 0) == int((mine == 2).sum())
    assert checked


@pytest.mark.parametrize("method", ["hqq", "awq"])
def test_saved_and_loaded_again_the_answers_are_the_same(mixture, method, tmp_path):
    calibration = CalibrationSpec("noise", samples=2) if method in CALIBRATED else None
    plan = QuantPlan(
        language=QuantSpec(4, GROUP), rules=(Rule(r"layers\.1\.mlp\.experts", None), Rule(r"experts\.2\.down", None))
    )
    loaded = load_quantized(str(mixture.path), backend=get(method), plan=plan, calibration=calibration)
    expected = mixture.answer(loaded.model)
    saved = save_quantized(loaded.model, loaded.processor, loaded.report, tmp_path / "saved")
    assert saved.format == "lmms_plugin"
    assert saved.reason.endswith("holds experts")
    again = load_quantized(str(tmp_path / "saved"), backend=get("prequantized"), plan=QuantPlan())
    weights, back = loaded.model.state_dict(), again.model.state_dict()
    assert weights.keys() == back.keys()
    assert all(torch.equal(weights[name], back[name]) for name in weights)
    # Products in float32 depend on where in memory their factors begin.
    torch.testing.assert_close(mixture.answer(again.model), expected, rtol=1e-4, atol=1e-5)
    assert again.report.bytes_after == loaded.report.bytes_after
    assert len(again.report.quantized) == len(loaded.report.quantized)


# --- use and outliers -------------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_routers_own_choices(mixture):
    model = mixture.model
    expected = {name: torch.zeros(fused.num_experts, dtype=torch.int64) for name, fused in find_mixtures(model).items()}

    def note(name):
        def hook(_, __, output):
            for expert in output[2].reshape(-1).tolist():
                expected[name][expert] += 1

        return hook

    handles = [
        model.get_submodule(f"{name.rpartition('.')[0]}.gate").register_forward_hook(note(name)) for name in expected
    ]
    counted = count_tokens(model, mixture.batches, Residence())
    for handle in handles:
        handle.remove()
    assert counted == {name: counts.tolist() for name, counts in expected.items()}
    tokens = sum(batch["input_ids"].shape[1] for batch in mixture.batches)
    assert {sum(counts) for counts in counted.values()} == {2 * tokens}


def test_the_report_of_a_calibrated_method_holds_use_and_outliers(mixture):
    work = mixture.quantize("gptq")
    counted = count_tokens(mixture.model, mixture.batches, Residence())
    assert {layer.name: list(layer.tokens) for layer in work.expert_use} == counted
    for layer in work.expert_use:
        shares = np.array(layer.tokens) / sum(layer.tokens)
        positive = shares[shares > 0]
        assert layer.entropy == pytest.approx(-(positive * np.log(positive)).sum() / math.log(len(shares)))
        assert layer.imbalance == pytest.approx(shares.max() / shares.mean())
    for module in work.modules():
        if module.role == "attention":
            dense = mixture.model.get_submodule(module.name).weight.detach().abs()
            assert module.outlier_score == pytest.approx(float((dense.amax(0) / dense.mean(0)).max()), rel=1e-5)


def test_outlier_score_of_known_weights():
    even = torch.ones(4, 3)
    assert find_outlier_score(even) == 1
    spiked = even.clone()
    spiked[2, 1] = -9
    assert find_outlier_score(spiked) == pytest.approx(9 / 3)
    spiked[:, 0] = 0
    assert find_outlier_score(spiked) == pytest.approx(3)
    assert find_outlier_score(torch.zeros(2, 2)) == 1


# --- roles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen3_vl_moe", {"attention": 12, "mlp": 3, "routed_experts": 32}),
        ("deepseek_vl2", {"attention": 12, "mlp": 3, "shared_expert": 6, "routed_experts": 24}),
    ],
)
def test_roles_are_found_by_structure(mixtures, family, expected):
    model = copy.deepcopy(mixtures[family].model)
    split_experts(model)
    places = find_places(model, components(model))
    found = {}
    for name, place in places.items():
        found[place.role] = found.get(place.role, 0) + 1
        assert f".layers.{place.block}." in name
        assert (".experts." in name) == (place.role == "routed_experts")
        assert (".shared_experts." in name) == (place.role == "shared_expert")
        assert (".self_attn." in name) == (place.role == "attention")
        if place.role == "routed_experts":
            assert name.startswith(f"{place.experts}.{place.expert}.")
    assert found == expected


def bits_by_layer(work):
    return {module.name: module.bits or 16 for module in work.modules() if module.role is not None}


def roles_plan(tmp_path, text, **arguments):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return QuantPlan.from_arguments(**{"bits": 4, "group_size": GROUP, "plan": path} | arguments)


def test_bits_by_role(mixtures, tmp_path):
    plan = roles_plan(
        tmp_path,
        "roles: {attention: 8, mlp: 6, shared_expert: 5, routed_experts: {bits: 3, group_size: 16}, router: 16}",
    )
    work = mixtures["deepseek_vl2"].quantize("rtn", plan)
    wanted = {"attention": 8, "mlp": 6, "shared_expert": 5, "routed_experts": 3}
    found = {module.role: set() for module in work.modules() if module.role}
    for module in work.modules():
        if module.role:
            found[module.role].add((module.bits, module.group_size))
    assert found == {role: {(bits, 16 if bits == 3 else GROUP)} for role, bits in wanted.items()}


def test_rules_win_over_roles_and_the_first_blocks_raise_but_never_lower(mixtures, tmp_path):
    plan = roles_plan(
        tmp_path,
        """
        roles: {attention: 8, shared_expert: 16, routed_experts: 3, first_blocks: {count: 2, bits: 6}}
        rules: [{match: 'layers.1.mlp.experts.5', bits: 2}]
        skip: ['layers.2.self_attn.o_proj']
        """,
    )
    bits = bits_by_layer(mixtures["deepseek_vl2"].quantize("rtn", plan))
    prefix = "model.language_model.layers"
    assert bits[f"{prefix}.0.mlp.up_proj"] == 6
    assert bits[f"{prefix}.1.mlp.experts.0.down_proj"] == 6
    assert bits[f"{prefix}.2.mlp.experts.0.down_proj"] == 3
    assert bits[f"{prefix}.1.self_attn.o_proj"] == 8
    assert bits[f"{prefix}.1.mlp.experts.5.down_proj"] == 2
    assert f"{prefix}.2.self_attn.o_proj" not in bits
    assert f"{prefix}.1.mlp.shared_experts.up_proj" not in bits


BY_USE = "roles: {routed_experts: {frequent: 6, rare: 2, share: 0.25%s}}"


def test_bits_by_use(mixture, tmp_path):
    """The fourth of each layer's experts that most tokens are sent to; rtn takes the counts from a report."""
    work = mixture.quantize("gptq", roles_plan(tmp_path, BY_USE % ""))
    counted = count_tokens(mixture.model, mixture.batches, Residence())
    expected = {}
    for name, tokens in counted.items():
        frequent = sorted(range(len(tokens)), key=lambda expert: (-tokens[expert], expert))[
            : math.ceil(len(tokens) / 4)
        ]
        for expert in range(len(tokens)):
            for layer in ("gate_up_proj", "down_proj"):
                expected[f"{name}.{expert}.{layer}"] = 6 if expert in frequent else 2
    got = bits_by_layer(work)
    assert {name: bits for name, bits in got.items() if ".experts." in name} == expected
    report = QuantReport("gptq", work.modules(), 0, 0, 0.0, None, None, None, {}, work.expert_use)
    (tmp_path / "report.json").write_text(report.to_json())
    plan = roles_plan(tmp_path, BY_USE % ", use: report.json")
    loaded = load_quantized(str(mixture.path), backend=get("rtn"), plan=plan)
    assert {m.name: m.bits for m in loaded.report.modules if m.role == "routed_experts"} == expected
    assert "experts of 2 layers: " in report.table()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("roles: {atention: 8}", r"plan.yaml:1:9: roles: unknown key 'atention', did you mean 'attention'"),
        ("roles: [8]", r"plan.yaml:1:8: roles: expected a mapping"),
        ("roles: {attention: 1}", r"plan.yaml:1:20: roles: attention: bits must be"),
        ("roles: {router: 4}", r"plan.yaml:1:17: roles: router must be 16 \(a router decides .*\), got 4"),
        ("roles: {routed_experts: {frequent: 4}}", r"roles: routed_experts: rare is missing"),
        ("roles: {routed_experts: {frequent: 4, rare: 2, share: 2}}", r"routed_experts: share must be a fraction"),
        ("roles: {routed_experts: {frequent: 9, rare: 2, share: 0.5}}", r"routed_experts: frequent: bits must be"),
        (
            "roles: {routed_experts: {frequent: 4, rare: 2, share: 0.5, use: 3}}",
            r"use must be the name of a report's file, got 3",
        ),
        ("roles: {first_blocks: 2}", r"roles: first_blocks: expected a mapping"),
        ("roles: {first_blocks: {count: 2}}", r"roles: first_blocks: bits is missing"),
        ("roles: {first_blocks: {count: 0, bits: 8}}", r"roles: first_blocks: count must be a positive integer"),
    ],
)
def test_mistakes_in_roles_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        roles_plan(tmp_path, text)


def test_reports_without_counts_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"plan\.yaml:\d+:\d+: .*use: there is no report .*gone\.json"):
        roles_plan(tmp_path, BY_USE % ", use: gone.json")
    (tmp_path / "empty.json").write_text('{"experts": []}')
    (tmp_path / "damaged.json").write_text('{"experts": [{"name": "layer", "tokens": [1, -1]}]}')
    with pytest.raises(ValueError, match=r"plan\.yaml:1:\d+: .*damaged: experts\[0\]: tokens\[1\] must be"):
        roles_plan(tmp_path, BY_USE % ", use: damaged.json")
    with pytest.raises(ValueError, match=r"empty\.json counts no experts; expected the report of a calibrated method"):
        roles_plan(tmp_path, BY_USE % ", use: empty.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("roles: {shared_expert: 8}", r"roles name shared_expert, but this model's layers are: attention, mlp, routed"),
        ("roles: {first_blocks: {count: 4, bits: 8}}", r"first_blocks are 4, this decoder has 3 blocks"),
        ("rules: [{match: 'mlp.gate$', bits: 4}]", r"plan rule 'mlp.gate\$' matches no linear layer"),
    ],
)
def test_plans_that_do_not_fit_the_model_are_refused(mixtures, tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        mixtures["qwen3_vl_moe"].quantize("rtn", roles_plan(tmp_path, text))


def test_by_use_without_inputs_to_count_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"rtn looks at no inputs that could be counted: name the report"):
        get("rtn").check(roles_plan(tmp_path, BY_USE % ""))


def test_routers_and_shared_gates_that_are_linear_layers_are_left_alone():
    """Qwen3.5-MoE gates its shared expert by a linear layer with one output; experts in lists have linear routers."""

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.down_proj(self.up_proj(x))

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(8, 8)

        def forward(self, x, attention_mask=None):
            return self.q_proj(x)

    block = nn.Module()
    block.self_attn, block.mlp = Attention(), Mlp()
    block.mlp.gate, block.mlp.shared_expert_gate = nn.Linear(8, 5), nn.Linear(8, 1)
    block.mlp.experts, block.mlp.shared_expert = nn.ModuleList(Mlp() for _ in range(5)), Mlp()
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    layers = {name: "language" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    places = find_places(model, layers)
    roles = {name.removeprefix("layers.0."): place.role for name, place in places.items()}
    assert roles["mlp.gate"] == roles["mlp.shared_expert_gate"] == "router"
    assert roles["mlp.shared_expert.up_proj"] == "shared_expert"
    assert roles["self_attn.q_proj"] == "attention"
    assert places["layers.0.mlp.experts.3.up_proj"] == ("routed_experts", 0, "layers.0.mlp.experts", 3)
    plan = QuantPlan(language=QuantSpec(4, 8))
    specs, reasons = plan.assign(layers, places)
    assert set(reasons) == {"layers.0.mlp.gate", "layers.0.mlp.shared_expert_gate"}
    assert all("decides which experts run" in reason for reason in reasons.values())
    assert len(specs) == len(layers) - 2
