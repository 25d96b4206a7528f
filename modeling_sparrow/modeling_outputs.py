"""What the models return."""

from dataclasses import dataclass, field, replace

import torch
from transformers import Cache
from transformers.utils import ModelOutput

from .box_ops import pairwise_iou, tight_boxes
from .configuration_sparrow import FiltrationHeadConfig
from .filtration_head import FiltrationOutput, select_boxes
from .mask_tracker import FrameMasks, TrackedObject
from .region_proposer import RegionProposals


@dataclass
class SparrowModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state: `(B, L, D)`, normalised, the state that predicts the next token.
        logits: `(B, L, vocabulary)` or of the last `logits_to_keep` positions.
        cache: keys and values of the language model.
        hidden_states, attentions: of the language model, when asked for.
    """

    last_hidden_state: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class SparrowOutput(ModelOutput):
    """Output of training, `S` [SEG] tokens of the batch in row order.

    Args:
        loss: weighted sum of the losses below that apply.
        ce_loss, mask_bce_loss, mask_dice_loss, filter_class_loss, filter_box_loss: unweighted scalars.
        logits, cache, hidden_states, attentions: of the language model.
        box_embeddings, seg_embeddings: `(S, prompt_size)`, what the two heads made of the tokens.
        mask_logits: `(S, T, h, w)` low-resolution mask logits of each token on each frame.
        boxes: per token `(K, 4)` normalised xyxy, the boxes that prompted it.
    """

    loss: torch.Tensor | None = None
    ce_loss: torch.Tensor | None = None
    mask_bce_loss: torch.Tensor | None = None
    mask_dice_loss: torch.Tensor | None = None
    filter_class_loss: torch.Tensor | None = None
    filter_box_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    box_embeddings: torch.Tensor | None = None
    seg_embeddings: torch.Tensor | None = None
    mask_logits: torch.Tensor | None = None
    boxes: list[torch.Tensor] | None = None


@dataclass
class ClipBatch:
    """Clips of a training batch, as `forward` takes them.

    Args:
        frames: `(V, T, 3, S, S)`, padded at the end.
        num_frames: `(V,)` frames that are not padding; default all.
        proposer_pixel_values: `(V, 3, s, s)` first frames for a proposer that encodes on its own.
        original_sizes: `(V, 2)` height and width of the videos.
    """

    frames: torch.Tensor
    num_frames: torch.Tensor | None = None
    proposer_pixel_values: torch.Tensor | None = None
    original_sizes: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def counts(self) -> list[int]:
        """Frames of each clip that are not padding."""
        return [self.frames.shape[1]] * len(self) if self.num_frames is None else self.num_frames.tolist()

    def proposer_pixels(self, clip: int) -> torch.Tensor | None:
        return None if self.proposer_pixel_values is None else self.proposer_pixel_values[clip : clip + 1]


@dataclass
class FilteredFrame:
    """Proposals of one frame (`F` = 1) and the scores that `S` [BOX] embeddings gave them."""

    frame_index: int
    proposals: RegionProposals
    output: FiltrationOutput

    @staticmethod
    def split(proposals: RegionProposals, output: FiltrationOutput, frames: list[int]) -> "list[FilteredFrame]":
        """Proposals and scores of several frames, one by one."""
        per_frame = ("logits", "confidence", "boxes", "regressed_boxes")
        return [
            FilteredFrame(
                frame,
                RegionProposals(**{name: value[i : i + 1] for name, value in proposals.items()}),
                FiltrationOutput(
                    **{name: value[:, i : i + 1] if name in per_frame else value for name, value in output.items()}
                ),
            )
            for i, frame in enumerate(frames)
        ]


@dataclass
class LocatedBoxes:
    """Where one [BOX] token was found.

    Args:
        frame_index: the frame to prompt.
        boxes: `(K, 4)` normalised xyxy; `K` may be 0.
        scores: `(K,)` confidence.
        token: `(D,)` embedding after attending to the proposals (released variant), else the one given.
        proposals: of that frame, before the choice.
        confidence: `(Q,)` of each proposal.
        elsewhere: of a token that is known to mean several objects, the same for the other frames that were looked at,
            those that show most of them first.
    """

    frame_index: int
    boxes: torch.Tensor
    scores: torch.Tensor
    token: torch.Tensor
    proposals: RegionProposals
    confidence: torch.Tensor
    elsewhere: list["LocatedBoxes"] = field(default_factory=list)

    @staticmethod
    def choose(
        filtered: list[FilteredFrame],
        s: int,
        token: torch.Tensor,
        config: FiltrationHeadConfig,
        at_least_one: bool = False,
    ) -> "LocatedBoxes":
        """One frame and its boxes for token number `s`, see [`SparrowForVideoGrounding.locate`].

        Args:
            filtered: scores of the frames that were looked at.
            token: its embedding.
            at_least_one: take the best box where none is good enough.
        """
        plural_logits = filtered[0].output.plural_logits
        is_plural = None if plural_logits is None else plural_logits[s].item() > 0
        scored = [(frame.output.confidence[s, 0], frame.output.boxes[s, 0]) for frame in filtered]
        found = [select_boxes(confidence, boxes, config, is_plural) for confidence, boxes in scored]
        if is_plural:  # confidences are probabilities: their sum is the number of objects to be expected
            value = [confidence[own].sum().item() for (confidence, _), own in zip(scored, found, strict=True)]
            passing = []
        else:
            value = [confidence.max().item() for confidence, _ in scored]
            passing = [place for place, best in enumerate(value) if best >= config.score_threshold]
        place = passing[0] if passing else value.index(max(value))
        if at_least_one and not len(found[place]):
            found[place] = scored[place][0].argmax()[None]
        located = [
            LocatedBoxes(
                frame.frame_index,
                boxes[chosen],
                confidence[chosen],
                token if frame.output.tokens is None else frame.output.tokens[s],
                frame.proposals,
                confidence,
            )
            for frame, chosen, (confidence, boxes) in zip(filtered, found, scored, strict=True)
        ]
        if is_plural:
            others = sorted((other for other in range(len(value)) if other != place), key=lambda i: -value[i])
            located[place].elsewhere = [located[other] for other in others]
        return located[place]

    def drop_broken_boxes(self) -> int:
        """Drop, in place, boxes that are not finite or end before they begin; returns how many."""
        sound = self.scores.isfinite() & self.boxes.isfinite().all(-1)
        sound &= (self.boxes[:, :2] <= self.boxes[:, 2:]).all(-1)
        self.boxes, self.scores = self.boxes[sound], self.scores[sound]
        return int((~sound).sum()) + sum(place.drop_broken_boxes() for place in self.elsewhere)

    def not_covered(self, followed: torch.Tensor, iou: float) -> "LocatedBoxes":
        """The boxes that overlap none of `followed`, `(n, 4)` normalised xyxy or NaN, by more than `iou`."""
        overlap = pairwise_iou(self.boxes, followed.to(self.boxes)).nan_to_num()
        free = (overlap <= iou).all(-1)
        return replace(self, boxes=self.boxes[free], scores=self.scores[free], elsewhere=[])


@dataclass
class FollowedObjects:
    """Objects of one video that are followed together.

    Args:
        tracked: what prompts each.
        owners: (row, place among the objects of the row) of each.
        queries: `(P,)` [BOX] embedding of each that was located by one.
    """

    tracked: list[TrackedObject] = field(default_factory=list)
    owners: list[tuple[int, int]] = field(default_factory=list)
    queries: list[torch.Tensor] = field(default_factory=list)

    @property
    def box_embeddings(self) -> torch.Tensor | None:
        """`(N, P)`, if all objects have one."""
        return torch.stack(self.queries) if self.queries and len(self.queries) == len(self.tracked) else None


@dataclass
class AnswerTokens:
    """What one generated answer says about objects.

    Args:
        box, seg: `(n, P)` embeddings of its [BOX] and [SEG] tokens; equally many unless one kind is absent.
        positions: index of each [SEG] (or [BOX]) among the generated tokens.
        warnings: sentences about tokens that were dropped.
    """

    box: torch.Tensor
    seg: torch.Tensor
    positions: list[int]
    warnings: list[str]

    def warn_of_weak_boxes(self, located: list[LocatedBoxes], threshold: float):
        """Adds a sentence about tokens whose best box is taken although its confidence is under the threshold."""
        best = [place.scores.max().item() for place in located if len(place.scores)]
        weak = [score for score in best if score < threshold]
        if weak:
            self.warnings.append(
                f"{len(weak)} of {len(best)} objects: nothing reached the score threshold {threshold:g}, the best "
                f"region was taken (score {max(weak):.2f})."
            )


@dataclass
class GroundedObject:
    """One object of an answer.

    Args:
        token_position: index of its [SEG] (or [BOX]) among the generated tokens.
        frame_index: frame it was prompted on.
        box: `(4,)` normalised xyxy on that frame, or None if [SEG] alone prompted it.
        score: confidence of the box, or of the mask on the prompted frame.
        frame_scores: `(T,)` confidence on each frame.
        object_logits: `(T,)` logit of being there on each frame.
        frame_boxes: `(T, 4)` normalised xyxy around the mask on each frame, NaN where it is empty.
        mask_logits: `(T, h, w)` low-resolution logits over the square frame, or None if they went to a sink.
    """

    token_position: int
    frame_index: int
    box: torch.Tensor | None
    score: float | None
    frame_scores: torch.Tensor
    object_logits: torch.Tensor
    frame_boxes: torch.Tensor
    mask_logits: torch.Tensor | None = None

    @classmethod
    def start(
        cls, position: int, tracked: TrackedObject, place: LocatedBoxes | None, k: int, num_frames: int
    ) -> "GroundedObject":
        """An object before its first mask; `k` is its box among those of its token."""
        return cls(
            token_position=position,
            frame_index=tracked.frame_index,
            box=place.boxes[k].cpu() if place is not None else None,
            score=place.scores[k].item() if place is not None else None,
            frame_scores=torch.zeros(num_frames),
            object_logits=torch.full((num_frames,), -torch.inf),
            frame_boxes=torch.full((num_frames, 4), torch.nan),
        )

    def record(self, masks: FrameMasks, row: int, keep_logits: bool):
        """Take over row `row` of the masks of one frame."""
        t = masks.frame_index
        self.frame_scores[t] = masks.score[row].float().cpu()
        self.object_logits[t] = masks.object_logits[row].float().cpu()
        self.frame_boxes[t] = tight_boxes(masks.logits[row]).cpu()
        if self.score is None and t == self.frame_index:
            self.score = self.frame_scores[t].item()
        if keep_logits:
            logits = masks.logits[row].cpu()
            if self.mask_logits is None:
                self.mask_logits = logits.new_zeros(len(self.frame_scores), *logits.shape)
            self.mask_logits[t] = logits


@dataclass
class GroundingOutput:
    """Answers of `ground`.

    It fills up as `ground_iter` runs: the text first, then what was located, then the scores of frame after frame.

    Args:
        sequences: `(B, L)` generated ids, prompt removed.
        objects: for each row its [`GroundedObject`]s, in the order of the tokens, then those missed at first.
        num_frames: for each row, frames of its video.
        warnings: for each row, sentences about tokens that could not be paired.
        timings: seconds spent in `generate`, `locate` and `propagate`.
        metadata: for each row what the processor said about it.
        located: for each row, where each of its [BOX] tokens was found, with the proposals it chose from.
        tracked: for each row, what prompted each of its objects.
    """

    sequences: torch.LongTensor | None = None
    objects: list[list[GroundedObject]] = field(default_factory=list)
    num_frames: list[int] = field(default_factory=list)
    warnings: list[list[str]] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    metadata: list | None = None
    located: list[list[LocatedBoxes]] = field(default_factory=list)
    tracked: list[list[TrackedObject]] = field(default_factory=list)

    def start_objects(
        self,
        row: int,
        position: int,
        tracked: list[TrackedObject],
        place: LocatedBoxes | None,
        query: torch.Tensor | None,
        batch: FollowedObjects,
    ):
        """Add what a token prompts to the objects of a row, and to those that are followed together.

        Args:
            position: of the token among the generated ones.
            place, query: where it was found, and its [BOX] embedding, if it has one.
        """
        for k, item in enumerate(tracked):
            batch.tracked.append(item)
            batch.owners.append((row, len(self.objects[row])))
            if query is not None:
                batch.queries.append(query)
            self.tracked[row].append(item)
            self.objects[row].append(GroundedObject.start(position, item, place, k, self.num_frames[row]))
