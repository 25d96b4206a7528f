"""A clip five or ten times as long takes the same memory, but for the result itself.

The long comparison, 120 frames with 1,200, runs with

    pytest tests/end_to_end/test_memory.py -m slow
"""

import gc
import json
import os
import subprocess
import sys
import tracemalloc
import weakref
from pathlib import Path

import pytest
import torch

from modeling_sparrow.cli import load_model
from sparrow_processing import processing_sparrow
from sparrow_processing.pixel_streams import segmenter_pixels

from ..processing.clip_factory import write_clip

WIDTH, HEIGHT = 320, 240
FRAME_BYTES = WIDTH * HEIGHT * 3

# Grounds one clip in a process of its own; prints its largest resident memory in bytes and the frames done.
RESIDENT = """
import json, sys, threading, time
import psutil, torch
from modeling_sparrow.cli import ground_video, load_model
from sparrow_processing import open_video

torch.set_num_threads(1)
process, largest, done = psutil.Process(), [], threading.Event()

def watch():
    while not done.is_set():
        largest.append(process.memory_info().rss)
        time.sleep(0.005)

folder, clip = sys.argv[1:]
model, processor = load_model(folder, "cpu")
watcher = threading.Thread(target=watch)
watcher.start()
(result,), _ = ground_video(model, processor, open_video(clip), ["the ring"], "refer", 16)
done.set()
watcher.join()
print(json.dumps({"largest": max(largest), "frames": result.num_frames}))
"""


class LiveFrames:
    """Counts decoded frames that are still held; FFmpeg's memory is not traced by Python."""

    def __init__(self, monkeypatch):
        self.now = self.most = 0
        monkeypatch.setattr(processing_sparrow, "segmenter_pixels", self.watch)

    def watch(self, frame, size: int) -> torch.Tensor:
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(frame, self.forget)
        return segmenter_pixels(frame, size)

    def forget(self):
        self.now -= 1


def tensor_bytes() -> int:
    """Memory of all tensors alive, each storage once."""
    tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def measure(model, processor, path: Path, num_frames: int) -> dict[str, int]:
    """Bytes beside what is there before: of tensors near the end, of Python and numpy at most, and of the result."""
    gc.collect()
    before, tensors, seen = tensor_bytes(), 0, 0
    tracemalloc.start()
    inputs = processor(text="the ring", videos=str(path), stream=True)
    collector = processor.collector(inputs["metadata"])
    for row, masks in model.ground_iter(**inputs):
        collector(row, masks)
        seen += 1
        if num_frames - seen in (1, 2, 3):  # all phases of a batch of two frames
            tensors = max(tensors, tensor_bytes() - before)
    del inputs, masks
    gc.collect()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == num_frames and collector.tracks[0][0]["visible"].sum() > num_frames / 2
    return {"tensors": tensors, "python": peak - kept, "result": kept}


@pytest.mark.parametrize("prompted", ["first", "last"])
def test_memory_does_not_grow_with_the_clip(prompted, answering, tmp_path, monkeypatch):
    model, processor = load_model(str(answering), "cpu")
    # the last one: all the way back through the video
    monkeypatch.setattr(model, "candidate_frames", lambda num_frames: [0 if prompted == "first" else num_frames - 1])
    paths = {
        count: write_clip(tmp_path / f"{count}.mp4", count=count, width=WIDTH, height=HEIGHT, gop=12)
        for count in (4, 20, 100)
    }
    live = LiveFrames(monkeypatch)
    _, short, long = (measure(model, processor, path, count) for count, path in paths.items())  # the first warms up
    assert live.most <= 16  # a block of frames on the way back
    for kind in ("tensors", "python"):
        assert long[kind] < 1.1 * short[kind], (short, long)
    assert long["python"] < 50 * FRAME_BYTES
    assert long["result"] < 100 * FRAME_BYTES / 20, (short, long)


@pytest.mark.slow
def test_resident_memory_does_not_grow_with_a_long_clip(answering, tmp_path):
    """The frames of the longer clip are 829 MB."""
    largest = {}
    for count in (120, 1200):
        path = write_clip(tmp_path / f"{count}.mp4", count=count, width=640, height=360, gop=12)
        done = subprocess.run(
            [sys.executable, "-c", RESIDENT, str(answering), str(path)],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        report = json.loads(done.stdout)
        assert report["frames"] == count
        largest[count] = report["largest"]
    assert largest[1200] < 1.1 * largest[120], largest
