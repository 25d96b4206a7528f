"""SAM2 over a video: prompt, decode, remember.

The modules are transformers' `Sam2VideoModel`; the loop is ours, because the stock one has no place for language
embeddings, runs under inference mode and grows with the video. Here every frame is encoded once, all objects of a
video share the batch axis, and the memory of an object holds a fixed number of frames and pointers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Sam2VideoModel
from transformers import initialization as init
from transformers.models.sam2_video.modeling_sam2_video import get_1d_sine_pe
from transformers.utils import ModelOutput

from .configuration_sparrow import MaskTrackerConfig
from .frame_pyramid import ClipPyramids, FramePyramid, FrameStream, VideoPyramids
from .modeling_base import SparrowPreTrainedModel

NO_OBJECT_LOGIT = -1024.0  # mask logit of an absent object, as in SAM2


@dataclass
class MaskPrompt:
    """What prompts `N` objects on one frame. Coordinates are normalised, xyxy.

    Args:
        tokens: `(N, K, D)` language embeddings ([SEG]).
        boxes: `(N, 4)`.
        points: `(N, P, 2)` with `labels` `(N, P)`: 1 on the object, 0 off it.
        masks: `(N, H, W)` bool, taken as the answer on this frame instead of decoding one.
        previous_logits: `(N, S/4, S/4)` low-resolution mask logits that this prompt corrects.
    """

    tokens: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    points: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    previous_logits: torch.Tensor | None = None

    @property
    def num_points(self) -> int:
        """Points as SAM2 counts them for its choice between one mask and three: a box is two."""
        return (2 if self.boxes is not None else 0) + (self.points.shape[1] if self.points is not None else 0)

    @staticmethod
    def cat(prompts: list["MaskPrompt"]) -> "MaskPrompt":
        """Prompts of the same kind, one object after the other."""
        fields = {name: [getattr(prompt, name) for prompt in prompts] for name in vars(prompts[0])}
        return MaskPrompt(**{name: None if parts[0] is None else torch.cat(parts) for name, parts in fields.items()})


@dataclass
class FrameMasks(ModelOutput):
    """Masks of `N` objects on one frame.

    Args:
        frame_index: position of the frame in the video.
        objects: which objects of the video these are, list of `N` int.
        logits: `(N, S/4, S/4)` mask logits; `NO_OBJECT_LOGIT` everywhere where the object is absent.
        raw_logits: the same before absent objects were emptied; what a loss compares.
        score: `(N,)` confidence in [0, 1]: probability that the object is there times predicted IoU of its mask.
        object_logits: `(N,)` logit of the object being there.
        pointer: `(N, D)` object pointer for the memory.
        reprompt_boxes: `(N, 4)` normalised xyxy that prompted an object again on this frame, NaN for the others; None
            if none was.
    """

    frame_index: int | None = None
    objects: list[int] | None = None
    logits: torch.Tensor | None = None
    raw_logits: torch.Tensor | None = None
    score: torch.Tensor | None = None
    object_logits: torch.Tensor | None = None
    pointer: torch.Tensor | None = None
    reprompt_boxes: torch.Tensor | None = None

    def by_owner(self, owners: list[tuple[int, int]]) -> dict[int, "FrameMasks"]:
        """Split by owner; `owners[o]` names the owner of object `o` and its place among the owner's objects."""
        rows: dict[int, list[int]] = {}
        for row, tracked in enumerate(self.objects):
            rows.setdefault(owners[tracked][0], []).append(row)
        tensors = ("logits", "raw_logits", "score", "object_logits", "pointer")
        return {
            owner: FrameMasks(
                frame_index=self.frame_index,
                objects=[owners[self.objects[row]][1] for row in own],
                **{name: self[name][own] for name in tensors},
                reprompt_boxes=None if self.reprompt_boxes is None else self.reprompt_boxes[own],
            )
            for owner, own in rows.items()
        }


@dataclass
class FrameMemory:
    """Memory of one frame: `features` `(h * w, N, M)` or None once too old, `pointer` `(N, D)`."""

    features: torch.Tensor | None
    pointer: torch.Tensor


