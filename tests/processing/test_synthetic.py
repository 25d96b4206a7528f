"""The generated referring-video world: pixels, masks, boxes, questions and splits."""

import hashlib
import re
import time
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from sparrow_processing.synthetic import (
    COLOURS,
    HELD_OUT_PAIRS,
    PRESETS,
    SINGLE_TARGET_KINDS,
    SPLITS,
    SyntheticVideos,
    WorldConfig,
    all_expressions,
    generate_clip,
    render_contact_sheet,
    split_seed,
)
from sparrow_processing.synthetic.backgrounds import _drawing, _photograph, noise_bank
from sparrow_processing.synthetic.emoji import EMOJI
from sparrow_processing.synthetic.sprites import rasterise


def content_hash(clip):
    digest = hashlib.sha256(clip.frames.tobytes())
    digest.update(clip.full_boxes.tobytes())
    digest.update(repr(clip.objects).encode())
    return digest.hexdigest()


def centres(clip):
    """(N, T, 2)"""
    return (clip.full_boxes[..., :2] + clip.full_boxes[..., 2:]) / 2


@pytest.mark.parametrize("preset", PRESETS)
def test_clips_follow_from_seed_and_config(preset):
    config = PRESETS[preset]
    first = [content_hash(generate_clip(seed, config)) for seed in range(6)]
    for cached in (rasterise, _drawing, _photograph, noise_bank):
        cached.cache_clear()
    again = [content_hash(generate_clip(seed, config)) for seed in reversed(range(6))][::-1]
    assert first == again
    assert len(set(first)) == 6
    questions = [all_expressions(generate_clip(2, config), np.random.default_rng(4)) for _ in range(2)]
    assert questions[0] == questions[1]


@pytest.mark.parametrize(
    "config",
    [
        PRESETS["easy"],
        PRESETS["hard"],
        WorldConfig(height=97, width=151, num_frames=5),
        WorldConfig(height=48, width=200, num_frames=12, max_objects=6),
        WorldConfig(height=240, width=64, num_frames=3, bounce=False),
        replace(PRESETS["hard"], height=75, width=75, num_frames=8),
    ],
)
def test_masks_and_boxes_agree(config):
    for seed in range(12):
        clip = generate_clip(seed, config)
        shape = (clip.num_objects, config.num_frames)
        assert clip.frames.shape == (config.num_frames, config.height, config.width, 3)
        assert clip.masks.shape == (*shape, config.height, config.width)
        assert clip.boxes.shape == clip.full_boxes.shape == (*shape, 4)
        assert (clip.frames.dtype, clip.masks.dtype, clip.boxes.dtype) == (np.uint8, np.bool_, np.float32)
        assert clip.masks.sum(axis=0).max() <= 1  # visible parts do not overlap
        for n in range(clip.num_objects):
            for t in range(config.num_frames):
                y, x = np.nonzero(clip.masks[n, t])
                if not len(y):
                    assert np.isnan(clip.boxes[n, t]).all()
                    assert clip.visibility[n, t] == 0
                    continue
                tight = (x.min(), y.min(), x.max() + 1, y.max() + 1)
                assert tuple(clip.boxes[n, t]) == tight
                full = clip.full_boxes[n, t]
                assert (full[:2] <= tight[:2]).all()
                assert (full[2:] >= tight[2:]).all()
                if clip.visibility[n, t] == 1:
                    assert (full == tight).all()


def test_masks_cover_pixels_of_the_named_colour():
    palette = np.array(list(COLOURS.values()))
    seen, right = Counter(), []
    for seed in range(120):
        clip = generate_clip(seed, WorldConfig(num_frames=2, edge=0.0))
        for n, thing in enumerate(clip.objects):
            if clip.visibility[n, 0] > 0.5:
                pixel = np.median(clip.frames[0][clip.masks[n, 0]], axis=0)
                nearest = int(np.abs(palette - pixel).sum(axis=1).argmin())
                right.append(list(COLOURS)[nearest] == thing.colour)
                assert right[-1] or thing.noun in EMOJI
                seen[thing.colour] += 1
    assert set(seen) == set(COLOURS)
    assert np.mean(right) > 0.985  # a small emoji may be half shadow


def test_light_and_noise_do_not_overflow():
    for seed in range(40):
        frames = generate_clip(seed, PRESETS["hard"]).frames.astype(int)
        # Nothing is drawn outside 20..235, light adds up to 6 and noise up to 10: a value beyond has wrapped around.
        assert frames.min() >= 4
        assert frames.max() <= 251


