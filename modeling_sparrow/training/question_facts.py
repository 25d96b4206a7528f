"""What a question about a generated clip asks for, as numbers for throw-away heads.

What looks for the target in the visual tokens has to know the words of the question, and of a question with an anchor
("the ring nearest to the red star") the anchor's looks and place. A small model does not learn this from answers
alone.
"""

import torch
import torch.nn.functional as F
from torch import nn

from sparrow_processing.synthetic import SyntheticClip
from sparrow_processing.synthetic.words import EVENTS, MEETINGS, ORDINALS, RELATIONS, SIDES, SYNONYMS

from ..box_ops import xyxy_to_cxcywh
from .object_facts import EVENT_NAMES, UNKNOWN
from .packed_questions import WELL_SEEN, Question
from .pretrain_towers import DIRECTIONS

RELATION_NAMES = (*RELATIONS, "nearest")
RANK_ASKED = tuple(f"{ordinal} {side}" for ordinal in ORDINALS for side in SIDES)
MEETING_NAMES = tuple(MEETINGS)
BOX_WEIGHT = 10.0  # of distances, in shares of the picture, beside cross-entropies


class QuestionHeads(nn.Module):
    """Throw-away heads on states `(S, D)` of questions.

    Args:
        size: `D`.
        words: of nouns and colours.
        whole: whether all is asked, or only what the target and the anchor are called.
    """

    def __init__(self, size: int, words: dict[str, tuple[str, ...]], whole: bool):
        super().__init__()
        self.words = words
        counts = {f"{whom}{name}": len(words[name]) for whom in ("", "anchor_") for name in ("noun", "colour")}
        if whole:
            counts |= {"direction": len(DIRECTIONS), "event": len(EVENT_NAMES), "meeting": len(MEETING_NAMES)}
            counts |= {"relation": len(RELATION_NAMES), "rank": len(RANK_ASKED)}
        self.heads = nn.ModuleDict({name: nn.Linear(size, count) for name, count in counts.items()})
        self.anchor_box = nn.Linear(size, 4) if whole else None

    def loss(self, states: torch.Tensor, clips: list[SyntheticClip], questions: list[Question]) -> torch.Tensor:
        """Sum over the heads of their mean loss on the questions that say something about it."""
        facts = [question_facts(question, clips[question.clip], self.words) for question in questions]
        total = states.sum() * 0.0
        for name, head in self.heads.items():
            wanted = torch.tensor([fact.get(name, UNKNOWN) for fact in facts])
            if (wanted != UNKNOWN).any():
                total = total + F.cross_entropy(head(states), wanted, ignore_index=UNKNOWN)
        if self.anchor_box is not None:
            boxes = torch.stack([_anchor_box(question, clips[question.clip]) for question in questions])
            known = ~boxes.isnan().any(-1)
            if known.any():
                output = self.anchor_box(states[known]).sigmoid()
                total = total + BOX_WEIGHT * (output - xyxy_to_cxcywh(boxes[known])).abs().mean()
        return total


def question_facts(question: Question, clip: SyntheticClip, words: dict[str, tuple[str, ...]]) -> dict[str, int]:
    """What a question asks for, by name of a head of [`QuestionHeads`]: noun and colour of the target where they are
    said, those of the anchor, and the one thing that its kind asks about."""
    text, kind, asked = question.expression.text, question.expression.kind, {}
    if len(question.targets) == 1:
        thing = clip.objects[question.targets[0]]
        looks = {name: getattr(thing, name) for name in words}
        asked |= {name: words[name].index(look) for name, look in looks.items() if look in text.split()}
        if kind == "motion" and thing.action == "straight" and not thing.bounces:
            asked["direction"] = DIRECTIONS.index(thing.direction)
    if question.expression.anchor_id is not None:
        anchor = clip.objects[question.expression.anchor_id]
        asked |= {f"anchor_{name}": words[name].index(getattr(anchor, name)) for name in words}
    if kind == "event":
        said = [name for name, forms in EVENTS.items() if any(text.endswith(form[0]) for form in forms)]
        asked["event"] = EVENT_NAMES.index(said[-1])
    if kind == "meeting":
        said = next((name for name in ("front", "behind") if name in text.split()), "cross")
        asked["meeting"] = MEETING_NAMES.index(said)
    if kind == "relation":
        asked["relation"] = next(
            index for index, name in enumerate(RELATION_NAMES) if any(f" {form} " in text for form in SYNONYMS[name])
        )
    if kind == "ordinal":
        ordinal = next(word for word in text.split() if word in ORDINALS)
        asked["rank"] = RANK_ASKED.index(f"{ordinal} {text.split()[-1]}")
    return asked


def _anchor_box(question: Question, clip: SyntheticClip) -> torch.Tensor:
    """Normalised xyxy of the anchor on the first frame, NaN where there is none or it is not well seen."""
    anchor = question.expression.anchor_id
    if anchor is None or clip.visibility[anchor, 0] <= WELL_SEEN:
        return torch.full((4,), float("nan"))
    H, W = clip.frames.shape[1:3]
    return torch.from_numpy(clip.boxes[anchor, 0]) / torch.tensor([W, H, W, H], dtype=torch.float32)
