"""The folder of features: several writers, several writings, files that were never finished."""

import dataclasses

import pytest
import torch

from lmms_plugin.selector import features
from lmms_plugin.selector.features import FeatureOrigin, Features, FeatureWriter, key, read
from lmms_plugin.utils.hashing import of_weights

ORIGIN = FeatureOrigin("a" * 64, {"method": "rtn", "plan": {"language": {"bits": 4}}}, -1)


def some(*values, dtype=torch.float32):
    column = torch.tensor(values, dtype=dtype)
    wide = column[:, None].expand(-1, 3)
    return Features(wide, wide + 0.5, -wide, column.float() / 100)


def write(folder, keys, values, origin=ORIGIN, **options):
    writer = FeatureWriter(folder, origin)
    writer.add(keys, some(*values, **options))
    writer.flush()


def test_files_of_several_processes_are_one_store(tmp_path):
    write(tmp_path, ["t/0", "t/2"], [10, 12])
    write(tmp_path, ["t/1"], [11])
    store = read(tmp_path)
    assert store.origin == ORIGIN
    rows = [store.index[f"t/{k}"] for k in range(3)]
    torch.testing.assert_close(store.features.rows(rows).first[:, 0], torch.tensor([-10.0, -11.0, -12.0]))
    assert store.features.matrix().shape == (3, 10)


def test_of_several_for_one_request_the_last_counts(tmp_path):
    write(tmp_path, ["t/0", "t/1"], [1, 2])
    write(tmp_path, ["t/1"], [3])
    writer = FeatureWriter(tmp_path, ORIGIN)
    writer.add(["t/0", "t/0"], some(4, 5))
    writer.flush()
    store = read(tmp_path)
    assert len(store.features.logprob) == 2
    assert store.features.image[store.index["t/0"], 0] == 5
    assert store.features.image[store.index["t/1"], 0] == 3


def test_the_precision_of_the_model_is_kept(tmp_path):
    write(tmp_path, ["t/0"], [0.1], dtype=torch.bfloat16)
    found = read(tmp_path).features.image
    assert found.dtype == torch.bfloat16
    assert found[0, 0] == torch.tensor(0.1, dtype=torch.bfloat16)


def test_a_file_that_was_never_finished_is_none(tmp_path, monkeypatch):
    write(tmp_path, ["t/0"], [1])

    left = []

    def interrupted(columns, file, metadata):
        file.write_bytes(b"half a file")
        left.append(file)
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, ["t/1"], [2])
    assert len(list(tmp_path.iterdir())) == 1
    # Whoever is killed has no time to remove it.
    left[0].write_bytes(b"half a file")
    assert set(read(tmp_path).index) == {"t/0"}


def test_a_file_damaged_later_is_an_error(tmp_path):
    write(tmp_path, ["t/0"], [1])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"{file.name} is damaged"):
        read(tmp_path)


def test_large_portions_are_written_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "PORTION_BYTES", 100)
    writer = FeatureWriter(tmp_path, ORIGIN)
    for k in range(6):
        writer.add([f"t/{k}"], some(k))
    on_the_way = len(list(tmp_path.iterdir()))
    writer.flush()
    writer.flush()
    assert 1 < on_the_way <= len(list(tmp_path.iterdir())) < 6
    store = read(tmp_path)
    assert [int(store.features.image[store.index[f"t/{k}"], 0]) for k in range(6)] == list(range(6))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"model": "b" * 64}, "model aaaaaaaaaaaa… and bbbbbbbbbbbb…", id="model"),
        pytest.param({"quantization": {**ORIGIN.quantization, "method": "awq"}}, "method rtn and awq", id="method"),
        pytest.param({"layer": 2}, "feature layer -1 and 2", id="layer"),
    ],
)
def test_a_folder_holds_one_model(tmp_path, change, named):
    other = dataclasses.replace(ORIGIN, **change)
    assert ORIGIN.differences(other) == [named]
    write(tmp_path, ["t/0"], [1])
    with pytest.raises(ValueError, match="features of one model"):
        FeatureWriter(tmp_path, other)
    # Two that began at the same time in an empty folder.
    unaware = FeatureWriter(tmp_path / "elsewhere", other)
    unaware.folder = tmp_path
    unaware.add(["t/1"], some(2))
    unaware.flush()
    with pytest.raises(ValueError, match=named):
        read(tmp_path)


def test_an_empty_folder_and_foreign_files_are_errors(tmp_path):
    with pytest.raises(ValueError, match="come from --model_args features="):
        read(tmp_path)
    features.save_file({"weight": torch.ones(2)}, tmp_path / "features-1.safetensors")
    with pytest.raises(ValueError, match="another kind of file"):
        read(tmp_path)


def test_repeats_of_a_request_have_keys_of_their_own():
    assert len({key("t", 1), key("t", 1, 1), key("t", 11), key("t1", 1), key("t", 1, 2)}) == 5


def test_a_fingerprint_knows_weights_and_not_where_they_lie(tmp_path):
    weights = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0))
    changed = weights.clone()
    # What a fine-tuning leaves alike is little, but not nothing.
    changed[:, ::3] += 1e-3
    for name, tensor in {"one": weights, "copy": weights, "tuned": changed}.items():
        (tmp_path / name).mkdir()
        features.save_file({"weight": tensor}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(name)
    assert of_weights(tmp_path / "one") == of_weights(tmp_path / "copy") != of_weights(tmp_path / "tuned")
    with pytest.raises(FileNotFoundError, match="expected weights"):
        of_weights(tmp_path)
