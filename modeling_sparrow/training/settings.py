"""Strict settings: YAML to dataclasses, where an unknown key or a value of the wrong type is an error."""

import dataclasses
import types
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

CONFIGS = Path(__file__).parent / "configs"  # shipped with the package, found by their name
Settings = TypeVar("Settings")


class SettingsError(ValueError):
    """Settings that cannot be used; the message names the key and says what was expected."""


def read_settings(path: str | PathLike, hint: Any, overrides: list[str] | None = None) -> Any:
    """Settings from a YAML file.

    Args:
        path: of the file, or the name of one that is shipped with the package ("tiny_filter").
        hint: the dataclass, or several joined by `|` that a `Literal` field tells apart.
        overrides: `key=value` with dots between the levels ("optimization.steps=20"); values are YAML.

    Raises:
        SettingsError: the file is absent or no YAML, or does not fit the dataclass.
    """
    file = find_config(path)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: not valid YAML: {error}") from error
    for override in overrides or []:
        _override(content, override)
    return build(hint, content, str(path))


def find_config(path: str | PathLike) -> Path:
    """The file, or the shipped one of that name."""
    shipped = CONFIGS / f"{Path(path).stem}.yaml"
    if Path(path).is_file():
        return Path(path)
    if Path(path).name == str(path) and shipped.is_file():
        return shipped
    names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
    raise SettingsError(f"{path}: no such file, and none of the shipped settings: {names}.")


def _override(content: Any, override: str):
    keys, equals, value = override.partition("=")
    if not equals:
        raise SettingsError(f"{override!r}: expected key=value, with dots between the levels of keys.")
    *parents, last = keys.strip().split(".")
    for key in parents:
        if not isinstance(content, dict):
            raise SettingsError(f"{override!r}: {key!r} is not below a mapping.")
        if content.get(key) is None:
            content[key] = {}
        content = content[key]
    if not isinstance(content, dict):
        raise SettingsError(f"{override!r}: {last!r} is not below a mapping.")
    content[last] = yaml.safe_load(value)


def to_plain(settings: Any) -> dict[str, Any]:
    """Settings as a mapping that `build` takes back."""
    return dataclasses.asdict(settings)


def build(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint` says: a dataclass from a mapping, a list, a number, …

    Args:
        where: place of the value, for error messages.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _build_union(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            raise SettingsError(f"{where}: expected one of {', '.join(map(repr, arguments))}, got {value!r}.")
        return value
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(hint, value, where)
    if origin is list or origin is dict:
        if not isinstance(value, origin):
            raise SettingsError(f"{where}: expected a {origin.__name__}, got {value!r}.")
        if origin is dict:
            return {str(key): build(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
        return [build(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    return _build_scalar(hint, value, where)


def _build_dataclass(cls: type[Settings], value: Any, where: str) -> Settings:
    if not isinstance(value, dict):
        raise SettingsError(f"{where}: expected a mapping of keys to values, got {value!r}.")
    hints = get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := [str(key) for key in value if key not in known]:
        raise SettingsError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(known)}.")
    optional = {
        name
        for name, field in known.items()
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    }
    if missing := [name for name in known if name not in value and name not in optional]:
        raise SettingsError(f"{where}: the key {', '.join(missing)} is required.")
    return cls(**{name: build(hints[name], item, f"{where}: {name}") for name, item in value.items()})


def _build_union(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    """`X | None`, or dataclasses that a `Literal` field of the same name tells apart."""
    choices = [hint for hint in hints if hint is not type(None)]
    if value is None and len(choices) < len(hints):
        return None
    if len(choices) == 1:
        return build(choices[0], value, where)
    tags = {}
    for choice in choices:
        for name, hint in get_type_hints(choice).items():
            if get_origin(hint) is Literal and len(get_args(hint)) == 1:
                tags[name, get_args(hint)[0]] = choice
    for (name, tag), choice in tags.items():
        if isinstance(value, dict) and value.get(name) == tag:
            return build(choice, value, where)
    expected = " or ".join(f"{name}: {tag}" for name, tag in tags)
    raise SettingsError(f"{where}: expected a mapping with {expected}, got {value!r}.")


def _build_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, str):  # YAML takes 1e-4 for a word
        try:
            return float(value)
        except ValueError as error:
            raise SettingsError(f"{where}: expected a number, got {value!r}.") from error
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise SettingsError(f"{where}: expected {hint.__name__}, got {value!r}.")
    return value
