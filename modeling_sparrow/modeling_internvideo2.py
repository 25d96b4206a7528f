"""Temporal tower: the vision encoder of InternVideo2 stage 2 (arXiv 2403.15377), absent from transformers.

A plain pre-norm transformer over the tokens of a short chunk of frames, attended jointly in space and time. SPARROW
reads the residual stream after the last layer, without a final norm.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import capture_outputs

from .configuration_sparrow import InternVideo2Config


class InternVideo2RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = hidden_states.float()
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(hidden_states.dtype)


class InternVideo2Embeddings(nn.Module):
    """Tubelet patches, class token, learned positions; a table of its own for a still picture."""

    def __init__(self, config: InternVideo2Config):
        super().__init__()
        kernel = (config.tubelet_size, config.patch_size, config.patch_size)
        self.patch_embedding = nn.Conv3d(config.num_channels, config.hidden_size, kernel_size=kernel, stride=kernel)
        patches = (config.image_size // config.patch_size) ** 2
        steps = config.num_frames // config.tubelet_size
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + steps * patches, config.hidden_size))
        self.image_position_embedding = nn.Parameter(torch.zeros(1, 1 + patches, config.hidden_size))
        self.tubelet_size = config.tubelet_size

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        T = pixel_values.shape[1]
        pixel_values = pixel_values.to(self.patch_embedding.weight.dtype)
        if T == 1:  # a still picture fills one tubelet
            pixel_values = pixel_values.expand(-1, self.tubelet_size, -1, -1, -1)
        patches = (
            self.patch_embedding(pixel_values.transpose(1, 2)).flatten(2).transpose(1, 2)
        )  # (B, steps * h * w, D)
        tokens = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1)
        positions = self.image_position_embedding if T == 1 else self.position_embedding
        if tokens.shape[1] != positions.shape[1]:
            raise ValueError(
                f"{T} frames of {tuple(pixel_values.shape[-2:])} pixels give {tokens.shape[1]} tokens, the position "
                f"table has {positions.shape[1]}. Feed chunks of num_frames square frames of image_size, or one frame."
            )
        return tokens + positions


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class InternVideo2Attention(nn.Module):
    """Self-attention whose queries and keys are normalised over the full width, before the split into heads."""

    def __init__(self, config: InternVideo2Config):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_norm = InternVideo2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.k_norm = InternVideo2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        B, L, D = hidden_states.shape
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
        query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.view(B, L, self.num_heads, self.head_dim).transpose(1, 2) for x in (query, key, value))
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention(self, query, key, value, attention_mask=None, scaling=self.scaling)
        return self.o_proj(output.reshape(B, L, D))


class InternVideo2MLP(nn.Module):
    def __init__(self, config: InternVideo2Config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(hidden_states)))


class InternVideo2Layer(GradientCheckpointingLayer):
    def __init__(self, config: InternVideo2Config):
        super().__init__()
        self.norm1 = InternVideo2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = InternVideo2Attention(config)
        # not called "gamma": loaders of older checkpoints rename such keys
        self.attention_scale = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init_value))
        self.norm2 = InternVideo2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = InternVideo2MLP(config)
        self.mlp_scale = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init_value))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        update = self.attention(self.norm1(hidden_states))
        hidden_states = hidden_states + (update.float() * self.attention_scale.float()).to(update.dtype)
        update = self.mlp(self.norm2(hidden_states))
        return hidden_states + (update.float() * self.mlp_scale.float()).to(update.dtype)


class InternVideo2Model(PreTrainedModel):
    """InternVideo2 vision encoder.

    `forward(pixel_values)` takes `(B, T, 3, H, W)` float frames normalised with ImageNet statistics, `T` being
    `config.num_frames` or 1, and returns `last_hidden_state` `(B, 1 + tokens, D)`: the class token, then frame by
    frame, row by row.
    """

    config: InternVideo2Config
    config_class = InternVideo2Config
    base_model_prefix = "internvideo2"
    main_input_name = "pixel_values"
    input_modalities = ("video",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternVideo2Layer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": InternVideo2Layer}  # noqa: RUF012

    def __init__(self, config: InternVideo2Config):
        super().__init__(config)
        self.embeddings = InternVideo2Embeddings(config)
        self.layers = nn.ModuleList([InternVideo2Layer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, InternVideo2Embeddings):
            for table in (module.class_token, module.position_embedding, module.image_position_embedding):
                init.normal_(table, std=self.config.initializer_range)
        elif isinstance(module, InternVideo2RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, InternVideo2Layer):
            init.constant_(module.attention_scale, self.config.layer_scale_init_value)
            init.constant_(module.mlp_scale, self.config.layer_scale_init_value)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutput:
        hidden_states = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return BaseModelOutput(last_hidden_state=hidden_states)
