"""SAM2 as Meta released it (2.0, 2.1) and with language prompts (SPARROW, VideoGLaMM): modules and videos."""

import functools
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from modeling_sparrow.frame_pyramid import FramePyramid
from modeling_sparrow.mask_tracker import FrameMasks, MaskPrompt, MaskTracker, TrackedObject

from .builders import build_tracker, options, trunk_settings
from .fixtures import BFLOAT16_TOLERANCE, TOLERANCE, Recording, for_cases, for_families
from .knife_edges import PromptedMasks, compare_across_knife_edge

FAMILIES = ("sam20_tiny", "sam21_tiny", "sam2_tiny")
folders = for_families(*FAMILIES)


@pytest.fixture
def tracker(official: Recording) -> MaskTracker:
    return tracker_of(official)


@functools.cache
def tracker_of(official: Recording) -> MaskTracker:
    if official.config["family"] == "sam2_tiny":
        sizes = rules = official.config["sam2"]
    else:
        sizes, rules = official.config["geometry"], official.config["model"]
    return build_tracker(official.weights, sizes["image_size"], trunk_settings(sizes), rules)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def first_frame(official: Recording, tracker: MaskTracker) -> FramePyramid:
    return tracker.encode_frames(official["in.frames"][:1])


def point(x: float, y: float, label: int = 1) -> MaskPrompt:
    return MaskPrompt(points=torch.tensor([[[x, y]]]), labels=torch.tensor([[label]]))


# ------------------------------------------------------------------ modules


@folders
def test_image_encoder(official: Recording, tracker: MaskTracker):
    encoder = tracker.sam2.vision_encoder
    num_frames = len(official["out.trunk.0"])
    frames = official["in.frames"][:num_frames]
    for level, states in enumerate(encoder.backbone(frames).intermediate_hidden_states):
        official.check(f"trunk.{level}", states.permute(0, 3, 1, 2))
    output = encoder(frames)
    for name in official.names("encoder.fpn."):
        official.check(name, output.fpn_hidden_states[int(name.split(".")[-1])])
    for name in official.names("encoder.pos."):
        official.check(name, output.fpn_position_encoding[int(name.split(".")[-1])][:1])
    if "out.encoder.vision_features" in official:
        official.check("encoder.vision_features", output.fpn_hidden_states[-1])


@folders
def test_pyramid(official: Recording, tracker: MaskTracker):
    pyramid = first_frame(official, tracker)
    for name in official.names("forward_image_fpn."):
        official.check(name, pyramid.levels[int(name.split(".")[-1])])


