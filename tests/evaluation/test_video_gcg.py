"""VideoGCG: listing of the three sets, matching, both hosts' counting."""

import shutil

import numpy as np
import pytest

from modeling_sparrow.evaluation import Cider, EvaluationError, VideoGcgDataset, score_video_gcg
from modeling_sparrow.evaluation.files import write_mask
from modeling_sparrow.evaluation.video_gcg import (
    clean_caption,
    match_phrases,
    sample_miou,
    tube_ious,
    write_prediction,
)
from modeling_sparrow.evaluation.video_gcg_dataset import mark_words

from .fake_data import SIZE, dump, moving_square, rectangle


def same_words(first: str, second: str) -> float:
    return float(first == second)


@pytest.fixture
def dataset(gcg_root):
    return VideoGcgDataset(gcg_root)


@pytest.fixture
def predictions(dataset, tmp_path):
    """The ground truth of every sample as its prediction."""
    for sample in dataset:
        frames = [np.stack([track.frame(i) != 0 for track in sample.tracks]) for i in range(len(sample.frame_paths))]
        write_prediction(tmp_path / "pred", sample, sample.caption, frames, tokens=("[SEG]",))
    return tmp_path / "pred"


def test_listing(dataset, gcg_root):
    assert [sample.name for sample in dataset] == ["video_gcg/000000", "mevis_gcg/aaa", "vidstg_gcg/12"]
    first, second, third = dataset
    assert first.caption == "a <p> dog </p> [SEG] chases two <p> cats </p> [SEG]"
    assert first.frame_paths[1] == gcg_root / "ytvis" / "vos" / "train" / "JPEGImages" / "seq" / "00001.jpg"
    assert np.array_equal(first.tracks[0].frame(1) != 0, moving_square(1))
    assert not first.tracks[1].frame(1).any()
    assert second.caption == "<p> A square </p> [SEG] and <p> both of them </p> [SEG] move."
    assert np.array_equal(second.tracks[1].frame(2) != 0, moving_square(2) | moving_square(2, 10))
    # Only the first object of "a child" counts.
    assert np.array_equal(third.tracks[0].frame(0), rectangle(2, 2, 10, 10)) and len(third.tracks) == 3
    assert first.prompt.endswith("interleaved segmentation masks for the corresponding parts of the answer.")
    assert len(VideoGcgDataset(gcg_root, sets=("mevis_gcg",))) == 1
    with pytest.raises(ValueError, match="expected some of"):
        VideoGcgDataset(gcg_root, sets=("hcstvg_gcg",))


def test_damaged_annotations_name_their_files(gcg_root):
    dump(gcg_root / "mevis_gcg" / "valid_u" / "aaa.json", {"caption": "[a ghost](5)"})
    with pytest.raises(EvaluationError, match=r"aaa\.json: mevis_gcg/aaa names object 5, which has no masks"):
        VideoGcgDataset(gcg_root)
    shutil.rmtree(gcg_root / "mevis_gcg")
    with pytest.raises(EvaluationError, match="valid_u: no captions"):
        VideoGcgDataset(gcg_root)


def test_words_with_several_objects():
    caption = mark_words("two cats sleep", [1, 1, 0], [4, 5, 6])
    assert caption.text == "<p> two </p> [SEG] <p> cats </p> [SEG] sleep"
    assert caption.phrases == ["two", "cats"] and caption.objects == [["6"], ["4", "5"]]


def test_cleaning():
    raw = "ASSISTANT: x ASSISTANT: A <p> dog </p> [BOX] [SEG] sits\non <p>it</p> [SEG]."
    assert clean_caption(raw) == ("A dog [BOX] sitson it .", ["dog", "it"])
    assert clean_caption(raw, ("[BOX]", "[SEG]"))[0] == "A dog sitson it ."


def frames_of(*tubes: list[np.ndarray]) -> np.ndarray:
    return np.array(tubes, bool)


def table(truth: np.ndarray, prediction: np.ndarray, host: str = "sparrow") -> np.ndarray:
    return tube_ious(((truth[:, t], prediction[:, t]) for t in range(truth.shape[1])), host)


def test_tubes_are_pooled_over_frames():
    full, empty = np.ones((2, 2)), np.zeros((2, 2))
    truth, prediction = frames_of([full, empty]), frames_of([full, full])
    # Pooled: 4 of 8 pixels; the mean over frames would be 0.5 too, but not here:
    assert table(truth, prediction).tolist() == [[0.5]]
    truth[0, 1, 0, 0] = True
    assert table(truth, prediction).tolist() == [[5 / 8]]
    with pytest.raises(ValueError, match="no frames"):
        tube_ious([])


def test_no_objects_on_one_side():
    none = np.zeros((0, 1, 2, 2), bool)
    some = np.ones((2, 1, 2, 2), bool)
    assert table(none, some).shape == (0, 2) and sample_miou(table(none, some)) == 0.0
    assert sample_miou(table(some, none)) == 0.0 and match_phrases(table(some, none), ["a", "b"], [], same_words) == []


