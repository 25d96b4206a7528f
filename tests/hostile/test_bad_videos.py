"""Video files, folders and arrays that are broken, odd or made to do harm. Numbers are cases of the agreed list."""

import io
import os
import re
import struct
import tracemalloc
import wave
import zipfile
import zlib

import av
import numpy as np
import pytest
import torch
from PIL import Image

from sparrow_processing import video_sources
from sparrow_processing.errors import LimitExceededError, VideoGroundingError, VideoReadError
from sparrow_processing.video_io import VideoLimits, open_video

from ..processing.clip_factory import damaged, number_of, numbered_picture, write_clip, write_sound_only

FASTSTART = {"movflags": "+faststart"}  # the index comes first, so that a file cut short can still be read


def numbers(frames):
    return [number_of(frame) for frame in frames]


def test_01_empty_file(tmp_path):
    path = tmp_path / "empty.mp4"
    path.touch()
    with pytest.raises(VideoReadError, match=rf"{re.escape(str(path))}.*file is empty"):
        open_video(path)
    for source in (b"", io.BytesIO()):
        with pytest.raises(VideoReadError, match="file is empty"):
            open_video(source)


@pytest.mark.parametrize(
    "content", [b"just text\n" * 50, b"\0" * 1000, bytes(range(256)) * 8, b"\xff\xd8\xff\xe0 no jpeg"]
)
def test_02_not_a_video(content, tmp_path):
    path = tmp_path / "text.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoReadError, match=r"text\.mp4") as caught:
        open_video(path)
    assert isinstance(caught.value.__cause__, av.FFmpegError)
    assert isinstance(caught.value, VideoGroundingError) and isinstance(caught.value, ValueError)


