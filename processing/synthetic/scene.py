"""What happens in a generated clip: which objects there are, where they go, what hides them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from .config import DIRECTIONS, HELD_OUT_PAIRS, SIZES, SPEEDS, WorldConfig

_Item = TypeVar("_Item")
_PLACEMENTS = 8  # random positions tried before the least crowded one is taken
_OPPOSITE = {0: ("right", "left"), 1: ("down", "up")}  # by axis: 0 is x, 1 is y
_STILL_TARGET = 0.35  # share of crossings in which one object waits for the other


@dataclass
class SyntheticObject:
    """What can be said about one object. Lengths in pixels.

    Attributes:
        noun, colour, size: words, see ``WorldConfig``.
        direction: one of ``DIRECTIONS``; where the object moves before it first turns.
        speed: pixels per frame while it moves, 0 for still objects.
        length: longest side of the shape before its slight rotation.
        action: "straight", "turn", "stop" or "start": what a moving object does on its way.
        action_at: share of the clip after which it turns, stops or starts.
        bounces: whether it turns at a wall within the clip.
        centres: (T, 2) float, x and y of the centre, y down.
    """

    noun: str
    colour: str
    size: str
    direction: str
    speed: float
    length: int
    action: str = "straight"
    action_at: float = 0.0
    bounces: bool = False
    centres: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)), repr=False)

    @property
    def velocity(self) -> tuple[float, float]:
        """Pixels per frame along x and y, before the first turn."""
        x, y = DIRECTIONS[self.direction]
        return x * self.speed, y * self.speed

    @property
    def axis(self) -> int:
        """The axis along which a moving object moves: 0 is x, 1 is y."""
        return 0 if self.direction in ("left", "right") else 1

    def progress(self, num_frames: int) -> np.ndarray:
        """(T,) distance from the start on each frame, in steps of ``speed``, if no wall is in the way."""
        times = np.arange(num_frames, dtype=float)
        change = round(self.action_at * (num_frames - 1))
        if self.action == "turn":
            return np.minimum(times, 2 * change - times)
        if self.action == "stop":
            return np.minimum(times, change)
        return np.maximum(times - change, 0) if self.action == "start" else times


@dataclass(frozen=True)
class Bar:
    """A bar across the whole picture, in front of all objects. Along ``axis`` (0 is x) it covers start..stop."""

    axis: int
    start: int
    stop: int


def plan_scene(rng: np.random.Generator, config: WorldConfig) -> tuple[list[SyntheticObject], Bar | None]:
    """Choose the objects, from back to front, with their paths, and perhaps a bar that hides one for a while."""
    objects = _choose_objects(rng, config)
    free = list(objects)
    if rng.random() < config.crossing:
        _place_crossing(rng, free.pop(0), free.pop(0), config)
    if rng.random() < config.late_entry and free:
        _place_at_edge(rng, free.pop(), config, enters=True)
    if rng.random() < config.leaving and free:
        _place_at_edge(rng, free.pop(), config, enters=False)
    placed = [thing for thing in objects if len(thing.centres)]
    for thing in free:
        _place_freely(rng, thing, placed, config)
        placed.append(thing)
    bar = _choose_bar(rng, objects, config) if rng.random() < config.occluder else None
    return [objects[i] for i in rng.permutation(len(objects))], bar


def _pick(rng: np.random.Generator, options: Sequence[_Item]) -> _Item:
    return options[int(rng.random() * len(options))]  # much faster than rng.choice


def _choose_objects(rng: np.random.Generator, config: WorldConfig) -> list[SyntheticObject]:
    objects = []
    for noun, colour in _choose_pairs(rng, config):
        size = _pick(rng, config.sizes)
        length = round(rng.uniform(*SIZES[size]) * config.short_side)
        thing = SyntheticObject(noun, colour, size, "still", 0.0, length)
        if rng.random() >= config.still:
            thing.direction = _pick(rng, ("left", "right", "up", "down"))
            _choose_action(rng, thing, config)
        objects.append(thing)
    return objects


def _choose_action(rng: np.random.Generator, thing: SyntheticObject, config: WorldConfig) -> None:
    """What a moving object does on its way, and how fast it is."""
    draw = rng.random()
    for action in ("turn", "stop", "start"):
        draw -= getattr(config, action)
        if draw < 0:
            thing.action, thing.action_at = action, rng.uniform(0.35, 0.65)
            thing.speed = _choose_speed(rng, config, "fast")  # slow ones would not come far enough to be seen moving
            return
    thing.speed = _choose_speed(rng, config)


def _choose_pairs(rng: np.random.Generator, config: WorldConfig) -> list[tuple[str, str]]:
    """(noun, colour) of each object, with distractors that share the noun or the colour of an earlier object."""
    count = int(rng.integers(config.min_objects, config.max_objects + 1))
    pairs: list[tuple[str, str]] = []
    if config.new_pairs:
        noun, colour = _pick(rng, config.unseen_pairs)
        same_noun = [pair for pair in config.known_pairs if pair[0] == noun]
        same_colour = [pair for pair in config.known_pairs if pair[1] == colour]
        pairs = [(noun, colour)] + [_pick(rng, options) for options in (same_noun, same_colour) if options]
    while len(pairs) < count:
        noun, colour = _pick(rng, config.nouns), _pick(rng, config.colours)
        if pairs and ((config.always_same_noun and len(pairs) == 1) or rng.random() < config.same_noun):
            noun = _pick(rng, pairs)[0]
        if pairs and rng.random() < config.same_colour:
            colour = _pick(rng, pairs)[1]
        if (noun, colour) not in HELD_OUT_PAIRS:
            pairs.append((noun, colour))
    return pairs


def _choose_speed(rng: np.random.Generator, config: WorldConfig, name: str | None = None) -> float:
    """Pixels per frame."""
    lowest, highest = SPEEDS[name or _pick(rng, ("slow", "fast"))]
    return rng.uniform(lowest, highest) * config.short_side / config.frames_per_second


def _side(axis: int, config: WorldConfig) -> int:
    return (config.width, config.height)[axis]


def _room(thing: SyntheticObject, axis: int, config: WorldConfig) -> tuple[float, float]:
    """Lowest and highest centre along one axis at which the object is inside the picture."""
    return thing.length / 2, _side(axis, config) - thing.length / 2


def _follow(thing: SyntheticObject, start: tuple[float, float], config: WorldConfig, through: bool = False) -> None:
    """Fill in the path from ``start`` (x, y), turning at the walls if the config says so.

    The wall that lies behind the object at the start does not hold it back, so that it can enter from outside.

    Args:
        through: no wall holds the object: it leaves the picture.
    """
    thing.centres = np.empty((config.num_frames, 2))
    thing.centres[:] = start
    if not thing.speed:
        return
    axis = thing.axis
    sign = np.sign(thing.velocity[axis])
    lowest, highest = _room(thing, axis, config)
    behind = start[axis] - lowest if sign > 0 else highest - start[axis]  # distance from the wall behind
    gone = behind + thing.speed * thing.progress(config.num_frames)
    span = highest - lowest
    if config.bounce and not through and (gone.max() > span or gone.min() < min(behind, 0)):
        thing.bounces = True
        outside = (gone > span) | (gone < min(behind, 0))
        gone = np.where(outside, span - np.abs(gone % (2 * span) - span), gone)
    thing.centres[:, axis] = lowest + gone if sign > 0 else highest - gone


def _place_freely(
    rng: np.random.Generator, thing: SyntheticObject, placed: list[SyntheticObject], config: WorldConfig
) -> None:
    """Start where the object stays in view, if the clip is short enough, and away from others on the first frame."""
    ranges = []
    progress = thing.progress(config.num_frames)
    for axis, step in enumerate(thing.velocity):
        lowest, highest = _room(thing, axis, config)
        travel = step * progress
        room = (lowest - travel.min(), highest - travel.max())
        fits = room[0] <= room[1]  # a longer path turns at a wall wherever it starts
        ranges.append(room if fits else (lowest, highest))
    (left, right), (top, bottom) = ranges
    others = [(*other.centres[0].tolist(), (thing.length + other.length) / 2) for other in placed]
    best, widest = None, -np.inf
    for u, v in rng.random((_PLACEMENTS, 2)).tolist():
        x, y = left + u * (right - left), top + v * (bottom - top)
        gap = min((max(abs(x - a), abs(y - b)) - apart for a, b, apart in others), default=1.0)
        if gap > widest:
            best, widest = (x, y), gap
        if gap > 0:
            break
    _follow(thing, best, config)


def _place_crossing(
    rng: np.random.Generator, one: SyntheticObject, other: SyntheticObject, config: WorldConfig
) -> None:
    """Let two objects come from opposite sides, or one come to another that waits, and overlap in mid-clip."""
    axis = int(rng.integers(2))
    side = _side(axis, config)
    one.direction, other.direction = _OPPOSITE[axis]
    one.action = other.action = "straight"
    half = max(one.length, other.length) / 2
    # slow ones would still overlap at the start
    one.speed, other.speed = _choose_speed(rng, config, "fast"), _choose_speed(rng, config, "fast")
    if rng.random() < _STILL_TARGET:
        other.direction, other.speed = "still", 0.0
    # Frames for which both stay in view, if they start at the walls: a long clip only begins with the crossing.
    last = min(config.num_frames - 1, (side - 2 * half) / max(one.speed, other.speed))
    apart = (one.length + other.length) / 2 / (one.speed + other.speed)  # frames until they touch, if centres meet
    meeting = min(max(rng.uniform(0.35, 0.65) * last, 1.1 * apart), last)
    lowest = half + max(one.speed * meeting, other.speed * (last - meeting))
    highest = side - half - max(other.speed * meeting, one.speed * (last - meeting))
    place = rng.uniform(lowest, highest) if lowest < highest else (lowest + highest) / 2
    bigger = one if one.length > other.length else other
    across = rng.uniform(*_room(bigger, 1 - axis, config))
    for thing, sign in ((one, -1), (other, 1)):
        along = place + sign * thing.speed * meeting
        low, high = _room(thing, 1 - axis, config)
        beside = min(max(across + rng.uniform(-0.12, 0.12) * half, low), high)
        _follow(thing, (along, beside) if axis == 0 else (beside, along), config)


def _place_at_edge(rng: np.random.Generator, thing: SyntheticObject, config: WorldConfig, enters: bool) -> None:
    """Let an object enter through a side of the picture after the first frame, or leave before the last one."""
    thing.direction, thing.speed = _pick(rng, ("left", "right", "up", "down")), _choose_speed(rng, config, "fast")
    thing.action = "straight"
    side = _side(thing.axis, config)
    last = config.num_frames - 1
    if enters:
        along = -thing.length / 2 - thing.speed * rng.uniform(0.15, 0.45) * last
    else:
        # The object is wholly outside this share of the clip before its end; from inside at the start.
        frames_left = rng.uniform(0.1, 0.35) * last
        along = side + thing.length / 2 + thing.speed * (frames_left - last)
        along = max(along, thing.length / 2)
    forwards = thing.direction in ("right", "down")
    start = [rng.uniform(*_room(thing, axis, config)) for axis in (0, 1)]
    start[thing.axis] = along if forwards else side - along
    _follow(thing, tuple(start), config, through=not enters)


def _choose_bar(rng: np.random.Generator, objects: list[SyntheticObject], config: WorldConfig) -> Bar | None:
    """A bar that an object passes behind, seen before and after, and that does not hide others most of the time."""
    moving = [thing for thing in objects if thing.speed]
    for index in np.tile(rng.permutation(len(moving)), 4):  # large objects rarely fit at the first time of hiding
        thing = moving[index]
        hidden_at = round(rng.uniform(0.35, 0.65) * (config.num_frames - 1))
        middle, width = thing.centres[hidden_at, thing.axis], thing.length * rng.uniform(0.8, 1.2)
        bar = Bar(
            thing.axis, max(0, round(middle - width / 2)), min(_side(thing.axis, config), round(middle + width / 2))
        )
        clear = _clear_of(thing, bar, config)
        passes = clear[:hidden_at].any() and clear[hidden_at:].any()
        if passes and all(_clear_of(other, bar, config).mean() >= 1 / 3 for other in objects):
            return bar
    return None


def _clear_of(thing: SyntheticObject, bar: Bar, config: WorldConfig) -> np.ndarray:
    """In which frames (T,) bool the centre of an object is in the picture and beside the bar."""
    x, y = thing.centres.T
    along = thing.centres[:, bar.axis]
    inside = (x > 0) & (x < config.width) & (y > 0) & (y < config.height)
    return inside & ((along < bar.start) | (along > bar.stop))
