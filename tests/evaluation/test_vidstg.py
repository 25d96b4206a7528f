"""VidSTG: sampling, boxes, temporal localisation, missing predictions."""

import json

import numpy as np
import pytest

from modeling_sparrow.evaluation import EvaluationError, VidStgDataset, score_vidstg
from modeling_sparrow.evaluation.vidstg import (
    MOMENT_TEMPORAL_PROTOCOL,
    TUBEDETR_PROTOCOL,
    annotated_box,
    box_iou,
    mask_to_box,
    parse_span,
    remove_small_components,
    sample_frames,
    shrunk_size,
    write_prediction,
)

from .fake_data import dump


def write_perfect(dataset, folder, span=None):
    for sample in dataset:
        write_prediction(folder, sample, sample.boxes, span)
    return folder


def test_sampling_by_hand():
    # 1 of 10 frames per second: ticks of the absolute clock at 30, 40, 50 after the first frame.
    assert sample_frames(25, 60, 10) == [25, 30, 40, 50]
    assert sample_frames(20, 60, 10, max_frames=3) == [20, 30, 40]
    assert sample_frames(3, 4, 30) == [3]
    with pytest.raises(EvaluationError, match="at least one frame"):
        sample_frames(5, 5, 10)
    with pytest.raises(EvaluationError, match="2 frames per second cannot be sampled at 5"):
        sample_frames(0, 10, 2, fps=5)


def test_listing(vidstg_root):
    dataset = VidStgDataset(vidstg_root)
    (sample,) = dataset
    assert sample.prompt == "What does the child hold? Please respond with segmentation masks."
    assert sample.video_path == vidstg_root / "vidstg" / "video" / "0" / "clip.mp4"
    assert sample.frame_ids == sample.moment_ids == (20, 30, 40, 50)
    # 320 x 240 is shrunk to 298 x 224; the box [30, 40, 110, 100] with it.
    assert sample.boxes[30] == pytest.approx([30 * 298 / 320, 40 * 224 / 240, 110 * 298 / 320, 100 * 224 / 240])
    assert len(VidStgDataset(vidstg_root, "declarative")) == 1
    temporal = VidStgDataset(vidstg_root, protocol=TUBEDETR_PROTOCOL)[0]
    assert temporal.frame_ids[:3] == (0, 2, 4) and temporal.moment_ids[0] == 20 and temporal.moment_ids[-1] == 58
    assert temporal.boxes[20].tolist() == [20, 40, 100, 100]


def test_small_frames():
    assert shrunk_size(240, 320) == (224, 298)
    assert shrunk_size(360, 640) == (210, 373)
    assert shrunk_size(224, 224) == (224, 224)
    assert annotated_box([-10, 5, 20, 10], (100, 200), (50, 100)).tolist() == [0, 2.5, 5, 7.5]
    assert annotated_box([300, 5, 20, 10], (100, 200), (50, 100)) is None


def test_mask_to_box():
    mask = np.zeros((30, 40), bool)
    assert mask_to_box(mask) is None
    mask[5:10, 7:12] = True  # 25 pixels
    mask[20:24, 30:34] = True  # 16 pixels, too few
    mask[10, 12] = True  # touches only by a corner
    assert mask_to_box(mask) == [7.0, 5.0, 33.0, 23.0]
    assert mask_to_box(remove_small_components(mask)) == [7.0, 5.0, 11.0, 9.0]
    assert mask_to_box(remove_small_components(np.zeros((4, 4), bool))) is None


def test_box_iou():
    assert box_iou([0, 0, 10, 10], [5, 5, 15, 15]) == pytest.approx(25 / 175)
    assert box_iou([3, 3, 3, 3], [0, 0, 10, 10]) == 0.0
    assert box_iou([3, 3, 3, 3], [3, 3, 3, 3]) == 0.0


def test_perfect_and_half_right(vidstg_root, tmp_path):
    dataset = VidStgDataset(vidstg_root)
    write_perfect(dataset, tmp_path / "pred")
    result = score_vidstg(dataset, tmp_path / "pred")
    assert result.metrics == {"mIoU": 1.0, "mIoU@0.3": 1.0, "mIoU@0.5": 1.0}
    assert result.counts == {
        **{"samples": 1, "frames": 4, "in_mean": 1, "missing": 0},
        **{"without_ground_truth": 0, "extra": 0},
    }
    sample = dataset[0]
    boxes = {frame: box if frame < 40 else None for frame, box in sample.boxes.items()}
    write_prediction(tmp_path / "pred", sample, boxes)
    # 0.5 is not above 0.5.
    assert score_vidstg(dataset, tmp_path / "pred").metrics == {"mIoU": 0.5, "mIoU@0.3": 1.0, "mIoU@0.5": 0.0}


