"""Plans: from arguments and files to the spec of each layer; registry of backends."""

import subprocess
import sys

import pytest

from lmms_plugin.quant_backends import BACKENDS, get, names
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec, Rule
from lmms_plugin.utils.reading.problems import SeveralErrors, lines_of

LAYERS = {
    "model.visual.blocks.0.fc1": "vision",
    "model.visual.merger.0": "connector",
    "model.language_model.layers.0.q_proj": "language",
    "model.language_model.layers.1.q_proj": "language",
    "lm_head": "head",
}


@pytest.fixture
def plan_file(tmp_path):
    """Return a function that writes a plan file and returns its path."""

    def write(text):
        path = tmp_path / "plan.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "bits must be"),
        ({"bits": 9}, "bits must be"),
        ({"bits": 4.0}, "bits must be"),
        ({"bits": True}, "bits must be"),
        ({"bits": 4, "group_size": 0}, "group_size must be"),
        ({"bits": 4, "group_size": -2}, "group_size must be"),
        ({"bits": 4, "group_size": "64"}, "group_size must be"),
        ({"bits": 4, "symmetric": 1}, "symmetric must be"),
    ],
    ids=str,
)
def test_specs_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(**arguments)


def test_minus_one_and_none_both_mean_one_group_per_row():
    assert QuantSpec(4, -1) == QuantSpec(4, None)


def test_arguments_quantize_the_language_model_alone_by_default():
    plan = QuantPlan.from_arguments(bits=4, group_size=64)
    assert (plan.vision, plan.connector, plan.language, plan.head) == (None, None, QuantSpec(4, 64), None)


def test_each_component_has_its_own_bits():
    plan = QuantPlan.from_arguments(
        bits=4, vision_bits=8, connector_bits=6, language_bits=3, head_bits=5, symmetric=True
    )
    bits = [plan.spec_for(name, component).bits for name, component in LAYERS.items()]
    assert bits == [8, 6, 3, 3, 5]
    assert plan.spec_for("lm_head", "head").symmetric


def test_entries_may_name_formats_which_decide_bits_and_symmetry(plan_file):
    text = """
components: {language: {format: nvfp4}, vision: {format: int8_asym, group_size: 32}}
roles: {attention: {format: fp8_e4m3, activation_format: none}}
rules: [{match: q_proj, activation_format: int8}]
"""
    plan = QuantPlan.from_arguments(bits=4, plan=plan_file(text))
    assert plan.language == QuantSpec(4, 128, True, format="nvfp4")
    assert plan.vision == QuantSpec(8, 32, False, format="int8_asym")
    assert plan.roles.attention == QuantSpec(8, 128, True, format="fp8_e4m3", activation_format="none")
    assert plan.rules[0].spec == QuantSpec(4, 128, False, activation_format="int8")
    assert plan.to_dict()["language"] == {"bits": 4, "group_size": 128, "symmetric": True, "format": "nvfp4"}
    assert plan.to_dict()["connector"] is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{format: nvfp5}", "unknown format 'nvfp5'"),
        ("{format: nvfp4, bits: 8}", "format nvfp4 has 4 bits per weight, got bits: 8; leave out bits"),
        ("{format: nvfp4, group_size: 32}", "format nvfp4 decides group_size: leave out group_size"),
        ("{format: int4, symmetric: false}", "format int4 decides symmetric: leave out symmetric"),
        ("{format: 4}", "format must be"),
    ],
)
def test_entries_that_contradict_their_format_are_refused(plan_file, entry, message):
    rule = entry.replace("{", "{match: q_proj, ")
    for text in (f"components: {{language: {entry}}}", f"rules: [{rule}]"):
        with pytest.raises(ValueError, match=message):
            QuantPlan.from_arguments(plan=plan_file(text))


def test_sixteen_bits_everywhere_is_the_empty_plan():
    assert QuantPlan.from_arguments(bits=16) == QuantPlan()


def test_skip_wins_over_rules_and_rules_over_components():
    plan = QuantPlan(
        language=QuantSpec(4),
        rules=(Rule(r"layers\.\d\.", QuantSpec(8)), Rule(r"layers\.0", QuantSpec(2)), Rule("visual", QuantSpec(6))),
        skip=(r"layers\.1",),
    )
    specs, reasons = plan.assign(LAYERS)
    assert {name: spec.bits for name, spec in specs.items()} == {
        "model.visual.blocks.0.fc1": 6,
        "model.visual.merger.0": 6,
        "model.language_model.layers.0.q_proj": 8,
    }
    assert "layers" in reasons["model.language_model.layers.1.q_proj"]
    assert reasons["lm_head"] == "the plan leaves head at 16 bits"


