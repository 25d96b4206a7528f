"""LoRA on the language model, through peft: what is adapted, how an adapter is loaded and merged."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..modeling_sparrow import SparrowForVideoGrounding
from .settings import SettingsError

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_CONFIG = "adapter_config.json"
LANGUAGE_MODEL = "model.host.language_model"


@dataclass
class LoraSettings:
    """Low-rank adapters (arXiv 2106.09685).

    Args:
        rank, alpha, dropout: of the adapters.
        language_modules: names of linear layers of the language model; `qkv_proj` is Phi-3's fused one.
        parts: further parts whose linear layers get adapters, named as in `trainable` (released training does so for
            the V->L adapters and the token head, instead of training them in full).
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    language_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj", "qkv_proj"])
    parts: list[str] = field(default_factory=list)


def target_pattern(settings: LoraSettings) -> str:
    """Regular expression of the full names of the layers that get adapters.

    It is anchored at the language model: the towers and SAM2 have layers of the same names.
    """
    names = "|".join(map(re.escape, settings.language_modules))
    patterns = [rf"{re.escape(LANGUAGE_MODEL)}\..*\.(?:{names})"]
    patterns += [rf"{re.escape(f'model.{part}')}(?:\..*)?\.fc\d" for part in settings.parts]
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def add_lora(model: SparrowForVideoGrounding, settings: LoraSettings, trainable: list[str]) -> "PeftModel":
    """The model with adapters; all else is frozen but the rows of [BOX] and [SEG] and the parts in `trainable`.

    The rows lie in the embedding table and in the output layer, which are one matrix if they are tied. Releases leave
    them as they were initialised.

    Args:
        trainable: parts of `SparrowModel` that are trained in full ("seg_head").

    Raises:
        SettingsError: no layer matches, or the output layer has a bias, which peft would drop.
    """
    from peft import LoraConfig, get_peft_model

    pattern = target_pattern(settings)
    if not any(re.fullmatch(pattern, name) for name, _ in model.named_modules()):
        raise SettingsError(f"lora: no layer of the model is called as {settings.language_modules} say.")
    output = model.get_output_embeddings()
    if getattr(output, "bias", None) is not None:
        raise SettingsError("lora: the output layer of this language model has a bias; train it without lora.")
    tied = output.weight is model.get_input_embeddings().weight
    tables = [model.get_input_embeddings()] if tied else [model.get_input_embeddings(), output]
    tokens = [model.config.box_token_id, model.config.seg_token_id]
    return get_peft_model(
        model,
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=pattern,
            modules_to_save=[f"model.{part}" for part in trainable] or None,
            trainable_token_indices={_name_of(model, table): tokens for table in tables},
        ),
    )


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def base_of_adapter(folder: str | Path) -> str:
    """Folder or Hub id of the model that an adapter belongs to."""
    return json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]


@torch.no_grad()
def merge_adapter(model: SparrowForVideoGrounding, folder: str | Path) -> SparrowForVideoGrounding:
    """The model with the adapter of a folder merged into its weights; gives the same outputs as both together."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder).merge_and_unload().requires_grad_(True)
