"""How the demo checkpoint was trained: packing, losses, optimizer, schedule, resumption."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from demo_training.architecture import CELLS, DIALECT, prompt_ids, sine_positions
from demo_training.evaluate import conversation
from demo_training.packing import IGNORED, PROBE, answer, cell_labels, look, pack, visible
from demo_training.train import LESSONS, LISTEN, LOOK, Pointer, Run, image_features, objects_at, read, schedule
from demo_training.tune import FIRST_SCENE, Tuning
from lmms_plugin.demo import CHECKPOINT
from lmms_plugin.demo.scenes import MAX_OBJECTS, SIDE, scene
from lmms_plugin.protocol.boxes import Box, iou


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype="auto").eval()


@pytest.fixture(scope="module")
def scenes():
    return [scene("val", i) for i in range(4)]


class TestPacking:
    @pytest.mark.parametrize("expression", ["cross", "the red circle with a hole", "Größe 17"])
    def test_questions_are_what_the_processor_renders(self, processor, expression):
        image = Image.new("RGB", (SIDE, SIDE))
        text = processor.apply_chat_template(conversation(expression), add_generation_prompt=True, tokenize=False)
        rendered = processor(text=[text], images=[[image]])["input_ids"][0]
        prefix, (question,) = prompt_ids(processor.tokenizer, [expression])
        assert list(rendered) == prefix + question

    def test_pixels_are_what_the_processor_makes(self, processor, scenes):
        images = [[Image.fromarray(s.image)] for s in scenes]
        made = processor.image_processor(images, return_tensors="pt")["pixel_values"][:, 0]
        torch.testing.assert_close(look(scenes)[0], made, atol=1e-6, rtol=0)

    def test_answers_name_the_box_within_the_grid(self, scenes, processor):
        packed = pack(scenes, processor.tokenizer)
        for row, drawn in zip(packed.labels, scenes, strict=True):
            texts = processor.tokenizer.decode(row[row != IGNORED]).split("<end_of_utterance>")[:-1]
            truth = [Box.from_xywh(o.box, (SIDE, SIDE)) for o in drawn.objects for _ in o.expressions]
            said = [DIALECT.parse(t, original_size=None, model_size=None).box for t in texts]
            assert len(said) == min(6, len(truth))
            assert all(max(iou(s, t) for t in truth) > 0.85 for s in said)

    def test_packed_questions_see_what_they_see_alone(self, model, processor, scenes):
        packed = pack(scenes, processor.tokenizer)
        with torch.inference_mode():
            loss = read(model, Pointer(), image_features(model, look(scenes)[0]), packed).answer
            total, count = 0.0, 0
            for b, drawn in enumerate(scenes):
                for k in range(1, int(packed.segments[b].max()) + 1):
                    mine = (packed.segments[b] == 0) | (packed.segments[b] == k)
                    pixels = processor.image_processor([[Image.fromarray(drawn.image)]], return_tensors="pt")
                    logits = model(input_ids=packed.ids[b][mine][None], **pixels).logits[0]
                    labels = packed.labels[b][mine]
                    total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
                    count += int((labels != IGNORED).sum())
        assert loss.item() == pytest.approx(total / count, rel=1e-4)

    def test_visibility_by_hand(self):
        seen = visible(torch.tensor([[0, 0, 1, 2, 2]]))[0, 0].int().tolist()
        assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]

    def test_cells_carry_their_objects_attributes(self, scenes):
        for drawn in scenes:
            labels = cell_labels(drawn)
            assert labels.shape == (49, len(PROBE))
            shown = Counter(map(tuple, labels[labels[:, 4] != IGNORED].tolist()))
            assert len(shown) == len(drawn.objects)
            background = labels[labels[:, 4] == IGNORED]
            assert (background[:, 1] == 0).all()

    def test_every_answer_token_knows_its_object_and_the_cells_it_lies_in(self, scenes, processor):
        packed = pack(scenes, processor.tokenizer)
        assert ((packed.meant >= 0) == (packed.labels != IGNORED)).all()
        for b, drawn in enumerate(scenes):
            count = len(drawn.objects)
            assert set(packed.meant[b].tolist()) == set(range(-1, count))
            torch.testing.assert_close(packed.shares[b].sum(1), torch.arange(MAX_OBJECTS).lt(count).float())
            for k, item in enumerate(drawn.objects):
                said = processor.tokenizer.decode(packed.labels[b][packed.meant[b] == k])
                assert set(said.split("<end_of_utterance>")[:-1]) == {answer(item)}
                # The mean of the cells' centres lies in the object's box, give or take half a cell.
                row, column = np.average(np.indices((CELLS, CELLS)).reshape(2, -1), axis=1, weights=packed.shares[b, k])
                x, y, w, h = item.box
                assert x - 8 <= (column + 0.5) * 16 <= x + w + 8
                assert y - 8 <= (row + 0.5) * 16 <= y + h + 8


class TestRun:
    def test_the_seed_decides_and_nothing_else(self, processor):
        def weights(seed, disturbance):
            torch.manual_seed(disturbance)
            run = Run(processor.tokenizer, seed=seed, batch_size=2, lr=1e-3, ema=0.9)
            for progress in (LOOK / 2, 0.5):
                run.advance(progress)
            return torch.cat([p.flatten() for p in run.average.parameters()])

        one = weights(1, 5)
        assert torch.equal(one, weights(1, 6))
        assert not torch.equal(one, weights(2, 5))

    def test_the_eyes_do_not_learn_from_answers_before_they_listen(self, processor):
        def gradient(progress):
            run = Run(processor.tokenizer, seed=1, batch_size=2, lr=0.0, ema=0.9)
            with torch.no_grad():
                run.probe.weight.zero_()  # all that the eyes could still hear is the answers
            heard = []
            patches = run.model.model.vision_model.embeddings.patch_embedding.weight
            patches.register_hook(lambda grad: heard.append(grad.abs().max().item()))
            run.advance(progress)
            return heard[0]

        assert gradient((LOOK + LISTEN) / 2) == 0
        assert gradient(0.5) > 0

    def test_a_resumed_run_goes_where_the_whole_one_went(self, tmp_path, processor):
        def fresh():
            return Run(processor.tokenizer, seed=1, batch_size=2, lr=1e-3, ema=0.9)

        whole, half, resumed = fresh(), fresh(), fresh()
        # Looking, reading with the eyes held still, reading with all that learns.
        steps = [LOOK / 2, (LOOK + LISTEN) / 2, 0.5, 0.9]
        for progress in steps:
            whole.advance(progress)
        for progress in steps[:2]:
            half.advance(progress)
        half.save_state(tmp_path / "state.pt")
        resumed.load_state(tmp_path / "state.pt")
        for progress in steps[2:]:
            resumed.advance(progress)
        for a, b in zip(whole.average.parameters(), resumed.average.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_learning_lowers_the_loss(self, processor):
        run = Run(processor.tokenizer, seed=0, batch_size=4, lr=5e-3, ema=0.9)
        losses = [run.advance(LISTEN)["answer"] for _ in range(12)]
        assert losses[-1] < 0.6 * losses[0]

    def test_schedule_rises_holds_and_ends_at_zero(self):
        assert schedule(0.0) == pytest.approx(0.15)
        assert schedule(LOOK / 2) == 1
        assert schedule(LOOK - 1e-9) == pytest.approx(0.15)
        assert schedule(LOOK) == 0
        assert schedule(1.0) == pytest.approx(0, abs=1e-12)
        rates = [schedule(p) for p in np.linspace(0.45, 1, 50)]
        assert rates[0] == pytest.approx(0.4, rel=0.01)
        assert rates == sorted(rates, reverse=True)

    def test_curriculum_ends_with_full_scenes(self):
        begins = [LOOK + (1 - LOOK) * lesson for lesson in LESSONS]
        assert [objects_at(p) for p in (0.0, LOOK / 2, LOOK, 0.24)] == [4, 4, 1, 1]
        assert [objects_at(p + 1e-6) for p in begins] == [2, 3, 4]
        assert [objects_at(p - 1e-6) for p in begins] == [1, 2, 3]
        assert objects_at(1.0) == 4


def test_sine_positions_tell_every_cell_apart():
    table = sine_positions(7, 128)
    assert table.shape == (49, 128)
    assert np.abs(table).max() <= 1
    similarity = table @ table.T
    assert (similarity.argmax(1) == np.arange(49)).all()


class TestTuning:
    def test_eyes_stay_and_the_language_model_learns(self, processor, tmp_path):
        run = Run(processor.tokenizer, seed=0, batch_size=2, lr=2e-3, ema=0.99)
        run.advance(0.5)
        run.save_state(tmp_path / "state.pt")
        tuning = Tuning(tmp_path / "state.pt", seed=0)
        before = {name: weight.clone() for name, weight in tuning.model.state_dict().items()}
        first = tuning.advance(0.3)
        second = tuning.advance(0.3)
        assert set(first) == {"answer", "pointing", "tens"} == set(second)
        changed = {name for name, weight in tuning.model.state_dict().items() if not weight.equal(before[name])}
        assert changed
        assert not any("vision_model" in name or "connector" in name for name in changed)

    def test_scenes_are_new_and_mostly_hold_a_choice(self, processor, tmp_path):
        run = Run(processor.tokenizer, seed=0, batch_size=2, lr=2e-3, ema=0.99)
        run.save_state(tmp_path / "state.pt")
        tuning = Tuning(tmp_path / "state.pt", seed=0)
        counts = [len(drawn.objects) for drawn in tuning.scenes(3)]
        assert tuning.drawn > FIRST_SCENE
        assert max(counts) == 3
        assert sum(count == 1 for count in counts) < len(counts) / 3
