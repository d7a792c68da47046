"""Calibration sources: parsed and drawn before a model is loaded, the same every time, refused with a reason."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image

from lmms_plugin.protocol.boxes import Box
from lmms_plugin.quant_backends.calibration import photographs
from lmms_plugin.quant_backends.calibration.inputs import encode, model_size, question, written_answer
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.shifts.image.corruptions import apply


def png(index, size=(40, 30)):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(index).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes rows as a parquet split and returns the folder."""

    def write(rows, split="train"):
        features = None if "image" not in rows[0] else datasets.Dataset.from_list(rows[:1]).features
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
        return tmp_path

    return write


def referring(count):
    return [
        {"image": png(index), "answer": [f"thing {index}", f"object {index}"], "bbox": [4.0, 3.0, 20.0, 15.0]}
        for index in range(count)
    ]


@pytest.mark.parametrize("source", ["none", "noise", "self", "demo", "photographs"])
def test_plain_sources(source):
    spec = CalibrationSpec.parse(source, samples=3, seed=7)
    assert (spec.source, spec.samples, spec.seed, str(spec)) == (source, 3, 7, source)


def test_dataset_with_options():
    spec = CalibrationSpec.parse("dataset:my-org/my-set:split=train2:image=picture:text=caption")
    assert (spec.path, spec.split, spec.image, spec.text) == ("my-org/my-set", "train2", "picture", "caption")
    assert CalibrationSpec.parse(str(spec)) == spec


def test_number_seed_and_tokens_may_follow_any_source():
    spec = CalibrationSpec.parse("noise:n=5:seed=3:tokens=200", samples=64, seed=0)
    assert (spec.samples, spec.seed, spec.tokens) == (5, 3, 200)
    assert str(spec) == "noise:tokens=200"


def test_a_path_may_hold_colons(tmp_path):
    folder = tmp_path / "a:b"
    folder.mkdir()
    assert CalibrationSpec.parse(f"dataset:{folder}:split=train").path == str(folder)


@pytest.mark.parametrize(
    ("text", "samples", "message"),
    [
        ("nose", 4, "did you mean 'noise'"),
        (
            "self:split=train",
            4,
            r"unknown calibration option 'split' \(known for 'self': degenerate, n, seed, tokens\)",
        ),
        ("none:n=3", 4, "unknown calibration option 'n'"),
        ("noise:images", 4, "takes no path"),
        ("noise:n=many", 4, "n must be a whole number, got 'many'"),
        ("noise:n=0", 4, "at least 1 sample"),
        ("self:tokens=0", 4, "at least 1 token"),
        ("dataset", 4, "needs a hub id or a path"),
        ("dataset:a/b:splt=train", 4, "unknown calibration option 'splt', did you mean 'split'"),
        ("dataset:a/b:text=", 4, "option text is empty"),
        ("noise:n=2:n=3", 4, "option n is given twice in 'noise:n=2:n=3'"),
        ("noise:seed=-1", 4, "seed of a calibration must be 0 or above, got -1"),
        ("dataset:a/b:force=maybe", 4, "force must be true or false"),
        ("dataset:a/b:split=testA", 4, "evaluation data"),
        ("dataset:a/b:split=val", 4, "evaluation data"),
        ("noise", 0, "at least 1 sample"),
        ("noise:shift=fog_3", 4, "unknown calibration option 'shift'"),
        ("demo:shift=fog", 4, "shift must be a corruption and its severity, as fog_3, got 'fog'"),
        ("demo:shift=fgo_3", 4, "unknown shift 'fgo', did you mean 'fog'"),
        ("demo:shift=fog_6", 4, "severity of fog: expected an integer from 1 to 5, got 6"),
    ],
)
def test_bad_arguments_are_refused_at_once(text, samples, message):
    with pytest.raises(ValueError, match=message):
        CalibrationSpec.parse(text, samples=samples)


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_a_missing_path_is_named(path):
    with pytest.raises(FileNotFoundError, match="neither an existing path nor a hub id"):
        CalibrationSpec.parse(f"dataset:{path}")


