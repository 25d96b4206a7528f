import io
import os
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from sparrow_processing import video_sources
from sparrow_processing.errors import VideoReadError
from sparrow_processing.video_io import VideoReader, open_video
from sparrow_processing.video_sources import usable_times

from .clip_factory import BLUE, GREEN, RED, WHITE, corner_colors, number_of, numbered_picture, write_clip

CLIPS = Path(os.environ.get("SPARROW_CLIPS_DIR", Path(__file__).parents[2] / "../shared/clips"))

# name: what `write_clip` needs for it
KINDS = {
    "mp4": {},
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "mkv": {},
    "ts": {},
    "flv": {},
    "mpeg2.mpg": {"codec": "mpeg2video"},
    "mpeg4.avi": {"codec": "mpeg4", "codec_options": {"bf": "2"}},
    "vp9.webm": {"codec": "libvpx-vp9", "codec_options": {"deadline": "realtime", "cpu-used": "8"}},
    "hevc.mp4": {"codec": "libx265", "codec_options": {"x265-params": "log-level=none:keyint=5"}},
    "av1.mp4": {"codec": "libsvtav1", "codec_options": {"preset": "12"}},
    "lossless.mkv": {"codec": "ffv1"},
    "gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "animated.png": {"codec": "apng", "container": "apng", "pix_fmt": "rgb24"},
    "raw.h264": {},
    "b_frames.avi": {},
}


@pytest.fixture(params=KINDS)
def clip(request, tmp_path):
    """20 numbered frames in every kind of file."""
    codec = KINDS[request.param].get("codec", "libx264")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {codec}")
    return write_clip(tmp_path / f"clip.{request.param}", count=20, **KINDS[request.param])


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="needs the scheduling calls of Linux")
def test_clips_are_made_without_a_change_of_scheduling(clip):
    assert os.sched_getscheduler(0) != os.SCHED_FIFO


def numbers(frames):
    return [number_of(frame) for frame in frames]


def test_frames_come_in_order_with_true_times(clip):
    with open_video(clip) as reader:
        assert numbers(reader) == list(range(20))
        assert (len(reader), reader.num_frames, reader.width, reader.height) == (20, 20, 64, 48)
        assert reader.fps == pytest.approx(25)
        assert reader.duration == pytest.approx(0.8)
        assert reader.timestamps.dtype == np.float64
        np.testing.assert_allclose(reader.timestamps, np.arange(20) / 25, atol=1e-3)
        assert reader.path == str(clip)


def test_seek_equals_scan(clip):
    reader = open_video(clip)
    scanned = np.stack(list(reader))
    assert scanned.dtype == np.uint8
    for indices in ([19, 3, 3, 0, 11, 12, 7], [5], [], list(range(20))[::-1], np.array([4, 2], dtype=np.uint8)):
        np.testing.assert_array_equal(reader.read(indices), scanned[np.asarray(indices, dtype=int)])
    for start in range(20):
        np.testing.assert_array_equal(next(reader.frames(start)), scanned[start])
    np.testing.assert_array_equal(np.stack(list(reader.frames(6, 14))), scanned[6:14])


def test_reversed_equals_scan_backwards(clip, monkeypatch):
    monkeypatch.setattr(VideoReader, "REVERSE_BLOCK", 3)
    reader = open_video(clip)
    scanned = np.stack(list(reader))
    np.testing.assert_array_equal(np.stack(list(reader.frames_reversed())), scanned[::-1])
    np.testing.assert_array_equal(np.stack(list(reader.frames_reversed(7))), scanned[7::-1])
    np.testing.assert_array_equal(np.stack(list(reader.frames_reversed(0))), scanned[:1])


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts", "vp9.webm"])
def test_reading_late_frames_does_not_decode_the_whole_clip(kind, tmp_path, monkeypatch):
    reader = open_video(write_clip(tmp_path / f"clip.{kind}", count=100, gop=10, **KINDS[kind]))
    decoded = []
    decode = video_sources._decode

    def counting_decode(*arguments):
        for frame in decode(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_sources, "_decode", counting_decode)
    assert numbers(reader.read([95])) == [95]
    assert len(decoded) <= 30
    decoded.clear()
    assert numbers(reader.read([0, 95])) == [0, 95]
    assert len(decoded) <= 31


