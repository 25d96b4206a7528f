"""What every part of SPARROW shares as a transformers model."""

import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_sparrow import SparrowConfig


class SparrowPreTrainedModel(PreTrainedModel):
    """Base of the whole model and of its parts; a part overrides `config` and `_init_weights`."""

    config: SparrowConfig
    config_class = SparrowConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("video", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


def is_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def grad_if_trainable(module: nn.Module) -> torch.set_grad_enabled:
    """Context without gradients if nothing in `module` is trained, so that frozen parts keep no activations."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and is_trainable(module))
