"""Questions about generated clips as rows of tokens, several to a row.

Several questions about a clip are packed into one sequence: each sees the clip and itself, and counts its positions
from the end of the clip, so the result equals one row per question.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from sparrow_processing import SparrowProcessor
from sparrow_processing.synthetic import Expression, SyntheticClip, all_expressions, sample_expressions
from sparrow_processing.synthetic.answers import MANY_ANSWER, NO_ANSWER, ONE_ANSWER, REFER_QUESTIONS

from ..configuration_sparrow import SparrowConfig

# kinds that (also) ask what no single frame answers
MOVING_KINDS = ("motion", "speed", "event", "meeting", "multi", "none")

WELL_SEEN = 0.3  # visible share of an object that a frame can be asked about


@dataclass
class Question:
    """One question about clip number `clip` of a batch, with the objects it means: one, several, or none."""

    clip: int
    expression: Expression
    targets: tuple[int, ...]
    ids: list[int]  # without the part that all questions about a clip share, and without the answer


def shared_ids(processor: SparrowProcessor, num_frames: int) -> list[int]:
    """Ids before the words of a question: the user's turn, and the clip if there is one."""
    ids = processor.prompt_ids("x", "ask", num_frames)
    return ids[: ids.index(processor.tokenizer.convert_tokens_to_ids("x"))]


def is_askable(clip: SyntheticClip, item: Expression, frame: int, with_video: bool) -> bool:
    """Whether a question can be answered by the regions of one frame: each target is either well seen there or not
    there at all."""
    if not with_video and item.kind in MOVING_KINDS:
        return False
    seen = clip.visibility[list(item.target_ids)]
    return bool(((seen[:, frame] > WELL_SEEN) | (seen[:, frame] == 0)).all())


def draw_questions(
    processor: SparrowProcessor,
    clips: list[SyntheticClip],
    count: int,
    rng: np.random.Generator,
    is_allowed: Callable[[SyntheticClip, Expression], bool],
    favoured: tuple[str, ...] = (),
) -> list[Question]:
    """Up to `count` allowed questions per clip, kinds balanced, or half of them of the favoured kinds."""
    prefix = len(shared_ids(processor, 0))
    questions = []
    for number, clip in enumerate(clips):
        possible = [item for item in all_expressions(clip, rng) if is_allowed(clip, item)]
        drawn = sample_expressions([item for item in possible if item.kind in favoured], count // 2, rng)
        drawn += sample_expressions([item for item in possible if item.kind not in favoured], count - len(drawn), rng)
        for item in drawn:
            # the first form is that of the package; the others are for users who ask in their own words
            form = REFER_QUESTIONS[0] if rng.random() < 0.5 else REFER_QUESTIONS[rng.integers(len(REFER_QUESTIONS))]
            ids = processor.prompt_ids(form.format(query=item.text), "ask")[prefix:]
            questions.append(Question(number, item, item.target_ids, ids))
    return questions


@functools.lru_cache(maxsize=8)
def answer_ids(processor: SparrowProcessor, answer: str) -> list[int]:
    return processor.tokenizer.encode(answer + " <|end|>", add_special_tokens=False)


@dataclass
class PackedQuestions:
    """Questions about `C` clips in rows of `L` tokens.

    Args:
        ids, positions: `(C, L)`.
        labels: `(C, L)` of the answers, -100 elsewhere; what has no target is denied in the first word, and a second
            time, on its own, in all words.
        mask: `(C, 1, L, L)` float, what each token sees.
        prefix: tokens that all questions about a clip share.
        order: the questions, clip by clip.
        first, box, seg: clip and column of the token that predicts the first word, [BOX], [SEG] of each question.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    prefix: int
    order: list[Question]
    first: list[tuple[int, int]]
    box: list[tuple[int, int]]
    seg: list[tuple[int, int]]


def pack_questions(
    processor: SparrowProcessor, config: SparrowConfig, prefix: list[int], clips: int, questions: list[Question]
) -> PackedQuestions:
    """Pack the questions about each clip behind the `prefix` into one row."""
    one, many, denial = (answer_ids(processor, text) for text in (ONE_ANSWER, MANY_ANSWER, NO_ANSWER))
    # of each row: words, answer, what it should say, and the question if its [BOX] and [SEG] count
    rows: list[list[tuple[list[int], list[int], list[int], Question | None]]] = [[] for _ in range(clips)]
    for question in questions:
        answer = many if len(question.targets) > 1 else one
        if question.targets:
            rows[question.clip].append((question.ids, answer, answer, question))
        else:
            first_word = denial[:1] + [-100] * (len(answer) - 1)
            rows[question.clip].append((question.ids, answer, first_word, question))
            rows[question.clip].append((question.ids, denial, denial, None))
    length = len(prefix) + max(sum(len(words) + len(answer) for words, answer, _, _ in row) for row in rows)
    ids = torch.full((clips, length), processor.tokenizer.pad_token_id)
    labels = torch.full((clips, length), -100)
    positions = torch.zeros(clips, length, dtype=torch.int64)
    segment = torch.full((clips, length), -1)  # 0 prefix, 1, 2, … questions, -1 padding
    ids[:, : len(prefix)], positions[:, : len(prefix)] = torch.tensor(prefix), torch.arange(len(prefix))
    segment[:, : len(prefix)] = 0
    order, first, box, seg = [], [], [], []
    for number, row in enumerate(rows):
        at = len(prefix)
        for index, (words, answer, wanted, question) in enumerate(row, start=1):
            own = words + answer
            part = slice(at, at + len(own))
            ids[number, part], labels[number, part] = torch.tensor(own), torch.tensor([-100] * len(words) + wanted)
            positions[number, part] = torch.arange(len(prefix), len(prefix) + len(own))
            segment[number, part] = index
            if question is not None:
                order.append(question)
                first.append((number, at + len(words) - 1))
                box.append((number, at + own.index(config.box_token_id) - 1))
                seg.append((number, at + own.index(config.seg_token_id) - 1))
            at = part.stop
    same = (segment[:, :, None] == segment[:, None]) | (segment[:, None] == 0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = (same & causal) | torch.eye(length, dtype=torch.bool)
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.bfloat16).min)[:, None]
    return PackedQuestions(ids, positions, labels, mask, len(prefix), order, first, box, seg)