def test_no_source_means_nothing_to_look_at():
    with pytest.raises(ValueError, match="calibration=none"):
        CalibrationSpec.parse("none").load_samples()


@pytest.mark.parametrize("source", ["noise", "self", "photographs"])
def test_made_up_samples_depend_on_the_seed_alone(source):
    one, again = (CalibrationSpec(source, samples=4, seed=1).load_samples() for _ in range(2))
    assert all(a.image.tobytes() == b.image.tobytes() and a[1:] == b[1:] for a, b in zip(one, again, strict=True))
    other = CalibrationSpec(source, samples=4, seed=2).load_samples()
    assert all(a.image.tobytes() != b.image.tobytes() for a, b in zip(one, other, strict=True))
    longer = CalibrationSpec(source, samples=6, seed=1).load_samples()
    assert [sample[1:] for sample in longer[:4]] == [sample[1:] for sample in one]


def test_shifted_images_are_those_of_the_source_under_that_corruption():
    plain, again = (CalibrationSpec.parse("demo", samples=3, seed=4).load_samples() for _ in range(2))
    spec = CalibrationSpec.parse("demo:shift=gaussian_noise_3", samples=3, seed=4)
    assert str(spec) == "demo:shift=gaussian_noise_3"
    shifted = spec.load_samples()
    for index, (one, same, other) in enumerate(zip(plain, again, shifted, strict=True)):
        assert one.image.tobytes() == same.image.tobytes()
        assert other[1:] == one[1:]
        expected = apply(one.image, "gaussian_noise", 3, f"calibration/4/{index}")
        assert other.image.tobytes() == expected.tobytes()


def test_photographs_are_parts_of_real_ones_with_captions():
    whole = [pixels for pixels, _ in photographs.load()]
    for sample in CalibrationSpec("photographs", samples=6).load_samples():
        part = np.asarray(sample.image)
        assert sample.prompt
        assert sample.answer in {caption for captions in photographs.CAPTIONS.values() for caption in captions}
        height, width = part.shape[:2]
        assert any(_holds(pixels, part) for pixels in whole), (height, width)


def _holds(pixels, part):
    """Whether an image is somewhere in another, as it is or mirrored."""
    height, width = part.shape[:2]
    for candidate in (part, part[:, ::-1]):
        corner = candidate[0, 0]
        for top, left in zip(*np.where((pixels == corner).all(axis=2)), strict=True):
            if np.array_equal(pixels[top : top + height, left : left + width], candidate):
                return True
    return False


def test_self_asks_for_boxes_and_noise_does_not():
    assert all(sample.expression and sample.answer is None for sample in CalibrationSpec("self", 4).load_samples())
    assert all(sample.prompt and sample.answer for sample in CalibrationSpec("noise", 4).load_samples())


def test_referring_expressions_from_parquet(folder):
    spec = CalibrationSpec.parse(f"dataset:{folder(referring(6))}", samples=4, seed=0)
    samples = spec.load_samples()
    assert [sample.expression for sample in samples] == [sample.expression for sample in spec.load_samples()]
    assert len({sample.expression.split()[1] for sample in samples}) == 4
    assert samples[0].box == Box(0.1, 0.1, 0.6, 0.6)
    assert samples[0].image.size == (40, 30)


def test_any_image_and_text_columns(folder):
    rows = [{"picture": png(index), "words": f"a picture {index}"} for index in range(3)]
    path = folder([{"picture": row["picture"], "words": row["words"]} for row in rows])
    samples = CalibrationSpec.parse(f"dataset:{path}:image=picture:text=words", samples=3).load_samples()
    assert {sample.answer for sample in samples} == {"a picture 0", "a picture 1", "a picture 2"}


def test_questions_of_a_dataset_are_asked_as_they_are(folder):
    rows = [{"image": png(index), "question": f"what is {index}?", "answer": f"it is {index}"} for index in range(2)]
    spec = CalibrationSpec.parse(f"dataset:{folder(rows)}:prompt=question:text=answer", samples=2)
    assert {(sample.prompt, sample.answer) for sample in spec.load_samples()} == {
        ("what is 0?", "it is 0"),
        ("what is 1?", "it is 1"),
    }
    assert CalibrationSpec.parse(str(spec), samples=2) == spec


