"""Evaluation on the generated world: every number against hand-made masks, the controls, and the command."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from modeling_sparrow.cli import load_model, main
from modeling_sparrow.evaluation import synthetic
from modeling_sparrow.evaluation.region_similarity import region_and_boundary
from modeling_sparrow.evaluation.report import hash_checkpoint
from modeling_sparrow.evaluation.synthetic import evaluate_synthetic, score_clip, summarise
from sparrow_processing.synthetic import KINDS, SyntheticVideos

from .answering import save_checkpoint

KEYS = {
    *("split", "clips", "seed", "control", "j", "f", "j_and_f", "box_miou", "right_object", "chance"),
    *("identity_switches", "no_target_accuracy", "multi_target_recall", "by_kind", "frames_per_second", "seconds"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model"), "it is [BOX] [SEG] .")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(str(folder), "cpu")


def square(*tops: int | None, left: int = 4, side: int = 8) -> np.ndarray:
    """A track `(T, 32, 32)`: a square at the given height on each frame, or nothing."""
    track = np.zeros((len(tops), 32, 32), bool)
    for frame, top in zip(track, tops, strict=True):
        if top is not None:
            frame[top : top + side, left : left + side] = True
    return track


NEAR, FAR = square(2, 2, 2, 2), square(20, 20, 20, 20)
MASKS = np.stack([NEAR, FAR, square(2, 2, 2, 2, left=20)])


# ---------------------------------------------------------------------- numbers of one clip


def test_a_perfect_answer():
    scores = score_clip(NEAR[None], MASKS, (0,), "class")
    assert (scores.j, scores.f, scores.box_miou) == (1.0, 1.0, 1.0)
    assert scores.right_object and not scores.identity_switch and scores.chance == 1 / 3
    assert scores.targets_found is None and not scores.answered_none


def test_half_an_answer_and_the_wrong_object():
    half = NEAR.copy()
    half[:2] = False
    scores = score_clip(half[None], MASKS, (0,), "class")
    assert (scores.j, scores.box_miou) == (0.5, 0.5) and scores.right_object
    wrong = score_clip(FAR[None], MASKS, (0,), "class")
    assert (wrong.j, wrong.f, wrong.box_miou) == (0.0, 0.0, 0.0) and not wrong.right_object
    # More on the other object than on the target.
    both = score_clip((half | FAR)[None], MASKS, (0,), "class")
    assert not both.right_object and both.j == pytest.approx(0.25)


def test_boxes_are_tight_and_frames_without_both_are_right():
    shifted = square(4, None, None, 2)
    truth = np.stack([square(2, None, 2, 2), FAR])
    scores = score_clip(shifted[None], truth, (0,), "class")
    # 8 x 6 of 8 x 10 pixels; both absent; one absent; equal.
    assert scores.box_miou == pytest.approx((48 / 80 + 1 + 0 + 1) / 4)
    assert scores.j == pytest.approx((48 / 80 + 1 + 0 + 1) / 4)
    values = [region_and_boundary(p, t)[1] for p, t in zip(shifted, truth[0], strict=True)]
    assert scores.f == pytest.approx(np.mean(values))


def test_a_faint_overlap_takes_no_object():
    dot = np.zeros((1, 4, 32, 32), bool)
    dot[0, :, 2:4, 4:6] = True  # 4 of 64 pixels
    assert not score_clip(dot, MASKS, (0,), "class").right_object
    nothing = score_clip(np.zeros((0, 4, 32, 32), bool), MASKS, (0,), "class")
    assert nothing.answered_none and not nothing.right_object and nothing.j == 0.0
    empty = score_clip(np.zeros((1, 4, 32, 32), bool), MASKS, (0,), "class")
    assert not empty.answered_none and not empty.right_object


@pytest.mark.parametrize(
    "tops, switched",
    [
        ((2, 2, 20, 20), True),
        ((20, 20, 2, 2), False),  # found the target late
        ((20, 20, 20, 20), False),  # never on the target
        ((2, None, None, 2), False),  # lost and found
        ((2, 20, 2, 2), True),  # came back
        ((2, 11, 2, 2), False),  # on neither
    ],
)
def test_identity_switches(tops, switched):
    assert score_clip(square(*tops)[None], MASKS, (0,), "class").identity_switch is switched


def test_leaving_for_an_object_while_the_target_is_hidden_is_a_switch():
    masks = np.stack([square(2, 2, None, None), FAR])
    assert score_clip(square(2, 2, 20, 20)[None], masks, (0,), "motion").identity_switch
    assert not score_clip(square(2, 2, None, None)[None], masks, (0,), "motion").identity_switch


def test_several_targets():
    one = score_clip(NEAR[None], MASKS, (0, 1), "multi")
    assert one.targets_found == (1, 2) and one.j == 0.5 and one.chance == 2 / 3 and one.right_object
    both = score_clip(np.stack([NEAR, FAR]), MASKS, (0, 1), "multi")
    assert both.targets_found == (2, 2) and both.j == 1.0
    # One track over both covers neither by more than half.
    assert score_clip((NEAR | FAR)[None], MASKS, (0, 1), "multi").targets_found == (0, 2)
    assert score_clip(MASKS[:0], MASKS, (0, 1), "multi").targets_found == (0, 2)
    # To go from one target to the other is no switch.
    assert not score_clip(square(2, 2, 20, 20)[None], MASKS, (0, 1), "multi").identity_switch


def test_no_target():
    silent = score_clip(MASKS[:0], MASKS, (), "none")
    assert silent.answered_none and silent.j == silent.f == silent.box_miou == 1.0
    assert silent.right_object is None and silent.identity_switch is None and silent.chance is None
    assert score_clip(NEAR[None], MASKS, (), "none").j == 0.0


def test_summary():
    clips = [
        score_clip(NEAR[None], MASKS, (0,), "class"),
        score_clip(FAR[None], MASKS, (0,), "class"),
        score_clip(NEAR[None], MASKS, (0, 1), "multi"),
        score_clip(MASKS[:0], MASKS, (), "none"),
        score_clip(NEAR[None], MASKS, (), "none"),
    ]
    numbers = summarise(clips)
    assert numbers["j"] == pytest.approx((1 + 0 + 0.5 + 1 + 0) / 5)
    assert numbers["j_and_f"] == pytest.approx((numbers["j"] + numbers["f"]) / 2)
    assert numbers["right_object"] == pytest.approx(2 / 3) and numbers["chance"] == pytest.approx((1 + 1 + 2) / 9)
    assert numbers["no_target_accuracy"] == 0.5 and numbers["multi_target_recall"] == 0.5
    assert numbers["by_kind"]["class"] == {"clips": 2, "right_object": 0.5, "j": 0.5}
    assert numbers["by_kind"]["none"] == {"clips": 2, "right_object": None, "j": 0.5}
    only = summarise(clips[:1])
    assert only["no_target_accuracy"] is None and only["multi_target_recall"] is None
    json.dumps(numbers, allow_nan=False)


# ---------------------------------------------------------------------- whole runs


def test_a_perfect_model_is_perfect(monkeypatch):
    def oracle(model, processor, records, *others):
        return [SimpleNamespace(masks=record["masks"][list(record["target_ids"])]) for record in records]

    monkeypatch.setattr(synthetic, "ground_records", oracle)
    numbers = evaluate_synthetic(None, None, "test-hard", clips=27, seed=3)
    assert set(numbers["by_kind"]) == set(KINDS) and set(numbers) == KEYS
    for name in ("j", "f", "box_miou", "right_object", "no_target_accuracy", "multi_target_recall"):
        assert numbers[name] == 1.0
    assert numbers["identity_switches"] == 0.0


def test_chance_is_low_enough_to_mean_something(monkeypatch):
    def blank(model, processor, records, *others):
        return [SimpleNamespace(masks=record["masks"][:0]) for record in records]

    monkeypatch.setattr(synthetic, "ground_records", blank)
    numbers = evaluate_synthetic(None, None, "test-easy", clips=70, batch_size=50)
    assert numbers["chance"] <= 0.40 and numbers["right_object"] == 0.0
    assert numbers["j"] < 0.01  # right only where another object hides the target wholly
    assert set(numbers["by_kind"]) == set(SyntheticVideos("test-easy").config.kinds)
    assert sum(kind["clips"] for kind in numbers["by_kind"].values()) == 70


def test_batches_equal_single_runs(loaded):
    one, four = (evaluate_synthetic(*loaded, "test-easy", clips=4, seed=1, batch_size=size) for size in (1, 4))
    assert one["j"] > 0 and one["frames_per_second"] == pytest.approx(4 * 8 / one["seconds"])
    for name in ("j", "f", "box_miou"):
        assert four[name] == pytest.approx(one[name], abs=2e-3)
    for name in ("right_object", "chance", "identity_switches"):
        assert four[name] == one[name]


def test_another_seed_gives_other_clips_and_the_same_seed_the_same(loaded):
    runs = [evaluate_synthetic(*loaded, "test-new-words", clips=2, seed=seed) for seed in (0, 0, 1)]
    assert runs[0]["j"] == runs[1]["j"] != runs[2]["j"]


def test_a_model_that_names_nothing(tmp_path):
    model, processor = load_model(str(save_checkpoint(tmp_path, "there is no such object .")), "cpu")
    numbers = evaluate_synthetic(model, processor, "test-hard", clips=len(KINDS), max_new_tokens=8)
    assert numbers["no_target_accuracy"] == 1.0 and numbers["multi_target_recall"] == 0.0
    assert numbers["right_object"] == 0.0 and numbers["by_kind"]["none"]["j"] == 1.0


# ---------------------------------------------------------------------- controls


@pytest.fixture
def records():
    videos = SyntheticVideos("validation", size=3, seed=2)
    return [videos[0], videos[1]], [videos[1], videos[2]]


@pytest.fixture
def seen(loaded, records, monkeypatch):
    """What the model is given under a control."""

    def run(control):
        given = {}
        ground = loaded[0].ground
        monkeypatch.setattr(loaded[0], "ground", lambda **inputs: given.update(inputs) or ground(**inputs))
        synthetic.ground_records(*loaded, *records, control, 8.0, 8)
        monkeypatch.undo()
        return given

    return run


def test_controls_change_what_the_language_side_sees_and_nothing_else(loaded, records, seen):
    plain = seen("none")
    expected = loaded[1](
        text=[record["expression"] for record in records[0]], videos=[r["frames"] for r in records[0]]
    )
    streams = ("spatial_pixel_values", "temporal_pixel_values")
    assert all(plain[name].equal(expected[name]) for name in (*streams, "mask_pixel_values", "input_ids"))
    black, other = seen("blank-video"), seen("other-video")
    neighbours = loaded[1](text="a ring", videos=[record["frames"] for record in records[1]])
    for name in streams:
        assert all((black[name][:, channel] == black[name][0, channel, 0, 0]).all() for channel in range(3))
        assert other[name].equal(neighbours[name]) and not other[name].equal(plain[name])
    for given in (black, other):
        assert given["mask_pixel_values"].equal(plain["mask_pixel_values"])
        assert given["input_ids"].equal(plain["input_ids"])
    question = seen("other-question")
    assert [request.query for request in question["metadata"]] == [record["expression"] for record in records[1]]
    assert all(question[name].equal(plain[name]) for name in (*streams, "mask_pixel_values"))


def test_true_boxes_need_no_answer(loaded, records):
    """Every target is prompted where it first appears, whatever the model would say."""
    model, processor = loaded
    for record in records[0]:
        masks = synthetic.follow_true_boxes(model, processor, record, 8.0)
        assert masks.shape == (len(record["target_ids"]), *record["frames"].shape[:3]) and masks.dtype == bool
        assert masks.any(axis=(1, 2, 3)).all()
    numbers = evaluate_synthetic(model, processor, "validation", clips=3, seed=2, control="true-boxes")
    assert numbers["control"] == "true-boxes" and numbers["j"] > 0


@pytest.mark.parametrize(
    "setting", [{"control": "noise"}, {"clips": 0}, {"split": "tests"}, {"batch_size": 0}, {"seed": -1}]
)
def test_bad_settings(loaded, setting):
    with pytest.raises(ValueError):
        evaluate_synthetic(*loaded, **({"split": "test-easy", "clips": 1} | setting))


# ---------------------------------------------------------------------- the command


def test_command(folder, capsys):
    words = ["evaluate", "synthetic", "--split", "validation", "--clips", "2", "--seed", "5", "--json", "-"]
    assert main([*words, "--model", str(folder), "--device", "cpu", "--control", "other-video"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert set(numbers) == KEYS | {"model", "checkpoint_sha256"}
    assert (numbers["split"], numbers["clips"], numbers["seed"], numbers["control"]) == (
        *("validation", 2, 5),
        "other-video",
    )
    assert numbers["model"] == str(folder) and numbers["checkpoint_sha256"] == hash_checkpoint(folder)


@pytest.mark.parametrize("words", [["--split", "train"], ["--clips", "0"], ["--control", "all"]])
def test_command_refuses(words, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "synthetic", *words])
    assert words[0] in capsys.readouterr().err
