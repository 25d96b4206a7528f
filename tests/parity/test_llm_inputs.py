"""The multimodal token sequence: what the language model is given and what comes out of it.

Uses `SparrowConfig` fields `spatial_pool_size`, `temporal_pool_size`, `spatial_feature_layer`, `tsf_num_clusters`,
`tsf_iterations`. The segmenter is not recorded here; ours has random weights and is not run.
"""

import functools
import itertools

import pytest
import torch

from modeling_sparrow.configuration_sparrow import SparrowConfig
from modeling_sparrow.conversion.videoglamm import convert_released
from modeling_sparrow.modeling_sparrow import SparrowForVideoGrounding
from modeling_sparrow.modeling_videoglamm import pool_tokens
from modeling_sparrow.tracked_features import select_medoids
from modeling_sparrow.training.tiny_model import sam2_settings

from .builders import host_sizes
from .fixtures import Recording, for_cases, for_families
from .knife_edges import chosen, holds_for_one, possible_choices
from .sequences import Clip, Rows, expand_rows, pixel_inputs

folders = for_families("llm_inputs")

# What each row of a case shows (README of the family).
CASES = {
    "video": [Clip("v4")],
    "video_8_frames": [Clip("v8")],
    "tsf_6_crops": [Clip("v4", "t6")],
    "tsf_none": [Clip("v4")],
    "tsf_fewer_crops": [Clip("v4", "t2")],
    "tsf_single_crop_3d": [Clip("i", "t1")],
    "tsf_spread": [Clip("v4", "t6")],
    "image": [Clip("i")],
    "image_tsf_none_arg": [Clip("i")],
    "batch_mixed": [Clip("v4", "t6"), Clip("i")],
    "batch_same_length": [Clip("i"), Clip("i2")],
    "batch_text_only": [Clip("i"), Clip("i2")],
    "inference_no_labels_no_mask": [Clip("v4", "t6")],
    "inference_mask": [Clip("v4")],
    "no_box_token": [Clip("v4")],
}


@pytest.fixture
def model(official: Recording) -> SparrowForVideoGrounding:
    return model_of(official)


@functools.cache
def model_of(official: Recording) -> SparrowForVideoGrounding:
    sizes = host_sizes(official.config, official.weights)
    vocab_size = sizes["text_config"]["vocab_size"]
    config = SparrowConfig(
        **sizes,
        mask_tracker_config={"sam2_config": {"model_type": "sam2_video", **sam2_settings()}},
        num_prompt_frames=1,
        video_token_id=vocab_size,
        tsf_token_id=vocab_size + 1,
        box_guidance=False,
    )
    model = SparrowForVideoGrounding(config).eval()
    conversion = convert_released(official.weights, config.temporal_config.num_hidden_layers)
    result = model.load_state_dict(conversion.tensors, strict=False)
    assert not result.unexpected_keys
    assert all(
        key.startswith(("model.mask_tracker.", "model.seg_head.", "model.box_head.")) for key in result.missing_keys
    )
    return model


def check_strided(official: Recording, name: str, actual: torch.Tensor, where: torch.Tensor):
    """Long rows are recorded at every 5th position and the last 32."""
    for suffix, positions in (("", slice(None)), ("_every5", slice(None, None, 5)), ("_last32", slice(-32, None))):
        if f"out.{name}{suffix}" in official:
            official.check(f"{name}{suffix}", actual[:, positions], where=where[:, positions])


@for_cases("case_", "llm_inputs")
@torch.no_grad()
def test_case(official: Recording, model: SparrowForVideoGrounding, case: str):
    name, clips = f"case_{case}", CASES[case]
    video_index = list(range(len(clips)))
    rows = expand_rows(official, model.config, name, clips, video_index)
    pixels = pixel_inputs(official, model.config, rows, clips, video_index)
    check_positions(official, model.config, case, rows)

    crops = clips[0].crop_pixels(official)
    if crops is None or len(crops) <= model.config.tsf_num_clusters:
        compare_states(official, model, name, rows, pixels)
        return

    config = model.config
    kept = int((rows.input_ids[0] == config.tsf_token_id).sum())
    vectors = model.model.host.encode_pictures(crops).mean(dim=1)
    choices = possible_choices(vectors, config.tsf_num_clusters, config.tsf_iterations)
    if kept == config.tsf_num_clusters:
        choices = itertools.chain([None], choices)
    else:  # fewer placeholders than clusters: officially the first medoids are used, we refuse such a row
        with pytest.raises(ValueError, match="tracked-feature"):
            model.model.host.embed(rows.input_ids, **pixels)

    def compare(choice: torch.Tensor | None):
        with chosen(choice if choice is None else choice[:kept]):
            compare_states(official, model, name, rows, pixels)

    holds_for_one(choices, compare)


