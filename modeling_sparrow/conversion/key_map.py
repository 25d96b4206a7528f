"""Renaming of state dicts by ordered regular expressions."""

import re

import torch


def rename_keys(state_dict: dict[str, torch.Tensor], rules: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Apply every rule, in order, to every key; a key may be changed by several.

    Raises:
        ValueError: if two keys end up with the same name.
    """
    renamed = {}
    for key, tensor in state_dict.items():
        name = key
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise ValueError(f"Two tensors map to {name}; the second is {key}.")
        renamed[name] = tensor
    return renamed
