"""GGUF files: bits of each type, what a file is, what is written, and what cannot be."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lmms_plugin.demo import CHECKPOINT
from lmms_plugin.quant_backends.checkpoints.gguf.gguf_content import GgufContent, Tensor, content_of
from lmms_plugin.quant_backends.checkpoints.gguf.gguf_export import TEXT_FILE, VISION_FILE, export
from lmms_plugin.quant_backends.checkpoints.gguf.gguf_file import bits_per_weight, matrices, read
from lmms_plugin.quant_backends.checkpoints.gguf.idefics3_writer import SCALE, linear_as_perceptron
from lmms_plugin.quant_backends.checkpoints.gguf.llama_text import interleaved
from lmms_plugin.quant_backends.checkpoints.gguf.tensor_types import TypeChoice, dequantized, quantized

pytest.importorskip("gguf", reason="the extra gguf is not installed")

BITS = {"F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8.5, "Q5_1": 6, "Q5_0": 5.5, "Q4_1": 5, "Q4_0": 4.5}
K_BITS = {"Q6_K": 6.5625, "Q5_K": 5.5, "Q4_K": 4.5, "Q3_K": 3.4375, "Q2_K": 2.625}
HEADS = 4


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A function from types to the demo written in them, once for each."""
    made = {}

    def of(choice):
        if choice not in made:
            folder = tmp_path_factory.mktemp("gguf") / "model"
            made[choice] = folder, export(CHECKPOINT, folder, choice)
        return made[choice]

    return of


def values(columns=512):
    return np.random.default_rng(0).normal(size=(8, columns)).astype(np.float32)


@pytest.mark.parametrize(("kind", "bits"), [*BITS.items(), *K_BITS.items()])
def test_bits_are_those_of_the_bytes_and_values_come_back_within_their_step(kind, bits):
    if kind in K_BITS:
        pytest.importorskip("libgguf", reason="the extra k-quants is not installed")
    stored = quantized(values(), kind)
    assert 8 * stored.nbytes / values().size == bits
    error = np.linalg.norm(dequantized(stored, kind).reshape(values().shape) - values()) / np.linalg.norm(values())
    # Half a unit in the last place; of the others, a uniform grid of 2**b steps over about eight standard deviations.
    bound = {"F32": 0, "F16": 2.0**-11, "BF16": 2.0**-8}
    assert error <= (bound[kind] if kind in bound else 8 * 2.0 ** -int(kind[1]))


def test_a_file_is_what_its_tensors_are_and_not_what_it_says(written):
    folder, model = written(TypeChoice("Q4_0", embedding="Q8_0", output="F16"))
    rows = {(row.component, row.type): row for row in model.text.histogram}
    assert {key: row.bits_per_weight for key, row in rows.items()} == {
        ("embedding", "Q8_0"): 8.5,
        ("language", "Q4_0"): 4.5,
        ("language", "F32"): 32,
        ("head", "F16"): 16,
    }
    assert model.text.stated == "MOSTLY_Q4_0"
    assert {row.type for row in model.vision.histogram} == {"F32"}
    assert model.vision.projector == "phi4"
    sizes = sum(one.bytes for one in (*model.text.tensors, *model.vision.tensors))
    files = sum((folder / name).stat().st_size for name in (TEXT_FILE, VISION_FILE))
    assert model.totals()["bytes_after"] == sizes < files < sizes * 1.02
    count = sum(array.numel() for name, array in load_file(f"{CHECKPOINT}/model.safetensors").items() if "text" in name)
    assert sum(one.weights for one in model.text.tensors if one.component != "head") == count
    assert model.totals()["bits_per_weight"] == bits_per_weight(model.text.quantized)
    assert "mostly Q4_0" in model.text.table()
    assert json.loads(model.text.to_json())["types"][0]["type"] == "Q8_0"


def test_f32_holds_the_weights_of_the_checkpoint(written):
    folder, _ = written(TypeChoice("F32"))
    weights = load_file(f"{CHECKPOINT}/model.safetensors")
    found = dict(matrices(folder / TEXT_FILE))
    layer = "model.text_model.layers.1."
    assert np.array_equal(found["blk.1.ffn_down.weight"], weights[f"{layer}mlp.down_proj.weight"])
    assert np.array_equal(found["output.weight"], weights["lm_head.weight"])
    query = weights[f"{layer}self_attn.q_proj.weight"]
    # Rotary embeddings turn neighbours in llama.cpp, and the two halves of a head in transformers.
    pairs = found["blk.1.attn_q.weight"].reshape(HEADS, 16, 2, 128)
    assert np.array_equal(pairs[:, :, 0], query.reshape(HEADS, 2, 16, 128)[:, 0])
    assert np.array_equal(pairs[:, :, 1], query.reshape(HEADS, 2, 16, 128)[:, 1])
    assert np.array_equal(interleaved(np.arange(8.0)[:, None], 2)[:, 0], [0, 2, 1, 3, 4, 6, 5, 7])


def test_the_perceptron_is_the_linear_connector():
    matrix = values(64)[:, :16].copy()
    parts = {one.name: torch.from_numpy(one.load()) for one in linear_as_perceptron(matrix)}
    inputs = torch.from_numpy(values(16))
    hidden = torch.nn.functional.gelu(inputs @ parts["mm.0.weight"].T, approximate="tanh")
    assert hidden.abs().max() > SCALE / 100
    assert torch.allclose(hidden @ parts["mm.2.weight"].T, inputs @ torch.from_numpy(matrix).T, rtol=1e-5, atol=1e-6)


