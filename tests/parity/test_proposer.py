"""The region proposer: released rules are `num_feature_levels=1`, `refine_reference_points=False`, two objectness
heads (`objectness_powers`), no suppression (`nms_threshold=None`) and an image encoder of its own."""

import functools
import re

import pytest
import torch
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_sparrow.configuration_sparrow import RegionProposerConfig
from modeling_sparrow.conversion.sam2 import sam2_vision_config
from modeling_sparrow.conversion.videoglamm import convert_proposer
from modeling_sparrow.region_proposer import RegionProposer, RegionProposerOutput, inverse_sigmoid

from .builders import options, our_names, proposer_sizes, trunk_settings
from .fixtures import Recording, for_cases, for_families

folders = for_families("proposer")

HEADS = ["coco", "sa1b"]  # sources of the training data, each with an objectness head


@pytest.fixture
def proposer(official: Recording) -> RegionProposer:
    return proposer_of(official)


@functools.cache
def proposer_of(official: Recording) -> RegionProposer:
    encoder = {
        f"image_encoder.{key.removeprefix('vis_encoder.')}": value
        for key, value in official.weights.items()
        if key.startswith("vis_encoder.")
    }
    side = official.config["image_hw"][0]
    config = RegionProposerConfig(
        **proposer_sizes(official.config["ddetr"]),
        vision_config=sam2_vision_config(encoder, side, **trunk_settings(official.config["sam2"])),
        image_size=side,
        box_head_hidden_size=official.config["bbox_mlp_hidden"],
        objectness_powers=official.config["score_power"],
        refine_reference_points=False,
        nms_threshold=None,
    )
    config._attn_implementation = "eager"
    proposer = RegionProposer(config, channels=[]).eval()
    conversion = convert_proposer(official.weights)
    proposer.load_state_dict(conversion.tensors)
    assert len(conversion.tensors) + len(conversion.dropped) == len(official.weights)
    return proposer


@folders
@torch.no_grad()
def test_features(official: Recording, proposer: RegionProposer):
    levels = proposer.encode_pictures(official["in.images"])
    for k, level in enumerate(levels):
        official.check(f"fpn.{k}", level)
    used = levels[-len(proposer.input_projections) :]
    for k, (project, level) in enumerate(zip(proposer.input_projections, used, strict=True)):
        official.check(f"srcs.{k}", project(level))


@folders
@torch.no_grad()
def test_raw_output(official: Recording, proposer: RegionProposer):
    output = proposer(proposer.encode_pictures(official["in.images"]))
    official.check("enc_outputs_class", output.encoder_objectness[..., None])
    official.check("enc_outputs_coord_logits", output.encoder_boxes)
    official.check("encoder_last_hidden_state", output.encoder_hidden_states)
    official.check("init_reference_points", output.reference_points)
    official.check("last_hidden_state", output.hidden_states)
    official.check("intermediate_hidden_states", output.decoder_hidden_states.transpose(0, 1))
    official.check("pred_boxes_cxcywh", output.boxes[-1])
    official.check("logits_coco", output.objectness[0][-1][..., None])
    official.check("logits_sa1b", output.objectness[1][-1][..., None])
    # where the next layer's box starts from: the offset of this layer, measured at the initial reference
    start = inverse_sigmoid(output.reference_points)
    starts = [
        (head(states) + start).sigmoid()
        for head, states in zip(proposer.box_heads[:-1], output.decoder_hidden_states, strict=True)
    ]
    official.check("intermediate_reference_points", torch.stack(starts, dim=1))


@for_cases("proposals_", "proposer")
@torch.no_grad()
def test_proposals(official: Recording, proposer: RegionProposer, case: str):
    """`top<k>_p<a>_<b>`: the k best by coco ** 0.a * sa1b ** 0.b."""
    k, *powers = (int(number) for number in re.fullmatch(r"top(\d+)_p(\d+)_(\d+)", case).groups())
    picture = official["in.picture_uint8"].permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    pixel_values = (picture - mean) / std
    official.check("pixel_values", pixel_values)
    with options(proposer.config, max_proposals=k, objectness_powers=[power / 10 for power in powers]):
        proposals = proposer.propose(proposer.encode_pictures(pixel_values))
    official.check(f"proposals_{case}.boxes", proposals.boxes[0])
    official.check(f"proposals_{case}.scores", proposals.scores[0])
    official.check(f"proposals_{case}.features", proposals.features[0])
    official.check(f"proposals_{case}.mask", proposals.valid[0])


@for_cases("train_", "proposer")
def test_training(official: Recording, proposer: RegionProposer, case: str):
    """Losses and gradients for targets of one source; evaluation mode, so that dropout is off."""
    targets = [official[f"in.labels.{k}.boxes"] for k in range(len(official["in.images"]))]
    proposer.zero_grad()
    output = proposer(proposer.encode_pictures(official["in.images"]))
    losses = proposer.loss(output, targets, objectness_index=HEADS.index(case))
    official.check(f"train_{case}.loss", losses["loss"])
    for name in losses.keys() - {"loss"}:
        official.check(f"train_{case}.loss_dict.{name}", losses[name])
    losses["loss"].backward()
    renamed = our_names(official.weights, convert_proposer(official.weights).tensors)
    parameters = dict(proposer.named_parameters())
    for name in official.names(f"train_{case}.grad."):
        parameter = parameters[renamed[name.removeprefix(f"train_{case}.grad.")]]
        official.check_gradient(name, parameter.grad)
    check_cardinality_errors(official, output, targets, case)


def check_cardinality_errors(
    official: Recording, output: RegionProposerOutput, targets: list[torch.Tensor], case: str
):
    """Only logged by the official code: mean difference between the objects predicted and those there are.

    An object is predicted where the arg-max is not the last class. There is one class, so that is never.
    """
    logits = output.objectness[HEADS.index(case)]
    stages = {"": logits[-1], "_enc": output.encoder_objectness} | {f"_{k}": logits[k] for k in range(len(logits) - 1)}
    there = torch.tensor([float(len(target)) for target in targets])
    for suffix, stage in stages.items():
        predicted = (stage[..., None].argmax(-1) != 0).sum(1)
        error = (predicted - there).abs().mean()
        official.check(f"train_{case}.loss_dict.cardinality_error{suffix}", error)


@folders
def test_every_output_is_compared(official: Recording, whole_module):
    assert not official.missing()