def test_too_few_rows(folder):
    with pytest.raises(ValueError, match=r"asks for 9 samples, but .* has 2"):
        CalibrationSpec.parse(f"dataset:{folder(referring(2))}", samples=9).load_samples()


def test_missing_columns_are_named_with_those_present(folder):
    path = folder(referring(2))
    with pytest.raises(ValueError, match=r"no column 'photo' \(it has: image, answer, bbox"):
        CalibrationSpec.parse(f"dataset:{path}:image=photo", samples=1).load_samples()
    with pytest.raises(ValueError, match="no column 'caption'"):
        CalibrationSpec.parse(f"dataset:{path}:text=caption", samples=1).load_samples()


def test_a_corrupt_image_names_its_row(folder):
    rows = referring(2)
    for row in rows:
        row["image"] = {"bytes": b"no image", "path": None}
    with pytest.raises(ValueError, match="row 0 holds no readable image"):
        CalibrationSpec.parse(f"dataset:{folder(rows)}", samples=2).load_samples()


def test_a_split_that_is_not_there(folder):
    with pytest.raises(FileNotFoundError, match="split 'train'"):
        CalibrationSpec.parse(f"dataset:{folder(referring(1), split='other')}", samples=1).load_samples()


def test_a_split_is_a_whole_word_of_the_path(folder):
    folder(referring(1), split="train2")
    path = folder(referring(3))
    assert len(CalibrationSpec.parse(f"dataset:{path}", samples=3).load_samples()) == 3
    (path / "train").mkdir()
    (path / "train-00000-of-00001.parquet").rename(path / "train" / "0000.parquet")
    assert len(CalibrationSpec.parse(f"dataset:{path}", samples=3).load_samples()) == 3


def test_naming_the_file_does_not_slip_past_the_guard(folder):
    path = folder(referring(2), split="testA") / "testA-00000-of-00001.parquet"
    with pytest.raises(ValueError, match="evaluation data"):
        CalibrationSpec.parse(f"dataset:{path}")


def test_a_box_that_is_none_names_its_row(folder):
    rows = referring(1)
    rows[0]["bbox"] = [4.0, 3.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="row 0: bbox"):
        CalibrationSpec.parse(f"dataset:{folder(rows)}", samples=1).load_samples()


def test_an_evaluation_split_is_taken_by_force_only_and_says_so(folder):
    path = folder(referring(2), split="testA")
    spec = CalibrationSpec.parse(f"dataset:{path}:split=testA:force=true", samples=2)
    assert len(spec.load_samples()) == 2
    assert "force=true" in str(spec)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3", "paligemma"])
def test_question_and_answer_go_through_the_models_own_processor(checkpoint, family):
    from transformers import AutoProcessor

    from lmms_plugin.protocol.dialects import dialect_for

    processor = AutoProcessor.from_pretrained(checkpoint(family))
    dialect = dialect_for(family)
    sample = CalibrationSpec("self", 1).load_samples()[0]._replace(box=Box(0.25, 0.25, 0.5, 0.75))
    answer = written_answer(sample, dialect, processor)
    asked = encode(processor, sample.image, question(sample, dialect))
    full = encode(processor, sample.image, question(sample, dialect), answer)
    text = processor.tokenizer.decode(full["input_ids"][0])
    assert sample.expression in text
    assert answer.strip() in text
    assert "labels" not in full
    start = asked["input_ids"].shape[1] - 1
    if family != "paligemma":  # which ends its prompt with a line break that the answer then replaces
        assert full["input_ids"][0, :start].tolist() == asked["input_ids"][0, :start].tolist()
    parsed = dialect.parse(answer, original_size=sample.image.size, model_size=model_size(full, processor))
    assert parsed.box == pytest.approx((0.25, 0.25, 0.5, 0.75), abs=0.02)
