"""What is true of each object of a generated clip, as numbers for throw-away heads: events, meetings, ranks.

A small model does not learn from answers alone what happens to an object: the tokens of its towers, and what the
language model makes of them, are asked for it directly.
"""

from dataclasses import dataclass

import numpy as np

from sparrow_processing.synthetic import SyntheticClip
from sparrow_processing.synthetic.facts import Facts
from sparrow_processing.synthetic.words import EVENTS, SIDES

EVENT_NAMES = (*EVENTS, "meets_front", "meets_behind")
RANK_NAMES = tuple(f"{group}_from_{side}" for group in ("noun", "colour", "all") for side in SIDES)
MOST_RANKS = 5  # objects in a clip
UNKNOWN = -1


@dataclass
class ObjectFacts:
    """Facts about the `N` objects of a clip.

    Args:
        events: `(N, E)` float32, 1 if one of `EVENT_NAMES` happens to an object, 0 if not, NaN where that is unclear.
        partner: `(N,)` colour (index) of the one object that it comes to meet, `UNKNOWN` if there is no such object.
        partner_box: `(N, 4)` float32, where that object is on the first frame, normalised cxcywh; NaN if there is no
            such object or it is hidden there.
        ranks: `(N, R)` place on the first frame, for each of `RANK_NAMES`: among the objects of the same noun, of the
            same colour or among all, counted from one side; `UNKNOWN` where it is too close to call.
    """

    events: np.ndarray
    partner: np.ndarray
    partner_box: np.ndarray
    ranks: np.ndarray


def object_facts(clip: SyntheticClip, colours: tuple[str, ...]) -> ObjectFacts:
    """Facts about the objects of a whole clip, not of the frames that the language model sees of it."""
    facts, N = Facts(clip), clip.num_objects
    events = np.zeros((N, len(EVENT_NAMES)), np.float32)  # without a bar nothing goes behind it
    for name, states in facts.events().items():
        events[:, EVENT_NAMES.index(name)] = [np.nan if state is None else state for state in states]
    met = {n: [] for n in range(N)}
    for anchor in range(N):
        for n, state in enumerate(facts.meets(anchor, "any")):
            side = EVENT_NAMES.index("meets_front" if n > anchor else "meets_behind")
            if state is None and not events[n, side] > 0:
                events[n, side] = np.nan
            if state:
                events[n, side] = 1
                met[n].append(anchor)
    partner = np.full(N, UNKNOWN)
    partner_box = np.full((N, 4), np.nan, np.float32)
    places = normalized_boxes(clip, 0)
    for n, anchors in met.items():
        said = {clip.objects[anchor].colour for anchor in anchors}
        if len(said) == 1:
            partner[n] = colours.index(said.pop())
        if len(anchors) == 1:
            partner_box[n] = places[anchors[0]]
    return ObjectFacts(events, partner, partner_box, _ranks(facts))


def normalized_boxes(clip: SyntheticClip, t: int) -> np.ndarray:
    """Boxes `(N, 4)` of the objects on frame `t`, normalised cxcywh, NaN where hidden."""
    H, W = clip.frames.shape[1:3]
    corners = clip.boxes[:, t] / np.array([W, H, W, H], np.float32)
    return np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)


def _ranks(facts: Facts) -> np.ndarray:
    objects = facts.clip.objects
    ranks = np.full((len(objects), len(RANK_NAMES)), UNKNOWN)
    groups = {"all": [tuple(range(len(objects)))]}
    for group in ("noun", "colour"):
        said = [getattr(item, group) for item in objects]
        groups[group] = [tuple(n for n, word in enumerate(said) if word == same) for same in set(said)]
    for column, name in enumerate(RANK_NAMES):
        group, side = name.split("_from_")
        for ids in groups[group]:
            for rank, n in enumerate(facts.ranked(ids, *SIDES[side], frame=0) or ()):
                ranks[n, column] = rank
    return ranks
