"""The example of docs/training.md does what it says."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_sparrow.cli import load_model, main
from modeling_sparrow.training.records import RecordFile

from ..tiny import random_clip

DOCUMENT = Path(__file__).parents[2] / "docs" / "training.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_own_data_from_the_file_to_the_model(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames = [Image.fromarray(frame) for frame in random_clip(5)]
    video = io.BytesIO()
    frames[0].save(video, format="GIF", save_all=True, append_images=frames[1:], duration=100)
    Path("frog.mp4").write_bytes(video.getvalue())  # what a file holds is told by its content
    masks = np.zeros((5, 48, 64), dtype=bool)
    masks[:, 5:20, 8:30] = True
    np.save("frog.npy", masks)
    example, settings = blocks("python")[0], blocks("yaml")[0]
    assert len(example.splitlines()) <= 20
    exec(compile(example, "example", "exec"), {})
    (record,) = RecordFile("mine.jsonl").read(0, np.random.default_rng(0))
    assert record.answer == "It is <p> the green frog </p> [BOX] [SEG]." and len(record.objects[0].frames) == 5
    Path("mine.yaml").write_text(settings, encoding="utf-8")
    command = ["train", "mine.yaml", "--set", f"model={checkpoint}", "--set", "optimization.steps=2"]
    assert main([*command, "--merge", "my-model"]) == 0
    load_model("my-model", "cpu")


@pytest.mark.parametrize("name", re.findall(r"sparrow (?:train|ablate) (tiny_\w+)", "\n".join(blocks("bash"))))
def test_commands_name_shipped_settings(name):
    from modeling_sparrow.training.settings import find_config

    assert find_config(name).is_file()