def test_plan_file(plan_file):
    path = plan_file(
        r"""
        components: {vision: 8, language: {bits: 3, group_size: 32}}
        rules:
          - {match: 'layers\.0\.', bits: 6, symmetric: true}
          - {match: 'merger', skip: true}
        skip: ['lm_head']
        """
    )
    plan = QuantPlan.from_arguments(bits=4, group_size=64, plan=path)
    assert plan.vision == QuantSpec(8, 64)
    assert plan.language == QuantSpec(3, 32)
    assert plan.rules == (Rule(r"layers\.0\.", QuantSpec(6, 64, True)), Rule("merger", None))
    assert plan.assign(LAYERS).specs["model.language_model.layers.0.q_proj"].bits == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits: 4", r"plan\.yaml:1:1: unknown key 'bits' \(known: components, roles, rules, skip\)"),
        ("- 1", r"plan\.yaml:1:1: expected a mapping with components, roles, rules, skip, got \[1\]"),
        (
            "components: {visual: 4}",
            "1:14: components: expected one of vision, connector, language, head, got 'visual'",
        ),
        ("components: {vision: x}", "1:22: components: vision must be a number of bits, or a mapping with bits, .*'x'"),
        ("components:\n  vision:", "2:10: components: vision must be a number of bits, .* got None"),
        ("components: {languge: 4}", "did you mean 'language'"),
        ("components: {vision: 1}", "1:22: components: vision: bits must be .*, got 1"),
        ("components:\n  vision: {bits: 4, grop_size: 8}", "2:21: .*'grop_size', did you mean 'group_size'\\?"),
        ("components: {vision: {symmetric: 1}}", "1:34: components: vision: symmetric must be True or False, got 1"),
        ("rules: [{bits: 4}]", "1:9: rules: match is missing"),
        ("rules: [{match: 5, bits: 4}]", "1:17: rules: match must be a regular expression, got 5"),
        ("rules: [{match: '(', bits: 4}]", "not a regular expression"),
        ("rules: [{match: a, skip: true, bits: 4}]", "both skips and sets bits"),
        ("rules: [{match: a, bites: 4}]", "1:20: rules: unknown key 'bites', did you mean 'bits'"),
        ("rules: {match: a, bits: 4}", "rules must be a list"),
        ("rules: 5", "rules must be a list"),
        ("skip: lm_head", "skip must be a list"),
        ("skip: [lm_head,\n  5]", "2:3: skip must be a regular expression, got 5"),
        ("skip: {lm_head: true}", "skip must be a list"),
        ("a: [", "expected YAML"),
    ],
)
def test_bad_plan_files_name_file_and_entry(plan_file, text, message):
    with pytest.raises(ValueError, match=message):
        QuantPlan.from_arguments(plan=plan_file(text))


def test_all_errors_of_a_plan_file_are_told_at_once(plan_file):
    path = plan_file("components: {visoin: 4, head: 9}\nrules: [{match: '(', bits: 4}, {mach: a}]\nskp: []\n")
    with pytest.raises(SeveralErrors) as caught:
        QuantPlan.from_arguments(plan=path)
    told = lines_of(caught.value)
    places = [line.removeprefix(f"{path}:").split(": ")[0] for line in told]
    assert places == ["1:14", "1:31", "2:17", "2:32", "2:33", "3:1"]
    hints = [line.partition("did you mean ")[2].partition("?")[0] for line in told]
    assert hints == ["'vision'", "", "", "", "'match'", "'skip'"]


def test_missing_plan_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        QuantPlan.from_arguments(plan=tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (QuantPlan(language=QuantSpec(4), skip=("qproj",)), "'qproj' matches no linear layer .*model.visual"),
        (QuantPlan(language=QuantSpec(4), rules=(Rule("o_proj", QuantSpec(8)),)), "'o_proj' matches no linear layer"),
        (QuantPlan(language=QuantSpec(4), skip=("layers",)), "asks to quantize language, .* skip and rules leave none"),
        (QuantPlan(rules=(Rule("layers", None),)), "quantizes nothing"),
    ],
    ids=["skip", "rule", "all skipped", "nothing"],
)
def test_a_plan_that_would_silently_do_nothing_is_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        plan.assign(LAYERS)


def test_a_component_without_linear_layers_is_refused():
    layers = {name: part for name, part in LAYERS.items() if part != "connector"}
    with pytest.raises(ValueError, match=r"asks to quantize connector, .* no nn\.Linear"):
        QuantPlan.from_arguments(bits=4, connector_bits=4).assign(layers)


@pytest.mark.parametrize("name", names())
def test_every_registered_backend_is_there_under_its_name(name):
    assert get(name).name == name


def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'awq'"):
        get("aqw")
    assert set(names()) == set(BACKENDS) >= {"none", "rtn", "hqq", "awq"}


def test_listing_backends_imports_no_heavy_library():
    code = "import sys, lmms_plugin.quant_backends as q; q.names(); print(*(m for m in sys.modules if '.' not in m))"
    loaded = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "transformers", "hqq", "numpy", "lmms_eval"} & set(loaded)


def test_an_unknown_option_of_a_backend_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown option 'damping' .*'rtn'"):
        get("rtn", damping=1)
