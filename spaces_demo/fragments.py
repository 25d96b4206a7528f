"""The parts of the page that Gradio has no component for, as HTML. Every text of a user or a model is escaped.

An element with `data-frame` and `data-time` brings the visitor to that moment when it is pressed (`page.js`).
"""

import html

import numpy as np

from sparrow_processing.overlays import object_color, object_outline
from sparrow_processing.results import GroundingResult, ObjectTrack

from .pictures import Picture
from .session import Progress, Session

UNSURE_BELOW = 0.5  # score of a frame under which a visible object counts as unsure
STATES = ("visible", "unsure", "hidden", "not computed")
CHART_HEIGHT = 100


def escape(text: str) -> str:
    return html.escape(text, quote=True)


def colours(object_id: int) -> str:
    """CSS of the colour and outline of an object."""
    red, green, blue = object_color(object_id)
    return f"--object: rgb({red}, {green}, {blue}); --outline: {object_outline(object_id)}"


def moment(session: Session, frame: int) -> str:
    """Attributes that name a frame; the time lies in the middle of the frame, so that a player shows that one."""
    times = session.reader.timestamps
    last = frame + 1 == len(times)
    middle = times[frame] + (1 / session.reader.fps if last else times[frame + 1] - times[frame]) / 2
    return f'data-frame="{frame}" data-time="{middle:.5f}"'


# ---------------------------------------------------------------------- status


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def status(text: str, kind: str = "note", progress: Progress | None = None) -> str:
    """A line for the reader of the page, and of its screen: `kind` is note or error."""
    bar = ""
    if progress is not None:
        left = f"about {progress.seconds_left:.0f} s left" if progress.done > 1 else "estimating the time"
        bar = (
            f'<progress max="{progress.total}" value="{progress.done}" aria-label="frames done"></progress>'
            f"<span>{progress.done} of {progress.total} frames, {left}</span>"
        )
    role = "alert" if kind == "error" else "status"
    return f'<div class="sp-status sp-{kind}" role="{role}"><span>{escape(text)}</span>{bar}</div>'


# ---------------------------------------------------------------------- answer


def answers(session: Session, rejected: dict[int, tuple[str, Picture | None]]) -> str:
    """Every question with its answer, phrases in the colours of their masks.

    Args:
        rejected: for the answers that point at nothing, what came closest: a sentence and a picture.
    """
    parts = []
    for row, result in enumerate(session.results):
        question = "" if session.task == "describe" else f'<p class="sp-question">{escape(result.query)}</p>'
        parts.append(f'<section class="sp-answer">{question}<p class="sp-text">{answer_text(session, result)}</p>')
        if row in rejected:
            sentence, picture = rejected[row]
            image = f'<img src="{picture.url}" alt="{escape(picture.alt)}">' if picture else ""
            parts.append(f'<p class="sp-nothing" role="status">{escape(sentence)}</p>{image}')
        if result.time_span is not None:
            start, end = result.time_span
            parts.append(f'<p class="sp-span">from {start:.2f} s to {end:.2f} s</p>')
        notes = "".join(f"<li>{escape(warning)}</li>" for warning in result.warnings)
        parts.append(f'<ul class="sp-notes">{notes}</ul></section>')
    return "".join(parts)


def answer_text(session: Session, result: GroundingResult) -> str:
    """The text of an answer; each phrase is a button. Objects without a phrase follow it."""
    parts, end = [], 0
    by_span: dict[tuple[int, int], list[ObjectTrack]] = {}
    for track in result:
        if track.span is not None:
            by_span.setdefault(track.span, []).append(track)
    for (start, stop), tracks in sorted(by_span.items()):
        parts.append(escape(result.text[end:start]))
        parts.append(phrase_button(session, tracks, result.text[start:stop]))
        end = stop
    parts.append(escape(result.text[end:]))
    for track in result:
        if track.span is None:
            parts.append(" " + phrase_button(session, [track], track.phrase or f"object {track.id}"))
    return "".join(parts)


def phrase_button(session: Session, tracks: list[ObjectTrack], words: str) -> str:
    track = tracks[0]
    seen = np.flatnonzero(track.visible)
    frame = int(seen[0]) if len(seen) else 0
    label = f"{words}: go to its first frame"
    numbers = ", ".join(str(item.id) for item in tracks)
    return (
        f'<button type="button" class="sp-phrase" data-object="{track.id}" style="{colours(track.id)}" '
        f'{moment(session, frame)} aria-label="{escape(label)}">{escape(words)}<sup>{numbers}</sup></button>'
    )


# ---------------------------------------------------------------------- objects


def objects_table(session: Session) -> str:
    if not session.places:
        return '<p class="sp-quiet">No objects.</p>'
    rows = []
    for track in session.tracks:
        seen = np.flatnonzero(track.visible)
        times = session.reader.timestamps
        when = f"{times[seen[0]]:.2f} to {times[seen[-1]]:.2f} s" if len(seen) else "never"
        shown = "false" if track.id in session.hidden else "true"
        name = escape(track.phrase or "object")
        rows.append(
            f'<tr style="{colours(track.id)}"><td><button type="button" role="switch" class="sp-switch" '
            f'aria-checked="{shown}" data-object="{track.id}" '
            f'aria-label="show object {track.id}, {name}"></button></td>'
            f'<td><span class="sp-swatch"></span>{track.id}</td><td>{name}</td><td>{track.score:.2f}</td>'
            f"<td>{len(seen)} of {len(track)}</td><td>{when}</td></tr>"
        )
    head = "".join(f"<th scope=col>{name}</th>" for name in ("show", "id", "object", "score", "frames", "seen"))
    return f'<table class="sp-objects"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


