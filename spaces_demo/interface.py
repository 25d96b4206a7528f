"""The page: components, and what happens when they are used."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from sparrow_processing.errors import VideoGroundingError

from . import fragments
from .grounding import Grounder
from .pictures import best_rejected, frame_picture, pipeline_steps
from .session import DemoLimits, Session, visitor_folder

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
EXAMPLES = [("shapes.mp4", "the red ring"), ("stars.mp4", "the green star"), ("rabbits.mp4", "both rabbits")]
TASKS = [("Find", "refer"), ("Box", "box"), ("Describe", "describe"), ("Ask", "ask")]
SECONDS_BETWEEN_UPDATES = 0.3
SESSION_SECONDS = 3600  # how long results are kept for a visitor who does nothing
ACTIONS_AT_ONCE = 8  # visitors who look at frames, toggle objects or fetch files at the same time
html = partial(gr.HTML, apply_default_css=False)  # page.css has the styles
SEEK = "() => sparrow.seekToStage()"


class Page:
    """The page and its events.

    Args:
        grounder: shared by all visitors; it is read-only.
        limits: of one request.
        root: folder for uploads and requests; Gradio serves only what lies in it.
        name: how to call the model.
    """

    def __init__(self, grounder: Grounder, limits: DemoLimits, root: Path, name: str):
        self.grounder, self.limits, self.root, self.name = grounder, limits, root, name
        with gr.Blocks(title="SPARROW: ask about a video", delete_cache=(600, SESSION_SECONDS)) as self.blocks:
            self._lay_out()
            self._connect()
        self.blocks.queue(max_size=limits.max_waiting, default_concurrency_limit=1)

    # ------------------------------------------------------------------ layout

    def _lay_out(self):
        self.session = gr.State(None, time_to_live=SESSION_SECONDS, delete_callback=close)
        gr.Markdown(
            "# SPARROW: ask about a video\nText, boxes and masks from one question. "
            f"The model here is **{self.name}**."
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                self.video = gr.Video(label="Video", sources=["upload"], elem_id="video", height=240)
            with gr.Column(scale=3, min_width=300):
                self.task = gr.Radio(TASKS, value="refer", label="Task", elem_id="task")
                self.text = gr.Textbox(
                    label="What to find, or what to ask; one per line",
                    placeholder="the red ring",
                    lines=2,
                    max_length=20_000,
                    elem_id="query",
                )
                with gr.Row():
                    self.ask = gr.Button("Ground it", variant="primary", elem_id="ask")
                    self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
                html(f'<p class="sp-quiet">A video may have {self.limits}.</p>')
        gr.Examples(
            [[str(HERE / "examples" / name), text] for name, text in EXAMPLES],
            [self.video, self.text],
            elem_id="examples",
            example_labels=[f"{text} ({name})" for name, text in EXAMPLES],
        )
        self.status = html(fragments.status("Choose a video and ask."), elem_id="status", min_height=44)
        with gr.Column(visible=False, elem_id="results") as self.result:
            self._lay_out_results()

    def _lay_out_results(self):
        player = {"interactive": False, "min_width": 280, "loop": True}
        self.answers = html(elem_id="answers", js_on_load="sparrow.jumps(element, f => trigger('jump', {frame: f}))")
        with gr.Row():
            self.overlay = gr.Video(label="Overlay", elem_id="overlay", height=400, **player)
            self.original = gr.Video(label="Original", elem_id="original", height=400, **player)
        self.table = html(
            elem_id="objects",
            js_on_load="sparrow.toggles(element, (id, shown) => trigger('toggle', {object: id, shown: shown}))",
        )
        with gr.Tabs():
            with gr.Tab("Timeline"):
                self.timeline = html(
                    elem_id="timeline", js_on_load="sparrow.jumps(element, f => trigger('jump', {frame: f}))"
                )
            with gr.Tab("Downloads"):
                self.prepare = gr.Button("Prepare the files", elem_id="prepare")
                self.files = gr.File(label="Files", file_count="multiple", elem_id="files", visible=False)
        self.frame = gr.Slider(0, 1, value=0, step=1, label="Frame", elem_id="frame", buttons=[])
        self.stage = html(elem_id="stage", js_on_load="sparrow.stage(element, box => trigger('correct', box))")
        with gr.Accordion("How it got there", open=False, elem_id="how"):
            self.how = html()

    def _connect(self):
        model = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal"}
        model |= {"show_progress_on": self.status, "api_visibility": "private"}
        light = {"concurrency_limit": ACTIONS_AT_ONCE, "show_progress": "hidden", "api_visibility": "private"}
        outputs = [self.session, self.status, self.ask, self.stop, self.result, self.answers, self.overlay]
        outputs += [self.original, self.table, self.timeline, self.frame, self.stage, self.how, self.files]
        self.ask.click(self.run, [self.video, self.text, self.task], outputs, **model)
        self.stage.correct(self.correct, [self.session], outputs, **model).then(None, js=SEEK)
        self.stop.click(stop, [self.session], None, queue=False, api_visibility="private")
        for part in (self.answers, self.timeline):
            part.jump(self.jump, [self.session], [self.frame, self.stage], **light).then(None, js=SEEK)
        scrub = partial(self.frame.input, self.show_frame, [self.session, self.frame], [self.stage])
        scrub(trigger_mode="always_last", **light).then(None, js=SEEK)
        self.table.toggle(
            self.toggle,
            [self.session, self.frame],
            [self.status, self.overlay, self.stage],
            trigger_mode="multiple",
            **light,
        )
        self.prepare.click(self.write_files, [self.session], [self.status, self.files], **light)
        self.blocks.unload(self.forget)

    # ------------------------------------------------------------------ asking

    def run(self, video: str | None, text: str, task: str, request: gr.Request) -> Iterator[dict]:
        """Ground the queries; what is on the page comes step by step."""
        yield {
            **self._busy("Reading the video."),
            self.session: None,
            self.result: gr.update(visible=False),
            self.files: gr.update(value=None, visible=False),
        }
        try:
            folder = visitor_folder(self.root, request.session_hash)
            session = Session(folder, self._own_file(video), text, task, self.limits)
        except VideoGroundingError as error:
            yield self._failed(str(error))
            return
        yield {self.session: session, self.status: fragments.status("Reading the question and writing the answer.")}
        yield from self._work(session, session.ground(self.grounder))

    def correct(self, session: Session | None, event: gr.EventData) -> Iterator[dict]:
        """Carry a corrected box on."""
        if session is None:
            yield self._failed(GONE)
            return
        object_id, frame, whole, box = (getattr(event, name, None) for name in ("object", "frame", "whole", "box"))
        yield self._busy(f"Carrying the box of object {object_id} on from frame {frame}.")
        yield from self._work(session, session.correct(self.grounder, object_id, frame, box, bool(whole)), frame)

    def _work(self, session: Session, steps: Iterator, corrected: int | None = None) -> Iterator[dict]:
        """Walk through the steps, telling how far they are, and show what came of them.

        Args:
            corrected: the frame on which a box was corrected, if that is what was done.
        """
        shown = 0.0
        try:
            for progress in steps:
                if progress.seconds - shown > SECONDS_BETWEEN_UPDATES or progress.done in (1, progress.total):
                    shown = progress.seconds
                    yield {self.status: fragments.status("Masks:", progress=progress)}
            yield {self.status: fragments.status("Drawing the overlay.")}
            yield self._done(session, corrected)
        except VideoGroundingError as error:
            yield self._failed(session.plain(error))
        except torch.OutOfMemoryError:
            logger.exception("out of memory")
            yield self._failed("The clip is too large for the memory of this machine. Try a shorter or smaller one.")

    def _done(self, session: Session, corrected: int | None) -> dict:
        rejected = best_rejected(session, self.grounder)
        starts = [found.frame_index for objects in session.output.objects for found in objects]
        frame = min(starts, default=0) if corrected is None else corrected
        return {
            **self._idle(),
            self.status: fragments.status(summary(session, rejected, corrected)),
            self.result: gr.update(visible=True),
            self.answers: fragments.answers(session, rejected),
            self.overlay: str(session.overlay_video()),
            self.original: str(session.original_video()),
            self.table: fragments.objects_table(session),
            self.timeline: fragments.timeline(session),
            self.frame: gr.update(value=frame, maximum=max(len(session.reader) - 1, 1)),
            self.stage: fragments.stage(session, frame, frame_picture(session, frame)),
            self.how: fragments.how_it_got_there(pipeline_steps(session, self.grounder)),
            self.files: gr.update(value=None, visible=False),
        }

    def _busy(self, text: str) -> dict:
        return {
            self.status: fragments.status(text),
            self.ask: gr.update(interactive=False),
            self.stop: gr.update(visible=True),
        }

    def _idle(self) -> dict:
        return {self.ask: gr.update(interactive=True), self.stop: gr.update(visible=False)}

    def _failed(self, text: str) -> dict:
        return {**self._idle(), self.status: fragments.status(text, "error")}

    def _own_file(self, video: str | None) -> str | None:
        """The path of an upload, after links are followed; nothing outside the folder of uploads is ever opened."""
        if video is not None and not Path(video).resolve().is_relative_to(self.root.resolve()):
            raise VideoGroundingError("This file was not uploaded here.")
        return video

    # ------------------------------------------------------------------ looking

    def jump(self, session: Session | None, event: gr.EventData) -> tuple[Any, str]:
        frame = getattr(event, "frame", None)
        return gr.update(value=frame), self.show_frame(session, frame)

    def show_frame(self, session: Session | None, frame: int) -> str:
        if session is None or not session.results or frame not in range(len(session.reader)):
            return gr.skip()
        return fragments.stage(session, int(frame), frame_picture(session, int(frame)))

    def toggle(self, session: Session | None, frame: int, event: gr.EventData) -> tuple[str, Any, str]:
        """Show or hide an object on the video and on the frame."""
        if session is None or not session.results:
            return fragments.status(GONE, "error"), gr.skip(), gr.skip()
        number, shown = getattr(event, "object", None), getattr(event, "shown", True)
        if number in range(len(session.places)):
            (session.hidden.discard if shown else session.hidden.add)(number)
        text = f"Object {number} is {'shown' if shown else 'hidden'}."
        return fragments.status(text), str(session.overlay_video()), self.show_frame(session, frame)

    def write_files(self, session: Session | None) -> Iterator[tuple[str, Any]]:
        if session is None or not session.results:
            yield fragments.status(GONE, "error"), gr.skip()
            return
        yield fragments.status("Writing the files."), gr.skip()
        files = [str(path) for path in session.write_downloads()]
        yield fragments.status(f"{len(files)} files are ready."), gr.update(value=files, visible=True)

    def forget(self, request: gr.Request):
        """Delete the files of a visitor who has left."""
        shutil.rmtree(visitor_folder(self.root, request.session_hash), ignore_errors=True)


def summary(session: Session, rejected: dict, corrected: int | None) -> str:
    """One sentence about a run that has ended."""
    total = len(session.reader)
    if session.stopped and corrected is not None:
        return "Stopped; frames that were not reached keep their masks."
    if session.stopped:
        return f"Stopped after {len(session.frames_done)} of {total} frames; what was done is kept."
    if corrected is not None:
        return f"Done: the box was carried on from frame {corrected}."
    if rejected and len(rejected) == len(session.results):
        return "Nothing matched; see below what came closest."
    objects, frames = fragments.count(len(session.places), "object"), fragments.count(total, "frame")
    return f"Done: {objects} in {frames}, {sum(session.results[0].timings.values()):.1f} s."


GONE = "The results of this request are gone. Ask again."


def stop(session: Session | None):
    if session is not None:
        session.stop.set()


def close(session: Session | None):
    if session is not None:
        session.stop.set()
        session.close()


def serve(model, processor, name: str, limits: DemoLimits | None = None, **options):
    """Serve the demo until it is interrupted. Uploads and results lie in a temporary folder, which is deleted then.

    Args:
        name: how to call the model on the page.
        options: of `gradio.Blocks.launch`.
    """
    limits = limits or DemoLimits()
    with tempfile.TemporaryDirectory(prefix="sparrow-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when components are made
        page = Page(Grounder(model, processor), limits, Path(folder), name)
        page.blocks.launch(
            theme=gr.themes.Default(primary_hue="blue", text_size="md"),
            css_paths=[HERE / "page.css"],
            head=f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
            max_file_size=limits.video.max_bytes,
            footer_links=["settings"],
            **options,
        )
