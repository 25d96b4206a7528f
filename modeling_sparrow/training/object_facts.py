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
RANK_NAMES = tuple(f"{group}_from_{side}" for group in ("noun", "all") for side in SIDES)
MOST_RANKS = 5  # objects in a clip
UNKNOWN = -1


@dataclass
class ObjectFacts:
    """Facts about the `N` objects of a clip.

    Args:
        events: `(N, E)` float32, 1 if one of `EVENT_NAMES` happens to an object, 0 if not, NaN where that is unclear.
        partner: `(N,)` colour (index) of the one object that it comes to meet, `UNKNOWN` if there is no such object.
        ranks: `(N, R)` place on the first frame, for each of `RANK_NAMES`: among the objects of the same noun or among
            all, counted from one side; `UNKNOWN` where it is too close to call.
    """

    events: np.ndarray
    partner: np.ndarray
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
                met[n].append(colours.index(clip.objects[anchor].colour))
    partner = np.array([set(own).pop() if len(set(own)) == 1 else UNKNOWN for own in met.values()])
    return ObjectFacts(events, partner, ranks_on(clip, 0))


def ranks_on(clip: SyntheticClip, frame: int) -> np.ndarray:
    """Ranks `(N, R)` on a frame, as in [`ObjectFacts`]."""
    facts, objects = Facts(clip), clip.objects
    ranks = np.full((len(objects), len(RANK_NAMES)), UNKNOWN)
    groups = {"all": [tuple(range(len(objects)))]}
    groups["noun"] = [
        tuple(n for n, item in enumerate(objects) if item.noun == noun) for noun in {item.noun for item in objects}
    ]
    for column, name in enumerate(RANK_NAMES):
        group, side = name.split("_from_")
        for ids in groups[group]:
            for rank, n in enumerate(facts.ranked(ids, *SIDES[side], frame=frame) or ()):
                ranks[n, column] = rank
    return ranks