def test_iterators_are_independent(clip):
    reader = open_video(clip)
    first, second = iter(reader), iter(reader)
    assert numbers([next(first), next(first), next(second)]) == [0, 1, 0]
    assert number_of(reader.read([15])[0]) == 15
    assert numbers([next(first), next(second)]) == [2, 1]


def test_indices_outside_the_clip_are_refused(tmp_path):
    reader = open_video(write_clip(tmp_path / "clip.mp4", count=3))
    for indices in ([3], [-1], [0, 99]):
        with pytest.raises(IndexError, match="of a clip of 3 frames"):
            reader.read(indices)
    with pytest.raises(IndexError):
        reader.frames(0, 4)
    with pytest.raises(IndexError):
        reader.frames_reversed(3)
    with pytest.raises(TypeError, match="integers"):
        reader.read([0.5])


def test_closed_reader_gives_no_more_frames(tmp_path):
    with open_video(write_clip(tmp_path / "clip.mp4", count=3)) as reader:
        under_way = iter(reader)
        next(under_way)
    with pytest.raises(VideoReadError, match="closed"):
        next(under_way)
    with pytest.raises(VideoReadError, match="closed"):
        reader.read([0])


def test_variable_frame_rate_keeps_true_times(tmp_path):
    milliseconds = [0, 40, 80, 1000, 1010, 3000]
    reader = open_video(write_clip(tmp_path / "clip.mp4", count=6, milliseconds=milliseconds))
    np.testing.assert_allclose(reader.timestamps, np.array(milliseconds) / 1000, atol=1e-4)
    assert reader.fps == pytest.approx(5 / 3)
    assert reader.warnings == []
    assert numbers(reader.read([5, 3])) == [5, 3]


@pytest.mark.parametrize("kind, sentence", [("raw.h264", "no usable time"), ("b_frames.avi", "sorted")])
def test_repaired_times_are_told(kind, sentence, tmp_path):
    reader = open_video(write_clip(tmp_path / f"clip.{kind}", count=20))
    assert [warning for warning in reader.warnings if sentence in warning]
    assert (np.diff(reader.timestamps) > 0).all()


def test_times_start_at_zero(tmp_path):
    reader = open_video(write_clip(tmp_path / "clip.mkv", count=3, milliseconds=[5000, 5040, 5080]))
    np.testing.assert_allclose(reader.timestamps, [0, 0.04, 0.08], atol=1e-6)
    assert numbers(reader.read([2, 0])) == [2, 0]


@pytest.mark.parametrize(
    "rotation, size, corners",  # FFmpeg's angle is counter-clockwise; corners: top left, top right, bottom left, right
    [
        (0, (64, 48), [RED, GREEN, BLUE, WHITE]),
        (90, (48, 64), [GREEN, WHITE, RED, BLUE]),
        (180, (64, 48), [WHITE, BLUE, GREEN, RED]),
        (270, (48, 64), [BLUE, RED, WHITE, GREEN]),
    ],
)
def test_rotation_metadata_is_applied(rotation, size, corners, tmp_path):
    reader = open_video(write_clip(tmp_path / "clip.mp4", count=8, rotation=rotation))
    assert (reader.width, reader.height) == size
    for frame in (next(iter(reader)), reader.read([6])[0], next(reader.frames_reversed())):
        assert frame.shape == (size[1], size[0], 3)
        assert frame.flags.c_contiguous
        assert corner_colors(frame) == corners


@pytest.mark.parametrize(
    "codec, pix_fmt",
    [
        ("ffv1", "gray"),
        ("ffv1", "gray10le"),
        ("libx264", "yuv420p10le"),
        ("libx264", "yuv444p"),
        ("ffv1", "yuv422p"),
        ("ffv1", "rgb48le"),
    ],
)
def test_pixel_formats_become_8_bit_rgb(codec, pix_fmt, tmp_path):
    reader = open_video(write_clip(tmp_path / "clip.mkv", count=4, codec=codec, pix_fmt=pix_fmt))
    frames = list(reader)
    assert frames[0].shape == (48, 64, 3) and frames[0].dtype == np.uint8
    assert numbers(frames) == [0, 1, 2, 3]
    if pix_fmt.startswith("gray"):
        assert (frames[1] == frames[1][..., :1]).all()
        assert int(frames[3][40, 60, 0]) == pytest.approx(240, abs=2)
    else:
        assert corner_colors(frames[3]) == [RED, GREEN, BLUE, WHITE]


