"""Each stage learns four clips by heart, from files as a user would write them."""

import json
from pathlib import Path

import pytest

from modeling_sparrow.evaluation.files import read_json
from modeling_sparrow.training.run import FINAL, HISTORY_FILE, train_stage

from .conftest import object_content, toy_stage, write_clip, write_lines

CLIPS, SHOWN = 4, (0, 3)  # clips, and the frames of each that are annotated
QUESTIONS = ("the red ring", "the blue star", "the green cross", "the white house")


def steps(count: int, learning_rate: float) -> dict:
    return {
        "steps": count,
        "learning_rate": learning_rate,
        "batch_size": CLIPS,
        "warmup_steps": 10,
        "schedule": "cosine",
        "save_every": count,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Folder with four clips, `records.jsonl` and `boxes.json`."""
    folder = tmp_path_factory.mktemp("clips")
    records, images, annotations = [], [], []
    for n, question in enumerate(QUESTIONS):
        _, masks = write_clip(folder / f"clip-{n}", num_frames=4, seed=n)
        thing = object_content(masks)
        thing["frames"] = [thing["frames"][t] for t in SHOWN]
        records.append({"video": f"clip-{n}", "question": question, "answer": "it is [SEG] .", "objects": [thing]})
        for frame in thing["frames"]:
            x0, y0, x1, y1 = frame["box"]
            annotations.append({"image_id": len(images), "bbox": [x0, y0, x1 - x0, y1 - y0]})
            images.append({"id": len(images), "file_name": f"clip-{n}/{frame['index']:03d}.png"})
    write_lines(folder / "records.jsonl", records)
    (folder / "boxes.json").write_text(json.dumps({"images": images, "annotations": annotations}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def proposer(checkpoint, data, tmp_path_factory) -> Path:
    settings = toy_stage(
        "proposer",
        checkpoint,
        tmp_path_factory.mktemp("overfit") / "proposer",
        data=[{"kind": "coco", "annotations": str(data / "boxes.json"), "images": str(data)}],
        augment=False,
        optimization=steps(250, 3e-3),
    )
    return train_stage(settings)


def losses_of(final: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Of the first and of the last step, by name."""
    newest = max(final.parent.glob("checkpoint-*"))
    entries = [entry for entry in read_json(newest / "trainer_state.json")["log_history"] if "grad_norm" in entry]
    return entries[0], entries[-1]


def assert_learned(final: Path, limits: dict[str, float]):
    first, last = losses_of(final)
    for name, limit in limits.items():
        assert last[name] < limit < first[name], f"{name}: from {first[name]} to {last[name]}"


def test_proposer(proposer):
    assert_learned(proposer, {"objectness_loss": 0.05, "l1_loss": 0.02, "giou_loss": 0.1})


def test_target_injection(checkpoint, data, tmp_path):
    """In full, the mask tracker too: the one of the toy model is random, and [SEG] alone cannot steer it."""
    settings = toy_stage(
        "target_injection",
        checkpoint,
        tmp_path / "run",
        data=[{"kind": "records", "path": str(data / "records.jsonl")}],
        lora=None,
        trainable=["host.language_model", "host.spatial_adapter", "host.temporal_adapter", "seg_head", "mask_tracker"],
        optimization=steps(90, 3e-3),
    )
    assert_learned(train_stage(settings), {"ce_loss": 0.1, "mask_bce_loss": 0.02, "mask_dice_loss": 0.05})


def test_filter(proposer, data, tmp_path):
    settings = toy_stage(
        "filter",
        proposer,
        tmp_path / "run",
        data=[{"kind": "records", "path": str(data / "records.jsonl")}],
        optimization=steps(250, 3e-3),
    )
    final = train_stage(settings)
    assert_learned(final, {"filter_class_loss": 0.1, "filter_box_loss": 0.05})
    assert [entry["stage"] for entry in read_json(final / HISTORY_FILE)["history"]] == ["proposer", "filter"]
    assert final.name == FINAL
