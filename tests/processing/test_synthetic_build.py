"""The published form of the generated world: rows, shards, and what `datasets` reads from them."""

import dataclasses
import io
import json
import sys

import av
import numpy as np
import pytest

from sparrow_processing.results import decode_mask
from sparrow_processing.synthetic import DIALOGUE_KINDS, KINDS, PRESETS, SyntheticVideos
from sparrow_processing.synthetic.rows import SyntheticRow, encode_video, make_row

datasets = pytest.importorskip("datasets")
build = pytest.importorskip("sparrow_processing.synthetic.build")

SIZES = [(128, 128), (96, 144)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    build.build_split("train", 40, folder, seed=2, resolutions=SIZES, shard_clips=15)
    build.build_split("test-hard", 4, folder, resolutions=None)
    return folder


def load(folder, split, cache):
    return datasets.load_dataset(str(folder), split=split, cache_dir=str(cache))


def read_video(file):
    with av.open(io.BytesIO(file)) as container:
        rate = container.streams.video[0].average_rate
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), float(rate)


def test_datasets_reads_what_the_generator_makes(folder, tmp_path):
    loaded = load(folder, "train", tmp_path)
    videos = SyntheticVideos("train", size=40, seed=2, resolutions=SIZES)
    assert len(loaded) == 40 and set(loaded.column_names) == {field.name for field in dataclasses.fields(SyntheticRow)}
    for index in range(0, 40, 3):
        row, clip = loaded[index], videos[index]["clip"]
        wanted = dataclasses.asdict(make_row(videos, index))
        frames, rate = read_video(row["video"])
        assert frames.shape == clip.frames.shape and rate == row["frames_per_second"] == 8
        assert np.abs(frames.astype(int) - clip.frames).mean() < 4
        same = ("id", "question", "answer", "targets", "kind", "expression", "seed", "height", "width", "num_frames")
        assert {name: row[name] for name in same} == {name: wanted[name] for name in same}
        assert row["time_span"] == (wanted["time_span"] and pytest.approx(wanted["time_span"]))
        assert [item["id"] for item in row["objects"]] == list(range(clip.num_objects))
        for item, boxes, masks in zip(row["objects"], clip.boxes, clip.masks, strict=True):
            for frame, box, mask in zip(item["frames"], boxes, masks, strict=True):
                if mask.any():
                    assert frame["box"] == box.tolist() and (decode_mask(frame["mask"]) == mask).all()
                else:
                    assert frame["box"] is None and frame["mask"] is None
        assert row["answer"].count("[BOX] [SEG]") == len(row["targets"])
        assert all(0 <= i < clip.num_objects for ids in row["targets"] for i in ids)
    assert {(row["height"], row["width"]) for row in loaded} == set(SIZES)
    assert set(loaded["kind"]) & set(DIALOGUE_KINDS) and set(loaded["kind"]) & set(KINDS)


def test_test_splits_ask_for_expressions_only(folder, tmp_path):
    loaded = load(folder, "test_hard", tmp_path)
    assert loaded["kind"] == list(KINDS[:4])
    videos = SyntheticVideos("test-hard", size=4)
    for index, row in enumerate(loaded):
        assert row["expression"] == videos[index]["expression"] and row["expression"] in row["question"]
        assert row["targets"] == [list(videos[index]["target_ids"])]
        assert row["num_frames"] == PRESETS["hard"].num_frames


def test_a_build_goes_on_where_it_stopped(folder, tmp_path):
    def run():
        return build.build_split("validation", 7, tmp_path, seed=1, resolutions=None, shard_clips=3)

    shards = run()
    assert [shard.name for shard in shards] == [f"validation-{k:05d}-of-00003.parquet" for k in range(3)]
    contents, first = [shard.read_bytes() for shard in shards], shards[0].stat().st_mtime_ns
    shards[1].unlink()
    (tmp_path / "data" / f".{shards[1].name}.tmp").write_bytes(b"half a shard")
    assert run() == shards
    assert shards[0].stat().st_mtime_ns == first and [shard.read_bytes() for shard in shards] == contents
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [shard.name for shard in shards]
    with pytest.raises(ValueError, match="take another folder"):
        build.build_split("validation", 8, tmp_path, seed=1, resolutions=None, shard_clips=3)


def test_command_and_card(tmp_path, monkeypatch):
    words = ["--split", "test-easy", "--clips", "2", "--output", str(tmp_path), "--one-resolution"]
    monkeypatch.setattr(sys, "argv", ["build", *words])
    build.main()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (
        "  - split: test_easy\n    path: data/test_easy-*.parquet\n---" in card and "test_hard\n    path" not in card
    )
    assert json.loads((tmp_path / "settings" / "test-easy.json").read_text())["clips"] == 2


def test_bad_settings(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        build.build_split("train", 0, tmp_path)
    with pytest.raises(ValueError, match="even sides"):
        encode_video(np.zeros((1, 50, 51, 3), np.uint8), 8)