def test_greedy_is_not_hungarian():
    ious = np.array([[0.9, 0.8], [0.85, 0.0]])
    # Greedy takes 0.9 and is left with 0; the best assignment would be 0.8 + 0.85.
    assert sample_miou(ious) == pytest.approx(0.9)
    assert match_phrases(ious, ["a", "a"], ["a", "a"], same_words) == [(0, 0)]
    # The first best pair that fails ends the matching, although others would pass.
    assert match_phrases(ious, ["a", "b"], ["b", "a"], same_words) == []


def test_two_empty_tubes_by_host():
    empty, full = np.zeros((3, 3)), np.ones((3, 3))
    truth, prediction = frames_of([empty], [full]), frames_of([empty], [full])
    assert sample_miou(table(truth, prediction, "sparrow")) == 1.0
    assert sample_miou(table(truth, prediction, "videoglamm")) == 0.0


def test_perfect_predictions(dataset, predictions):
    result = score_video_gcg(
        dataset, predictions, text_similarity=same_words, caption_metrics=[Cider(tokens="simple")], num_workers=2
    )
    assert result.metrics["mIoU"] == result.metrics["recall"] == 1.0
    assert result.metrics["CIDEr (simple tokens)"] > 5
    assert result.counts == {"samples": 3, "phrases": 7, "in_mean": 3, "missing": 0, "extra": 0}
    dump(predictions / "mevis_gcg" / "zzz" / "res.json", {})
    result = score_video_gcg(dataset, predictions)
    assert result.counts["extra"] == 1 and "mevis_gcg/zzz: not part of the benchmark" in result.problems[0]
    assert "recall" not in score_video_gcg(dataset, predictions).metrics


def test_masks_are_taken_in_numeric_order(gcg_root, dataset, tmp_path):
    sample = dataset[2]
    masks = [rectangle(12 + i, 0, 13 + i, 40) for i in range(11)]  # in string order, 10 would come second
    masks[10] = sample.tracks[0].frame(0)
    answer = "".join(f"<p> thing {i} </p> [SEG]" for i in range(10)) + "<p> a child </p> [SEG]"
    write_prediction(tmp_path / "pred", sample, answer, [np.stack(masks)] * 2, tokens=("[SEG]",))
    only = VideoGcgDataset(gcg_root, sets=("vidstg_gcg",))
    # The child's mask is the eleventh, and so is its phrase.
    assert score_video_gcg(only, tmp_path / "pred", text_similarity=same_words).metrics["recall"] == 1 / 3


def test_missing_samples_by_policy(dataset, predictions):
    (predictions / "mevis_gcg" / "aaa" / "res.json").unlink()
    with pytest.raises(EvaluationError, match=r"mevis_gcg/aaa/res\.json: missing sample"):
        score_video_gcg(dataset, predictions)
    cider = Cider(tokens="simple")
    found = {}
    for policy, host in (
        ("zero", "sparrow"),
        ("skip", "sparrow"),
        ("official", "sparrow"),
        ("official", "videoglamm"),
    ):
        result = score_video_gcg(dataset, predictions, host, policy, same_words, [cider])
        found[policy, host] = result.metrics["mIoU"], result.metrics["recall"], result.counts["in_mean"]
    assert found["zero", "sparrow"] == (pytest.approx(2 / 3), pytest.approx(5 / 7), 3)
    assert found["skip", "sparrow"] == (1.0, 1.0, 2)
    # SPARROW's script: mIoU 0, but its phrases are in no denominator. VideoGLaMM's: left out.
    assert found["official", "sparrow"] == (pytest.approx(2 / 3), 1.0, 3)
    assert found["official", "videoglamm"] == (1.0, 1.0, 2)


def test_missing_masks_by_policy(dataset, predictions):
    path = predictions / "vidstg_gcg" / "12" / "pred_masks_0" / "mask_1.png"
    path.unlink()
    with pytest.raises(EvaluationError, match=r"pred_masks_0/mask_1\.png: missing \(1 of 6 masks\)"):
        score_video_gcg(dataset, predictions)
    half = pytest.approx((2 + (0.5 + 1 + 1) / 3) / 3)
    assert score_video_gcg(dataset, predictions, missing="zero").metrics["mIoU"] == half
    assert score_video_gcg(dataset, predictions, missing="official").metrics["mIoU"] == half
    official = score_video_gcg(dataset, predictions, "videoglamm", "official", same_words)
    assert official.metrics["mIoU"] == pytest.approx(2 / 3) and official.metrics["recall"] == pytest.approx(4 / 7)


def test_bad_predictions_name_their_files(dataset, predictions):
    path = predictions / "vidstg_gcg" / "12" / "pred_masks_2" / "mask_0.png"
    write_mask(path, np.zeros((5, 5)))
    with pytest.raises(EvaluationError, match=rf"mask_0\.png: 5 x 5 pixels .* expected {SIZE[0]} x {SIZE[1]}"):
        score_video_gcg(dataset, predictions, missing="skip")
    path.write_bytes(b"")
    dump(predictions / "mevis_gcg" / "aaa" / "res.json", {"pred_text": "x"})
    with pytest.raises(EvaluationError) as caught:
        score_video_gcg(dataset, predictions)
    assert f"{path}: not a readable PNG" in str(caught.value)
    assert "aaa/res.json: expected the keys" in str(caught.value)
    with pytest.raises(ValueError, match="host='glus'"):
        score_video_gcg(dataset, predictions, host="glus")
