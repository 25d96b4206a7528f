"""Toy runs of the training stages: a random model of 1.5 M parameters, clips of 64 px, a few steps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from modeling_sparrow.training.run import HISTORY_FILE, train_stage
from modeling_sparrow.training.settings import build
from modeling_sparrow.training.stages import AnyStage
from sparrow_processing.results import encode_mask

from ..tiny import random_clip

WORLD = {"kind": "synthetic", "world": {"height": 64, "width": 64}, "size": 100}
STEPS = {"steps": 6, "learning_rate": 1e-3, "batch_size": 2, "warmup_steps": 1, "log_every": 1, "save_every": 2}
STAGES: dict[str, dict[str, Any]] = {
    "proposer": {"data": [WORLD]},
    "target_injection": {"data": [WORLD | {"questions_per_video": 2}], "frames": {"mask_frames": 3}},
    "filter": {
        "data": [WORLD | {"questions_per_video": 2}],
        "frames": {"mask_frames": 3},
        "allow_untrained_start": True,
    },
}


def toy_content(stage: str, model: Path, output: Path, **changes) -> dict[str, Any]:
    """A stage as its YAML file says it; `changes` replace keys, and are merged into mappings."""
    content = {"stage": stage, "model": str(model), "output": str(output), "optimization": STEPS} | STAGES[stage]
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(value, dict) and key in content else value
    return content


def toy_stage(stage: str, model: Path, output: Path, **changes) -> AnyStage:
    return build(AnyStage, toy_content(stage, model, output, **changes), "toy")


def write_yaml(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def trained_tensors(output: Path) -> dict[str, torch.Tensor]:
    """What the last checkpoint of a run holds."""
    from safetensors.torch import load_file

    newest = max(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    return load_file(newest / "trained.safetensors")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums over several threads may differ in the last bit from run to run, and these tests compare bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the processes that tests start
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def injected(checkpoint, tmp_path_factory) -> Path:
    """Output of a toy stage 1: an adapter."""
    return train_stage(toy_stage("target_injection", checkpoint, tmp_path_factory.mktemp("injected") / "run"))


@pytest.fixture(scope="session")
def history_file() -> str:
    return HISTORY_FILE


def write_clip(folder: Path, num_frames: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A video as a folder of pictures, its frames `(T, 48, 64, 3)`, and the mask of its moving square."""
    frames = random_clip(num_frames, seed=seed)
    folder.mkdir(parents=True)
    masks = np.zeros(frames.shape[:3], dtype=bool)
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{t:03d}.png")
        y, x = (5 + 3 * t) % (48 - 16), (8 + 5 * t) % (64 - 16)
        masks[t, y : y + 14, x : x + 14] = True
    return frames, masks


def object_content(masks: np.ndarray, number: int = 0, with_masks: bool = True, with_boxes: bool = True) -> dict:
    """An object of a record as JSON, from masks `(T, H, W)`; frames without it have neither box nor mask."""
    frames = []
    for t, mask in enumerate(masks):
        rows, columns = np.nonzero(mask)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) and with_boxes else None
        shape = encode_mask(mask) if with_masks else None
        frames.append({"index": t, "box": None if box is None else [int(v) for v in box], "mask": shape})
    return {"id": number, "frames": frames}


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path
