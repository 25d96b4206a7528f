"""What runs on the accelerator: answering, and carrying a corrected box through the clip.

On a ZeroGPU Space it runs in a process of its own. Whatever goes in or comes out is therefore pickled: prepared inputs
and readers of files go in, tensors on the CPU come out, step by step.
"""

import dataclasses
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch

from modeling_sparrow.frame_pyramid import FrameStream
from modeling_sparrow.mask_tracker import FrameMasks, MaskPrompt, TrackedObject
from modeling_sparrow.modeling_outputs import GroundingOutput
from modeling_sparrow.region_proposer import RegionProposals

try:
    import spaces
except ImportError:  # anywhere but on a Space with ZeroGPU
    spaces = None

# What a ZeroGPU call may take: seconds to answer, and seconds per frame.
ANSWER_SECONDS, FRAME_SECONDS, MAX_SECONDS = 20, 0.1, 120


class StreamTail:
    """The frames of a [`FrameStream`] from `start` on."""

    def __init__(self, stream: FrameStream, start: int):
        self.stream, self.start = stream, start

    def __len__(self) -> int:
        return len(self.stream) - self.start

    def read(self, indices: list[int]) -> torch.Tensor:
        return self.stream.read([self.start + index for index in indices])

    def frames(self, start: int = 0) -> Iterator[torch.Tensor]:
        return self.stream.frames(self.start + start)

    def frames_reversed(self, start: int) -> Iterator[torch.Tensor]:
        return islice(self.stream.frames_reversed(self.start + start), start + 1)


class Grounder:
    """A model and its processor, read-only and shared by all visitors."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.ground = on_gpu(self._ground, lambda inputs: ANSWER_SECONDS + FRAME_SECONDS * len(inputs["frames"][0]))
        self.carry_on = on_gpu(self._carry_on, lambda stream, tracked: ANSWER_SECONDS + FRAME_SECONDS * len(stream))

    @property
    def score_threshold(self) -> float:
        """Confidence that makes a proposal a box."""
        return self.model.config.filtration_config.score_threshold

    @property
    def least_score(self) -> float:
        """With which the best region is still kept."""
        rules = self.model.config.filtration_config
        return min(rules.score_threshold, rules.fallback_threshold)

    @torch.no_grad()
    def _ground(self, inputs: dict[str, Any]) -> Iterator[GroundingOutput | RegionProposals | tuple[int, FrameMasks]]:
        """Answer; gives the output as soon as text and prompts are known, then (row, masks) of frame after frame, then
        the complete output. If nothing was located, also the proposals of the first frame."""
        inputs = moved(inputs, self.model.device)
        output, told = GroundingOutput(), False
        for row, masks in self.model.ground_iter(**inputs, output=output):
            if not told:
                yield moved(output, "cpu")
                told = True
            yield row, moved(masks, "cpu")
        if not any(output.located) and self.model.model.region_proposer is not None:
            pyramids = self.model.model.mask_tracker.encode_video(inputs["frames"][0])
            yield moved(self.model.model.propose(pyramids.at(0), inputs.get("proposer_pixel_values")), "cpu")
        yield moved(output, "cpu")

    @torch.no_grad()
    def _carry_on(self, stream: FrameStream, tracked: TrackedObject) -> Iterator[FrameMasks]:
        """Masks of one object on the frames of a stream."""
        tracked = moved(tracked, self.model.device)
        for masks in self.model.propagate(self.model.model.mask_tracker.encode_video(stream), [tracked]):
            yield moved(masks, "cpu")

    def corrected(self, tracked: TrackedObject, frame_index: int, box: torch.Tensor) -> TrackedObject:
        """The same object, prompted by its words and a box `(4,)`, normalised xyxy, on another frame."""
        config = self.model.config.mask_tracker_config
        tokens = next((prompt.tokens[:1] for prompt in tracked.prompts if prompt.tokens is not None), None)
        if config.joint_prompt or config.propagation == "framewise" or tokens is None:
            prompts = [MaskPrompt(tokens=tokens, boxes=box[None])]
        else:
            prompts = [MaskPrompt(tokens=tokens), MaskPrompt(boxes=box[None])]
        return TrackedObject(frame_index, prompts)


def on_gpu(function: Callable, seconds: Callable[..., float]) -> Callable:
    """The function as ZeroGPU wants it, with an upper bound of its time; anywhere else the function itself."""
    if spaces is None:
        return function
    return spaces.GPU(duration=lambda *arguments: min(int(seconds(*arguments)), MAX_SECONDS))(function)


def moved(value: Any, device: torch.device | str) -> Any:
    """A structure of lists, dicts and dataclasses with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value):
        fields = {field.name: moved(getattr(value, field.name), device) for field in dataclasses.fields(value)}
        return type(value)(**fields)
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return value
