"""The command `sparrow`: ground, info, export."""

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from sparrow_processing.errors import ExportError, VideoGroundingError

logger = logging.getLogger("sparrow")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparrow", description="SPARROW: ask about a video, get text, boxes and masks."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    ground = commands.add_parser("ground", help="ground queries in a video")
    ground.add_argument("video", help="a video file, a GIF, or a folder of pictures")
    ground.add_argument("query", nargs="*", help="what to find; several queries share the work on the video")
    ground.add_argument("--model", default=None, help="folder or Hub id (default: the embedded sparrow-tiny)")
    ground.add_argument("--output", default="sparrow_output", help="folder for result.json, overlay.mp4 and masks/")
    ground.add_argument("--device", default=None, help="cpu, cuda, mps (default: the best there is)")
    ground.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    ground.add_argument("--max-frames", type=int, default=None, help="use only the first frames of the video")
    ground.add_argument("--task", default="refer", choices=["refer", "box", "describe", "ask"])
    ground.add_argument("--max-new-tokens", type=int, default=128)
    ground.add_argument("--json", default=None, metavar="FILE", help="also write the result here; - prints it")
    ground.add_argument("--no-overlay", action="store_true", help="do not write overlay.mp4")
    ground.set_defaults(run=run_ground)

    info = commands.add_parser("info", help="say what a checkpoint is")
    info.add_argument("model", nargs="?", default=None)
    info.set_defaults(run=run_info)

    export = commands.add_parser("export", help="write a complete Hub repository: weights, code, processor, card")
    export.add_argument("model")
    export.add_argument("directory")
    export.set_defaults(run=run_export)

    from .evaluation.commands import add_commands

    add_commands(commands)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 bad input, 130 interrupted."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return options.run(options)
    except (VideoGroundingError, OSError, ValueError) as error:
        print(f"sparrow: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sparrow: interrupted", file=sys.stderr)
        return 130


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def load_model(name: str | None, device: str | None, dtype: str = "float32"):
    """Model in evaluation mode and its processor.

    Args:
        name: folder or Hub id; None for the embedded checkpoint.
        device: None picks cuda, then mps, then cpu.
        dtype: of the weights.
    """
    import torch
    from transformers import AutoModel, AutoProcessor

    from .registration import DEFAULT_CHECKPOINT

    name = DEFAULT_CHECKPOINT if name is None else name
    if os.sep in name and not os.path.isdir(name) and name.count("/") != 1:
        raise ValueError(f"{name}: no such folder.")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    model = AutoModel.from_pretrained(name, dtype=getattr(torch, dtype), use_safetensors=True).to(device).eval()
    processor = AutoProcessor.from_pretrained(name)
    processor.check_config(model.config)
    return model, processor


# ---------------------------------------------------------------------- ground


def run_ground(options: argparse.Namespace) -> int:
    from sparrow_processing.processing_sparrow import check_prompt

    queries = [check_prompt(query) for query in options.query]
    if not queries and options.task != "describe":
        raise ValueError("Give at least one query, for example: sparrow ground clip.mp4 'the red ring'.")
    if options.max_frames is not None and options.max_frames < 1:
        raise ValueError(f"--max-frames must be at least 1, got {options.max_frames}.")
    from sparrow_processing.video_io import open_video

    reader = open_video(options.video)
    model, processor = load_model(options.model, options.device, options.dtype)
    if options.max_frames is not None:
        reader = reader.head(options.max_frames)
    results, interrupted = ground_video(
        model, processor, reader, queries or None, options.task, options.max_new_tokens
    )
    folders = _output_folders(Path(options.output), len(results))
    for result, folder in zip(results, folders, strict=True):
        write_result(result, reader, folder, overlay=not options.no_overlay)
        _report(result, folder)
    if options.json is not None:
        _write_json(results, options.json)
    return 130 if interrupted else 0