def test_temporal_localisation_in_frame_numbers(vidstg_root, tmp_path):
    dataset = VidStgDataset(vidstg_root, protocol=TUBEDETR_PROTOCOL)
    write_perfect(dataset, tmp_path, span=(40, 80))
    metrics = score_vidstg(dataset, tmp_path).metrics
    assert metrics["tIoU"] == pytest.approx(20 / 60)  # [40, 60) of [20, 80)
    assert metrics["vIoU"] == pytest.approx(10 / 30)  # at every second frame
    write_perfect(dataset, tmp_path, span=(70, 80))
    metrics = score_vidstg(dataset, tmp_path).metrics
    assert metrics["tIoU"] == metrics["vIoU"] == 0.0 and metrics["mIoU"] == 1.0


def test_temporal_localisation_in_sampled_frames(vidstg_root, tmp_path):
    dataset = VidStgDataset(vidstg_root, protocol=MOMENT_TEMPORAL_PROTOCOL)
    # Sampled 0, 10 … 90; the moment [20, 60) holds numbers 2 to 5, and its end 5 is included.
    write_perfect(dataset, tmp_path, span=(2, 4))
    metrics = score_vidstg(dataset, tmp_path).metrics
    assert metrics["tIoU"] == pytest.approx(2 / 3) and metrics["vIoU"] == pytest.approx(2 / 3)
    write_perfect(dataset, tmp_path, span=None)
    assert score_vidstg(dataset, tmp_path).metrics["tIoU"] == 0.0


def test_span_of_an_answer():
    assert parse_span("It is [SEG] in frames:(3,17).") == (3, 17)
    assert parse_span("It is [SEG] from 3 to 17.") is None


def test_missing_predictions(vidstg_root, tmp_path):
    dataset = VidStgDataset(vidstg_root)
    sample = dataset[0]
    with pytest.raises(EvaluationError, match="pred: no such folder"):
        score_vidstg(dataset, tmp_path / "pred")
    (tmp_path / "pred").mkdir()
    with pytest.raises(EvaluationError, match=r"0\.json: missing"):
        score_vidstg(dataset, tmp_path / "pred")
    assert score_vidstg(dataset, tmp_path / "pred", missing="zero").metrics["mIoU"] == 0.0
    write_prediction(tmp_path / "pred", sample, {20: sample.boxes[20]})
    with pytest.raises(EvaluationError, match=r"0\.json: no box for frame 30 \(3 of 4 frames\)"):
        score_vidstg(dataset, tmp_path / "pred")
    assert score_vidstg(dataset, tmp_path / "pred", missing="zero").metrics["mIoU"] == 0.25
    assert score_vidstg(dataset, tmp_path / "pred", missing="official").metrics["mIoU"] == 0.25
    with pytest.raises(EvaluationError, match="nothing left"):
        score_vidstg(VidStgDataset(vidstg_root, host="videoglamm"), tmp_path / "pred", missing="official")


def test_bad_predictions_name_their_files(vidstg_root, tmp_path):
    dataset = VidStgDataset(vidstg_root)
    write_perfect(dataset, tmp_path / "pred")
    (tmp_path / "pred" / "9.json").write_text("{}")
    result = score_vidstg(dataset, tmp_path / "pred")
    assert result.counts["extra"] == 1 and "9.json: not part of the benchmark" in result.problems[0]
    text = {"boxes": {"20": ["a", "b", "c", "d"]}, "span": None}
    for content in (
        {"boxes": {"20": [1, 2, 3]}, "span": None},
        {"boxes": []},
        {"boxes": {"a": None}, "span": None},
        text,
    ):
        dump(tmp_path / "pred" / "0.json", content)
        with pytest.raises(EvaluationError, match=r"0\.json: expected"):
            score_vidstg(dataset, tmp_path / "pred", missing="skip")


def test_degenerate_annotation_is_left_out_and_counted(vidstg_root, tmp_path):
    path = vidstg_root / "processed" / "vidstg" / "vidstg_annotations" / "test.json"
    content = json.loads(path.read_text())
    content["videos"].append({**content["videos"][0], "video_id": 2, "target_id": 8})
    trajectory = content["trajectories"]["o1"]
    trajectory["8"] = {**trajectory["7"], "30": {"bbox": [5, 5, 0, 10]}}
    dump(path, content)
    dataset = VidStgDataset(vidstg_root)
    write_perfect(dataset, tmp_path / "pred")
    result = score_vidstg(dataset, tmp_path / "pred")
    assert result.metrics["mIoU"] == 1.0 and result.counts["without_ground_truth"] == 1
    assert "sample 2 has no usable box" in result.problems[0]
    trajectory["8"].pop("40")
    dump(path, content)
    with pytest.raises(EvaluationError, match=r"test\.json: video o1 has no box for target 8 at '40'"):
        list(VidStgDataset(vidstg_root))
