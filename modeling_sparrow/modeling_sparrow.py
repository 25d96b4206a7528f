"""SPARROW: text, boxes and masks for a query about a video (arXiv 2603.12382).

    frames ──> host (video language model) ──> text with [BOX] [SEG]
    frames ──> SAM2 pyramid, once per frame ──> region proposals ─ filtration([BOX]) ─> boxes
                                            └─> mask tracker(boxes, [SEG]) ──> masks on every frame

`SparrowModel` holds the parts, `SparrowForVideoGrounding` speaks: `forward` trains, `ground` answers, by way of
`generate` (text), `locate` (tokens to boxes), `segment` (boxes and tokens to masks on a frame) and `propagate` (to
every frame).
"""

import time
from collections.abc import Callable, Generator, Iterator

import torch
from torch import nn
from transformers import Cache, GenerationMixin
from transformers.utils import can_return_tuple

from .configuration_sparrow import SparrowConfig
from .filtration_head import FiltrationHead, FiltrationOutput, ReleasedFiltrationHead
from .frame_pyramid import ClipPyramids, FramePyramid, FrameStream, TensorFrames, VideoPyramids
from .losses import LOSS_NAMES, count_items, filter_losses, mask_losses
from .mask_tracker import NO_OBJECT_LOGIT, FrameMasks, MaskPrompt, MaskTracker, TrackedObject
from .modeling_base import SparrowPreTrainedModel, grad_if_trainable, is_trainable
from .modeling_outputs import (
    AnswerTokens,
    ClipBatch,
    FilteredFrame,
    FollowedObjects,
    GroundingOutput,
    LocatedBoxes,
    SparrowModelOutput,
    SparrowOutput,
)
from .modeling_videoglamm import VideoGlammHost
from .region_proposer import RegionProposals, RegionProposer
from .released_rules import align_boxes, filter_by_box_prior

# inputs of the first generation step only
_PIXEL_INPUTS = (
    "spatial_pixel_values",
    "temporal_pixel_values",
    "num_frames",
    "video_index",
    "tsf_pixel_values",
    "num_tsf_crops",
)

DEFAULT_NEW_TOKENS = 128  # `generate` would cut an answer after 20
_LENGTH_OPTIONS = {"max_length", "max_new_tokens", "generation_config"}


class TokenHead(nn.Module):
    """L->V head: hidden state of the language model to the prompt space of the mask decoder."""

    def __init__(self, input_size: int, output_size: int):
        super().__init__()
        self.fc1 = nn.Linear(input_size, input_size)
        self.fc2 = nn.Linear(input_size, output_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.relu(self.fc1(hidden_states)))