def test_sizes_and_speeds_scale_with_the_picture():
    small, big = WorldConfig(), WorldConfig(height=256, width=320)
    for seed in range(20):
        objects = zip(generate_clip(seed, small).objects, generate_clip(seed, big).objects, strict=True)
        for one, two in objects:
            assert two.length == pytest.approx(2 * one.length, abs=1)
            assert two.speed == pytest.approx(2 * one.speed)
            low, high = {"small": (23, 28), "large": (37, 46)}[one.size]
            assert low <= one.length <= high
            assert one.speed == 0 or 1.5 <= one.speed <= 2.5 or 4 <= one.speed <= 6


def test_speeds_are_per_second():
    for seed in range(10):
        slow, double = generate_clip(seed, WorldConfig()), generate_clip(seed, WorldConfig(frames_per_second=16))
        assert [thing.speed / 2 for thing in slow.objects] == pytest.approx([thing.speed for thing in double.objects])


def test_short_clips_stay_in_view_and_apart_at_the_start():
    for seed in range(60):
        clip = generate_clip(seed, PRESETS["easy"])
        assert not any(thing.bounces for thing in clip.objects)
        assert (clip.visibility[:, 0] > 0.3).all()
        centre = centres(clip)
        assert (centre > 0).all()
        assert (centre < 128).all()