# ---------------------------------------------------------------------- timeline


def timeline(session: Session) -> str:
    """A row of states for each object, and their scores over time."""
    if not session.places:
        return '<p class="sp-quiet">No objects, so no timeline.</p>'
    rows = "".join(timeline_row(session, track) for track in session.tracks)
    key = "".join(f'<span><i class="sp-segment sp-{state.replace(" ", "-")}"></i>{state}</span>' for state in STATES)
    return f'<div class="sp-timeline">{rows}<div class="sp-key">{key}</div>{score_chart(session)}</div>'


def frame_states(session: Session, track: ObjectTrack) -> list[str]:
    """One of `STATES` for each frame."""
    states = []
    for frame, (visible, score) in enumerate(zip(track.visible, track.scores, strict=True)):
        if frame not in session.frames_done:
            states.append("not computed")
        elif not visible:
            states.append("hidden")
        else:
            states.append("unsure" if score < UNSURE_BELOW else "visible")
    return states


def runs(states: list[str]) -> list[tuple[str, int, int]]:
    """(state, first frame, frame after the last) of stretches of one state."""
    starts = [0, *(t for t in range(1, len(states)) if states[t] != states[t - 1])]
    return [(states[a], a, b) for a, b in zip(starts, [*starts[1:], len(states)], strict=True)]


def timeline_row(session: Session, track: ObjectTrack) -> str:
    times = session.reader.timestamps
    segments = "".join(
        f'<button type="button" class="sp-segment sp-{state.replace(" ", "-")}" style="flex-grow: {stop - start}" '
        f'data-stop="{stop}" {moment(session, start)} '
        f'aria-label="object {track.id} {state} from {times[start]:.2f} s, frames {start} to {stop - 1}" '
        f'title="{state}, frames {start} to {stop - 1}"></button>'
        for state, start, stop in runs(frame_states(session, track))
    )
    name = f"{track.id} {escape(track.phrase or 'object')}"
    return (
        f'<div class="sp-row" style="{colours(track.id)}" role="group" aria-label="timeline of object {track.id}">'
        f'<span class="sp-name"><span class="sp-swatch"></span>{name}</span><div class="sp-bar">{segments}</div></div>'
    )


def score_chart(session: Session) -> str:
    """Scores of all objects over the frames, as one SVG; pressing it leads to the frame."""
    T = len(session.reader)
    lines = []
    for track in session.tracks:
        points = " ".join(
            f"{frame + 0.5:g},{(1 - min(max(score, 0), 1)) * CHART_HEIGHT:.1f}"
            for frame, score in enumerate(track.scores.tolist())
            if frame in session.frames_done
        )
        lines.append(
            f'<polyline points="{points}" class="sp-line sp-casing"/>'  # light colours stand out from a light page
            f'<polyline points="{points}" class="sp-line sp-{object_outline(track.id)}" style="{colours(track.id)}"/>'
        )
    threshold = (1 - UNSURE_BELOW) * CHART_HEIGHT
    return (
        f'<div class="sp-chart"><span class="sp-name">score, 0 to 1</span><svg viewBox="0 0 {T} {CHART_HEIGHT}" '
        f'preserveAspectRatio="none" role="img" aria-label="score of every object over time" data-frames="{T}">'
        f'<line x1="0" x2="{T}" y1="{threshold}" y2="{threshold}" class="sp-threshold"/>{"".join(lines)}</svg></div>'
    )


# ---------------------------------------------------------------------- frame and correction


def stage(session: Session, frame: int, picture: Picture) -> str:
    """A frame with its objects, on which a box can be drawn for one of them."""
    height, width = session.reader.height, session.reader.width
    options = []
    for track in session.tracks:
        box = track.boxes[frame]
        corners = "" if np.isnan(box).any() else ",".join(f"{value:g}" for value in box)
        name = escape(f"{track.id} {track.phrase or 'object'}")
        options.append(f'<option value="{track.id}" data-box="{corners}" style="{colours(track.id)}">{name}</option>')
    controls = (
        f'<label>Object <select class="sp-object">{"".join(options)}</select></label>'
        '<label><input type="checkbox" class="sp-whole"> also the frames before</label>'
        '<button type="button" class="sp-apply">Propagate from this box</button>'
    )
    seconds = session.reader.timestamps[frame]
    return (
        f'<div class="sp-stage" {moment(session, frame)}>'
        f'<svg viewBox="0 0 {width} {height}" tabindex="0" role="group" '
        f'aria-label="frame {frame}: drag to draw a box; arrow keys move it, with Shift they change its size">'
        f'<image href="{picture.url}" width="{width}" height="{height}"/>'
        '<rect class="sp-box" x="0" y="0" width="0" height="0"/></svg>'
        f'<p class="sp-quiet">Frame {frame}, {seconds:.2f} s. Wrong here? Draw a box around the object and carry '
        f"it on from this frame; nothing else is computed again.</p>"
        f'<div class="sp-controls">{controls if session.places else ""}</div></div>'
    )


# ---------------------------------------------------------------------- how it got there


def how_it_got_there(steps: list[tuple[str, str, list[Picture]]]) -> str:
    """The steps of the paper's pipeline: (title, sentence, pictures)."""
    parts = []
    for title, sentence, pictures in steps:
        figures = "".join(
            f'<figure><img src="{picture.url}" alt="{escape(picture.alt)}" loading="lazy">'
            f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
            for picture in pictures
        )
        parts.append(
            f'<section class="sp-step"><h4>{escape(title)}</h4><p>{escape(sentence)}</p>'
            f'<div class="sp-figures">{figures}</div></section>'
        )
    return "".join(parts)
