"""SAM2 in official sizes, and the comparison of videos across a knife edge."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from transformers import Sam2VideoConfig

from modeling_sparrow.configuration_sparrow import MaskTrackerConfig
from modeling_sparrow.conversion.sam2 import convert_sam2, sam2_config_from_weights
from modeling_sparrow.frame_pyramid import FramePyramid
from modeling_sparrow.mask_tracker import FrameMasks, FrameMemory, MaskTracker

MAX_DOUBTFUL_PIXELS = 5


def trunk_settings(sizes: dict) -> dict:
    """What the weights of a Hiera trunk do not tell."""
    return {
        "num_attention_heads": sizes["num_heads"],
        "window_size_per_stage": sizes["window_spec"],
        "global_attention_blocks": sizes["global_att_blocks"],
    }


def set_sam2_rules(config: Sam2VideoConfig, sizes: dict):
    """Rules that the weights do not tell, under the names of the official constructor."""
    for name in (
        "sigmoid_scale_for_mem_enc",
        "sigmoid_bias_for_mem_enc",
        "multimask_output_in_sam",
        "multimask_min_pt_num",
        "multimask_max_pt_num",
        "multimask_output_for_tracking",
    ):
        setattr(config, name, sizes[name])
    config.max_object_pointers_in_encoder = sizes["max_obj_ptrs_in_encoder"]
    if "mask_decoder" in sizes:  # VideoGLaMM's family
        decoder = sizes["mask_decoder"]
        config.memory_attention_num_attention_heads = sizes["memory_attention_heads"]
        config.mask_decoder_config.num_attention_heads = decoder["transformer_heads"]
        config.mask_decoder_config.attention_downsample_rate = decoder["attention_downsample_rate"]
    else:  # Meta's constructor
        decoder = sizes["sam_mask_decoder_extra_args"]
        attention = sizes["memory_attention"]["layer"]["self_attention"]
        config.memory_attention_num_attention_heads = attention["num_heads"]
    for name in ("via_stability", "stability_delta", "stability_thresh"):
        setattr(config.mask_decoder_config, f"dynamic_multimask_{name}", decoder[f"dynamic_multimask_{name}"])


def build_tracker(weights: dict[str, torch.Tensor], image_size: int, trunk: dict, rules: dict) -> MaskTracker:
    """A [`MaskTracker`] with official weights and the official order of prompts.

    `joint_prompt=False`, `num_padding_points=2` and `binarize_prompted_memory=True` are what the released video
    predictor does; memory stays float32 until a test sets `memory_dtype`.
    """
    sam2_config = sam2_config_from_weights(weights, image_size, **trunk)
    set_sam2_rules(sam2_config, rules)
    config = MaskTrackerConfig(
        sam2_config=sam2_config, joint_prompt=False, num_padding_points=2, binarize_prompted_memory=True
    )
    tracker = MaskTracker(config).eval()
    tracker.sam2.load_state_dict(convert_sam2(weights))
    return tracker


@contextmanager
def options(config, **values) -> Iterator[None]:
    """Set fields of a configuration for a while."""
    before = {name: getattr(config, name) for name in values}
    for name, value in values.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@dataclass
class Remembered:
    """What entered the memory from a prompted frame."""

    masks: FrameMasks
    memory: FrameMemory


@dataclass(frozen=True)
class Pixel:
    """A pixel of a prompted mask whose logit is next to zero: which call of `remember`, which object, where."""

    call: int
    row: int
    y: int
    x: int


class PromptedMasks:
    """Watches `tracker.remember` on prompted frames; the pixels in `flipped` are rounded the other way there."""

    def __init__(self, tracker: MaskTracker, flipped: tuple[Pixel, ...] = ()):
        self.tracker, self.flipped = tracker, flipped
        self.remembered: list[Remembered] = []
        self.doubtful: list[tuple[float, Pixel]] = []

    def __enter__(self) -> "PromptedMasks":
        self.original = self.tracker.remember
        self.tracker.remember = self.remember
        return self

    def __exit__(self, *_):
        del self.tracker.remember  # back to the method of the class

    def remember(self, pyramid: FramePyramid, masks: FrameMasks, prompted: bool) -> FrameMemory:
        if not prompted:
            return self.original(pyramid, masks, prompted)
        call, size = len(self.remembered), self.tracker.config.image_size
        logits = F.interpolate(masks.logits[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]
        for row, y, x in (logits.abs() < 1e-4).nonzero().tolist():
            self.doubtful.append((logits[row, y, x].abs().item(), Pixel(call, row, y, x)))
        for pixel in self.flipped:
            if pixel.call == call:
                logits[pixel.row, pixel.y, pixel.x] *= -1
        # logits of the size of the frame are taken as they are
        memory = self.original(pyramid, replace(masks, logits=logits) if self.flipped else masks, prompted)
        self.remembered.append(Remembered(masks, memory))
        return memory


def compare_across_knife_edge(tracker: MaskTracker, run: Callable, compare: Callable):
    """Run and compare, allowing a pixel next to zero to be rounded either way before it enters memory.

    The official predictor thresholds the mask of a prompted frame before it encodes it into memory. A pixel whose
    logit is about 1e-6 may then fall on the other side here, and one flipped pixel moves the logits of later frames
    by about 1e-2: no tolerance of the masks themselves. So the comparison is strict first. If it fails, and only if
    the prompted frames have pixels within 1e-4 of zero, it must hold just as strictly for one way of rounding them.

    Args:
        run: without arguments; its result and the [`PromptedMasks`] go to `compare`.
        compare: raises AssertionError.
    """
    with PromptedMasks(tracker) as prompted:
        result = run()
    try:
        return compare(result, prompted)
    except AssertionError as error:
        failure = error
    nearest = sorted(prompted.doubtful, key=lambda item: item[0])[:MAX_DOUBTFUL_PIXELS]
    pixels = [pixel for _, pixel in nearest]
    for count in range(1, len(pixels) + 1):
        for flipped in itertools.combinations(pixels, count):
            with PromptedMasks(tracker, flipped) as prompted:
                result = run()
            try:
                return compare(result, prompted)
            except AssertionError:
                continue
    raise failure
