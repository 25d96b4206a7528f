"""DAVIS 2017 tasks and Ref-DAVIS17 protocol 4A on a small tree."""

import shutil

import numpy as np
import pytest

from modeling_sparrow.evaluation import (
    EvaluationError,
    RefDavis17Dataset,
    read_sequences,
    region_and_boundary,
    score_davis,
    score_ref_davis17,
    write_label_maps,
)
from modeling_sparrow.evaluation.davis import ANNOTATOR_SETS
from modeling_sparrow.evaluation.files import read_label_map, write_label_map, write_mask

from .fake_data import SIZE, moving_square


@pytest.fixture
def annotations(davis_root):
    return davis_root / "DAVIS" / "Annotations_unsupervised" / "480p"


@pytest.fixture
def predictions(annotations, tmp_path):
    return shutil.copytree(annotations, tmp_path / "pred")


def relabel(folder, table: dict[int, int]) -> None:
    for path in folder.glob("*.png"):
        labels = read_label_map(path)
        write_label_map(path, np.vectorize(lambda value: table.get(value, value), otypes=[np.uint8])(labels))


def test_sequences(davis_root):
    assert read_sequences(davis_root / "DAVIS") == ["clip"]
    with pytest.raises(EvaluationError, match=r"train\.txt: cannot be read"):
        read_sequences(davis_root / "DAVIS", "train")


def test_perfect_predictions(annotations, predictions):
    for task in ("unsupervised", "semi-supervised"):
        result = score_davis(annotations, predictions, ["clip"], task)
        assert result.metrics["J&F"] == 1.0 and result.metrics["J_recall"] == 1.0 and result.metrics["J_decay"] == 0.0
        assert result.counts["frames"] == (4 if task == "unsupervised" else 2)
        assert list(result.per_item) == ["clip_1", "clip_2"]
        assert result.dataset_version == "unrecognised: 1 videos, 2 expressions or objects"


def test_pairing_forgives_swapped_labels_only_when_unsupervised(annotations, predictions):
    relabel(predictions / "clip", {1: 9, 2: 1})
    unsupervised = score_davis(annotations, predictions, ["clip"])
    assert unsupervised.metrics["J"] == 1.0
    assert [row["proposal"] for row in unsupervised.per_item.values()] == [9.0, 1.0]
    with pytest.raises(
        EvaluationError, match=r"clip/0000\d\.png: label 9, expected at most 2 \(semi-supervised task\)"
    ):
        score_davis(annotations, predictions, ["clip"], "semi-supervised")
    relabel(predictions / "clip", {1: 2, 9: 1})
    relabel(predictions / "clip", {1: 2, 2: 1})
    assert score_davis(annotations, predictions, ["clip"], "semi-supervised").metrics["J"] < 0.2


def test_too_many_proposals(annotations, predictions):
    relabel(predictions / "clip", {2: 21})
    with pytest.raises(EvaluationError, match="label 21, expected at most 20"):
        score_davis(annotations, predictions, ["clip"])


def test_void_is_left_out_only_when_unsupervised(annotations, predictions):
    for index, path in enumerate(sorted((annotations / "clip").glob("*.png"))):
        labels = read_label_map(path)
        labels[18:] = 255  # covers a part of object 2
        write_label_map(path, labels)
        assert (labels == 2).sum() == 32, index
    result = score_davis(annotations, predictions, ["clip"])
    assert result.metrics["J"] == 1.0
    result = score_davis(annotations, predictions, ["clip"], "semi-supervised")
    assert result.per_item["clip_2"]["J"] == pytest.approx(0.5)


def test_objects_are_those_of_the_first_frame(annotations, predictions):
    first = annotations / "clip" / "00000.png"
    labels = read_label_map(first)
    write_label_map(first, np.where(labels == 2, 0, labels))
    result = score_davis(annotations, predictions, ["clip"])
    assert list(result.per_item) == ["clip_1"]


def test_fewer_proposals_than_objects(annotations, predictions):
    relabel(predictions / "clip", {2: 0})
    result = score_davis(annotations, predictions, ["clip"])
    assert [row["J"] for row in result.per_item.values()] == [1.0, 0.0]