@dataclass
class MemoryBank:
    """What is remembered of `N` objects: prompted frames, and the last few others on the way.

    Bounded whatever the length of the video: `num_recent` spatial memories and `num_pointers` pointers beside the
    prompted frames. One bank serves one direction; `restart()` keeps the prompted frames for the other.
    """

    num_recent: int
    num_pointers: int
    prompted: dict[int, FrameMemory] = field(default_factory=dict)
    recent: dict[int, FrameMemory] = field(default_factory=dict)

    def add_prompted(self, frame_index: int, memory: FrameMemory):
        self.prompted[frame_index] = memory

    def add_recent(self, frame_index: int, memory: FrameMemory):
        self.recent[frame_index] = memory
        for index in list(self.recent):
            age = abs(frame_index - index)
            if age >= self.num_pointers and age >= self.num_recent:
                del self.recent[index]
            elif age >= self.num_recent:
                self.recent[index].features = None

    def restart(self) -> "MemoryBank":
        return MemoryBank(self.num_recent, self.num_pointers, prompted=dict(self.prompted))

    def spatial(self, frame_index: int, reverse: bool, max_prompted: int) -> list[tuple[int, torch.Tensor]]:
        """(temporal position, features): 0 for prompted frames, otherwise the distance in frames, farthest first."""
        prompted = self.closest_prompted(frame_index, max_prompted)
        memories = [(0, self.prompted[index].features) for index in prompted]
        step = -1 if reverse else 1
        for distance in range(self.num_recent, 0, -1):
            index = frame_index - step * distance
            memory = self.recent.get(index)
            if memory is None and index not in prompted:
                memory = self.prompted.get(index)
            if memory is not None and memory.features is not None:
                memories.append((distance, memory.features))
        return memories

    def pointers(self, frame_index: int, reverse: bool, max_pointers: int) -> list[tuple[int, torch.Tensor]]:
        """(signed distance in frames, pointer) of prompted frames already passed and of recent frames."""
        step = -1 if reverse else 1
        found = [
            ((frame_index - index) * step, memory.pointer)
            for index, memory in self.prompted.items()
            if (frame_index - index) * step >= 0
        ]
        for distance in range(1, max_pointers):
            memory = self.recent.get(frame_index - step * distance)
            if memory is not None:
                found.append((distance, memory.pointer))
        return found

    def closest_prompted(self, frame_index: int, limit: int) -> list[int]:
        """Prompted frames to attend to, at most `limit` (-1: all): nearest before, nearest after, then nearest."""
        indices = list(self.prompted)
        if limit == -1 or len(indices) <= limit:
            return indices
        before = [index for index in indices if index < frame_index]
        after = [index for index in indices if index >= frame_index]
        chosen = ([max(before)] if before else []) + ([min(after)] if after else [])
        rest = sorted((index for index in indices if index not in chosen), key=lambda index: abs(index - frame_index))
        return (chosen + rest)[:limit]


@dataclass
class TrackedObject:
    """An object to follow.

    Args:
        frame_index: frame it is prompted on.
        prompts: given one after the other, each with a leading axis of 1; with framewise decoding one row per box.
    """

    frame_index: int
    prompts: list[MaskPrompt]


@dataclass
class Track:
    """Objects that were prompted on the same frame and so share a memory bank."""

    objects: list[int]
    frame_index: int
    prompts: list[MaskPrompt]
    memory: MemoryBank