def ground_video(model, processor, reader, queries: list[str] | None, task: str, max_new_tokens: int):
    """Ground queries in an open video with a progress bar.

    Returns the results and whether the user interrupted; an interrupted run keeps the frames that are done.
    """
    from tqdm import tqdm

    began = time.perf_counter()
    inputs = processor(text=queries, videos=[reader], task=task, stream=True).to(model.device)
    prepared = time.perf_counter() - began
    collector = processor.collector(inputs["metadata"])
    steps = model.ground_iter(**inputs, max_new_tokens=max_new_tokens)
    interrupted, output, seen = False, None, set()
    with tqdm(total=len(reader), desc="frames", unit="frame") as bar:
        try:
            while True:
                row, masks = next(steps)
                collector(row, masks)
                if masks.frame_index not in seen:
                    seen.add(masks.frame_index)
                    bar.update()
        except StopIteration as end:
            output = end.value
        except KeyboardInterrupt:
            interrupted = True
            logger.info("interrupted after %d of %d frames; writing what is done", len(seen), len(reader))
    if output is None:
        return processor.partial_results(collector), interrupted
    results = processor.post_process_grounding(output, collector)
    for result in results:
        result.timings["prepare"] = prepared
    return results, interrupted


def _output_folders(root: Path, count: int) -> list[Path]:
    """`root` itself for one query, a numbered folder in it for each of several."""
    return [root] if count == 1 else [root / f"query_{index}" for index in range(count)]


def write_result(result, reader, folder: Path, overlay: bool = True):
    """Write `result.json`, `overlay.mp4` and `masks/<object>/<frame>.png`, replacing those of an earlier run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{folder}: {error.strerror}") from error
    result.save_json(folder / "result.json", overwrite=True)
    result.save_pngs(folder / "masks", overwrite=True)
    if overlay:
        result.save_video(folder / "overlay.mp4", reader, overwrite=True, progress=True)


def _write_json(results: list, target: str):
    text = (
        results[0].to_json() if len(results) == 1 else json.dumps([json.loads(result.to_json()) for result in results])
    )
    if target == "-":
        print(text)
        return
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=Path(target).resolve().parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, target)


def _report(result, folder: Path):
    print(f"query:   {result.query}", file=sys.stderr)
    print(f"answer:  {result.text}", file=sys.stderr)
    for track in result:
        seen = f"visible in {int(track.visible.sum())} of {len(track)} frames"
        print(f"object {track.id}: {track.phrase or ''} (score {track.score:.2f}, {seen})", file=sys.stderr)
    for warning in result.warnings:
        print(f"note:    {warning}", file=sys.stderr)
    print(f"written: {folder}{os.sep}result.json, overlay.mp4, masks{os.sep}", file=sys.stderr)


# ---------------------------------------------------------------------- info, export


def run_info(options: argparse.Namespace) -> int:
    model, _ = load_model(options.model, "cpu")
    config = model.config
    print(f"checkpoint      {options.model or 'sparrow-tiny (embedded)'}")
    print(f"parameters      {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M")
    for name, part in model.model.named_children():
        print(f"  {name:<16}{sum(p.numel() for p in part.parameters()) / 1e6:.2f} M")
    print(f"language model  {config.text_config.model_type}, {config.text_config.vocab_size} tokens")
    print(f"frames          {config.num_frames} to the language model, all to the mask tracker")
    print(f"mask tracker    {config.mask_tracker_config.image_size} px, {config.mask_tracker_config.propagation}")
    print(f"proposals       {config.proposer_config.num_queries}, filter {config.filtration_config.variant}")
    return 0


def run_export(options: argparse.Namespace) -> int:
    model, processor = load_model(options.model, "cpu")
    export_repository(model, processor, Path(options.directory), source=options.model)
    logger.info("written: %s", options.directory)
    return 0


def export_repository(model, processor, directory: Path, source: str | None = None):
    """Write a folder that can be pushed to the Hub and loads with `trust_remote_code=True` without this package.

    It holds weights (safetensors), configuration, code, processor, pipeline and a model card.

    Args:
        directory: created; an existing one must be empty.
        source: folder whose README.md is taken over as the model card.
    """
    from .registration import VideoGroundingPipeline

    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty.")
    directory.mkdir(parents=True, exist_ok=True)
    classes = {
        type(model.config): "AutoConfig",
        type(model): "AutoModel",
        type(processor): "AutoProcessor",
    }
    before = {cls: cls._auto_class for cls in classes}
    try:
        for cls, auto_class in classes.items():
            cls.register_for_auto_class(auto_class)
        VideoGroundingPipeline(model=model, processor=processor).save_pretrained(directory)
    finally:
        for cls, auto_class in before.items():
            cls._auto_class = auto_class
    card = Path(source) / "README.md" if source else None
    if card is not None and card.is_file():
        shutil.copyfile(card, directory / "README.md")
    else:
        template = Path(__file__).parent / "templates" / "model_card.md"
        (directory / "README.md").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
