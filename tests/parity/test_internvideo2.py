"""The temporal tower."""

import functools

import pytest
import torch

from modeling_sparrow.configuration_sparrow import InternVideo2Config
from modeling_sparrow.conversion.videoglamm import convert_internvideo2
from modeling_sparrow.modeling_internvideo2 import InternVideo2Model

from .builders import internvideo2_sizes
from .fixtures import Recording, for_families

folders = for_families("internvideo2_tiny")


@functools.cache
def tower_of(official: Recording, attention: str) -> InternVideo2Model:
    config = InternVideo2Config(**internvideo2_sizes(official.config["tower"], official.weights))
    tower = InternVideo2Model(config).eval()
    tower.set_attn_implementation(attention)
    conversion = convert_internvideo2(official.weights, config.num_hidden_layers)
    tower.load_state_dict(conversion.tensors)
    assert len(conversion.tensors) + len(conversion.dropped) == len(official.weights)
    return tower


@folders
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_features(official: Recording, attention: str):
    tower = tower_of(official, attention)
    output = tower(official["in.video"], output_hidden_states=True)
    official.check("video_features", output.last_hidden_state)
    tokens = output.last_hidden_state[:, 1:]
    official.check("video_adapter_input", tokens)
    patches = tower.embeddings.patch_embedding(official["in.video"].transpose(1, 2))  # (B, D, T, h, w)
    official.check("patch_tokens", patches.flatten(3).permute(0, 2, 3, 1))
    for name in official.names("video_blocks."):  # every 37th token
        states = output.hidden_states[int(name.split(".")[-1]) + 1]
        official.check(name, states[:, ::37])
    official.check("image_features", tower(official["in.image"]).last_hidden_state)


@folders
def test_sizes(official: Recording):
    tower = tower_of(official, "sdpa")
    official.check("blocks_run", torch.tensor([len(tower.layers)]))
    official.check("hidden_size", torch.tensor([tower.config.hidden_size]))


@folders
def test_every_output_is_compared(official: Recording, whole_module):
    official.leave_out("preprocess_224_strided", "pixel preparation is the processor's, see test_preprocess")
    assert not official.missing()