def test_other_types_of_a_file_are_those_of_the_checkpoint(written, tmp_path):
    dense, _ = written(TypeChoice("F32"))
    content_of(dense / TEXT_FILE).write(tmp_path / "again.gguf", TypeChoice("Q5_1"))
    folder, _ = written(TypeChoice("Q5_1"))
    assert read(tmp_path / "again.gguf").histogram == read(folder / TEXT_FILE).histogram
    mine, theirs = dict(matrices(tmp_path / "again.gguf")), dict(matrices(folder / TEXT_FILE))
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


def test_a_file_of_k_quants_is_read_as_llama_cpp_reads_it(tmp_path):
    libgguf = pytest.importorskip("libgguf", reason="the extra k-quants is not installed")
    name = "blk.0.ffn_down.weight"
    for kind, bits in K_BITS.items():
        file = tmp_path / f"{kind}.gguf"
        GgufContent("llama", {}, [Tensor.of(name, values(256))]).write(file, TypeChoice(kind))
        (row,) = read(file).histogram
        assert (row.component, row.type, row.weights, row.bits_per_weight) == ("language", kind, 8 * 256, bits)
        ((found, array),) = matrices(file)
        # The values by llama.cpp's own code in C; those of the reader are numpy's.
        stored = quantized(values(256), kind)
        theirs = libgguf.dequantize_rows(stored, libgguf.GGMLQuantizationType[kind])
        assert found == name
        assert np.allclose(array, theirs.reshape(array.shape), rtol=1e-6, atol=1e-7)


def test_files_that_are_none_or_damaged_are_told_in_one_line(written, tmp_path):
    folder, _ = written(TypeChoice("Q4_0"))
    content = (folder / TEXT_FILE).read_bytes()
    cases = {"none.gguf": None, "other.gguf": b"PK\3\4 other", "cut.gguf": content[: len(content) // 2]}
    cases |= {"header.gguf": content[:200], "model-00001-of-00002.gguf": content}
    said = {
        "none.gguf": "there is none at",
        "other.gguf": "which begins with the bytes GGUF, got",
        "cut.gguf": "it may be damaged",
        "header.gguf": "it may be damaged",
        "model-00001-of-00002.gguf": "there is none at .*00002-of-00002",
    }
    for name, held in cases.items():
        if held is not None:
            (tmp_path / name).write_bytes(held)
        with pytest.raises(ValueError, match=said[name]) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)


def test_what_cannot_be_written_is_told_before_anything_is(tmp_path):
    with pytest.raises(ValueError, match="unknown type of GGUF tensors 'Q4_O', did you mean 'Q4_"):
        TypeChoice("Q4_O")
    pytest.importorskip("libgguf", reason="the extra k-quants is not installed")
    with pytest.raises(ValueError, match=r"token_embd.weight has 128 columns, and Q4_K takes whole blocks of 256"):
        export(CHECKPOINT, tmp_path / "k", TypeChoice("Q4_K"))
    with pytest.raises(ValueError, match=r"F16 cannot hold a value of 1e\+06"):
        quantized(np.full((1, 32), 1e6, np.float32), "F16")
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="weight holds NaN or infinite values, which no type holds"):
            quantized(np.full((1, 32), value, np.float32), "F32")
    other = tmp_path / "other"
    shutil.copytree(CHECKPOINT, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"scale_factor": 2}))
    with pytest.raises(ValueError, match="expected Idefics3 that keeps one token per patch"):
        export(str(other), tmp_path / "shuffled", TypeChoice())
    (other / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ValueError, match="llava: this family is not written as GGUF here"):
        export(str(other), tmp_path / "llava", TypeChoice())
    assert [one.name for one in tmp_path.iterdir()] == ["other"]


def test_the_converter_s_last_words_are_told(tmp_path):
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import sys\nsys.exit('Model Idefics3ForConditionalGeneration is not supported')\n")
    with pytest.raises(ValueError, match=r"does not convert the language model of .*: Model .* is not supported"):
        export(CHECKPOINT, tmp_path / "out", TypeChoice(), converter=script)
    with pytest.raises(ValueError, match=r"converter: expected llama.cpp's convert_hf_to_gguf.py"):
        export(CHECKPOINT, tmp_path / "out", TypeChoice(), converter=tmp_path / "missing.py")


def test_what_a_converter_writes_is_written_in_the_chosen_types(written, tmp_path):
    # A converter that writes what is there already: text or vision, as it is asked for.
    dense, _ = written(TypeChoice("F32"))
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(
        "import shutil, sys\n"
        f"source = {str(dense)!r} + ('/{VISION_FILE}' if '--mmproj' in sys.argv else '/{TEXT_FILE}')\n"
        "shutil.copy(source, sys.argv[sys.argv.index('--outfile') + 1])\n"
    )
    made = export(CHECKPOINT, tmp_path / "out", TypeChoice("Q8_0", vision="Q8_0"), converter=script)
    _, ours = written(TypeChoice("Q8_0", vision="Q8_0"))
    assert made.to_dict() == ours.to_dict()


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'needs gguf, which is not installed: pip install "lmms-plugin\[gguf\]"'):
        export(CHECKPOINT, tmp_path / "out", TypeChoice())