def compare_states(
    official: Recording, model: SparrowForVideoGrounding, name: str, rows: Rows, pixels: dict[str, torch.Tensor]
):
    """Embeddings that go into the language model, and what comes out where that is recorded."""
    # officially rows are padded with zero vectors, ours with the pad token; nothing attends to either
    L = rows.input_ids.shape[1]
    in_row = torch.arange(L) < rows.lengths[:, None]
    embeddings = model.model.host.embed(rows.input_ids, **pixels)
    check_strided(official, f"{name}.inputs_embeds", embeddings, in_row)
    if f"out.{name}.inputs_embeds_shape" in official:
        official.check(f"{name}.inputs_embeds_shape", torch.tensor(embeddings.shape))
    if f"out.{name}.logits_tail" not in official:
        return
    labels = rows.labels if f"in.{name}.labels" in official else None
    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask.long(), **pixels}
    output = model(**inputs, labels=labels, output_hidden_states=[-1])
    check_strided(official, f"{name}.last_hidden", output.hidden_states[-1], rows.attention_mask)
    tail = official[f"out.{name}.logits_tail"].shape[1]
    official.check(f"{name}.logits_tail", output.logits[:, -tail:], where=rows.attention_mask[:, -tail:])
    if labels is not None:
        official.check(f"{name}.loss", output.loss)


def check_positions(official: Recording, config: SparrowConfig, case: str, rows: Rows):
    """Masks, labels and positions; `*_token_mask` marks the position before a token."""
    name = f"case_{case}"
    B, L = rows.input_ids.shape
    official.check(f"{name}.position_ids", torch.arange(L)[None])  # the default of the language model
    if f"out.{name}.attention_mask" in official:
        official.check(f"{name}.attention_mask", rows.attention_mask)
    if f"out.{name}.labels" in official:
        official.check(f"{name}.labels", rows.labels)
    box_token_id = -1 if case == "no_box_token" else config.box_token_id
    for kind, token_id in (("seg", config.seg_token_id), ("box", box_token_id)):
        before = torch.cat([rows.input_ids[:, 1:] == token_id, torch.zeros(B, 1, dtype=torch.bool)], dim=1)
        official.check(f"{name}.{kind}_token_mask", before)


@folders
@torch.no_grad()
def test_towers(official: Recording, model: SparrowForVideoGrounding):
    """Tower features before the adapters, stored at evenly spaced tokens."""
    host = model.model.host
    layer = model.config.spatial_feature_layer

    def patches(pixel_values: torch.Tensor) -> torch.Tensor:
        return host.spatial_tower(pixel_values, output_hidden_states=True).hidden_states[layer][:, 1:]

    official.check("clip_patch_features", patches(official["in.i"]))
    context = patches(official["in.v8_context"])
    chunks = official["in.v8_images"].unflatten(0, (-1, model.config.temporal_config.num_frames))
    video = host.temporal_tower(chunks).last_hidden_state[:, 1:]
    for kind, features in (("context", context), ("video", video)):
        name = f"encode_videos_8.{kind}"
        official.check(f"{name}_shape", torch.tensor([1, *features.shape]))
        stride = -(-features.shape[1] // official[f"out.{name}"].shape[1])
        official.check(name, features[:, ::stride])


@folders
def test_pooling(official: Recording):
    for name in official.names("pool_"):
        official.check(name, pool_tokens(official["in.pool_x"], side=int(name.removeprefix("pool_"))))


@folders
@torch.no_grad()
def test_tracked_features(official: Recording, model: SparrowForVideoGrounding):
    official.check("tsf_frame_tokens", model.model.host.encode_pictures(official["in.t6"]).mean(dim=1))
    for name in official.names("kmeans_"):
        kind = name.removeprefix("kmeans_")
        if kind == "1iter":
            num_clusters, iterations = len(official[f"out.{name}"]), 1
        else:
            num_clusters, iterations = int(kind.removeprefix("k")), model.config.tsf_iterations
        vectors = official["in.km_x"]
        chosen_here = select_medoids(vectors, num_clusters, iterations)
        others = (vectors[choice] for choice in possible_choices(vectors, num_clusters, iterations))
        holds_for_one(itertools.chain([chosen_here], others), functools.partial(official.check, name))


@folders
def test_every_output_is_compared(official: Recording, whole_module):
    assert not official.missing()
