"""`SparrowProcessor`: questions and videos to tensors, model outputs to results."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from .errors import PromptError
from .frame_sampling import pad_to_multiple, sample_frame_indices
from .pixel_streams import proposer_pixels, segmenter_pixels, spatial_pixels, temporal_pixels
from .results import GroundingResult, ObjectTrack, decode_mask, encode_mask, mask_to_box
from .video_io import VideoReader, open_video

BOX_TOKEN, SEG_TOKEN, VIDEO_TOKEN, TSF_TOKEN = "[BOX]", "[SEG]", "<video>", "<tsf>"
MAX_PROMPT_CHARACTERS = 2000

# How a query is put to the model: the strings that VideoGLaMM and SPARROW checkpoints were trained with.
TASK_PROMPTS = {
    "refer": "What is {query} in this video? Please respond with segmentation masks.",
    "box": "Can you segment {query} in this video?",
    "describe": "Could you please give me a detailed description of the video? "
    "Please respond with interleaved segmentation masks for the corresponding parts of the answer.",
    "ask": "{query}",
}


@dataclass
class GroundingRequest:
    """What one row of a batch asks about; travels through `model.ground` and comes back with its output.

    Args:
        query: the user's words.
        task: key of the processor's `task_prompts`.
        path: of the video, None if it came from memory.
        size: (H, W) of its upright frames.
        fps: mean frame rate.
        timestamps: float64 `(T,)` seconds.
        sampled_frames: the frames that the language model sees.
        warnings: sentences from reading the video.
    """

    query: str
    task: str
    path: str | None
    size: tuple[int, int]
    fps: float
    timestamps: np.ndarray
    sampled_frames: list[int]
    warnings: list[str]

    @classmethod
    def of(cls, query: str, task: str, reader: VideoReader, sampled: np.ndarray) -> "GroundingRequest":
        return cls(
            query=query,
            task=task,
            path=reader.path,
            size=(reader.height, reader.width),
            fps=reader.fps,
            timestamps=reader.timestamps,
            sampled_frames=sampled.tolist(),
            warnings=list(reader.warnings),
        )


class MaskFrameStream:
    """The frames of a video for the mask tracker, `(3, S, S)` float32, decoded and resized when asked for."""

    def __init__(self, reader: VideoReader, size: int):
        self.reader, self.size = reader, size

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.stack([segmenter_pixels(frame, self.size) for frame in self.reader.read(indices)])

    def frames(self, start: int = 0) -> Iterator[torch.Tensor]:
        return (segmenter_pixels(frame, self.size) for frame in self.reader.frames(start))

    def frames_reversed(self, start: int) -> Iterator[torch.Tensor]:
        return (segmenter_pixels(frame, self.size) for frame in self.reader.frames_reversed(start))


class MaskCollector:
    """Turns mask logits into run-length encodings frame by frame; pass it to `ground` as `mask_sink`.

    A result of a long video is then small while it grows: nothing but encodings, boxes and scores is kept.

    Args:
        requests: one per row.
        mask_threshold: logit above which a pixel belongs to the object.
        visibility_threshold: logit of the object being there, above which it counts as visible.
    """

    def __init__(
        self, requests: list[GroundingRequest], mask_threshold: float = 0.0, visibility_threshold: float = 0.0
    ):
        self.requests = requests
        self.mask_threshold, self.visibility_threshold = mask_threshold, visibility_threshold
        self.tracks: list[dict[int, dict[str, Any]]] = [{} for _ in requests]

    def __call__(self, row: int, masks):
        """Take over the masks of one frame: an object with `frame_index`, `objects`, `logits`, `score` and
        `object_logits`, as `model.propagate` yields them."""
        self.add(row, masks.frame_index, masks.objects, masks.logits, masks.score, masks.object_logits)

    def add(
        self,
        row: int,
        frame: int,
        objects: list[int],
        logits: torch.Tensor,
        scores: torch.Tensor,
        object_logits: torch.Tensor,
    ):
        """
        Args:
            row: which request.
            frame: index of the frame.
            objects: which objects of the row.
            logits: `(n, h, w)` over the square frame.
            scores, object_logits: `(n,)`.
        """
        size = self.requests[row].size
        logits = F.interpolate(logits[:, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0]
        masks = (logits > self.mask_threshold).cpu().numpy()
        scores = torch.where(scores.isfinite(), scores, 0.0)  # a broken model must not break its result
        there = (object_logits > self.visibility_threshold).tolist()
        for k, item in enumerate(objects):
            track = self._track(row, item)
            track["scores"][frame] = float(scores[k])
            if there[k] and masks[k].any():
                track["visible"][frame] = True
                track["boxes"][frame] = mask_to_box(masks[k])
                track["rles"][frame] = encode_mask(masks[k])

    def _track(self, row: int, item: int) -> dict[str, Any]:
        T = len(self.requests[row].timestamps)
        if item not in self.tracks[row]:
            self.tracks[row][item] = {
                "boxes": np.full((T, 4), np.nan, dtype=np.float32),
                "scores": np.zeros(T, dtype=np.float32),
                "visible": np.zeros(T, dtype=bool),
                "rles": [None] * T,
            }
        return self.tracks[row][item]

    def frame_object(self, row: int, item: int, frame: int) -> dict[str, Any]:
        """What was collected of one object on one frame: `id`, `score`, `visible`, `box` and `mask`."""
        track = self._track(row, item)
        rle = track["rles"][frame]
        return {
            "id": item,
            "score": float(track["scores"][frame]),
            "visible": bool(track["visible"][frame]),
            "box": None if rle is None else track["boxes"][frame].tolist(),
            "mask": np.zeros(self.requests[row].size, dtype=bool) if rle is None else decode_mask(rle),
        }

    def object_track(
        self, row: int, item: int, phrase: str, span: tuple[int, int] | None, score: float
    ) -> ObjectTrack:
        """What was collected of one object."""
        fields = self._track(row, item)
        return ObjectTrack(id=item, phrase=phrase, span=span, score=score, size=self.requests[row].size, **fields)


class SparrowProcessor(ProcessorMixin):
    """Prepares videos and questions for [`SparrowForVideoGrounding`] and reads its answers.

    Args:
        tokenizer: knows `[BOX]`, `[SEG]`, `<video>` and `<tsf>` as special tokens and has a chat template that writes
            `<video>` and `<tsf>` for content of type `video` and `tracked_features`.
        num_frames: frames of a clip the language model sees.
        chunk_size, tubelet_size: frames the temporal tower takes at once, and frames it merges.
        spatial_size, temporal_size, mask_size: side of the square input of each stream, pixels.
        proposer_size: side of the proposer's own picture; None if it shares the segmenter's features.
        spatial_patch_size, spatial_pool_size, temporal_pool_size: tokens per frame, see [`SparrowConfig`].
        spatial_crop: the spatial tower sees the centre square (CLIP's rule), otherwise the frame stretched.
        tsf_num_clusters: placeholders of tracked features.
        task_prompts: how each task is worded, `{query}` in the place of the user's words.
        mask_threshold, visibility_threshold: logits above which a pixel or an object counts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_frames: int = 16,
        chunk_size: int = 4,
        tubelet_size: int = 1,
        spatial_size: int = 336,
        temporal_size: int = 224,
        mask_size: int = 1024,
        proposer_size: int | None = None,
        spatial_patch_size: int = 14,
        spatial_pool_size: int = 12,
        temporal_pool_size: int = 8,
        spatial_crop: bool = True,
        tsf_num_clusters: int = 4,
        task_prompts: dict[str, str] | None = None,
        mask_threshold: float = 0.0,
        visibility_threshold: float = 0.0,
        chat_template: str | None = None,
    ):
        super().__init__(tokenizer, chat_template=chat_template)
        self.num_frames, self.chunk_size, self.tubelet_size = num_frames, chunk_size, tubelet_size
        self.spatial_size, self.temporal_size, self.mask_size = spatial_size, temporal_size, mask_size
        self.proposer_size = proposer_size
        self.spatial_patch_size, self.spatial_pool_size = spatial_patch_size, spatial_pool_size
        self.temporal_pool_size, self.spatial_crop = temporal_pool_size, spatial_crop
        self.tsf_num_clusters = tsf_num_clusters
        self.task_prompts = dict(TASK_PROMPTS if task_prompts is None else task_prompts)
        self.mask_threshold, self.visibility_threshold = mask_threshold, visibility_threshold
        self.token_ids = self._special_token_ids()

    def _special_token_ids(self) -> dict[str, int]:
        tokens = (BOX_TOKEN, SEG_TOKEN, VIDEO_TOKEN, TSF_TOKEN)
        ids = {token: self.tokenizer.convert_tokens_to_ids(token) for token in tokens}
        missing = [token for token, index in ids.items() if index is None or index == self.tokenizer.unk_token_id]
        if missing:
            raise ValueError(
                f"The tokenizer lacks {', '.join(missing)}. Add them: tokenizer.add_special_tokens("
                f"{{'additional_special_tokens': {list(tokens)}}}, replace_additional_special_tokens=False)."
            )
        return ids

    @classmethod
    def from_config(cls, config, tokenizer: PreTrainedTokenizerBase, **overrides) -> "SparrowProcessor":
        """A processor whose streams and token counts fit a [`SparrowConfig`]."""
        settings = {
            "num_frames": config.num_frames,
            "mask_threshold": config.mask_tracker_config.mask_threshold,
            "visibility_threshold": config.mask_tracker_config.visibility_threshold,
        }
        processor = cls(tokenizer, **(_stream_sizes(config) | settings | overrides))
        processor.check_config(config)
        return processor

    def check_config(self, config):
        """Raise `ValueError` if token ids or sizes of the streams are not those of the model."""
        expected = {
            BOX_TOKEN: config.box_token_id,
            SEG_TOKEN: config.seg_token_id,
            VIDEO_TOKEN: config.video_token_id,
            TSF_TOKEN: config.tsf_token_id,
        }
        own = self.token_ids | vars(self)
        wrong = [
            f"{name}: processor {own[name]}, model {value}"
            for name, value in (expected | _stream_sizes(config)).items()
            if own[name] != value
        ]
        if wrong:
            raise ValueError("Processor and model do not belong together. " + "; ".join(wrong))

    # ------------------------------------------------------------------ inputs

    def __call__(
        self,
        text: str | list[str] | list[list[str]] | None = None,
        videos: Any = None,
        task: str = "refer",
        stream: bool = False,
        max_frames: int | None = None,
        tracked_crops: list[list[np.ndarray] | None] | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Inputs of `model.ground` or `model.generate`.

        Args:
            text: a query; or several, one per video, or all about a single video; or a list of queries per video.
            videos: a clip as `open_video` takes it, or a list of clips (a list of pictures or arrays is one clip: put
                it into another list to pass several).
            task: key of `task_prompts`: `refer`, `box`, `describe` (the text is not used) or `ask`.
            stream: give the frames for the masks as streams (`frames`) instead of one tensor (`mask_pixel_values`),
                so that memory does not grow with the video.
            max_frames: cut longer videos.
            tracked_crops: per row, RGB crops `(h, w, 3)` uint8 of the tracked referent, or None.
            return_tensors: "pt" only.

        Returns:
            `input_ids`, `attention_mask` `(B, L)` padded on the left; `video_index` `(B,)`; the pixel streams
            `spatial_pixel_values`, `temporal_pixel_values`, `num_frames`; `mask_pixel_values` `(V, T, 3, S, S)` with
            `num_mask_frames`, or `frames`; `original_sizes` `(V, 2)`; `metadata`, one [`GroundingRequest`] per row.

        Raises:
            PromptError: an empty, too long or broken query.
            VideoReadError: a video that cannot be read.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}.")
        if videos is None:
            raise PromptError("No video was given.")
        clips = list(videos) if self.is_list_of_videos(videos) else [videos]
        queries, video_index = _queries_per_video(text, len(clips), needs_text="{query}" in self._prompt(task))
        queries = [check_prompt(query) for query in queries]
        readers = [self._open(clip, max_frames) for clip in clips]
        sampled = [sample_frame_indices(reader.timestamps, self.num_frames) for reader in readers]
        data = self._video_streams(readers, sampled)
        crops = [row or None for row in tracked_crops or [None] * len(queries)]
        if len(crops) != len(queries):
            raise ValueError(f"tracked_crops: expected one list for each of {len(queries)} queries, got {len(crops)}.")
        rows = [
            self.prompt_ids(query, task, len(sampled[video]), 0 if crop is None else len(crop))
            for query, video, crop in zip(queries, video_index, crops, strict=True)
        ]
        data |= self._pad(rows)
        data["video_index"] = torch.tensor(video_index)
        if any(crop is not None for crop in crops):
            data |= self._crop_stream(crops)
        if stream:
            data["frames"] = [MaskFrameStream(reader, self.mask_size) for reader in readers]
        else:
            data |= self._mask_stream(readers)
        data["metadata"] = [
            GroundingRequest.of(query, task, readers[video], sampled[video])
            for query, video in zip(queries, video_index, strict=True)
        ]
        return BatchFeature(data)

    @staticmethod
    def is_list_of_videos(videos: Any) -> bool:
        """Whether this is a list of clips; a list of pictures, or of arrays of one frame each, is one clip."""
        return isinstance(videos, (list, tuple)) and len(videos) > 0 and not _is_picture(videos[0])

    def _open(self, video: Any, max_frames: int | None) -> VideoReader:
        reader = open_video(video)
        return reader if max_frames is None else reader.head(max_frames)

    def _prompt(self, task: str) -> str:
        if task not in self.task_prompts:
            raise PromptError(f"Unknown task {task!r}; this processor knows {', '.join(self.task_prompts)}.")
        return self.task_prompts[task]

    def num_visual_tokens(self, num_frames: int) -> int:
        """Placeholders of a clip of which `num_frames` are sampled; the same rule as `SparrowConfig`'s."""
        if num_frames == 1:
            return (self.spatial_size // self.spatial_patch_size) ** 2
        num_frames = -(-num_frames // self.chunk_size) * self.chunk_size
        return num_frames * self.spatial_pool_size**2 + num_frames // self.tubelet_size * self.temporal_pool_size**2

    def prompt_ids(self, query: str, task: str = "refer", num_frames: int = 0, num_crops: int = 0) -> list[int]:
        """Token ids of a question, placeholders at their real length, ready for the answer to follow.

        The user's words cannot write control tokens: `[SEG]` in a query is five letters.

        Args:
            num_frames: sampled frames of the clip, 0 for a question without a video.
            num_crops: crops of the tracked referent.
        """
        unknown = self.tokenizer.unk_token
        if unknown is not None:  # a tokenizer of words makes it of any text, which the sanitizing refuses
            query = query.replace(unknown, " ".join(unknown))
        content = [{"type": "text", "text": self._prompt(task).format(query=query)}]
        if num_frames:
            content.insert(0, {"type": "video"})
        if num_crops:
            content.append({"type": "tracked_features"})
        encoded = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            sanitize_control_tokens=True,
        )
        counts = {VIDEO_TOKEN: self.num_visual_tokens(num_frames) if num_frames else 0}
        counts[TSF_TOKEN] = min(num_crops, self.tsf_num_clusters)
        repeat = {self.token_ids[token]: count for token, count in counts.items()}
        return [index for index in encoded["input_ids"] for _ in range(repeat.get(index, 1))]

    def _pad(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        longest = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        return {
            "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }

    def _video_streams(self, readers: list[VideoReader], sampled: list[np.ndarray]) -> dict[str, torch.Tensor]:
        """What the two towers see: the sampled frames, whole chunks of them; still pictures only in the first."""
        spatial, temporal, counts = [], [], []
        for reader, indices in zip(readers, sampled, strict=True):
            frames = reader.read(pad_to_multiple(indices, self.chunk_size))
            spatial += [spatial_pixels(frame, self.spatial_size, self.spatial_crop) for frame in frames]
            temporal += [temporal_pixels(frame, self.temporal_size) for frame in frames if len(frames) > 1]
            counts.append(len(frames))
        streams = {"spatial_pixel_values": torch.stack(spatial), "num_frames": torch.tensor(counts)}
        streams["original_sizes"] = torch.tensor([(reader.height, reader.width) for reader in readers])
        if temporal:
            streams["temporal_pixel_values"] = torch.stack(temporal)
        if self.proposer_size is not None:
            first = [segmenter_pixels(reader.read([0])[0], self.mask_size) for reader in readers]
            streams["proposer_pixel_values"] = torch.stack([proposer_pixels(f, self.proposer_size) for f in first])
        return streams

    def _mask_stream(self, readers: list[VideoReader]) -> dict[str, torch.Tensor]:
        """Every frame for the mask tracker, shorter clips padded with their last frame."""
        longest = max(len(reader) for reader in readers)
        clips = []
        for reader in readers:
            frames = [segmenter_pixels(frame, self.mask_size) for frame in reader]
            clips.append(torch.stack(frames + frames[-1:] * (longest - len(frames))))
        counts = torch.tensor([len(reader) for reader in readers])
        return {"mask_pixel_values": torch.stack(clips), "num_mask_frames": counts}

    def _crop_stream(self, crops: list[list[np.ndarray] | None]) -> dict[str, torch.Tensor]:
        pixels = [spatial_pixels(crop, self.spatial_size, crop=False) for row in crops for crop in row or []]
        return {
            "tsf_pixel_values": torch.stack(pixels),
            "num_tsf_crops": torch.tensor([len(row or []) for row in crops]),
        }

    # ------------------------------------------------------------------ outputs

    def collector(self, requests: list[GroundingRequest]) -> MaskCollector:
        """A sink for the masks of a batch, with this processor's thresholds."""
        return MaskCollector(requests, self.mask_threshold, self.visibility_threshold)

    def post_process_grounding(self, output, masks: MaskCollector | None = None) -> list[GroundingResult]:
        """Results of `model.ground`, one per row.

        Args:
            output: of `ground`, called with everything this processor made.
            masks: the collector that was given to `ground` as `mask_sink`, if there was one.

        Raises:
            ValueError: the output does not know what was asked, or its masks went elsewhere.
        """
        requests = output.metadata
        if requests is None:
            raise ValueError("The output has no metadata: call ground with all that the processor made.")
        if masks is None:
            if any(found.mask_logits is None for objects in output.objects for found in objects):
                raise ValueError("The masks went to a mask_sink: give the collector that took them as `masks`.")
            masks = self.collector(requests)
            for row, objects in enumerate(output.objects):
                for item, found in enumerate(objects):
                    for t, logits in enumerate(found.mask_logits):
                        scores, there = found.frame_scores[t : t + 1], found.object_logits[t : t + 1]
                        masks.add(row, t, [item], logits[None], scores, there)
        results = []
        for row, (request, objects) in enumerate(zip(requests, output.objects, strict=True)):
            text, phrases = self.read_answer(output.sequences[row], [found.token_position for found in objects])
            default = request.query if request.task in ("refer", "box") else None
            tracks = [
                masks.object_track(row, item, phrase or default, span, found.score)
                for item, (found, (phrase, span)) in enumerate(zip(objects, phrases, strict=True))
            ]
            results.append(
                GroundingResult(
                    query=request.query,
                    text=text,
                    objects=tracks,
                    size=request.size,
                    fps=request.fps,
                    timestamps=request.timestamps,
                    sampled_frames=request.sampled_frames,
                    path=request.path,
                    timings=dict(output.timings),
                    warnings=request.warnings + output.warnings[row] + self._notes(request, objects),
                    time_span=read_time_span(text, request),
                )
            )
        return results

    def partial_results(self, masks: MaskCollector) -> list[GroundingResult]:
        """Results of a run that was stopped: the frames that were done, no text."""
        results = []
        for row, request in enumerate(masks.requests):
            tracks = [
                masks.object_track(row, item, request.query, None, float(fields["scores"].max()))
                for item, fields in sorted(masks.tracks[row].items())
            ]
            results.append(
                GroundingResult(
                    query=request.query,
                    text="",
                    objects=tracks,
                    size=request.size,
                    fps=request.fps,
                    timestamps=request.timestamps,
                    sampled_frames=request.sampled_frames,
                    path=request.path,
                    warnings=[*request.warnings, "Interrupted: not every frame was reached."],
                )
            )
        return results

    def _notes(self, request: GroundingRequest, objects: list) -> list[str]:
        notes = []
        if len(request.sampled_frames) < len(request.timestamps):
            notes.append(
                f"The clip has {len(request.timestamps)} frames; the language model saw "
                f"{len(request.sampled_frames)} of them."
            )
        if not objects and request.task != "ask":
            notes.append("The answer points at no object.")
        return notes

    def read_answer(
        self, ids: torch.Tensor, positions: list[int]
    ) -> tuple[str, list[tuple[str | None, tuple[int, int] | None]]]:
        """Clean text of an answer, and for each object the phrase it grounds with its span in that text.

        A phrase stands between `<p>` and `</p>` right before the object's tokens; an object without one has None.

        Args:
            ids: generated token ids `(L,)`.
            positions: index of the [SEG] (or [BOX]) of each object among them; objects may share one.
        """
        hidden = [token for token in self.tokenizer.all_special_tokens if token not in ("<p>", "</p>")]
        control = {*self.tokenizer.convert_tokens_to_ids(hidden), *self.token_ids.values()}
        answer, start = _AnswerText(), 0
        phrases = {}
        ids = [int(index) for index in ids]
        for position in [*(p for p, index in enumerate(ids) if index in control), len(ids)]:
            words = ids[start:position]
            answer.add(self.tokenizer.decode(words, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            phrases[position], start = answer.phrase, position + 1
        return answer.text, [phrases[position] for position in positions]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "spatial_pixel_values", "temporal_pixel_values", "mask_pixel_values"]


def _stream_sizes(config) -> dict[str, int | None]:
    """Arguments of the processor that the sizes of a [`SparrowConfig`] fix."""
    return {
        "chunk_size": config.temporal_config.num_frames,
        "tubelet_size": config.temporal_config.tubelet_size,
        "spatial_size": config.spatial_config.image_size,
        "temporal_size": config.temporal_config.image_size,
        "mask_size": config.mask_tracker_config.image_size,
        "proposer_size": config.proposer_config.image_size,
        "spatial_patch_size": config.spatial_config.patch_size,
        "spatial_pool_size": config.spatial_pool_size,
        "temporal_pool_size": config.temporal_pool_size,
        "tsf_num_clusters": config.tsf_num_clusters,
    }


def check_prompt(query: str) -> str:
    """The query, stripped.

    Raises:
        PromptError: empty, longer than 2,000 characters, or with characters that are no text.
    """
    if not isinstance(query, str):
        raise PromptError(f"A query must be a string, got {type(query).__name__}.")
    if len(query) > MAX_PROMPT_CHARACTERS:
        raise PromptError(f"The query has {len(query)} characters; at most {MAX_PROMPT_CHARACTERS} are accepted.")
    if "\0" in query or any("\ud800" <= character <= "\udfff" for character in query):
        raise PromptError("The query holds a NUL character or half of a surrogate pair: it is no valid text.")
    if not query.strip():
        raise PromptError("The query is empty.")
    return query.strip()


def read_time_span(text: str, request: GroundingRequest) -> tuple[float, float] | None:
    """Seconds of a span written as `frames:(a,b)`, indices among the sampled frames (VidSTG answers); else None."""
    match = re.search(r"frames\s*:\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)", text)
    if match is None:
        return None
    last = len(request.sampled_frames) - 1
    start, end = sorted(min(int(index), last) for index in match.groups())
    return tuple(float(request.timestamps[request.sampled_frames[index]]) for index in (start, end))


class _AnswerText:
    """Clean text of an answer while it is read piece by piece.

    Attributes:
        text: so far.
        phrase: words between the last `<p>` and `</p>` and their span, `(None, None)` once other words followed.
    """

    def __init__(self):
        self.text, self.phrase = "", (None, None)
        self._start: int | None = None  # where an open <p> stands

    def add(self, raw: str):
        for piece in re.split(r"(<p>|</p>)", raw):
            if piece == "<p>":
                self._start, self.phrase = len(self.text), (None, None)
            elif piece == "</p>":
                self._close_phrase()
            else:
                self._add_words(re.sub(r"\s+([.,;:!?])", r"\1", " ".join(piece.split())))

    def _close_phrase(self):
        if self._start is not None:
            begin = self._start + (self.text[self._start : self._start + 1] == " ")
            if begin < len(self.text):
                self.phrase = (self.text[begin:], (begin, len(self.text)))
        self._start = None

    def _add_words(self, words: str):
        if words:
            self.text += ("" if not self.text or words[0] in ".,;:!?" else " ") + words
            self.phrase = (None, None)


def _is_picture(item: Any) -> bool:
    """One frame of a clip rather than a clip: a PIL image, or an array of three axes."""
    if hasattr(item, "ndim") and hasattr(item, "shape"):
        return item.ndim == 3
    return hasattr(item, "getbands")


def _queries_per_video(text: Any, num_videos: int, needs_text: bool) -> tuple[list[str], list[int]]:
    """Flat list of queries and the video of each."""
    if text is None and not needs_text:
        return ["describe the video"] * num_videos, list(range(num_videos))
    if isinstance(text, str):
        text = [text] * num_videos
    if not isinstance(text, (list, tuple)) or not text:
        raise PromptError("text must be a query, a list of queries, or a list of queries for each video.")
    if all(isinstance(item, (list, tuple)) for item in text):
        if len(text) != num_videos:
            raise PromptError(f"{len(text)} lists of queries were given for {num_videos} videos.")
        pairs = [(query, video) for video, queries in enumerate(text) for query in queries]
        if not pairs:
            raise PromptError("The lists of queries are empty.")
        return [query for query, _ in pairs], [video for _, video in pairs]
    if num_videos == 1:
        return list(text), [0] * len(text)
    if len(text) != num_videos:
        raise PromptError(f"{len(text)} queries were given for {num_videos} videos.")
    return list(text), list(range(num_videos))