def test_long_clips_bounce_and_need_little_memory():
    config = WorldConfig(num_frames=300, height=96, width=96, still=0.0)
    generate_clip(4, config)  # fills the caches
    tracemalloc.start()
    clip = generate_clip(4, config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(thing.bounces for thing in clip.objects)
    centre = centres(clip)
    assert (centre >= 6).all()
    assert (centre <= 90).all()
    assert np.abs(np.diff(centre, axis=1)).max() <= 6  # no jumps
    assert peak < 1.2 * (clip.frames.nbytes + clip.masks.nbytes)


def test_objects_can_leave_when_they_may_not_bounce():
    clip = generate_clip(4, WorldConfig(num_frames=200, still=0.0, bounce=False))
    assert (clip.visibility[:, -1] == 0).all()
    assert np.isnan(clip.boxes[:, -1]).all()


def test_crossing_objects_share_their_noun_and_overlap_later():
    config = replace(PRESETS["hard"], crossing=1.0, late_entry=0.0, occluder=0.0)
    for seed in range(40):
        clip = generate_clip(seed, config)
        boxes = clip.full_boxes

        def overlap(i, j, t, boxes=boxes):
            low, high = np.maximum(boxes[i, t, :2], boxes[j, t, :2]), np.minimum(boxes[i, t, 2:], boxes[j, t, 2:])
            return (high > low).all()

        assert any(
            clip.objects[i].noun == clip.objects[j].noun
            and not overlap(i, j, 0)
            and any(overlap(i, j, t) for t in range(config.num_frames))
            for i in range(clip.num_objects)
            for j in range(i)
        ), seed


def test_late_objects_are_absent_first_and_seen_later():
    config = replace(PRESETS["hard"], crossing=0.0, late_entry=1.0, occluder=0.0)
    for seed in range(40):
        clip = generate_clip(seed, config)
        late = np.flatnonzero(clip.visibility[:, 0] == 0)
        assert len(late) == 1
        assert clip.visibility[late[0]].max() > 0.4
        for item in all_expressions(clip, np.random.default_rng(0)):  # these speak of the first frame
            assert late[0] not in item.target_ids or item.kind not in ("position", "ordinal", "relation")


def test_occluders_hide_objects_for_a_while():
    config = replace(PRESETS["hard"], crossing=0.0, late_entry=0.0, occluder=1.0)
    hidden = 0
    for seed in range(40):
        for row in generate_clip(seed, config).visibility:
            lowest = int(row.argmin())
            if row[lowest] < 0.3 and row[:lowest].max(initial=0) > 0.5 and row[lowest:].max() > 0.5:
                hidden += 1
                break
    assert hidden >= 20


def test_hard_clips_always_have_distractors_of_the_same_class():
    for seed in range(60):
        nouns = [thing.noun for thing in generate_clip(seed, PRESETS["hard"]).objects]
        assert len(set(nouns)) < len(nouns)


def test_split_seeds_differ():
    seeds = [
        split_seed(split, index, stream, attempt)
        for split in SPLITS
        for index in (0, 1, 255, 256, 2**32 - 1)
        for stream in (0, 1, 65535)
        for attempt in (0, 1, 255)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_splits_share_no_clip_and_hide_held_out_pairs():
    hashes = set()
    config = replace(PRESETS["easy"], num_frames=2)
    for split in SPLITS:
        pairs = Counter()
        videos = SyntheticVideos(split, config)
        for index in range(120):
            clip = generate_clip(split_seed(split, index), videos.config)
            hashes.add(content_hash(clip))
            pairs.update((thing.noun, thing.colour) for thing in clip.objects)
        shown = set(HELD_OUT_PAIRS) & set(pairs)
        assert shown == (set(HELD_OUT_PAIRS) if split == "test-new-words" else set())
    assert len(hashes) == 120 * len(SPLITS)


def test_new_words_need_both_words():
    videos = SyntheticVideos("test-new-words")
    for index in range(40):
        record = videos[index]
        (target,) = record["target_ids"]
        thing = record["objects"][target]
        assert (thing.noun, thing.colour) in HELD_OUT_PAIRS
        assert {thing.noun, thing.colour} <= set(record["expression"].split())
        others = record["objects"][:target] + record["objects"][target + 1 :]
        assert any(other.noun == thing.noun for other in others)
        assert any(other.colour == thing.colour for other in others)


def test_easy_test_is_balanced_and_hard_to_guess():
    videos = SyntheticVideos("test-easy", replace(PRESETS["easy"], num_frames=4))
    records = [videos[index] for index in range(500)]
    assert np.mean([1 / record["candidates"] for record in records]) <= 0.40
    counts = Counter(record["kind"] for record in records)
    assert set(counts) == set(SINGLE_TARGET_KINDS)
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("split", SPLITS)
def test_records_are_complete_and_repeatable(split):
    videos = SyntheticVideos(split, size=20, seed=3)
    assert len(videos) == 20
    one, again = videos[11], SyntheticVideos(split, size=20, seed=3)[11]
    assert one["id"] == again["id"] == f"{split}-000011"
    assert one["expression"] == again["expression"]
    assert (one["frames"] == again["frames"]).all()
    assert one["expression"] in [item.text for item in one["expressions"]]
    assert one["candidates"] == len(one["objects"]) == len(one["masks"]) == len(one["boxes"])
    other = SyntheticVideos(split, size=20, seed=4)[11]
    assert not np.array_equal(one["frames"], other["frames"])
    with pytest.raises(IndexError, match="record 20 of 20"):
        videos[20]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 40}, "48 × 48"),
        ({"num_frames": 0}, "num_frames"),
        ({"min_objects": 5}, "max_objects"),
        ({"min_objects": 1, "crossing": 0.5}, "2 <= min_objects"),
        ({"still": 1.5}, "still is a probability"),
        ({"nouns": ("circle", "cube")}, "nouns must be some of"),
        ({"kinds": ()}, "kinds must be some of"),
        ({"nouns": ("circle",), "colours": ("purple",)}, "no pair"),
    ],
)
def test_config_errors(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WorldConfig(**settings)


def test_split_errors():
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        SyntheticVideos("dev")
    with pytest.raises(ValueError, match="out of range"):
        SyntheticVideos("train", seed=2**16)
    with pytest.raises(ValueError, match="HELD_OUT_PAIRS"):
        SyntheticVideos("train", WorldConfig(new_pairs=True, min_objects=3))
    with pytest.raises(RuntimeError, match="kind 'relation'"):
        SyntheticVideos("train", WorldConfig(num_frames=1, min_objects=1, max_objects=1, kinds=("relation",)))[0]


def test_contact_sheet_shows_frames_and_outlines():
    clip = generate_clip(0, WorldConfig(num_frames=3, height=100, width=160))
    sheet = render_contact_sheet(clip, all_expressions(clip, np.random.default_rng(0))[:5])
    assert sheet.mode == "RGB"
    assert sheet.width == 3 * 320
    assert sheet.height > 2 * 200
    pixels = np.array(sheet)
    assert (pixels[:200:2, :320:2] == clip.frames[0]).all()
    assert (pixels[200:400, :320] == (255, 0, 255)).all(axis=-1).any()  # outline of object 0


def test_generation_is_fast():
    config = PRESETS["easy"]
    for seed in range(150):
        generate_clip(seed, config)  # fills the caches
    best = np.inf
    for start in (0, 50, 100):
        before = time.process_time()
        for seed in range(start, start + 50):
            generate_clip(seed, config)
        best = min(best, (time.process_time() - before) / 50)
    assert best < 0.012  # seconds; about 0.002 on an idle core
