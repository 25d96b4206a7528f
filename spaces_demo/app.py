"""Starts the demo: `python app.py` in a Space, `python spaces_demo/app.py` in a checkout, `sparrow demo` elsewhere."""

import importlib.util
import os
import sys
from pathlib import Path

if importlib.util.find_spec("spaces"):  # a Space with ZeroGPU: it must come before torch
    import spaces  # noqa: F401

HERE = Path(__file__).resolve().parent


def make_importable(name: str, folder: Path):
    """Lets a folder be imported as the package `name`, unless a package of that name is installed."""
    if importlib.util.find_spec(name) is not None or not folder.is_dir():
        return
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def main(arguments: list[str]) -> int:
    """`sparrow demo` with these arguments; the variable SPARROW_MODEL of a Space names its model."""
    # A checkout that is not installed, or a Space into which the packages were uploaded beside this file.
    make_importable("sparrow_processing", HERE.parent / "processing")
    make_importable("modeling_sparrow", HERE.parent / "modeling_sparrow")
    make_importable("sparrow_space", HERE)
    from modeling_sparrow import cli

    model = os.environ.get("SPARROW_MODEL")
    return cli.main(["demo", *(["--model", model] if model else []), *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
