"""What is true of each object of a clip, beyond doubt or not: read from paths, boxes and visible shares.

Every answer is True, False or None for each object; None where people could disagree. Distances are shares of the
picture's short side.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np

from .config import DIRECTIONS, SPEEDS
from .words import EVENTS, SIDES
from .world import SyntheticClip

POSITION_MARGIN = 10 / 128  # what is closer than this is too ambiguous to be asked about
MOTION_MARGIN = 6 / 128  # a moving object must come this far for its motion to be asked about
FASTEST_RATIO = 1.5  # how much faster than all others the fastest object must be
SEEN_SHARE = 0.3  # share of an object's pixels from which it is seen
HIDDEN_SHARE = 0.03  # share up to which it is hidden
CLEAR_SHARE = 0.6  # share from which it is seen well
CORE = 0.6  # the middle part of a box, along each side, that must overlap for two objects to meet
REST = 0.3  # share of the clip that an object must stand still to have stopped, or not to have started

States = list[bool | None]


class Facts:
    """Facts about one clip of `N` objects and `T` frames."""

    def __init__(self, clip: SyntheticClip):
        self.clip = clip
        config = clip.config
        self.margin = POSITION_MARGIN * config.short_side
        self.reach = MOTION_MARGIN * config.short_side
        self.centres = (clip.full_boxes[..., :2] + clip.full_boxes[..., 2:]) / 2  # (N, T, 2)
        self.seen = clip.visibility >= SEEN_SHARE  # (N, T)
        corner, size = np.minimum(clip.full_boxes[..., 2:], (config.width, config.height)), np.zeros(2)
        inside = np.maximum(corner - np.maximum(clip.full_boxes[..., :2], size), 0).prod(axis=-1)
        self.inside = inside / (clip.full_boxes[..., 2:] - clip.full_boxes[..., :2]).prod(axis=-1)  # share of the box

    @cached_property
    def seen_enough(self) -> list[bool]:
        """Whether each object is seen on at least two frames (or on the only one)."""
        return (self.seen.sum(axis=1) >= min(2, self.clip.config.num_frames)).tolist()

    @cached_property
    def all_at_start(self) -> bool:
        return bool(self.seen[:, 0].all())

    # ------------------------------------------------------------------ motion

    @cached_property
    def _ways(self) -> list[tuple[int, np.ndarray, float]]:
        """Of each object: axis of its motion, its steps along it (T - 1,) px, and the distance that was seen."""
        ways = []
        for n in range(self.clip.num_objects):
            steps = np.diff(self.clip.objects[n].centres, axis=0)
            axis = int(np.abs(steps).sum(axis=0).argmax()) if len(steps) else 0
            places = self.centres[n, self.seen[n], axis]
            ways.append((axis, steps[:, axis], float(np.ptp(places)) if len(places) else 0.0))
        return ways

    @cached_property
    def still(self) -> States:
        states: States = []
        for _, steps, distance in self._ways:
            if not len(steps):
                states.append(None)
            else:
                states.append(True if not steps.any() else False if distance >= self.reach else None)
        return states

    @cached_property
    def moves(self) -> States:
        return [None if still is None else not still for still in self.still]

    def heads(self, direction: str) -> States:
        """Whether each object moves in a direction (left, right, up, down) whenever it moves."""
        x, y = DIRECTIONS[direction]
        states: States = []
        for (axis, steps, _), still, resting in zip(self._ways, self.still, self._rests, strict=True):
            sign = (x, y)[axis]
            if still is None or still:
                states.append(False if still else None)
            elif sign == 0 or (sign * steps <= 0).all():
                states.append(False)
            else:
                states.append(True if (sign * steps >= 0).all() and resting == (False, False) else None)
        return states

    @cached_property
    def _rests(self) -> list[tuple[bool, bool]]:
        """Whether each object stands still for at least a frame at the start, and at the end."""
        return [(bool(len(s)) and s[0] == 0, bool(len(s)) and s[-1] == 0) for _, s, _ in self._ways]

    @cached_property
    def turns(self) -> States:
        """Moves one way and later back, both far enough to be seen."""
        states: States = []
        for n, (axis, steps, _) in enumerate(self._ways):
            if not len(steps):
                states.append(None)
            elif (steps >= 0).all() or (steps <= 0).all():
                states.append(False)
            else:
                states.append(True if self._seen_turning(n, axis) else None)
        return states

    def _seen_turning(self, n: int, axis: int) -> bool:
        places = self.centres[n, self.seen[n], axis]
        if len(places) < 3:
            return False
        for way in (places, -places):
            peak = int(way.argmax())
            if min(way[peak] - way[0], way[peak] - way[-1]) >= self.reach:
                return True
        return False

    @cached_property
    def stops(self) -> States:
        return self._rest_state(at_end=True)

    @cached_property
    def starts(self) -> States:
        return self._rest_state(at_end=False)

    def _rest_state(self, at_end: bool) -> States:
        """Moves, and stands still afterwards (or before), long and visibly enough."""
        states: States = []
        for n, (_, steps, distance) in enumerate(self._ways):
            order = steps[::-1] if at_end else steps
            moving = np.flatnonzero(order)
            if not len(moving):
                states.append(False if len(steps) else None)
                continue
            rest = int(moving[0])  # frames to which the object stands still
            seen = self.seen[n][::-1] if at_end else self.seen[n]
            if rest == 0:
                states.append(False)
            else:
                long = rest >= max(2, REST * len(steps))
                states.append(True if long and distance >= self.reach and seen[: rest + 1].all() else None)
        return states

    def speed(self, name: str) -> States:
        """Whether each object is slow or fast; None if it also rests."""
        config = self.clip.config
        lowest, highest = (limit * config.short_side / config.frames_per_second for limit in SPEEDS[name])
        states: States = []
        for thing, moves, resting in zip(self.clip.objects, self.moves, self._rests, strict=True):
            if not moves:
                states.append(moves)
            elif any(resting):
                states.append(None)
            else:
                states.append(bool(0.99 * lowest <= thing.speed <= 1.01 * highest))
        return states

    def fastest(self, ids: tuple[int, ...], sign: int = 1) -> int | None:
        """The fastest of the objects (the slowest with ``sign`` -1), if it is so by far and all move all the time."""
        if any(any(self._rests[i]) and self.moves[i] is not False for i in ids):
            return None
        if sign < 0 and not all(self.moves[i] for i in ids):
            return None
        speeds = sorted(((self.clip.objects[i].speed, i) for i in ids), reverse=sign > 0)
        (first, n), (second, _) = speeds[:2]
        apart = min(first, second) > 0 and max(first, second) >= FASTEST_RATIO * min(first, second)
        return n if apart and self.moves[n] else None

    # ------------------------------------------------------------------ presence

    @cached_property
    def enters(self) -> States:
        """Outside the picture on the first frame, seen later."""
        return self._absence(0)

    @cached_property
    def leaves(self) -> States:
        """Seen first, outside the picture on the last frame."""
        return self._absence(-1)

    def _absence(self, frame: int) -> States:
        states: States = []
        for n in range(self.clip.num_objects):
            if self.inside[n, frame] == 0:
                states.append(bool(self.seen[n].sum() >= 2) or None)
            else:
                here = self.seen[n, frame] and self.inside[n, frame] >= CLEAR_SHARE
                states.append(False if here else None)
        return states

    @cached_property
    def hidden(self) -> States:
        """Hidden for at least one frame while inside the picture, seen well before and after."""
        return [self._hidden(n, np.ones(self.clip.config.num_frames, bool)) for n in range(self.clip.num_objects)]

    @cached_property
    def behind_bar(self) -> States:
        """Hidden by the bar for a while; None for all objects if there is no bar."""
        bar = self.clip.bar
        if bar is None:
            return [None] * self.clip.num_objects
        states: States = []
        for n, box in enumerate(self.clip.full_boxes):
            low, high = box[:, bar.axis], box[:, bar.axis + 2]
            covered = (low >= bar.start - 1) & (high <= bar.stop + 1)
            touches = (low < bar.stop) & (high > bar.start)
            states.append((self._hidden(n, covered) or None) if touches.any() else False)
        return states

    def _hidden(self, n: int, where: np.ndarray) -> bool | None:
        share = self.clip.visibility[n]
        hidden = np.flatnonzero((share <= HIDDEN_SHARE) & (self.inside[n] >= 0.99) & where)
        clear = np.flatnonzero(share >= CLEAR_SHARE)
        if len(clear) and ((clear[0] < hidden) & (hidden < clear[-1])).any():
            return True
        covered = share < CLEAR_SHARE * self.inside[n]
        return None if (covered & (self.inside[n] > 0)).any() else False

    def events(self) -> dict[str, States]:
        """For each of ``EVENTS`` the objects to which it happens; none in a still picture."""
        if self.clip.config.num_frames == 1:
            return {}
        states = {name: getattr(self, name) for name in EVENTS if not name.startswith("ends_")}
        if self.clip.bar is None:
            del states["behind_bar"]
        return states | {f"ends_{side}": self.lies(*where, frame=-1) for side, where in SIDES.items()}

    # ------------------------------------------------------------------ places

    def lies(self, axis: int, sign: int, frame: int, anchor: int | None = None) -> States:
        """Whether each object lies on one side of the anchor by the margin, or in that third of the picture.

        Objects that are not seen on the frame are nowhere: None.
        """
        config = self.clip.config
        states: States = []
        for n in range(self.clip.num_objects):
            place = float(self.centres[n, frame, axis])
            if anchor is not None:
                distance, margin = sign * (place - float(self.centres[anchor, frame, axis])), self.margin
            else:
                side = (config.width, config.height)[axis]
                distance, margin = sign * (place - side / 2), side / 6
            clear = True if distance >= margin else False if distance <= 0 else None
            states.append(clear if self.seen[n, frame] else None)
        return states

    def ranked(self, ids: tuple[int, ...], axis: int, sign: int, frame: int) -> list[int] | None:
        """Objects from one side to the other (sign -1: from the left or the top), if all are seen on that frame and
        no two lie closer together than the margin."""
        if not self.seen[list(ids), frame].all():
            return None
        order = sorted(ids, key=lambda i: -sign * self.centres[i, frame, axis])
        places = self.centres[order, frame, axis]
        return order if (np.abs(np.diff(places)) >= self.margin).all() else None

    def outermost(self, ids: tuple[int, ...], axis: int, sign: int, frame: int) -> int | None:
        """The object farthest to one side, by the margin, if all are seen on that frame."""
        if not self.seen[list(ids), frame].all():
            return None
        places = sorted(((sign * float(self.centres[i, frame, axis]), i) for i in ids), reverse=True)
        (first, n), (second, _) = places[:2]
        return n if first - second >= self.margin else None

    def nearest(self, anchor: int, ids: tuple[int, ...]) -> int | None:
        """The object of ``ids`` whose centre is nearest to the anchor's at the start, by the margin."""
        x, y = self.centres[anchor, 0]
        ranked = sorted((math.hypot(self.centres[i, 0, 0] - x, self.centres[i, 0, 1] - y), i) for i in ids)
        return ranked[0][1] if ranked[1][0] - ranked[0][0] >= self.margin else None

    def meets(self, anchor: int, side: str) -> States:
        """Whether each object comes to lie over the anchor ("front"), under it ("behind") or either ("any").

        They must be apart on the first frame, and the object must move.
        """
        states: States = []
        for n in range(self.clip.num_objects):
            met, touched = self._meeting(n, anchor)
            in_front = n > anchor
            wanted = side == "any" or (side == "front") == in_front
            states.append((bool(met and self.moves[n]) or None) if touched and wanted else False)
        return states

    def _meeting(self, n: int, anchor: int) -> tuple[bool, bool]:
        """Whether two objects clearly meet, and whether their boxes ever touch."""
        if n == anchor:
            return False, False
        boxes = self.clip.full_boxes
        touch = _overlap(boxes[n], boxes[anchor])
        core = _overlap(_core(boxes[n]), _core(boxes[anchor]))
        front = max(n, anchor)
        core &= (self.clip.visibility[front] >= CLEAR_SHARE) & (self.inside[min(n, anchor)] >= CLEAR_SHARE)
        return bool(core.any() and not touch[0]), bool(touch.any())


def _overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(T,) bool: boxes xyxy (T, 4) share some area."""
    return (np.minimum(one[:, 2:], other[:, 2:]) > np.maximum(one[:, :2], other[:, :2])).all(axis=1)


def _core(boxes: np.ndarray) -> np.ndarray:
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, CORE * (boxes[:, 2:] - boxes[:, :2]) / 2
    return np.concatenate([centre - half, centre + half], axis=1)