def test_alpha_is_composited_on_black(tmp_path):
    with av.open(str(tmp_path / "clip.mkv"), "w") as output:
        stream = output.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "bgra"
        picture = np.full((16, 16, 4), (200, 100, 50, 255), dtype=np.uint8)
        picture[:, :8, 3] = 0
        picture[8:, 8:, 3] = 128
        output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")))
        output.mux(stream.encode(None))
    (frame,) = open_video(tmp_path / "clip.mkv")
    assert (frame[:, :8] == 0).all()
    assert frame[2, 12].tolist() == [200, 100, 50]
    assert frame[12, 12].tolist() == [100, 50, 25]


@pytest.mark.parametrize("codec, suffix", [("libx264", "mp4"), ("libvpx-vp9", "webm"), ("ffv1", "mkv")])
def test_odd_sizes_are_kept(codec, suffix, tmp_path):
    pix_fmt = "yuv444p" if codec == "libx264" else "yuv420p"  # x264 takes odd sizes with full colour only
    clip = write_clip(tmp_path / f"clip.{suffix}", count=4, width=127, height=63, codec=codec, pix_fmt=pix_fmt)
    reader = open_video(clip)
    assert (reader.width, reader.height) == (127, 63)
    assert numbers(reader) == [0, 1, 2, 3]
    assert corner_colors(reader.read([1])[0]) == [RED, GREEN, BLUE, WHITE]


def test_one_frame(tmp_path):
    reader = open_video(write_clip(tmp_path / "clip.mp4", count=1, rate=10))
    assert (len(reader), reader.timestamps.tolist()) == (1, [0.0])
    assert (reader.fps, reader.duration) == (10.0, 0.1)
    assert numbers(reader.frames_reversed()) == numbers(reader.read([0])) == [0]


def test_sound_beside_the_pictures_is_ignored(tmp_path):
    reader = open_video(write_clip(tmp_path / "clip.mp4", count=5, with_audio=True))
    assert numbers(reader) == list(range(5))
    assert reader.warnings == []


@pytest.mark.parametrize("suffix", ["mp4", "webm.jpg", "txt", ""])
def test_content_decides_not_the_name(suffix, tmp_path):
    clip = write_clip(tmp_path / "clip.mkv", count=3)
    renamed = clip.rename(tmp_path / f"clip.{suffix}")
    assert numbers(open_video(renamed)) == [0, 1, 2]


@pytest.mark.parametrize(
    "make",
    [
        Path,
        str,
        Path.read_bytes,
        lambda path: bytearray(path.read_bytes()),
        lambda path: memoryview(path.read_bytes()),
        lambda path: io.BytesIO(path.read_bytes()),
        lambda path: path.open("rb"),
    ],
    ids=["Path", "str", "bytes", "bytearray", "memoryview", "BytesIO", "open file"],
)
def test_every_form_of_a_file(make, tmp_path):
    source = make(write_clip(tmp_path / "clip.mp4", count=6))
    reader = open_video(source)
    assert numbers(reader) == list(range(6))
    assert numbers(reader.read([5, 0])) == [5, 0]
    assert reader.path == (str(tmp_path / "clip.mp4") if isinstance(source, str | Path) else None)
    if hasattr(source, "close"):
        assert not source.closed
        source.close()


def test_file_object_is_read_from_its_start(tmp_path):
    with open(write_clip(tmp_path / "clip.mp4", count=4), "rb") as file:
        file.seek(100)
        assert numbers(open_video(file)) == [0, 1, 2, 3]


def test_file_object_that_cannot_seek(tmp_path):
    class Pipe(io.RawIOBase):
        def __init__(self, data):
            self.rest = io.BytesIO(data)

        def readable(self):
            return True

        def readinto(self, buffer):
            return self.rest.readinto(buffer)

    source = Pipe(write_clip(tmp_path / "clip.mp4", count=4).read_bytes())
    assert numbers(open_video(source).read([3, 1])) == [3, 1]


