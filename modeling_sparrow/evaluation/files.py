"""Masks, label maps and mask dictionaries on disk, with errors that name the file.

Official layouts hold masks as PNG files (binary, or palette images whose pixel value is an object's number) and as
dictionaries of COCO run-length encodings. Whatever cannot be read raises an [`EvaluationError`] whose message
begins with the path, so that one line tells which file to mend.
"""

import contextlib
import json
import os
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask


class EvaluationError(ValueError):
    """Benchmark data or predictions that cannot be scored; the message names the file and says what was expected."""


class MissingPredictionError(EvaluationError):
    """A prediction file that is not there."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: str | Path) -> Any:
    """Content of a JSON file.

    Raises:
        EvaluationError: if the file is absent or not valid JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise EvaluationError(f"{path}: not valid JSON ({error})") from error


def write_json(path: str | Path, content: Any) -> None:
    """Writes `content` as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_label_map(path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Label map of one PNG file: the palette index, or the grey value.

    Args:
        path: PNG of mode P, L or 1 (8 bits).
        size: expected height and width in pixels; `None` accepts any.

    Returns:
        `(H, W)` uint8.

    Raises:
        MissingPredictionError: if the file is absent.
        EvaluationError: if it is corrupt, not a single-channel image, or of another size.
    """
    image, mode = _read_image(path, size)
    if mode not in ("P", "L", "1"):
        raise EvaluationError(f"{path}: image mode {mode}, expected one channel (palette or 8-bit grey)")
    return image.astype(np.uint8)


def read_mask(path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Foreground of one PNG file: every pixel that is not zero (in a colour image: not black).

    Official readers take any non-zero value as foreground; thresholding at 128 would empty masks stored as 0/1.

    Args:
        path: PNG of any mode; palette images are read by index.
        size: expected height and width in pixels; `None` accepts any.

    Returns:
        `(H, W)` bool.

    Raises:
        MissingPredictionError: if the file is absent.
        EvaluationError: if it is corrupt or of another size.
    """
    return read_mask_values(path, size) != 0


def read_mask_values(path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Like [`read_mask`], but `(H, W)` uint8 with the stored values (colour images: the largest channel)."""
    image, mode = _read_image(path, size)
    if image.ndim == 3:
        colours = image[..., :-1] if mode in ("LA", "RGBA") else image
        image = colours.max(axis=-1)
    return image.astype(np.uint8) if image.dtype in (np.uint8, bool) else (image != 0).astype(np.uint8)


def _read_image(path: str | Path, size: tuple[int, int] | None) -> tuple[np.ndarray, str]:
    try:
        with Image.open(path) as image:
            mode, array = image.mode, np.asarray(image)
    except FileNotFoundError as error:
        raise MissingPredictionError(f"{path}: missing") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow reports a broken PNG as any of these
        raise EvaluationError(f"{path}: not a readable PNG ({error})") from error
    if size is not None and array.shape[:2] != tuple(size):
        raise EvaluationError(
            f"{path}: {array.shape[0]} x {array.shape[1]} pixels (height x width), expected {size[0]} x {size[1]}; "
            "resize the mask logits before thresholding, never the PNG"
        )
    return array, mode


def write_mask(path: str | Path, mask: np.ndarray) -> None:
    """Writes a `(H, W)` bool mask as an 8-bit grey PNG with values 0 and 255, atomically."""
    _write_image(path, Image.fromarray(np.asarray(mask, dtype=bool).astype(np.uint8) * 255))


def write_label_map(path: str | Path, labels: np.ndarray) -> None:
    """Writes `(H, W)` uint8 labels as a palette PNG with the DAVIS colours, atomically."""
    image = Image.fromarray(np.asarray(labels, dtype=np.uint8)).convert("P")
    image.putpalette(davis_palette())
    _write_image(path, image)


def _write_image(path: str | Path, image: Image.Image) -> None:
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def davis_palette() -> list[int]:
    """The 256 RGB colours of Pascal VOC and DAVIS: the label's bits, spread over the high bits of the channels."""
    colours = []
    for label in range(256):
        channels = [0, 0, 0]
        for bit in range(8):
            channels[bit % 3] |= ((label >> bit) & 1) << (7 - bit // 3)
        colours.extend(channels)
    return colours


def decode_rle(rle: dict[str, Any], source: str) -> np.ndarray:
    """Decodes one COCO run-length encoding.

    Args:
        rle: `{"size": [height, width], "counts": str | bytes | list of int}`.
        source: what to name in an error.

    Returns:
        `(H, W)` uint8, 0 or 1.

    Raises:
        EvaluationError: if it is not a run-length encoding.
    """
    try:
        if isinstance(rle["counts"], list):
            rle = coco_mask.frPyObjects(rle, *rle["size"])
        return coco_mask.decode(rle)
    except (KeyError, TypeError, ValueError) as error:
        raise EvaluationError(f"{source}: not a COCO run-length encoding ({error!r})") from error


def read_mask_dict(path: str | Path) -> dict[str, list]:
    """Mask dictionary of a benchmark: annotation id -> one run-length encoding or `None` per frame.

    A pickle (Ref-DAVIS17's `mask_dict.pkl`) is never executed: only the instructions that build dictionaries, lists,
    strings, bytes and numbers are followed.

    Args:
        path: `.json` or `.pkl`.

    Raises:
        EvaluationError: if the file is absent, damaged, or a pickle that builds anything but plain data.
    """
    path = Path(path)
    content = _read_plain_pickle(path) if path.suffix in (".pkl", ".pickle") else read_json(path)
    if not isinstance(content, dict):
        raise EvaluationError(f"{path}: expected a dictionary of masks, found a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


_PLAIN_VALUES = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("STRING", "SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}


def _read_plain_pickle(path: Path) -> Any:
    """Plain data of a pickle, by interpreting its instructions without ever importing or calling anything."""
    try:
        return _PlainPickle().build(path.read_bytes())
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{path}: not a pickle of plain dictionaries, lists, strings and numbers ({error}); "
            "save its content as JSON and pass that file"
        ) from error


class _PlainPickle:
    """Stack machine for the data instructions of the pickle format (see the standard library's `pickletools`)."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def build(self, content: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(content):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in ("PROTO", "FRAME"):
                continue
            if name in _PLAIN_VALUES:
                self.stack.append(_PLAIN_VALUES[name])
            elif name in _LITERALS:
                self.stack.append(argument)
            elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
                self.stack.append({} if name == "EMPTY_DICT" else [])
            elif name == "MARK":
                self.marks.append(len(self.stack))
            elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
                self.memo[len(self.memo) if name == "MEMOIZE" else int(argument)] = self.stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[int(argument)])
            else:
                self._collect(name)
        raise ValueError("the file ends early")

    def _collect(self, name: str) -> None:
        if name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = self._take(len(self.stack) - int(name[-1]))
            self.stack.append(items)
        elif name in ("LIST", "TUPLE"):
            self.stack.append(self._take(self.marks.pop()))
        elif name == "DICT":
            items = self._take(self.marks.pop())
            self.stack.append(dict(zip(items[::2], items[1::2], strict=True)))
        elif name in ("APPEND", "APPENDS"):
            items = self._take(self.marks.pop() if name == "APPENDS" else len(self.stack) - 1)
            self.stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._take(self.marks.pop() if name == "SETITEMS" else len(self.stack) - 2)
            self.stack[-1].update(zip(items[::2], items[1::2], strict=True))
        else:
            raise ValueError(f"instruction {name}")

    def _take(self, start: int) -> list[Any]:
        items = self.stack[start:]
        del self.stack[start:]
        return items