def test_03_cut_before_the_index(tmp_path):
    data = write_clip(tmp_path / "clip.mp4", count=20).read_bytes()
    with pytest.raises(VideoReadError, match="not a video FFmpeg can read") as caught:
        open_video(data[: len(data) // 2])
    assert isinstance(caught.value.__cause__, av.FFmpegError)


@pytest.mark.parametrize(
    "name, options",
    [("mp4", {"container_options": FASTSTART}), ("flv", {}), ("mkv", {}), ("webm", {"codec": "libvpx-vp9"})],
)
def test_03_cut_short(name, options, tmp_path):
    data = write_clip(tmp_path / f"clip.{name}", count=60, **options).read_bytes()
    reader = open_video(data[: int(len(data) * 0.6)])
    count = len(reader)
    assert 20 <= count < 60
    assert numbers(reader) == list(range(count))
    assert numbers(reader.read([count - 1, 0])) == [count - 1, 0]
    assert numbers(reader.frames_reversed()) == list(range(count))[::-1]
    assert len(reader.timestamps) == count
    assert any(f"ended early at frame {count}" in warning for warning in reader.warnings)
    with pytest.raises(VideoReadError, match=f"ended early at frame {count}"):
        open_video(data[: int(len(data) * 0.6)], strict=True)


def test_03_cut_before_the_first_frame(tmp_path):
    data = write_clip(tmp_path / "clip.mp4", count=20, container_options=FASTSTART).read_bytes()
    with pytest.raises(VideoReadError, match="not one frame") as caught:
        open_video(data[: data.index(b"mdat") + 20])
    assert isinstance(caught.value.__cause__, av.FFmpegError)


@pytest.mark.parametrize(
    "codec, listed", [("libx264", "damaged frames"), ("ffv1", "could not be decoded, before frames")]
)
def test_04_damaged_in_the_middle(codec, listed, tmp_path):
    data = damaged(write_clip(tmp_path / "clip.mkv", count=30, codec=codec).read_bytes())
    reader = open_video(data)
    assert 28 <= len(reader) <= 30
    places = [warning for warning in reader.warnings if listed in warning]
    assert places and re.search(r"\d+", places[0])
    scanned = np.stack(list(reader))
    assert numbers(scanned[-1:]) == [29]
    np.testing.assert_array_equal(reader.read(range(len(reader))[::-1]), scanned[::-1])
    np.testing.assert_array_equal(np.stack(list(reader.frames_reversed())), scanned[::-1])
    with pytest.raises(VideoReadError, match="strict"):
        open_video(data, strict=True)


def test_04_container_that_cannot_be_read_on(tmp_path):
    data = write_clip(tmp_path / "clip.y4m", count=20, codec="wrapped_avframe", container="yuv4mpegpipe").read_bytes()
    broken = bytearray(data)
    place = data.index(b"FRAME", len(data) // 2)
    broken[place : place + 5] = b"xxxxx"
    reader = open_video(bytes(broken))
    assert numbers(reader) == list(range(len(reader))) and 8 <= len(reader) <= 12
    assert any(f"ended early at frame {len(reader)}" in warning for warning in reader.warnings)


def test_04_strict_accepts_an_intact_file(tmp_path):
    assert open_video(write_clip(tmp_path / "clip.mp4"), strict=True).warnings == []


@pytest.mark.parametrize("kind", ["m4a", "wav", "cover"])
def test_05_sound_only(kind, tmp_path):
    path = tmp_path / "sound.mp4"
    if kind == "wav":
        with wave.open(str(path), "wb") as sound:
            sound.setparams((1, 2, 8000, 0, "NONE", ""))
            sound.writeframes(bytes(8000))
    elif kind == "m4a":
        write_sound_only(path)
    else:
        write_cover_only(path)
    with pytest.raises(VideoReadError, match=r"sound.mp4.*no video stream"):
        open_video(path)


def write_cover_only(path):
    """Sound in FLAC with a cover picture, which FFmpeg shows as a video stream."""
    with av.open(str(path), "w", format="flac") as output:
        stream = output.add_stream("flac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 16_000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    buffer = io.BytesIO()
    Image.fromarray(numbered_picture(0)).save(buffer, "PNG")
    picture = buffer.getvalue()
    block = struct.pack(">II", 3, 9) + b"image/png" + struct.pack(">IIIIII", 0, 64, 48, 24, 0, len(picture)) + picture
    data = path.read_bytes()
    first_block_end = 4 + 4 + 34  # marker, block header, stream information
    header = bytes([6]) + len(block).to_bytes(3, "big")
    path.write_bytes(
        data[:4] + bytes([data[4] & 0x7F]) + data[5:first_block_end] + header + block + data[first_block_end:]
    )


@pytest.mark.parametrize("name", ["webm", "mkv", "ts", "fragmented.mp4"])
def test_06_no_frame_count_in_the_header(name, tmp_path):
    options = {"container_options": {"movflags": "frag_keyframe+empty_moov"}} if name == "fragmented.mp4" else {}
    path = write_clip(tmp_path / f"clip.{name}", codec="libvpx-vp9" if name == "webm" else "libx264", **options)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert numbers(open_video(path)) == list(range(12))


def with_stated_count(avi: bytes, count: int) -> bytes:
    """An AVI file whose stream header states another number of frames."""
    place = avi.index(b"strh") + 8 + 32
    return avi[:place] + struct.pack("<I", count) + avi[place + 4 :]


def test_07_header_states_another_count(tmp_path):
    data = with_stated_count(write_clip(tmp_path / "clip.avi", codec="mpeg4").read_bytes(), 1000)
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].frames == 1000
    reader = open_video(data)
    assert len(reader) == len(reader.timestamps) == 12
    assert numbers(reader) == list(range(12))
    assert any("states 1000 frames, 12 were decoded" in warning for warning in reader.warnings)


def test_08_one_frame(tmp_path):
    reader = open_video(write_clip(tmp_path / "clip.mp4", count=1))
    assert reader.timestamps.tolist() == [0.0]
    assert np.isfinite([reader.fps, reader.duration]).all() and reader.fps > 0


# Case 9 (fewer frames than asked for) is in tests/processing/test_frame_sampling.py; 10 to 12 (times, rotation, odd
# sizes) are in test_video_io.py and test_overlays.py.


def png_header(width: int, height: int) -> bytes:
    """A PNG that states a size and holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"
    )


@pytest.fixture
def no_decoding(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a frame was about to be decoded")

    monkeypatch.setattr(video_sources, "_decode", refuse)


def test_13_strip_wider_than_the_limit(tmp_path, no_decoding):
    path = write_clip(tmp_path / "strip.mp4", count=1, width=8208, height=16)
    with pytest.raises(LimitExceededError, match=r"8208 .*max_side = 8192.*VideoLimits\(max_side="):
        open_video(path)


def test_13_frame_with_too_many_pixels(no_decoding):
    with pytest.raises(LimitExceededError, match=r"6\.4e\+07|64000000 .*max_frame_pixels"):
        open_video(b"YUV4MPEG2 W8000 H8000 F25:1 Ip A1:1 C420\nFRAME\n" + bytes(100))


@pytest.mark.parametrize(
    "size, limit", [((16_384, 16), "max_side"), ((8_000, 8_000), "max_frame_pixels"), ((60_000, 60_000), "PIL")]
)
def test_13_picture_beyond_the_limits(size, limit, tmp_path):
    path = tmp_path / "frame.png"
    path.write_bytes(png_header(*size))
    tracemalloc.start()
    for source in (path, tmp_path):
        with pytest.raises(LimitExceededError, match=limit):
            open_video(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_13_picture_size_grows_within_the_stream(tmp_path):
    small = write_clip(tmp_path / "small.h264", count=6).read_bytes()
    large = write_clip(tmp_path / "large.h264", count=6, width=256, height=192).read_bytes()
    reader = open_video(small + large)
    assert {frame.shape for frame in reader} == {(48, 64, 3)}
    assert numbers(reader) == [*range(6), *range(6)]
    assert any("size changes at frame 6" in warning for warning in reader.warnings)
    with pytest.raises(LimitExceededError, match="max_side"):
        open_video(small + large, limits=VideoLimits(max_side=200))
    # FFmpeg refuses the larger pictures before it allocates them; the smaller ones are still there.
    limited = open_video(small + large, limits=VideoLimits(max_frame_pixels=64 * 48))
    assert numbers(limited.frames(0, 5)) == list(range(5))
    assert any("could not be decoded" in warning for warning in limited.warnings)


def test_14_decompression_bomb(tmp_path):
    path = tmp_path / "bomb.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "51"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        black = av.VideoFrame.from_ndarray(np.zeros((720, 1280, 3), dtype=np.uint8), format="rgb24")
        for number in range(150):
            black.pts = None
            output.mux(stream.encode(black))
            black.pts = number + 1
        output.mux(stream.encode(None))
    unpacked = 150 * 1280 * 720 * 3
    assert path.stat().st_size < unpacked / 1000
    tracemalloc.start()
    with pytest.raises(LimitExceededError, match=f"{41 * 1280 * 720} .*max_total_pixels"):
        open_video(path, limits=VideoLimits(max_total_pixels=40 * 1280 * 720 + 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_14_default_budget_stops_a_clip_of_8k_frames():
    limits = VideoLimits()
    frames_of_8k = limits.max_total_pixels // (7680 * 4320)
    assert frames_of_8k < 30_000
    assert limits.max_frames * 1920 * 1080 < limits.max_total_pixels


def test_15_too_many_frames(tmp_path, monkeypatch):
    limits = VideoLimits(max_frames=10)
    with pytest.raises(LimitExceededError, match=r"max_frames = 10.*VideoLimits\(max_frames="):
        open_video(write_clip(tmp_path / "clip.mkv"), limits=limits)
    for source in ([numbered_picture(0)] * 11, np.zeros((11, 4, 4, 3), dtype=np.uint8)):
        with pytest.raises(LimitExceededError, match="max_frames"):
            open_video(source, limits=limits)
    assert len(open_video(write_clip(tmp_path / "ten.mkv", count=10), limits=limits)) == 10


def test_15_header_that_states_too_many_frames(tmp_path, no_decoding):
    data = with_stated_count(write_clip(tmp_path / "clip.avi", codec="mpeg4").read_bytes(), 900_000)
    with pytest.raises(LimitExceededError, match=r"900000 .*max_frames"):
        open_video(data)


def test_15_decoding_time_is_limited(tmp_path):
    with pytest.raises(LimitExceededError, match="max_decode_seconds"):
        open_video(write_clip(tmp_path / "clip.mp4"), limits=VideoLimits(max_decode_seconds=0))


def test_file_size_is_limited(tmp_path):
    path = write_clip(tmp_path / "clip.mp4")
    for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        with pytest.raises(LimitExceededError, match=r"max_bytes = 1000"):
            open_video(source, limits=VideoLimits(max_bytes=1000))


# Case 16 (gray, 10-bit, 4:4:4, alpha) is in tests/processing/test_video_io.py, as are AV1, HEVC and VP9 of case 17.


def test_17_codec_without_a_decoder(tmp_path):
    data = write_clip(tmp_path / "clip.mp4").read_bytes().replace(b"avc1", b"zzz1")
    with pytest.raises(VideoReadError, match=r"no decoder for the codec.*zzz1"):
        open_video(data)


def test_18_animated_webp_is_refused(tmp_path):
    pictures = [Image.fromarray(numbered_picture(number)) for number in range(3)]
    pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:])
    with pytest.raises(VideoReadError, match="animated WebP"):
        open_video(tmp_path / "a.webp")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("kept", [0.9, 0.1])
def test_18_broken_still_picture(suffix, kept, tmp_path):
    path = tmp_path / f"still.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(VideoReadError, match=rf"still\.{suffix}.*picture"):
        open_video(path)


def test_19_wrong_suffix(tmp_path):
    path = write_clip(tmp_path / "clip.mp4").rename(tmp_path / "clip.jpg")
    assert numbers(open_video(path)) == list(range(12))


def frames_folder(folder, names):
    for number, name in enumerate(names):
        Image.fromarray(numbered_picture(number)).save(folder / name)


def test_20_folder_with_a_frame_of_another_size(tmp_path):
    frames_folder(tmp_path, ["frame1.png", "frame2.png"])
    Image.fromarray(numbered_picture(3, 64, 50)).save(tmp_path / "frame10.png")
    with pytest.raises(VideoReadError, match=r"frame10.png.*64×50.*64×48"):
        open_video(tmp_path)


@pytest.mark.parametrize("content", [b"", b"text", None], ids=["empty", "text", "cut"])
def test_20_folder_with_a_broken_frame(content, tmp_path):
    frames_folder(tmp_path, ["frame1.png", "frame2.png"])
    path = tmp_path / "frame2.png"
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.raises(VideoReadError, match=r"frame2\.png"):
        open_video(tmp_path)


def test_20_folders_that_are_no_clips(tmp_path):
    with pytest.raises(VideoReadError, match="holds no pictures"):
        open_video(tmp_path)
    (tmp_path / ".hidden.png").write_bytes(b"x")
    with pytest.raises(VideoReadError, match="holds no pictures"):
        open_video(tmp_path)
    (tmp_path / "more").mkdir()
    with pytest.raises(VideoReadError, match=r"more.*picture files only"):
        open_video(tmp_path)
    (tmp_path / "more").rmdir()
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(VideoReadError, match=r"pipe\.png.*picture files only"):
        open_video(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "two words.mp4",
        "🐢 [SEG] <image>.mp4",
        'it\'s "quoted".mp4',
        "n" * 251 + ".mp4",
        "%03d.png",
        "concat:a|b",
        "-i.mp4",
    ],
)
def test_21_unusual_names(name, tmp_path):
    path = write_clip(tmp_path / "clip.mp4").rename(tmp_path / name)
    reader = open_video(path)
    assert numbers(reader.read([3])) == [3]
    assert reader.path == str(path)


def test_21_names_that_cannot_exist(tmp_path):
    for path in (tmp_path / "missing.mp4", str(tmp_path) + "/nul\0.mp4", tmp_path / ("x" * 300), "", "\ud800"):
        with pytest.raises(VideoReadError):
            open_video(path)


def test_22_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", "/dev/zero"):
        with pytest.raises(VideoReadError, match="neither a regular file nor a folder"):
            open_video(path)
    (tmp_path / "secret").write_text("root:x:0:0:root:/root:/bin/bash\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(VideoReadError, match="not a video") as caught:
        open_video(tmp_path / "folder" / ".." / "secret")
    assert "root:" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest",
        "https://example.com/a.mp4",
        "file:///etc/passwd",
        "rtsp://host/x",
        "FTP://h/a",
        "s3://b/k",
    ],
)
def test_23_urls_are_refused(url):
    with pytest.raises(VideoReadError, match="URLs are not opened"):
        open_video(url)


@pytest.mark.parametrize(
    "protocol", ["file:{}", "concat:{}", "subfile,,start,0,end,0,,:{}", "cache:{}", "pipe:0", "data:,x"]
)
def test_23_protocols_are_plain_names(protocol, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4")
    with pytest.raises(VideoReadError, match="No such file"):
        open_video(protocol.format(clip))


def playlists(clip):
    yield f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{clip}\n#EXT-X-ENDLIST\n"
    yield f"ffconcat version 1.0\nfile '{clip}'\n"
    yield (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        f'<Representation id="0" bandwidth="1"><BaseURL>{clip}</BaseURL></Representation>'
        "</AdaptationSet></Period></MPD>"
    )
    yield "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"


@pytest.mark.parametrize("suffix", ["mp4", "m3u8", "ffconcat", "mpd", "sdp"])
def test_23_playlists_are_refused(suffix, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4")
    for content in playlists(clip):
        path = tmp_path / f"list.{suffix}"
        path.write_text(content)
        with pytest.raises(VideoReadError, match=r"playlists|not a video"):
            open_video(path)


def test_24_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "frames.zip", "w") as archive:
        archive.writestr("../frame1.png", b"x" * 1000)
    with pytest.raises(VideoReadError, match=r"frames\.zip"):
        open_video(tmp_path / "frames.zip")


PICTURES = np.stack([numbered_picture(number) for number in range(3)])


@pytest.mark.parametrize(
    "frames, message",
    [
        (PICTURES.astype(np.float32), r"0\.\.1.*uint8"),
        (PICTURES / 127.5 - 1, r"-1\.\.|expected 0\.\.1"),
        (PICTURES.astype(np.uint16), "dtype uint16"),
        (PICTURES.astype(np.int64), "dtype int64"),
        (PICTURES > 100, "dtype bool"),
        (np.full((2, 4, 5, 3), np.nan), "NaN"),
        (np.full((2, 4, 5, 3), np.inf), "infinite"),
        (np.zeros((0, 48, 64, 3), dtype=np.uint8), "no frames"),
        (np.zeros((2, 0, 64, 3), dtype=np.uint8), "shape"),
        (PICTURES[..., :1], "expected"),
        (np.zeros((2, 8, 8, 4), dtype=np.uint8), "expected"),
        (PICTURES[0], r"four axes"),
        (PICTURES[None], "shape"),
        (np.zeros((3, 3, 3, 3), dtype=np.uint8), "channel_order="),
        ([], "no frames"),
        ([PICTURES[0], PICTURES[1][:40]], r"frame 1.*64×40.*64×48"),
        ([PICTURES[0], PICTURES[1].transpose(2, 0, 1)], "frame 1"),
        ([PICTURES[0], Image.fromarray(PICTURES[1])], "Image, ndarray"),
        (["a.png", "b.png"], "a list of str"),
        ([Image.fromarray(PICTURES[0]), Image.new("RGB", (9, 9))], "picture 1"),
        ([Image.new("F", (9, 9))], "pixel type 'F'"),
        (torch.full((2, 3, 4, 5), torch.nan), "NaN"),
        (torch.zeros((2, 3, 4, 5), dtype=torch.int32), "dtype int32"),
        (torch.zeros((3, 4, 5)), "shape"),
        (np.array(["a"], dtype=object), "shape"),
        (np.array(5), "shape"),
        (None, "NoneType"),
        (42, "int"),
        ({"video": "a.mp4"}, "dict"),
        (io.StringIO("text"), "text mode"),
    ],
)
def test_28_arrays_and_objects_that_are_no_clips(frames, message):
    with pytest.raises(VideoReadError, match=message):
        open_video(frames)


def test_28_bgr_needs_one_flip():
    bgr = PICTURES[..., ::-1]
    np.testing.assert_array_equal(open_video(bgr[..., ::-1]).read([0, 1, 2]), PICTURES)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"fps": 0}, "positive"),
        ({"fps": float("nan")}, "positive"),
        ({"fps": 25, "timestamps": [0, 1, 2]}, "both"),
        ({"timestamps": [0, 1]}, "one per frame"),
        ({"timestamps": [0, 1, 1]}, "increasing"),
        ({"timestamps": [0, 1, float("inf")]}, "increasing"),
        ({"channel_order": "RGB"}, "channels_last"),
    ],
)
def test_28_clocks_and_layouts_are_checked(arguments, message):
    with pytest.raises(VideoReadError, match=message):
        open_video(PICTURES, **arguments)


def test_28_a_video_keeps_its_own_clock(tmp_path):
    with pytest.raises(VideoReadError, match="its own times"):
        open_video(write_clip(tmp_path / "clip.mp4"), fps=10)


# Case 33 (full disk, no permission) is in tests/processing/test_overlays.py.


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_no_file_stays_open(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip.read_bytes()[:500])
    Image.fromarray(numbered_picture(0)).save(tmp_path / "still.png")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        reader = open_video(clip)
        next(iter(reader))  # a pass left in the middle
        next(reader.frames_reversed())
        reader.read([3])
        open_video(tmp_path / "still.png").read([0])
        for bad in (cut, tmp_path / "missing"):
            with pytest.raises(VideoReadError):
                open_video(bad)
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_file_that_disappears_while_in_use(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", count=20)
    reader = open_video(path)
    path.write_bytes(write_clip(tmp_path / "other.mp4", count=5).read_bytes())
    with pytest.raises(VideoReadError, match="changed while in use"):
        reader.read([15])
    path.unlink()
    with pytest.raises(VideoReadError, match="No such file"):
        reader.read([0])