def test_an_open_reader_is_returned(tmp_path):
    reader = open_video(write_clip(tmp_path / "clip.mp4", count=2))
    assert open_video(reader) is reader


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff"])
def test_still_picture_is_a_clip_of_one_frame(suffix, tmp_path):
    path = tmp_path / f"still.{suffix}"
    Image.fromarray(numbered_picture(5)).save(path)
    reader = open_video(path)
    assert numbers(reader) == [5]
    assert (len(reader), reader.fps, reader.timestamps.tolist()) == (1, 25.0, [0.0])
    assert any("still picture" in warning for warning in reader.warnings)


def test_pictures_are_turned_upright_and_made_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show
    Image.fromarray(numbered_picture(0)).save(tmp_path / "turned.png", exif=exif)
    reader = open_video(tmp_path / "turned.png")
    assert (reader.width, reader.height) == (48, 64)
    assert corner_colors(next(iter(reader))) == [BLUE, RED, WHITE, GREEN]

    gray = np.full((4, 6), 0x80FF, dtype=np.uint16)
    Image.fromarray(gray).save(tmp_path / "gray16.png")
    assert next(iter(open_video(tmp_path / "gray16.png"))).tolist() == np.full((4, 6, 3), 0x80).tolist()

    clear = Image.fromarray(np.full((4, 6, 4), (200, 100, 50, 128), dtype=np.uint8))
    assert next(iter(open_video(clear)))[0, 0].tolist() == [100, 50, 25]


def test_folder_of_frames_in_natural_order(tmp_path):
    for number in (0, 1, 2, 9, 10, 11, 100):
        Image.fromarray(numbered_picture(number)).save(tmp_path / f"frame{number}.png")
    (tmp_path / ".DS_Store").write_bytes(b"not a picture")
    reader = open_video(tmp_path, fps=10)
    assert numbers(reader) == [0, 1, 2, 9, 10, 11, 100]
    assert numbers(reader.read([6, 3, 3])) == [100, 9, 9]
    assert numbers(reader.frames_reversed(1)) == [1, 0]
    np.testing.assert_allclose(reader.timestamps, np.arange(7) / 10)
    assert (reader.fps, reader.path) == (pytest.approx(10), str(tmp_path))


ARRAY = np.stack([numbered_picture(number) for number in range(5)])


@pytest.mark.parametrize(
    "frames",
    [
        ARRAY,
        ARRAY.transpose(0, 3, 1, 2),
        (ARRAY / 255).astype(np.float32),
        (ARRAY / 255).astype(np.float16),
        ARRAY[..., ::-1][..., ::-1],
        list(ARRAY),
        list(ARRAY.transpose(0, 3, 1, 2)),
        torch.from_numpy(ARRAY),
        torch.from_numpy(ARRAY).permute(0, 3, 1, 2),
        (torch.from_numpy(ARRAY) / 255).requires_grad_(),
        list(torch.from_numpy(ARRAY).permute(0, 3, 1, 2) / 255),
        [Image.fromarray(picture) for picture in ARRAY],
        tuple(Image.fromarray(picture) for picture in ARRAY),
    ],
    ids=[
        "THWC",
        "TCHW",
        "float32",
        "float16",
        "negative strides",
        "list HWC",
        "list CHW",
        "tensor THWC",
        "tensor TCHW",
        "float tensor with gradient",
        "list of tensors",
        "PIL",
        "tuple of PIL",
    ],
)
def test_frames_in_memory(frames):
    reader = open_video(frames)
    assert (len(reader), reader.width, reader.height, reader.fps) == (5, 64, 48, pytest.approx(25))
    np.testing.assert_array_equal(np.stack(list(reader)), ARRAY)
    np.testing.assert_array_equal(reader.read([4, 0, 4]), ARRAY[[4, 0, 4]])
    np.testing.assert_array_equal(np.stack(list(reader.frames_reversed())), ARRAY[::-1])