def test_bad_inputs_name_their_files(annotations, predictions):
    with pytest.raises(EvaluationError, match="ghost: no annotations"):
        score_davis(annotations, predictions, ["clip", "ghost"])
    write_label_map(predictions / "clip" / "00002.png", np.zeros((SIZE[0], SIZE[1] + 1)))
    with pytest.raises(EvaluationError, match=r"00002\.png: 24 x 41 pixels .* expected 24 x 40"):
        score_davis(annotations, predictions, ["clip"])
    (predictions / "clip" / "00002.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(EvaluationError, match=r"00002\.png: not a readable PNG"):
        score_davis(annotations, predictions, ["clip"], missing="zero")
    (predictions / "clip" / "00002.png").unlink()
    for missing in ("error", "official"):
        with pytest.raises(EvaluationError, match=r"00002\.png: missing \(1 of 4 frames\)"):
            score_davis(annotations, predictions, ["clip"], missing=missing)
    result = score_davis(annotations, predictions, ["clip"], missing="zero")
    assert result.metrics["J"] == 0.0 and result.counts["missing"] == 2 and len(result.problems) == 1
    with pytest.raises(ValueError, match="task='both'"):
        score_davis(annotations, predictions, ["clip"], task="both")


def test_too_short_for_the_semi_supervised_task(annotations, predictions):
    for folder in (annotations, predictions):
        for name in ("00002.png", "00003.png"):
            (folder / "clip" / name).unlink()
    with pytest.raises(EvaluationError, match="at least 3 frames"):
        score_davis(annotations, predictions, ["clip"], "semi-supervised")
    assert score_davis(annotations, predictions, ["clip"]).metrics["J"] == 1.0


def test_label_map_protocol_end_to_end(davis_root, annotations, tmp_path, write_predictions):
    dataset = RefDavis17Dataset(davis_root, mask_file=davis_root / "valid" / "mask_dict.json")
    expressions = write_predictions(dataset, tmp_path / "expressions")
    # Object 2 of the second set also claims object 1: the lower number keeps the overlap.
    for index, path in enumerate(dataset[5].prediction_paths(expressions)):
        write_mask(path, moving_square(index) | moving_square(index, 10))
    # Object 1 of the third set is nowhere.
    for path in dataset[2].prediction_paths(expressions):
        write_mask(path, np.zeros(SIZE))
    write_label_maps(dataset, expressions, tmp_path / "maps")
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == sorted(ANNOTATOR_SETS)
    labels = read_label_map(tmp_path / "maps" / ANNOTATOR_SETS[1] / "clip" / "00001.png")
    assert np.array_equal(labels == 1, moving_square(1)) and np.array_equal(labels == 2, moving_square(1, 10))
    result = score_ref_davis17(annotations, tmp_path / "maps", ["clip"])
    assert [result.metrics[f"J_{name}"] for name in ANNOTATOR_SETS] == [1.0, 1.0, 0.5, 1.0]
    assert result.metrics["J"] == pytest.approx(3.5 / 4)
    assert result.protocol.startswith("4A") and result.counts["sets"] == 4


def test_label_maps_need_four_expressions_per_object(davis_root, tmp_path):
    dataset = RefDavis17Dataset(davis_root)
    dataset.videos["clip"]["expressions"].pop("7")
    with pytest.raises(EvaluationError, match="clip has 7 expressions, expected four per object"):
        write_label_maps(dataset, tmp_path, tmp_path / "maps")


def test_tie_between_equal_proposals(tmp_path):
    # One object, two equally good halves: the better score is one half, whichever is taken.
    labels = np.zeros(SIZE, np.uint8)
    labels[4:12, 4:20] = 1
    halves = labels.copy()
    halves[4:12, 12:20] = 2
    write_label_map(tmp_path / "gt" / "v" / "00000.png", labels)
    write_label_map(tmp_path / "pred" / "v" / "00000.png", halves)
    result = score_davis(tmp_path / "gt", tmp_path / "pred", ["v"])
    assert result.metrics["J"] == region_and_boundary(halves == 1, labels == 1)[0] == 0.5