class Sam2Segmenter(Sam2VideoModel):
    """transformers' SAM2, whose initialisation leaves out one parameter."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self:
            init.zeros_(self.no_memory_embedding)


class MaskTracker(SparrowPreTrainedModel):
    """Prompting, decoding and memory on top of SAM2's modules; see [`MaskTrackerConfig`].

    `encode_frames` -> `prompt` on one frame -> `step` frame by frame, or `propagate` for a whole video. Nothing is
    kept on the module: the state of a video is its `MemoryBank`s. The same calls serve training and inference.
    """

    config: MaskTrackerConfig
    config_class = MaskTrackerConfig

    def __init__(self, config: MaskTrackerConfig):
        super().__init__(config)
        self.sam2 = Sam2Segmenter(config.sam2_config)
        self.post_init()

    def encode_frames(self, pixel_values: torch.Tensor) -> FramePyramid:
        """Pyramid of frames `(F, 3, S, S)`, normalised as SAM2 expects."""
        output = self.sam2.vision_encoder(pixel_values.to(self.sam2.no_memory_embedding.dtype))
        fine, middle, coarse = output.fpn_hidden_states
        decoder = self.sam2.mask_decoder
        return FramePyramid(
            levels=(decoder.conv_s0(fine), decoder.conv_s1(middle), coarse),
            position=output.fpn_position_encoding[-1][:1],
        )

    def encode_video(self, frames: FrameStream | torch.Tensor) -> VideoPyramids:
        """The frames of a video, a stream or `(T, 3, S, S)`, encoded as they are walked through."""
        device = self.sam2.no_memory_embedding.device

        def encode(pixel_values: torch.Tensor) -> FramePyramid:
            return self.encode_frames(pixel_values.to(device))

        return VideoPyramids(encode, frames, self.config.frame_batch_size, self.config.max_cached_frames)

    def new_memory(self) -> MemoryBank:
        sam2 = self.config.sam2_config
        return MemoryBank(num_recent=sam2.num_maskmem - 1, num_pointers=sam2.max_object_pointers_in_encoder)

    # ------------------------------------------------------------------ one frame

    def embed_prompt(self, prompt: MaskPrompt) -> tuple[torch.Tensor, torch.Tensor]:
        """Sparse `(N, 1, P, D)` and dense `(N, D, h, w)` prompt embeddings.

        Box corners and points come first, then the language embeddings. SAM2's closing empty point is appended to
        clicks and boxes only when no language embedding follows (paper: the prompt is box and [SEG] together).
        """
        size = self.config.image_size
        encoder = self.sam2.prompt_encoder
        points, labels = self._points_of(prompt, size)
        masks = None
        if prompt.previous_logits is not None:
            masks = prompt.previous_logits[:, None].clamp(-32.0, 32.0)
        if points is not None:
            sparse, dense = encoder(points[:, None], labels[:, None], None, masks)
            if prompt.tokens is not None and prompt.num_points:
                sparse = sparse[:, :, :-1]
        else:
            sparse, dense = None, encoder(None, None, None, masks)[1]
        if prompt.tokens is not None:
            tokens = prompt.tokens[:, None].to(dense.dtype)
            sparse = tokens if sparse is None else torch.cat([sparse, tokens], dim=2)
        return sparse, dense

    def _points_of(self, prompt: MaskPrompt, size: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Points `(N, P, 2)` in pixels of the SAM2 frame, labels `(N, P)`; corners of a box are labelled 2 and 3."""
        points, labels = [], []
        if prompt.boxes is not None:
            points.append(prompt.boxes.unflatten(-1, (2, 2)) * size)
            labels.append(torch.tensor([2, 3], device=prompt.boxes.device).expand(len(prompt.boxes), 2))
        if prompt.points is not None:
            points.append(prompt.points * size)
            labels.append(prompt.labels.long())
        if not points:
            padding = self.config.num_padding_points if prompt.tokens is not None else 2
            num_objects = next(len(value) for value in vars(prompt).values() if value is not None)
            return self._empty_points(num_objects, padding) if padding else (None, None)
        return torch.cat(points, dim=1), torch.cat(labels, dim=1)

    def _empty_points(self, num_objects: int, padding: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
        """Empty points and labels that make `padding` empty rows: the prompt encoder appends one of its own."""
        reference = self.sam2.no_memory_embedding
        points = torch.zeros(num_objects, padding - 1, 2, device=reference.device, dtype=reference.dtype)
        return points, torch.full((num_objects, padding - 1), -1, device=reference.device)

    def decode(
        self,
        pyramid: FramePyramid,
        image_features: torch.Tensor,
        sparse: torch.Tensor,
        dense: torch.Tensor,
        multimask: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the mask decoder for `N` objects on one frame.

        Args:
            pyramid: of that frame (`F` = 1).
            image_features: `(N, C, h, w)` or `(1, C, h, w)`, conditioned on memory or not.
            sparse: `(N, 1, P, D)`.
            dense: `(N or 1, D, h, w)`.
            multimask: take the best of three masks by predicted IoU.

        Returns:
            mask logits `(N, S/4, S/4)`, predicted IoU `(N,)`, output token `(N, D)`, object logits `(N,)`.
        """
        N = len(sparse)
        positions = self.sam2.get_image_wide_positional_embeddings().to(image_features.dtype)
        masks, iou, tokens, object_logits = self.sam2.mask_decoder(
            image_embeddings=image_features.expand(N, -1, -1, -1),
            image_positional_embeddings=positions.expand(N, -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
            high_resolution_features=[level.expand(N, -1, -1, -1) for level in pyramid.levels[:2]],
        )
        best = iou[:, 0].argmax(-1)
        rows = torch.arange(N, device=best.device)
        token = tokens[rows, 0, best if multimask else torch.zeros_like(best)]
        return masks[rows, 0, best], iou[rows, 0, best], token, object_logits[:, 0, 0]

    def prompt(
        self,
        pyramid: FramePyramid,
        prompt: MaskPrompt,
        frame_index: int = 0,
        image_features: torch.Tensor | None = None,
    ) -> FrameMasks:
        """Masks of the prompted objects on one frame; no memory is read unless `image_features` were conditioned.

        Args:
            pyramid: of that frame (`F` = 1).
            prompt: of `N` objects.
            frame_index: recorded in the result.
            image_features: `(N, C, h, w)` to use instead of the frame's own features without memory.
        """
        if prompt.masks is not None:
            return self._masks_as_answer(pyramid, prompt.masks, frame_index)
        if image_features is None:
            image_features = self.features_without_memory(pyramid)
        sparse, dense = self.embed_prompt(prompt)
        return self._answer(
            frame_index, *self.decode(pyramid, image_features, sparse, dense, self._use_multimask(prompt.num_points))
        )

    def prompt_in_turn(self, pyramid: FramePyramid, prompts: list[MaskPrompt], frame_index: int = 0) -> FrameMasks:
        """Prompt the same objects several times, each time correcting the mask so far (released video branch)."""
        masks = self.prompt(pyramid, prompts[0], frame_index)
        for prompt in prompts[1:]:
            prompt.previous_logits = masks.logits
            masks = self.prompt(pyramid, prompt, frame_index)
        return masks

    def features_without_memory(self, pyramid: FramePyramid) -> torch.Tensor:
        """`(F, C, h, w)`: the coarse level plus SAM2's learned "no memory" vector."""
        return pyramid.levels[-1] + self.sam2.no_memory_embedding.reshape(1, -1, 1, 1)

    def _use_multimask(self, num_points: int) -> bool:
        sam2 = self.config.sam2_config
        return sam2.multimask_output_in_sam and sam2.multimask_min_pt_num <= num_points <= sam2.multimask_max_pt_num

    def _answer(self, frame_index: int, logits, iou, token, object_logits) -> FrameMasks:
        """Empty the masks of absent objects and make the pointer."""
        present = object_logits > 0
        pointer = self.sam2.object_pointer_proj(token)
        pointer = torch.where(present[:, None], pointer, self.sam2.no_object_pointer.to(pointer.dtype))
        return FrameMasks(
            frame_index=frame_index,
            objects=list(range(len(logits))),
            logits=torch.where(present[:, None, None], logits, NO_OBJECT_LOGIT),
            raw_logits=logits,
            score=object_logits.sigmoid() * iou,
            object_logits=object_logits,
            pointer=pointer,
        )

    def _masks_as_answer(self, pyramid: FramePyramid, masks: torch.Tensor, frame_index: int) -> FrameMasks:
        """Take given masks `(N, H, W)` as the answer; the pointer still comes from the decoder (SAM2's rule)."""
        size = (self.config.image_size, self.config.image_size)
        reference = pyramid.levels[-1]
        masks = masks[:, None].to(torch.float32)
        if masks.shape[-2:] != size:
            masks = F.interpolate(masks, size=size, mode="bilinear", align_corners=False, antialias=True)
            masks = (masks >= 0.5).float()
        masks = masks.to(reference.dtype)
        logits = F.interpolate(
            masks.float() * 20.0 - 10.0,
            size=self.sam2.prompt_encoder.mask_input_size,
            mode="bilinear",
            align_corners=False,
            antialias=True,
        ).to(reference.dtype)
        points, labels = self._empty_points(len(masks))
        sparse, dense = self.sam2.prompt_encoder(
            points[:, None], labels[:, None], None, self.sam2.mask_downsample(masks)
        )
        _, _, token, _ = self.decode(pyramid, reference, sparse, dense, multimask=False)
        present = masks.flatten(1).any(dim=1)
        object_logits = torch.where(present, 10.0, -10.0).to(reference.dtype)
        return self._answer(frame_index, logits[:, 0], torch.ones_like(object_logits), token, object_logits)

    # ------------------------------------------------------------------ memory

    def remember(self, pyramid: FramePyramid, masks: FrameMasks, prompted: bool) -> FrameMemory:
        """Encode a frame and its masks into memory."""
        sam2, config = self.sam2, self.config
        mask = F.interpolate(
            masks.logits[:, None].float(), size=(config.image_size,) * 2, mode="bilinear", align_corners=False
        ).to(masks.logits.dtype)
        mask = (mask > 0).to(mask.dtype) if prompted and config.binarize_prompted_memory else mask.sigmoid()
        mask = mask * config.sam2_config.sigmoid_scale_for_mem_enc + config.sam2_config.sigmoid_bias_for_mem_enc
        features, _ = sam2.memory_encoder(pyramid.levels[-1].expand(len(mask), -1, -1, -1), mask)
        if sam2.occlusion_spatial_embedding_parameter is not None:
            absent = (masks.object_logits <= 0).to(features.dtype)[:, None, None, None]
            features = features + absent * sam2.occlusion_spatial_embedding_parameter[..., None, None]
        if config.memory_dtype is not None:
            features = features.to(getattr(torch, config.memory_dtype))
        return FrameMemory(features=features.flatten(2).permute(2, 0, 1), pointer=masks.pointer)

    def condition(
        self,
        pyramid: FramePyramid,
        memory: MemoryBank,
        frame_index: int,
        num_frames: int | None = None,
        reverse: bool = False,
    ) -> torch.Tensor:
        """Features of a frame after attending to the memory: `(N, C, h, w)`.

        Args:
            num_frames: length of the video; bounds the pointers of a short one as SAM2 does. None: unknown.
        """
        sam2 = self.sam2
        C, h, w = pyramid.levels[-1].shape[1:]
        dtype = pyramid.levels[-1].dtype
        spatial = memory.spatial(frame_index, reverse, self.config.sam2_config.max_cond_frame_num)
        N = spatial[0][1].shape[1]
        position = (
            sam2.memory_encoder.position_encoding((1, sam2.mem_dim, h, w), pyramid.levels[-1].device, dtype)
            .flatten(2)
            .permute(2, 0, 1)
        )
        tokens = [features.to(dtype) for _, features in spatial]
        positions = [
            (position + sam2.memory_temporal_positional_encoding[distance - 1]).expand(-1, N, -1)
            for distance, _ in spatial
        ]
        max_pointers = self.config.sam2_config.max_object_pointers_in_encoder
        if num_frames is not None:
            max_pointers = min(num_frames, max_pointers)
        pointers = memory.pointers(frame_index, reverse, max_pointers)
        num_pointer_tokens = 0
        if pointers:
            pointer_tokens, pointer_positions = self._pointer_tokens(pointers, max_pointers)
            num_pointer_tokens = len(pointer_tokens)
            tokens.append(pointer_tokens.to(dtype))
            positions.append(pointer_positions.to(dtype))
        current = pyramid.levels[-1].flatten(2).permute(2, 0, 1).expand(-1, N, -1)
        conditioned = sam2.memory_attention(
            current_vision_features=current,
            current_vision_position_embeddings=pyramid.position.to(dtype)
            .flatten(2)
            .permute(2, 0, 1)
            .expand(-1, N, -1),
            memory=torch.cat(tokens),
            memory_posision_embeddings=torch.cat(positions),
            num_object_pointer_tokens=num_pointer_tokens,
        )  # (1, N, h * w, C)
        return conditioned.squeeze(0).transpose(1, 2).reshape(N, C, h, w)

    def _pointer_tokens(
        self, pointers: list[tuple[int, torch.Tensor]], max_pointers: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Object pointers cut into tokens of the memory's width, `(P, N, M)`, and their positions."""
        sam2 = self.sam2
        stacked = torch.stack([pointer for _, pointer in pointers])  # (P, N, D)
        P, N, D = stacked.shape
        splits = D // sam2.mem_dim
        tokens = stacked.reshape(P, N, splits, sam2.mem_dim).permute(0, 2, 1, 3).flatten(0, 1)
        if not self.config.sam2_config.enable_temporal_pos_encoding_for_object_pointers:
            return tokens, torch.zeros_like(tokens)
        distance = torch.tensor([d for d, _ in pointers], device=stacked.device, dtype=torch.float32)
        code = get_1d_sine_pe(distance / float(max(max_pointers - 1, 1)), dim=D).to(stacked.dtype)
        positions = sam2.temporal_positional_encoding_projection_layer(code)
        return tokens, positions[:, None].expand(-1, N, -1).repeat_interleave(splits, dim=0)

    def step(
        self,
        pyramid: FramePyramid,
        memory: MemoryBank,
        frame_index: int,
        num_frames: int | None = None,
        reverse: bool = False,
    ) -> FrameMasks:
        """Carry the objects of a memory bank onto the next frame; add it to the memory with `remember`."""
        image_features = self.condition(pyramid, memory, frame_index, num_frames, reverse)
        points, labels = self._empty_points(len(image_features))
        sparse, dense = self.sam2.prompt_encoder(points[:, None], labels[:, None], None, None)
        multimask = self.config.sam2_config.multimask_output_for_tracking and self._use_multimask(0)
        return self._answer(frame_index, *self.decode(pyramid, image_features, sparse, dense, multimask))

    # ------------------------------------------------------------------ a whole video

    def propagate(
        self,
        frames: VideoPyramids | ClipPyramids,
        objects: list[TrackedObject],
        reprompt: Callable[[FramePyramid, list[int]], tuple[list[int], MaskPrompt]] | None = None,
    ) -> Iterator[FrameMasks]:
        """Masks of every object on every frame: back from the prompted frame, then forwards.

        One [`FrameMasks`] for each frame and each group of objects that share a prompted frame; frames come in the
        order of the walk, not of time.

        Args:
            frames: pyramids of the video.
            objects: what to follow.
            reprompt: called with the pyramid of a frame and the objects whose score fell below
                `config.reprompt_threshold`; returns those it could locate again and their prompt.
        """
        if not objects:
            return
        if self.config.propagation == "framewise":
            yield from self._decode_every_frame(frames, objects)
            return
        tracks = self._group(objects)
        earliest = min(track.frame_index for track in tracks)
        latest = max(track.frame_index for track in tracks)
        for index, pyramid in frames.walk(latest, reverse=True, keep_from=earliest + 1):
            for track in tracks:
                if index <= track.frame_index:
                    yield self._advance(track, pyramid, index, len(frames), True, reprompt)
        for track in tracks:
            track.memory = track.memory.restart()
        for index, pyramid in frames.walk(earliest + 1):
            for track in tracks:
                if index > track.frame_index:
                    yield self._advance(track, pyramid, index, len(frames), False, reprompt)

    def _group(self, objects: list[TrackedObject]) -> list[Track]:
        """Objects prompted on the same frame go together, at most `object_batch_size` at a time."""
        tracks: list[Track] = []
        limit = self.config.object_batch_size if self.config.joint_prompt else 1
        by_frame: dict[int, list[int]] = {}
        for row, tracked in enumerate(objects):
            by_frame.setdefault(tracked.frame_index, []).append(row)
        for frame_index, rows in sorted(by_frame.items()):
            for start in range(0, len(rows), limit):
                chunk = rows[start : start + limit]
                turns = zip(*(objects[row].prompts for row in chunk), strict=True)
                prompts = [MaskPrompt.cat(list(turn)) for turn in turns]
                tracks.append(Track(chunk, frame_index, prompts, self.new_memory()))
        return tracks

    def _advance(
        self, track: Track, pyramid: FramePyramid, index: int, num_frames: int, reverse: bool, reprompt
    ) -> FrameMasks:
        """One frame further for one track: prompt or step, then remember."""
        if len(pyramid) > 1:
            pyramid = pyramid[track.objects]
        if index == track.frame_index:
            masks = self.prompt_in_turn(pyramid, track.prompts, index)
            track.memory.add_prompted(index, self.remember(pyramid, masks, prompted=True))
        else:
            masks = self.step(pyramid, track.memory, index, num_frames, reverse)
            if reprompt is not None and self.config.reprompt_threshold is not None:
                masks = self._prompt_again(track, pyramid, masks, num_frames, reverse, reprompt)
            track.memory.add_recent(index, self.remember(pyramid, masks, prompted=False))
        masks.objects = track.objects
        return masks

    def _prompt_again(
        self, track: Track, pyramid: FramePyramid, masks: FrameMasks, num_frames: int, reverse: bool, reprompt
    ) -> FrameMasks:
        """Locate weak objects anew on this frame; the new mask replaces the carried one where its score is higher."""
        weak = (masks.score < self.config.reprompt_threshold).nonzero().flatten().tolist()
        if not weak:
            return masks
        found, prompt = reprompt(pyramid, [track.objects[row] for row in weak])
        if not found:
            return masks
        rows = torch.tensor([track.objects.index(tracked) for tracked in found], device=masks.score.device)
        features = self.condition(pyramid, track.memory, masks.frame_index, num_frames, reverse)[rows]
        again = self.prompt(pyramid if len(pyramid) == 1 else pyramid[rows], prompt, masks.frame_index, features)
        better = again.score > masks.score[rows]
        for name in ("logits", "raw_logits", "score", "object_logits", "pointer"):
            masks[name] = masks[name].index_copy(0, rows[better], again[name][better])
        if better.any():
            nowhere = prompt.boxes.new_full((len(masks.score), 4), torch.nan)
            masks.reprompt_boxes = nowhere.index_copy(0, rows[better], prompt.boxes[better])
        return masks

    def _decode_every_frame(
        self, frames: VideoPyramids | ClipPyramids, objects: list[TrackedObject]
    ) -> Iterator[FrameMasks]:
        """Released frame-wise branch: no memory, the same prompt on every frame, boxes of an object merged by maximum.

        The object score plays no part there.
        """
        counts = [len(tracked.prompts[0].tokens) for tracked in objects]
        prompt = MaskPrompt.cat([tracked.prompts[0] for tracked in objects])
        rows = torch.repeat_interleave(torch.arange(len(objects)), torch.tensor(counts))
        sparse, dense = self.embed_prompt(prompt)
        for index, pyramid in frames.walk(0):
            if len(pyramid) > 1:
                pyramid = pyramid[rows.to(pyramid.levels[0].device)]
            features = self.features_without_memory(pyramid)
            logits, iou, token, object_logits = self.decode(pyramid, features, sparse, dense, multimask=False)
            score = object_logits.sigmoid() * iou
            merged = [part.amax(0) for part in logits.split(counts)]
            yield FrameMasks(
                frame_index=index,
                objects=list(range(len(objects))),
                logits=torch.stack(merged),
                raw_logits=torch.stack(merged),
                score=torch.stack([part.amax(0) for part in score.split(counts)]),
                object_logits=torch.stack([part.amax(0) for part in object_logits.split(counts)]),
                pointer=torch.stack([part[0] for part in token.split(counts)]),
            )