class SparrowModel(SparrowPreTrainedModel):
    """The parts of SPARROW: host, token heads, mask tracker, region proposer, filtration head.

    `forward` runs the host alone and returns its states and logits.
    """

    def __init__(self, config: SparrowConfig):
        super().__init__(config)
        text_size, prompt_size = config.text_config.hidden_size, config.prompt_size
        channels = config.mask_tracker_config.pyramid_channels
        self.host = VideoGlammHost(config)
        self.seg_head = TokenHead(text_size, prompt_size)
        self.box_head = None if config.shared_token_head else TokenHead(text_size, prompt_size)
        self.mask_tracker = MaskTracker(config.mask_tracker_config)
        self.region_proposer = self.filtration_head = None
        if config.box_guidance:
            self.region_proposer = RegionProposer(config.proposer_config, channels)
            if config.filtration_config.variant == "released":
                self.filtration_head = ReleasedFiltrationHead(
                    config.filtration_config, prompt_size, config.proposer_config.d_model, channels
                )
            else:
                self.filtration_head = FiltrationHead(config.filtration_config, prompt_size, channels)
        self.post_init()

    def train(self, mode: bool = True) -> "SparrowModel":
        """Parts without a trainable parameter stay in evaluation mode: no dropout in what is frozen."""
        super().train(mode)
        for part in (*self.children(), *self.host.children()):
            if not is_trainable(part):
                part.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.host.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.host.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.host.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        self.host.set_output_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        spatial_pixel_values: torch.Tensor | None = None,
        temporal_pixel_values: torch.Tensor | None = None,
        num_frames: torch.Tensor | None = None,
        video_index: torch.Tensor | None = None,
        tsf_pixel_values: torch.Tensor | None = None,
        num_tsf_crops: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs,
    ) -> SparrowModelOutput:
        """See [`VideoGlammHost.embed`] for the pixel inputs; the rest goes to the language model."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.host.embed(
                input_ids,
                spatial_pixel_values,
                temporal_pixel_values,
                num_frames,
                video_index,
                tsf_pixel_values,
                num_tsf_crops,
            )
        output = self.host.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            output_hidden_states=output_hidden_states or [-1],
            **kwargs,
        )
        return SparrowModelOutput(
            last_hidden_state=output.hidden_states[-1],
            logits=output.logits,
            cache=output.cache,
            hidden_states=output.hidden_states if output_hidden_states else None,
            attentions=output.attentions,
        )

    def token_embeddings(self, states: torch.Tensor, token_id: int) -> torch.Tensor:
        """Prompt embeddings `(S, prompt_size)` of the states `(S, D)` that predict [BOX] or [SEG]."""
        is_box = token_id == self.config.box_token_id
        return (self.box_head if is_box and self.box_head is not None else self.seg_head)(states)

    def propose(self, pyramid: FramePyramid, pixel_values: torch.Tensor | None = None) -> RegionProposals:
        """Region proposals of frames.

        Args:
            pyramid: of `F` frames.
            pixel_values: `(F, 3, s, s)` of the same frames at `proposer_config.image_size`, for a proposer that does
                not share the pyramid.
        """
        return self.region_proposer.propose(self.proposer_levels(pyramid, pixel_values))

    def proposer_levels(self, pyramid: FramePyramid, pixel_values: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Feature levels the proposer reads."""
        if self.config.proposer_config.image_size is None:
            return list(pyramid.levels)
        if pixel_values is None:
            size = self.config.proposer_config.image_size
            raise ValueError(f"This proposer encodes pictures of {size} px on its own: give proposer_pixel_values.")
        if self.region_proposer.vision_encoder is not None:
            return self.region_proposer.encode_pictures(pixel_values)
        return list(self.mask_tracker.encode_frames(pixel_values).levels)

    def filter(self, tokens: torch.Tensor, proposals: RegionProposals, pyramid: FramePyramid) -> FiltrationOutput:
        """Score proposals of `F` frames for [BOX] embeddings `(S, D)` of one video."""
        levels = [*pyramid.levels[:-1], self.mask_tracker.features_without_memory(pyramid)]
        return self.filtration_head(tokens, proposals, levels)