def test_bfloat16_tensor():
    frames = torch.full((2, 3, 4, 4), 0.5, dtype=torch.bfloat16)
    assert (open_video(frames).read([1]) == 128).all()


def test_frames_given_out_are_copies():
    frames = ARRAY.copy()
    next(iter(open_video(frames)))[:] = 0
    np.testing.assert_array_equal(frames, ARRAY)


def test_times_for_sources_without_a_clock():
    np.testing.assert_allclose(open_video(ARRAY, fps=2).timestamps, [0, 0.5, 1, 1.5, 2])
    reader = open_video(ARRAY, timestamps=[3, 3.5, 4, 8, 9])
    np.testing.assert_allclose(reader.timestamps, [0, 0.5, 1, 5, 6])
    assert reader.fps == pytest.approx(4 / 6)
    assert open_video(ARRAY[:1], fps=2).duration == 0.5


def test_channel_order_decides_an_ambiguous_shape():
    frames = np.arange(3 * 3 * 3 * 3, dtype=np.uint8).reshape(3, 3, 3, 3)
    np.testing.assert_array_equal(open_video(frames, channel_order="channels_last").read([0, 1, 2]), frames)
    first = open_video(frames, channel_order="channels_first").read([0, 1, 2])
    np.testing.assert_array_equal(first, frames.transpose(0, 2, 3, 1))


def peak_bytes(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("direction", ["frames", "frames_reversed"])
def test_memory_does_not_grow_with_the_clip(direction, tmp_path, monkeypatch):
    monkeypatch.setattr(VideoReader, "REVERSE_BLOCK", 4)
    frame_bytes = 320 * 240 * 3
    peaks = {}
    for count in (20, 160):
        path = write_clip(tmp_path / f"{count}.mp4", count=count, width=320, height=240, gop=10)
        peaks[count] = peak_bytes(lambda path=path: [None for _ in getattr(open_video(path), direction)()])
    assert peaks[160] < 8 * frame_bytes
    assert peaks[160] < peaks[20] + 2 * frame_bytes


def test_times_are_made_usable():
    tick = Fraction(1, 1000)

    def repaired(pts):
        times, problem = usable_times(pts, tick, 25.0)
        return np.round(times, 6).tolist(), problem

    assert repaired([100, 140, 200]) == ([0, 0.04, 0.1], None)
    times, problem = repaired([None, None, None])
    assert times == [0, 0.04, 0.08] and "no usable time" in problem
    times, problem = repaired([0, 20, 20, 40, None, 60])  # usual interval 20 ms
    assert times == [0, 0.02, 0.04, 0.06, 0.08, 0.1] and "3 frames" in problem
    times, problem = repaired([0, 10, 30, 20, 40])
    assert times == [0, 0.01, 0.02, 0.03, 0.04] and "sorted" in problem
    times, problem = repaired([0, 10, 20, 0, 10, 20])  # two recordings in one file
    assert times == [0, 0.01, 0.02, 0.03, 0.04, 0.05] and "1 frames" in problem


@pytest.mark.parametrize("name", [path.name for path in sorted(CLIPS.glob("*.*")) if path.suffix != ".json"] or [None])
def test_reference_clips(name):
    if name is None:
        pytest.skip(f"no reference clips in {CLIPS} (set SPARROW_CLIPS_DIR)")
    with av.open(str(CLIPS / name)) as container:
        stream = container.streams.video[0]
        expected = [(frame.pts * stream.time_base, frame.width, frame.height) for frame in container.decode(stream)]
    reader = open_video(CLIPS / name)
    assert len(reader) == len(expected)
    assert {reader.width, reader.height} == set(expected[0][1:])
    assert reader.warnings == []
    np.testing.assert_allclose(reader.timestamps, [float(time - expected[0][0]) for time, _, _ in expected], atol=1e-6)
    assert (np.diff(reader.timestamps) > 0).all()
    middle = len(reader) // 2
    scanned = list(reader.frames(0, middle + 1))[-1]
    assert scanned.shape == (reader.height, reader.width, 3)
    np.testing.assert_array_equal(reader.read([middle])[0], scanned)
    if name == "phone_rotated.mp4":
        assert (reader.width, reader.height) == expected[0][:0:-1]