def sparse_and_dense(official: Recording, tracker: MaskTracker, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings `(N, P, D)` and `(N, D, h, w)` of the module-level prompts; `kind` as in `prompt_<kind>`."""
    encoder = tracker.sam2.prompt_encoder
    points, labels, boxes, masks = None, None, None, None
    parts = kind.split("_")
    if "points" in parts:
        points, labels = official["in.points"][:, None], official["in.point_labels"][:, None].long()
    if "box" in parts:
        boxes = official["in.box_norm"][:, None] * tracker.config.image_size
    if "mask" in parts:
        masks = official["in.mask_prompt"]
    num_prompts = len(official["in.points"])
    sparse, dense = encoder(points, labels, boxes, masks)
    sparse = sparse[:, 0] if sparse is not None else dense.new_zeros(num_prompts, 0, dense.shape[1])
    if boxes is not None:  # transformers closes a box with an empty point, Meta's prompt encoder does not
        sparse = sparse[:, :-1]
    if "text" in parts:
        sparse = torch.cat([sparse, official["in.text"]], dim=1)
    return sparse, dense.expand(num_prompts, -1, -1, -1)


@folders
def test_prompt_encoder(official: Recording, tracker: MaskTracker):
    official.check("dense_pe", tracker.sam2.get_image_wide_positional_embeddings())
    for name in official.names("prompt_"):
        kind, output = name.removeprefix("prompt_").split(".")
        sparse, dense = sparse_and_dense(official, tracker, kind)
        if output == "dense" and official[f"out.{name}"].shape[-1] == 1:  # one vector for all cells
            assert torch.equal(dense, dense[..., :1, :1].expand_as(dense))
            dense = dense[..., :1, :1]
        official.check(name, sparse if output == "sparse" else dense)


@folders
def test_prompts_of_the_tracker(official: Recording, tracker: MaskTracker):
    """`MaskTracker.embed_prompt` builds what the official tracking path and SPARROW's frame-wise branch feed."""
    boxes = official["in.box_norm"]
    sparse, _ = tracker.embed_prompt(MaskPrompt(boxes=boxes))
    torch.testing.assert_close(sparse[:, 0, :2], official["out.prompt_box.sparse"], atol=TOLERANCE, rtol=TOLERANCE)
    assert sparse.shape[2] == 3, "a box on the tracking path is closed by an empty point"
    if "in.text" not in official:
        return
    text = official["in.text"]
    sparse, _ = tracker.embed_prompt(MaskPrompt(tokens=text, boxes=boxes))
    expected = official["out.prompt_box_text.sparse"]
    torch.testing.assert_close(sparse[:, 0], expected, atol=TOLERANCE, rtol=TOLERANCE)
    sparse, _ = tracker.embed_prompt(MaskPrompt(tokens=text))  # num_padding_points=2
    empty = tracker.sam2.prompt_encoder.not_a_point_embed.weight.expand(len(text), 2, -1)
    torch.testing.assert_close(sparse[:, 0], torch.cat([empty, text], dim=1), atol=TOLERANCE, rtol=TOLERANCE)
    with options(tracker.config, num_padding_points=0):
        sparse, _ = tracker.embed_prompt(MaskPrompt(tokens=text))
        expected = official["out.prompt_text.sparse"]
        torch.testing.assert_close(sparse[:, 0], expected, atol=TOLERANCE, rtol=TOLERANCE)


@for_cases("decoder_", *FAMILIES)
def test_mask_decoder(official: Recording, tracker: MaskTracker, case: str):
    pyramid = first_frame(official, tracker)
    sparse, dense = sparse_and_dense(official, tracker, case)
    N = len(sparse)
    decoder = tracker.sam2.mask_decoder
    inputs = {
        "image_embeddings": tracker.features_without_memory(pyramid).expand(N, -1, -1, -1),
        "image_positional_embeddings": tracker.sam2.get_image_wide_positional_embeddings().expand(N, -1, -1, -1),
        "sparse_prompt_embeddings": sparse[:, None],
        "dense_prompt_embeddings": dense,
        "high_resolution_features": [level.expand(N, -1, -1, -1) for level in pyramid.levels[:2]],
    }
    outputs = {
        "multimask_True": decoder(**inputs, multimask_output=True),
        "multimask_False": decoder(**inputs, multimask_output=False),  # falls back where the mask is unstable
    }
    decoder.train()
    outputs["single_train_mode"] = decoder(**inputs, multimask_output=False)
    decoder.eval()
    expected = official.names(f"decoder_{case}.")
    for mode, (masks, iou, tokens, _) in outputs.items():
        for kind, value in (("masks", masks), ("iou", iou), ("tokens", tokens)):
            if (name := f"decoder_{case}.{mode}.{kind}") in expected:
                official.check(name, value[:, 0])
    single, several = outputs["single_train_mode"], outputs["multimask_True"]
    for k, kind in enumerate(("all_masks", "all_iou", "mask_tokens")):
        official.check(f"decoder_{case}.{kind}", torch.cat([single[k], several[k]], dim=2)[:, 0])
    official.check(f"decoder_{case}.object_score_logits", several[3][:, 0])
    delta = decoder.dynamic_multimask_stability_delta
    mask = single[0][:, 0]
    stability = (mask > delta).sum((-2, -1)) / (mask > -delta).sum((-2, -1))
    # a pixel next to one of the two thresholds may be counted or not
    clear = ((mask.abs() - delta).abs() > TOLERANCE).flatten(2).all(2)
    official.check(f"decoder_{case}.stability", stability, where=clear)


@folders
def test_memory_attention(official: Recording, tracker: MaskTracker):
    current, memory = official["in.mem_curr"], official["in.memory"]
    output = tracker.sam2.memory_attention(
        current_vision_features=current,
        current_vision_position_embeddings=official["in.mem_pos"],
        memory=memory,
        memory_posision_embeddings=official["in.memory_pos"],
        num_object_pointer_tokens=len(memory) % len(current),  # what does not fill a frame are pointers
    )
    official.check("memory_attention", output.squeeze(0).transpose(0, 1))


@folders
def test_memory_encoder(official: Recording, tracker: MaskTracker):
    sam2_config = tracker.config.sam2_config
    mask = official["in.enc_mask"].sigmoid() * sam2_config.sigmoid_scale_for_mem_enc
    mask = mask + sam2_config.sigmoid_bias_for_mem_enc
    features, position = tracker.sam2.memory_encoder(official["in.enc_feat"], mask)
    official.check("memory_encoder.features", features)
    official.check("memory_encoder.pos", position[:1])


@for_cases("sam_heads_", *FAMILIES)
def test_sam_heads(official: Recording, tracker: MaskTracker, case: str):
    """One prompt on the first frame: mask, predicted IoU and object pointer."""
    size = tracker.config.image_size
    if case == "box":
        prompt = MaskPrompt(boxes=official["in.box_norm"][:1])
    elif case == "point":
        prompt = MaskPrompt(points=official["in.points"][:1, :1] / size, labels=official["in.point_labels"][:1, :1])
    elif case == "text":
        prompt = MaskPrompt(tokens=official["in.text"][:1])
    else:  # no prompt: an empty point, which SAM2 counts like a click
        assert case == "none"
        prompt = point(0.0, 0.0, label=-1)
    pyramid = first_frame(official, tracker)
    masks = tracker.prompt(pyramid, prompt)
    name = f"sam_heads_{case}"
    official.check(f"{name}.low", masks.logits[:, None])
    official.check(f"{name}.obj_ptr", masks.pointer)
    official.check(f"{name}.obj_score", masks.object_logits)
    num_masks = official[f"out.{name}.iou"].shape[1]
    sparse, dense = tracker.embed_prompt(prompt)
    all_masks, iou, _, _ = tracker.sam2.mask_decoder(
        image_embeddings=tracker.features_without_memory(pyramid),
        image_positional_embeddings=tracker.sam2.get_image_wide_positional_embeddings(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=num_masks > 1,
        high_resolution_features=list(pyramid.levels[:2]),
    )
    official.check(f"{name}.low_multi", all_masks[:, 0])
    official.check(f"{name}.iou", iou[:, 0])


@for_families("sam20_tiny", "sam21_tiny")
def test_mask_as_answer(official: Recording, tracker: MaskTracker):
    pyramid = first_frame(official, tracker)
    # recorded with the "no memory" vector added; the video predictor (video_mask below) leaves it out here
    pyramid = FramePyramid((*pyramid.levels[:2], tracker.features_without_memory(pyramid)), pyramid.position)
    masks = tracker.prompt(pyramid, MaskPrompt(masks=official["in.object_mask"][None]))
    official.check("mask_as_output.low", masks.logits[:, None])
    official.check("mask_as_output.obj_ptr", masks.pointer)
    official.check("mask_as_output.obj_score", masks.object_logits)
    official.check("mask_as_output.iou", masks.score / masks.object_logits.sigmoid())


@for_families("sam2_tiny")
def test_several_boxes_of_a_token(official: Recording, tracker: MaskTracker):
    """SPARROW's frame-wise branch (`propagation="framewise"`): the maximum over the boxes of a token.

    The recording gave each box an embedding of its own; in the model all are the same.
    """
    tracked = [TrackedObject(0, [MaskPrompt(tokens=official["in.text"], boxes=official["in.box_norm"])])]
    with options(tracker.config, propagation="framewise"):
        masks = next(tracker.propagate(tracker.encode_video(official["in.frames"][:1]), tracked))
    size = official["out.sparrow_frame_decode"].shape[-2:]
    logits = F.interpolate(masks.logits[:, None], size=size, mode="bilinear", align_corners=False)
    official.check("sparrow_frame_decode", logits)


# ------------------------------------------------------------------ videos

# What is prompted on a frame, one prompt after the other; then the next prompted frame of the object.
Prompted = list[tuple[int, list[MaskPrompt]]]


def box(official: Recording, index: int) -> MaskPrompt:
    return MaskPrompt(boxes=official["in.box_norm"][index : index + 1])


def text(official: Recording, index: int) -> MaskPrompt:
    return MaskPrompt(tokens=official["in.text"][index : index + 1])


def two_objects(official: Recording) -> list[Prompted]:
    clicks = MaskPrompt(points=torch.tensor([[[0.3, 0.4], [0.7, 0.2]]]), labels=torch.tensor([[1, 0]]))
    return [[(0, [clicks])], [(0, [box(official, 1)])]]


def two_texts(official: Recording) -> list[Prompted]:
    return [[(0, [text(official, 0)])], [(0, [text(official, 1)])]]


def given_mask(official: Recording) -> list[Prompted]:
    return [[(0, [MaskPrompt(masks=official["in.object_mask"][None])])]]


def prompted_later(official: Recording) -> list[Prompted]:
    """Object 1 is clicked on frame 0 and boxed on frame 4, object 2 boxed on frame 0."""
    return [[(0, [point(0.4, 0.5)]), (4, [box(official, 2)])], [(0, [box(official, 1)])]]


def boxed_backwards(official: Recording) -> list[Prompted]:
    start = int(official["out.video_reverse_fp32mem.frame_idx"][0])
    return [[(start, [box(official, 0)])]]


def boxed_texts(official: Recording) -> list[Prompted]:
    first = [text(official, 0), box(official, 0), box(official, 2)]
    return [[(0, first)], [(0, [text(official, 1), box(official, 1)])]]


# Prompts of the cases, by name without `_fp32mem`; new ones each time, since prompting in turn changes them.
CASES: dict[str, Callable[[Recording], list[Prompted]]] = {
    "box": lambda official: [[(0, [box(official, 0)])]],
    "point": lambda official: [[(0, [point(0.4, 0.5)])]],
    "mask": given_mask,
    "reverse": boxed_backwards,
    "two_obj": two_objects,
    "two_obj_soft": two_objects,
    "two_frames": prompted_later,
    "text": lambda official: [[(0, [text(official, 0)])]],
    "text_2obj": two_texts,
    "text_then_box": lambda official: [[(0, [text(official, 0), box(official, 0)])]],
    "text_then_boxes_2obj": boxed_texts,
}


def prompts_of(official: Recording, case: str) -> list[Prompted]:
    if case.startswith("absent"):
        return two_texts(official) if "in.text" in official else two_objects(official)
    return CASES[case](official)


def track(tracker: MaskTracker, frames: torch.Tensor, objects: list[Prompted]) -> dict[tuple[int, int], FrameMasks]:
    """Masks of every (object, frame), each alone."""
    if any(len(prompted) > 1 for prompted in objects):
        return track_step_by_step(tracker, frames, objects)
    tracked = [TrackedObject(frame, prompts) for ((frame, prompts),) in objects]
    results = {}
    for masks in tracker.propagate(tracker.encode_video(frames), tracked):
        for row, index in enumerate(masks.objects):
            alone = masks.by_owner([(o, 0) for o in range(len(objects))])[index]
            assert len(alone.objects) == 1 and masks.objects[row] == index
            results[index, masks.frame_index] = alone
    return results


def track_step_by_step(
    tracker: MaskTracker, frames: torch.Tensor, objects: list[Prompted]
) -> dict[tuple[int, int], FrameMasks]:
    """Forwards with several prompted frames; Meta runs all prompts before the first step."""
    pyramid = tracker.encode_frames(frames)
    results = {}
    for index, prompted in enumerate(objects):
        memory = tracker.new_memory()
        for frame, prompts in prompted:
            masks = tracker.prompt_in_turn(pyramid[[frame]], prompts, frame)
            memory.add_prompted(frame, tracker.remember(pyramid[[frame]], masks, prompted=True))
            results[index, frame] = masks
        for frame in range(prompted[0][0] + 1, len(frames)):
            if (index, frame) not in results:
                masks = tracker.step(pyramid[[frame]], memory, frame, len(frames))
                memory.add_recent(frame, tracker.remember(pyramid[[frame]], masks, prompted=False))
                results[index, frame] = masks
    return results


@contextmanager
def less_often_present(tracker: MaskTracker, shift: float):
    """Objects are absent more often: the last bias of the object score is lowered."""
    bias = tracker.sam2.mask_decoder.pred_obj_score_head.proj_out.bias
    before = bias.clone()
    bias -= shift
    yield
    bias.copy_(before)


@for_cases("video_", *FAMILIES)
def test_video(official: Recording, tracker: MaskTracker, case: str):
    """Prompts and propagation; `joint_prompt=False`, `binarize_prompted_memory=True` unless the case says "soft".

    Cases without `_fp32mem` round memory as the released predictor does (`memory_dtype="bfloat16"`).
    """
    name = f"video_{case}"
    kind = case.removesuffix("_fp32mem")
    rounded = not case.endswith("_fp32mem") and not case.startswith("absent")
    tolerance = BFLOAT16_TOLERANCE if rounded else TOLERANCE
    settings = {"memory_dtype": "bfloat16" if rounded else None, "binarize_prompted_memory": "soft" not in kind}
    shift = nullcontext()
    if kind.startswith("absent"):
        shift = less_often_present(tracker, official.config["absent_shift"][int(kind.split("_")[1])])
    num_objects = len(prompts_of(official, kind))
    num_frames = len(official["in.frames"])
    frames = official[f"out.{name}.frame_idx"].tolist() if f"out.{name}.frame_idx" in official else range(num_frames)

    def run() -> dict[tuple[int, int], FrameMasks]:
        return track(tracker, official["in.frames"], prompts_of(official, kind))

    def compare(results: dict[tuple[int, int], FrameMasks], prompted: PromptedMasks):
        def stacked(field: str) -> torch.Tensor:
            return torch.stack([torch.cat([results[o, t][field] for o in range(num_objects)]) for t in frames])

        logits = stacked("logits")[:, :, None]
        official.check(f"{name}.low_res", logits, tolerance)
        official.check(f"{name}.obj_ptr", stacked("pointer"), tolerance)
        scores = stacked("object_logits")
        side = tracker.config.image_size // 16
        memory = [entry.features.permute(1, 2, 0).unflatten(2, (side, side)) for entry in prompted.remembered]
        memory = torch.cat(memory).float()
        for output, value in (
            ("object_score_logits", scores[..., None]),
            ("decoder_object_scores", scores.flatten()),
            ("masks", resize(official, logits)),
            ("maskmem_prompt_frame", memory[:1]),
            ("maskmem_frame0", memory),
        ):
            if f"out.{name}.{output}" in official:
                official.check(f"{name}.{output}", value, tolerance)

    with options(tracker.config, **settings), shift:
        compare_across_knife_edge(tracker, run, compare)
        check_answers_to_prompts(official, tracker, name, prompts_of(official, kind))
    if f"{name}.frame_idx" in official.names(name):
        start = prompts_of(official, kind)[0][0][0]
        walked = range(start, -1, -1) if kind == "reverse" else range(start, num_frames)
        official.check(f"{name}.frame_idx", torch.tensor(list(walked)))


def check_answers_to_prompts(official: Recording, tracker: MaskTracker, name: str, objects: list[Prompted]):
    """`after_prompt_<q>`: the masks of all objects so far after the q-th prompt, at the size of the video."""
    expected = official.names(f"{name}.after_prompt_")
    if not expected:
        return
    pyramid = first_frame(official, tracker)
    answers: dict[int, torch.Tensor] = {}
    calls = [(index, turn) for index, ((_, prompts),) in enumerate(objects) for turn in range(len(prompts))]
    assert len(expected) == len(calls)
    for call, (index, turn) in enumerate(calls):
        prompts = [replace(prompt) for prompt in objects[index][0][1][: turn + 1]]
        answers[index] = tracker.prompt_in_turn(pyramid, prompts).logits
        logits = torch.stack([answers[o] for o in sorted(answers)])
        official.check(f"{name}.after_prompt_{call}", resize(official, logits))


def resize(official: Recording, logits: torch.Tensor) -> torch.Tensor:
    """Mask logits `(…, 1, h, w)` at the size of the video."""
    size = tuple(official.config["video_hw"])
    resized = F.interpolate(logits.flatten(0, -4), size=size, mode="bilinear", align_corners=False)
    return resized.reshape(*logits.shape[:-2], *size)


@folders
def test_every_output_is_compared(official: Recording, whole_module):
    assert not official.missing()