class SparrowForVideoGrounding(SparrowPreTrainedModel, GenerationMixin):
    """Answers a query about a video with text, boxes and masks.

    ```python
    inputs = processor(text="the red ring", videos="clip.mp4", return_tensors="pt")
    output = model.ground(**inputs)
    result = processor.post_process_grounding(output, inputs)[0]
    ```
    """

    def __init__(self, config: SparrowConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.model = SparrowModel(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        self.model.set_output_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        spatial_pixel_values: torch.Tensor | None = None,
        temporal_pixel_values: torch.Tensor | None = None,
        num_frames: torch.Tensor | None = None,
        video_index: torch.Tensor | None = None,
        tsf_pixel_values: torch.Tensor | None = None,
        num_tsf_crops: torch.Tensor | None = None,
        mask_pixel_values: torch.Tensor | None = None,
        num_mask_frames: torch.Tensor | None = None,
        proposer_pixel_values: torch.Tensor | None = None,
        mask_labels: list[torch.Tensor] | None = None,
        box_labels: list[torch.Tensor] | None = None,
        original_sizes: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        loss_weights: dict[str, float] | None = None,
        num_items: dict[str, float | torch.Tensor] | None = None,
        box_guidance: bool | None = None,
        **kwargs,
    ) -> SparrowOutput:
        """Language modelling, and grounding of every [BOX] [SEG] pair in `input_ids` if `mask_pixel_values` are given.

        Args:
            input_ids, attention_mask, position_ids, labels: `(B, L)`; labels of -100 are ignored.
            spatial_pixel_values, temporal_pixel_values, num_frames, video_index, tsf_pixel_values, num_tsf_crops: see
                [`VideoGlammHost.embed`].
            mask_pixel_values: `(V, T, 3, S, S)` frames for SAM2, one clip per video, padded at the end.
            num_mask_frames: `(V,)` frames of each clip that are not padding; default all.
            proposer_pixel_values: `(V, 3, s, s)` first frame of each clip, for a proposer that encodes on its own.
            mask_labels: per video `(S_v, T_v, H, W)`, one mask per [SEG] in row order; 1 object, 0 background,
                -1 ignored.
            box_labels: per video `(S_v, M, T_v, 4)` normalised xyxy, NaN where absent; a token may mean up to `M`
                objects. Default: the tight boxes of `mask_labels`.
            original_sizes: `(V, 2)` height and width of the videos; only the released box prior needs them.
            loss_weights: weight of each loss, by name; what is left out is not computed. Default: the config's.
            num_items: by what each loss is divided, see `count_items`; the sum over all processes and micro-batches
                of a step, so that the step does not depend on how it was split. Default: the counts of this batch.
            box_guidance: whether the boxes that [BOX] chooses prompt the masks; default as in the config.

        Raises:
            ValueError: if tokens and labels do not match in number.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            spatial_pixel_values=spatial_pixel_values,
            temporal_pixel_values=temporal_pixel_values,
            num_frames=num_frames,
            video_index=video_index,
            tsf_pixel_values=tsf_pixel_values,
            num_tsf_crops=num_tsf_crops,
            output_hidden_states=output_hidden_states,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        if loss_weights is None:
            loss_weights = {name: getattr(self.config, f"{name}_weight") for name in LOSS_NAMES}
        if num_items is None:
            counts = self.count_items(labels, mask_labels, box_labels, num_mask_frames)
            num_items = {name: max(count, 1) for name, count in counts.items()}
        losses, grounding = {}, {}
        if labels is not None and "ce_loss" in loss_weights:
            losses["ce_loss"] = self.loss_function(
                logits=outputs.logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items["ce_loss"],
            )
        if mask_pixel_values is not None:
            guided = self.config.box_guidance if box_guidance is None else box_guidance
            clips = ClipBatch(mask_pixel_values, num_mask_frames, proposer_pixel_values, original_sizes)
            tokens = self._tokens_by_video(outputs.last_hidden_state, input_ids, video_index, len(clips))
            with_masks = mask_labels is None or bool({"mask_bce_loss", "mask_dice_loss"} & set(loss_weights))
            grounding, filtered, mask_logits = self._ground_clips(tokens, clips, guided, with_masks)
            if mask_labels is not None:
                losses |= self._grounding_losses(filtered, mask_logits, clips, mask_labels, box_labels, num_items)
        losses = {name: value for name, value in losses.items() if name in loss_weights}
        return SparrowOutput(
            loss=sum(loss_weights[name] * value for name, value in losses.items()) if losses else None,
            **losses,
            logits=outputs.logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **grounding,
        )

    # ------------------------------------------------------------------ training

    def _tokens_by_video(
        self, hidden_states: torch.Tensor, input_ids: torch.Tensor, video_index: torch.Tensor | None, num_videos: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """[BOX] and [SEG] embeddings of each video, `(S, P)` each, rows in order.

        The state used for a token is that of the position that predicts it.
        """
        rows = range(len(input_ids)) if video_index is None else video_index.tolist()
        limit = self.config.max_training_tokens
        tokens = []
        for video in range(num_videos):
            own = [b for b, index in enumerate(rows) if index == video]
            states, following = hidden_states[own, :-1], input_ids[own, 1:]
            embeddings = [
                self.model.token_embeddings(states[following == token_id], token_id)[:limit]
                for token_id in (self.config.box_token_id, self.config.seg_token_id)
            ]
            tokens.append(tuple(embeddings))
        return tokens

    def count_items(
        self,
        labels: torch.Tensor | None = None,
        mask_labels: list[torch.Tensor] | None = None,
        box_labels: list[torch.Tensor] | None = None,
        num_mask_frames: torch.Tensor | None = None,
        **inputs,
    ) -> dict[str, int]:
        """By what each loss of a batch is divided, see `losses.count_items`; other inputs of `forward` are ignored."""
        mask_labels = mask_labels or []
        lengths = [masks.shape[1] for masks in mask_labels]
        if num_mask_frames is not None and mask_labels:
            lengths = num_mask_frames.tolist()
        frames = [self.candidate_frames(length) for length in lengths]
        return count_items(self.config, labels, mask_labels, box_labels, frames)

    def _ground_clips(
        self, tokens: list[tuple[torch.Tensor, torch.Tensor]], clips: ClipBatch, box_guidance: bool, with_masks: bool
    ) -> tuple[dict[str, torch.Tensor], list[list[FilteredFrame]], list[list[torch.Tensor]] | None]:
        """What `forward` returns of boxes and masks, the scored proposals, and the mask logits if they are wanted."""
        pyramid = self._encode_clips(clips.frames)
        filtered, located = self._locate_clips(tokens, clips, pyramid, box_guidance)
        grounding = {
            "box_embeddings": torch.cat([box for box, _ in tokens]),
            "seg_embeddings": torch.cat([seg for _, seg in tokens]),
            "boxes": [place.boxes for video in located for place in video],
        }
        if not with_masks:
            return grounding, filtered, None
        mask_logits = self._segment_clips(tokens, located, clips, pyramid)
        flat = [logits for video in mask_logits for logits in video]
        grounding["mask_logits"] = torch.stack(flat) if flat else None
        return grounding, filtered, mask_logits

    def _locate_clips(
        self,
        tokens: list[tuple[torch.Tensor, torch.Tensor]],
        clips: ClipBatch,
        pyramid: FramePyramid,
        box_guidance: bool,
    ) -> tuple[list[list[FilteredFrame]], list[list[LocatedBoxes]]]:
        """Proposals with their scores, and the chosen boxes, of the tokens of each clip."""
        filtered: list[list[FilteredFrame]] = []
        located: list[list[LocatedBoxes]] = []
        T = clips.frames.shape[1]
        for v, (box_tokens, seg_tokens) in enumerate(tokens):
            filtered.append([])
            located.append([])
            queries = self._box_queries(box_tokens, seg_tokens)
            if not box_guidance or not len(queries):
                continue
            frames = self.candidate_frames(clips.counts[v])
            filtered[v] = self._filter_frames(
                queries, pyramid[[v * T + t for t in frames]], frames, clips.proposer_pixels(v)
            )
            located[v] = self._choose(queries, filtered[v], at_least_one=self.training)
            if clips.original_sizes is not None:
                size = tuple(clips.original_sizes[v].tolist())
                self._apply_box_prior(located[v], pyramid[v * T : v * T + 1], size)
        return filtered, located

    def _segment_clips(
        self,
        tokens: list[tuple[torch.Tensor, torch.Tensor]],
        located: list[list[LocatedBoxes]],
        clips: ClipBatch,
        pyramid: FramePyramid,
    ) -> list[list[torch.Tensor]]:
        """Mask logits `(T, h, w)` of each token of each clip, the maximum over its objects."""
        objects: list[TrackedObject] = []
        clip_of_object: list[int] = []
        objects_of_token: list[list[list[int]]] = []  # per video, per token
        for v, (box_tokens, seg_tokens) in enumerate(tokens):
            objects_of_token.append([])
            queries = self._mask_queries(box_tokens, seg_tokens, located[v])
            for token_objects in self.tracked_objects(queries, located[v]):
                objects_of_token[-1].append([len(objects) + k for k in range(len(token_objects))])
                objects += token_objects
                clip_of_object += [v] * len(token_objects)
        index = torch.tensor(clip_of_object, device=clips.frames.device, dtype=torch.int64)
        masks = self._propagate_clips(ClipPyramids(pyramid, clips.frames.shape[1], index), objects)
        side = self.config.mask_tracker_config.image_size // 4
        size = (clips.frames.shape[1], side, side)
        absent = pyramid.levels[0].new_full(size, NO_OBJECT_LOGIT)  # of a token that no box was found for
        return [
            [torch.stack([masks[k] for k in own]).amax(dim=0) if own else absent for own in video]
            for video in objects_of_token
        ]

    def _grounding_losses(
        self,
        filtered: list[list[FilteredFrame]],
        mask_logits: list[list[torch.Tensor]] | None,
        clips: ClipBatch,
        mask_labels: list[torch.Tensor],
        box_labels: list[torch.Tensor] | None,
        num_items: dict[str, float | torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        losses: dict[str, torch.Tensor] = {}
        for v, frames in enumerate(filtered):
            if frames:
                boxes = None if box_labels is None else box_labels[v]
                for name, value in filter_losses(self.config, frames, mask_labels[v], boxes, num_items).items():
                    losses[name] = losses.get(name, 0.0) + value
        if mask_logits is not None:
            losses |= mask_losses(self.config, mask_logits, clips.counts, mask_labels, num_items)
        return losses

    def _encode_clips(self, mask_pixel_values: torch.Tensor) -> FramePyramid:
        with grad_if_trainable(self.model.mask_tracker.sam2.vision_encoder):
            return self.model.mask_tracker.encode_frames(mask_pixel_values.flatten(0, 1))

    def _propagate_clips(self, clips: ClipPyramids, objects: list[TrackedObject]) -> list[torch.Tensor]:
        """Mask logits `(T, h, w)` of every object, before absent ones are emptied."""
        frames: dict[tuple[int, int], torch.Tensor] = {}
        for masks in self.model.mask_tracker.propagate(clips, objects):
            for row, logits in zip(masks.objects, masks.raw_logits, strict=True):
                frames[row, masks.frame_index] = logits
        return [torch.stack([frames[row, t] for t in range(len(clips))]) for row in range(len(objects))]

    # ------------------------------------------------------------------ tokens to boxes

    def candidate_frames(self, num_frames: int) -> list[int]:
        """Frames that are searched for the best one to prompt, spread over the clip, the first one first."""
        count = min(self.config.num_prompt_frames, num_frames)
        return sorted({round(i * (num_frames - 1) / max(count - 1, 1)) for i in range(count)})

    def locate(
        self,
        box_embeddings: torch.Tensor,
        pyramids: VideoPyramids,
        proposer_pixel_values: torch.Tensor | None = None,
    ) -> list[LocatedBoxes]:
        """Choose the boxes of [BOX] embeddings `(S, P)` in one video.

        Each token takes the first candidate frame on which a proposal passes the score threshold, otherwise the frame
        of its most confident proposal; one that is known to mean several objects the frame that shows most of them.
        Later frames are looked at only for tokens that need them.

        Args:
            box_embeddings: from `token_embeddings`.
            pyramids: the video, see [`MaskTracker.encode_video`].
            proposer_pixel_values: `(1, 3, s, s)` first frame, for a proposer that encodes on its own.
        """
        filtered: list[FilteredFrame] = []
        threshold = self.config.filtration_config.score_threshold
        settled = torch.zeros(len(box_embeddings), dtype=torch.bool, device=box_embeddings.device)
        for frame in self.candidate_frames(len(pyramids)):
            filtered += self._filter_frames(box_embeddings, pyramids.at(frame), [frame], proposer_pixel_values)
            output = filtered[-1].output
            settled |= output.confidence.amax((1, 2)) >= threshold
            if output.plural_logits is not None:
                settled &= output.plural_logits <= 0
            if settled.all():
                break
        return self._choose(box_embeddings, filtered)

    def _box_queries(self, box_tokens: torch.Tensor, seg_tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings that query the proposals. Released models let [SEG] do it in an answer without [BOX]."""
        if not self.config.box_guidance:
            return box_tokens[:0]
        released = self.config.filtration_config.variant == "released"
        return seg_tokens if released and not len(box_tokens) else box_tokens

    def _mask_queries(
        self, box_tokens: torch.Tensor, seg_tokens: torch.Tensor, located: list[LocatedBoxes]
    ) -> torch.Tensor:
        """Embeddings that prompt the masks: [SEG], after attending to the proposals if it queried them itself."""
        if located and not len(box_tokens):
            return torch.stack([place.token for place in located])
        return seg_tokens

    def _filter_frames(
        self, tokens: torch.Tensor, pyramid: FramePyramid, frames: list[int], pixel_values: torch.Tensor | None
    ) -> list[FilteredFrame]:
        """Proposals and scores of some frames of one video, computed together."""
        with grad_if_trainable(self.model.region_proposer):
            proposals = self.model.propose(pyramid, pixel_values)
        output = self.model.filter(tokens, proposals, pyramid)
        return FilteredFrame.split(proposals, output, frames)

    def _choose(
        self, tokens: torch.Tensor, filtered: list[FilteredFrame], at_least_one: bool = False
    ) -> list[LocatedBoxes]:
        """One frame and its boxes for each token.

        Args:
            at_least_one: take the best box where none is good enough, so that in training every mask has a gradient.
        """
        config = self.config.filtration_config
        return [LocatedBoxes.choose(filtered, s, token, config, at_least_one) for s, token in enumerate(tokens)]

    def _apply_box_prior(self, located: list[LocatedBoxes], pyramid: FramePyramid, original_size: tuple[int, int]):
        """Released rule, in place: keep the boxes whose own mask agrees with them."""
        config = self.config.filtration_config
        if config.prior_min_score is None:
            return
        for place in located:
            keep = filter_by_box_prior(self.model.mask_tracker, pyramid, place.boxes, original_size, config)
            place.boxes, place.scores = place.boxes[keep], place.scores[keep]

    # ------------------------------------------------------------------ boxes to masks

    def tracked_objects(self, seg_embeddings: torch.Tensor, located: list[LocatedBoxes]) -> list[list[TrackedObject]]:
        """What to follow for each [SEG] embedding `(S, P)` and its boxes; without boxes [SEG] prompts frame 0 alone.

        With memory each box is an object of its own; frame-wise, and in the released order of prompts, all boxes of a
        token make one object. A token that was not found has none. No [SEG] at all: the boxes alone prompt.
        """
        if self.config.filtration_config.variant == "released" and located:
            located = align_boxes(located, len(seg_embeddings))
        if not located:
            return [[TrackedObject(0, [MaskPrompt(tokens=seg[None, None])])] for seg in seg_embeddings]
        if not len(seg_embeddings):
            return [[TrackedObject(p.frame_index, [MaskPrompt(boxes=box[None])]) for box in p.boxes] for p in located]
        config = self.config.mask_tracker_config
        objects = []
        for seg, place in zip(seg_embeddings, located, strict=True):
            token = seg[None, None]  # (1, 1, P)
            if not len(place.boxes):
                objects.append([])
            elif config.propagation == "framewise":
                boxes = place.boxes
                prompt = MaskPrompt(tokens=token.expand(len(boxes), -1, -1), boxes=boxes)
                objects.append([TrackedObject(0, [prompt])])
            elif config.joint_prompt:
                prompts = [MaskPrompt(tokens=token, boxes=box[None]) for box in place.boxes]
                objects.append([TrackedObject(place.frame_index, [prompt]) for prompt in prompts])
            else:
                turns = [MaskPrompt(tokens=token), *(MaskPrompt(boxes=box[None].clamp(0, 1)) for box in place.boxes)]
                objects.append([TrackedObject(place.frame_index, turns)])
        return objects

    def segment(self, pyramid: FramePyramid, seg_embeddings: torch.Tensor, boxes: torch.Tensor | None) -> FrameMasks:
        """Masks on one frame of [SEG] embeddings `(N, P)` and boxes `(N, 4)`, normalised xyxy."""
        return self.model.mask_tracker.prompt(pyramid, MaskPrompt(tokens=seg_embeddings[:, None], boxes=boxes))

    def propagate(
        self,
        pyramids: VideoPyramids,
        objects: list[TrackedObject],
        box_embeddings: torch.Tensor | None = None,
    ) -> Iterator[FrameMasks]:
        """Masks of every object on every frame of a video; see [`MaskTracker.propagate`].

        Args:
            box_embeddings: `(N, P)` of each object; with them, and a `reprompt_threshold`, an object that was lost is
                located and prompted again.
        """
        reprompt = None
        if box_embeddings is not None and self.config.mask_tracker_config.reprompt_threshold is not None:
            reprompt = self._reprompter(objects, box_embeddings)
        return self.model.mask_tracker.propagate(pyramids, objects, reprompt)

    def _reprompter(
        self, objects: list[TrackedObject], box_embeddings: torch.Tensor
    ) -> Callable[[FramePyramid, list[int]], tuple[list[int], MaskPrompt | None]]:
        threshold = self.config.filtration_config.score_threshold

        def reprompt(pyramid: FramePyramid, lost: list[int]) -> tuple[list[int], MaskPrompt | None]:
            output = self.model.filter(box_embeddings[lost], self.model.propose(pyramid), pyramid)
            confidence, best = output.confidence[:, 0].max(dim=-1)
            found = [i for i, value in enumerate(confidence.tolist()) if value >= threshold]
            if not found:
                return [], None
            boxes = torch.stack([output.boxes[i, 0, best[i]] for i in found])
            tokens = [objects[lost[i]].prompts[0].tokens for i in found]
            prompt = MaskPrompt(tokens=None if tokens[0] is None else torch.cat(tokens), boxes=boxes)
            return [lost[i] for i in found], prompt

        return reprompt

    # ------------------------------------------------------------------ inference

    def prepare_inputs_for_generation(
        self,
        input_ids,
        is_first_iteration=False,
        mask_pixel_values=None,
        num_mask_frames=None,
        proposer_pixel_values=None,
        original_sizes=None,
        frames=None,
        metadata=None,
        **kwargs,
    ):
        """Text needs the towers' pixels, and those only in the first step; what `ground` takes beside is left out."""
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in _PIXEL_INPUTS:  # the cache holds what they gave
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Beams and samples of a row share its clip instead of copying its pixels."""
        pixels = {name: model_kwargs.pop(name) for name in _PIXEL_INPUTS if name in model_kwargs}
        if expand_size > 1:
            if pixels.get("tsf_pixel_values") is not None:
                raise ValueError("Tracked features work with one sequence per row: use num_beams=1.")
            index = pixels.get("video_index")
            index = torch.arange(len(input_ids), device=input_ids.device) if index is None else index
            pixels["video_index"] = index.repeat_interleave(expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | pixels

    def ground(self, *args, mask_sink: Callable[[int, FrameMasks], None] | None = None, **kwargs) -> GroundingOutput:
        """Answer: generate the text, then boxes and masks of every [BOX] [SEG] pair in it, once.

        Takes what [`ground_iter`] takes.

        Args:
            mask_sink: called with the row and the [`FrameMasks`] of each frame as soon as they are known (back from
                the prompted frame, then forwards); the output then holds no mask logits.
        """
        steps = self.ground_iter(*args, keep_logits=mask_sink is None, **kwargs)
        while True:
            try:
                row, masks = next(steps)
            except StopIteration as end:
                return end.value
            if mask_sink is not None:
                mask_sink(row, masks)

    @torch.no_grad()
    def ground_iter(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        mask_pixel_values: torch.Tensor | None = None,
        num_mask_frames: torch.Tensor | None = None,
        frames: FrameStream | list[FrameStream] | None = None,
        video_index: torch.Tensor | None = None,
        proposer_pixel_values: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        metadata: list | None = None,
        keep_logits: bool = False,
        output: GroundingOutput | None = None,
        **generate_kwargs,
    ) -> Generator[tuple[int, FrameMasks], None, GroundingOutput]:
        """`ground` step by step: yields the row and the masks of each frame, returns the output.

        Args:
            input_ids, attention_mask: `(B, L)` prompts, padded on the left. Rows of the same video share its pixels.
            mask_pixel_values, num_mask_frames: as in `forward`.
            frames: instead of them, one [`FrameStream`] per video; memory then does not grow with the video.
            video_index: `(B,)` video of each row, -1 for none. Default: row b has video b.
            proposer_pixel_values, original_sizes: as in `forward`.
            metadata: one item per row, handed through to the output for the processor.
            keep_logits: the output holds the mask logits of every frame.
            output: filled in and returned; who passes one has what is known when stopping early.
            generate_kwargs: pixel inputs of the towers and everything else `generate` takes; by default greedy and as
                many new tokens as the checkpoint's generation config says, else 128.
        """
        self._check_generation(generate_kwargs)
        began = time.perf_counter()
        generated = self.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            video_index=video_index,
            return_dict_in_generate=True,
            output_hidden_states=[-1],
            **generate_kwargs,
        )
        sequences = generated.sequences[:, input_ids.shape[1] :]
        # the state of step k predicts generated token k
        states = torch.stack([step[-1][:, -1] for step in generated.hidden_states], dim=1)  # (B, L, D)
        answers = [self._read_answer(ids, state) for ids, state in zip(sequences, states, strict=True)]
        streams = self._streams(mask_pixel_values, num_mask_frames, frames)
        rows = list(range(len(input_ids))) if video_index is None else video_index.tolist()
        output = GroundingOutput() if output is None else output
        output.sequences, output.metadata = sequences, metadata
        output.timings = {"generate": time.perf_counter() - began, "locate": 0.0, "propagate": 0.0}
        output.warnings = [answer.warnings for answer in answers]
        output.num_frames = [len(streams[index]) if 0 <= index < len(streams) else 0 for index in rows]
        output.objects, output.located, output.tracked = ([[] for _ in answers] for _ in range(3))
        for video, stream in enumerate(streams):
            own = {row: answers[row] for row, index in enumerate(rows) if index == video and answers[row].positions}
            pixels = None if proposer_pixel_values is None else proposer_pixel_values[video : video + 1]
            size = None if original_sizes is None else tuple(original_sizes[video].tolist())
            yield from self._ground_video(own, stream, pixels, size, keep_logits, output)
        return output

    def _check_generation(self, options: dict):
        """Options of `generate`, completed in place by the longest answer."""
        if options.get("num_beams", 1) != 1 or options.get("num_return_sequences", 1) != 1:
            raise ValueError("ground() reads the states of one sequence per row: use num_beams=1.")
        if options.get("max_new_tokens", 0) is None:  # as if not given
            del options["max_new_tokens"]
        if self.generation_config.max_new_tokens is None and not options.keys() & _LENGTH_OPTIONS:
            options["max_new_tokens"] = DEFAULT_NEW_TOKENS

    def _streams(self, mask_pixel_values, num_mask_frames, frames) -> list[FrameStream]:
        if frames is not None:
            return list(frames) if isinstance(frames, (list, tuple)) else [frames]
        if mask_pixel_values is None:
            return []
        counts = [mask_pixel_values.shape[1]] * len(mask_pixel_values)
        counts = counts if num_mask_frames is None else num_mask_frames.tolist()
        return [TensorFrames(clip[:count]) for clip, count in zip(mask_pixel_values, counts, strict=True)]

    def _ground_video(
        self,
        answers: dict[int, "AnswerTokens"],
        stream: FrameStream,
        proposer_pixel_values: torch.Tensor | None,
        original_size: tuple[int, int] | None,
        keep_logits: bool,
        output: GroundingOutput,
    ) -> Iterator[tuple[int, FrameMasks]]:
        """Boxes and masks for all rows that ask about one video; each frame is encoded once for all of them, and once
        more for objects that were missed at first."""
        began = time.perf_counter()
        pyramids = self.model.mask_tracker.encode_video(stream)
        batch = FollowedObjects()
        tokens: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # [BOX] and [SEG] embeddings of each row
        for row, answer in answers.items():
            box_tokens = self._box_queries(answer.box, answer.seg)
            located = self.locate(box_tokens, pyramids, proposer_pixel_values) if len(box_tokens) else []
            broken = sum(place.drop_broken_boxes() for place in located)
            if broken:
                answer.warnings.append(f"{broken} of the boxes found are not finite or inverted and were dropped.")
            answer.warn_of_weak_boxes(located, self.config.filtration_config.score_threshold)
            if original_size is not None and located:
                self._apply_box_prior(located, pyramids.at(0), original_size)
            output.located[row] = located
            tokens[row] = box_tokens, self._mask_queries(answer.box, answer.seg, located)
            for token, tracked in enumerate(self.tracked_objects(tokens[row][1], located)):
                place = located[min(token, len(located) - 1)] if located else None
                query = box_tokens[min(token, len(box_tokens) - 1)] if located else None
                output.start_objects(row, answer.positions[token], tracked, place, query, batch)
        output.timings["locate"] += time.perf_counter() - began
        began = time.perf_counter()
        while batch.tracked:
            for masks in self.propagate(pyramids, batch.tracked, batch.box_embeddings):
                for row, own in masks.by_owner(batch.owners).items():
                    for position, place in enumerate(own.objects):
                        output.objects[row][place].record(own, position, keep_logits)
                    yield row, own
            batch = self._missed_objects(answers, tokens, output)
        output.timings["propagate"] += time.perf_counter() - began

    def _missed_objects(
        self,
        answers: dict[int, "AnswerTokens"],
        tokens: dict[int, tuple[torch.Tensor, torch.Tensor]],
        output: GroundingOutput,
    ) -> FollowedObjects:
        """Objects that another searched frame shows and no followed mask covers there: of each token those of the next
        such frame. They are added to the output; none are left in the end, as every frame is looked at once."""
        batch, iou = FollowedObjects(), self.config.filtration_config.completion_iou
        for row, (box_tokens, seg_tokens) in tokens.items():
            for token, place in enumerate(output.located[row] if iou is not None else ()):
                position = answers[row].positions[token]
                own = [item for item in output.objects[row] if item.token_position == position]
                missed = None
                while place.elsewhere and own and (missed is None or not len(missed.boxes)):
                    other = place.elsewhere.pop(0)
                    missed = other.not_covered(torch.stack([item.frame_boxes[other.frame_index] for item in own]), iou)
                if missed is not None:
                    (tracked,) = self.tracked_objects(seg_tokens[token : token + 1], [missed])
                    output.start_objects(row, position, tracked, missed, box_tokens[token], batch)
        return batch

    def _read_answer(self, ids: torch.Tensor, states: torch.Tensor) -> AnswerTokens:
        """[BOX] and [SEG] embeddings of one generated answer, `ids` `(L,)` and `states` `(L, D)`.

        The i-th [BOX] goes with the i-th [SEG]; what has no partner is dropped with a warning, unless the answer has
        only one of the two kinds. Released models reuse the last boxes instead.
        """
        config = self.config
        box = (ids == config.box_token_id).nonzero().flatten()
        seg = (ids == config.seg_token_id).nonzero().flatten()
        warnings = []
        if len(box) and len(seg) and len(box) != len(seg) and config.filtration_config.variant != "released":
            pairs = min(len(box), len(seg))
            warnings.append(
                f"The answer has {len(box)} [BOX] and {len(seg)} [SEG] tokens; the first {pairs} of each are used."
            )
            box, seg = box[:pairs], seg[:pairs]
        return AnswerTokens(
            box=self.model.token_embeddings(states[box], config.box_token_id),
            seg=self.model.token_embeddings(states[seg], config.seg_token_id),
            positions=(seg if len(seg) else box).tolist(),
            warnings=warnings,
        )
