"""Pictures of what happened between a question and its masks."""

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from sparrow_processing.overlays import draw_overlay, object_color

from .grounding import Grounder
from .session import Session

SHOWN_PROPOSALS = 12
THUMBNAIL_WIDTH, PICTURE_WIDTH, STAGE_WIDTH = 160, 480, 1280


@dataclass
class Picture:
    """A picture inside the page.

    Args:
        url: `data:` URL.
        alt: for those who cannot see it.
        caption: under it.
    """

    url: str
    alt: str
    caption: str = ""

    @classmethod
    def of(cls, picture: np.ndarray, width: int, alt: str, caption: str = "") -> "Picture":
        """From uint8 RGB (H, W, 3), at most `width` pixels wide."""
        image = Image.fromarray(picture)
        if image.width > width:
            image = image.resize((width, max(1, round(image.height * width / image.width))))
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=88)
        return cls("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode(), alt, caption)


def frame_picture(session: Session, frame: int) -> Picture:
    return Picture.of(session.draw(frame), STAGE_WIDTH, f"frame {frame} with its objects")


def pipeline_steps(session: Session, grounder: Grounder) -> list[tuple[str, str, list[Picture]]]:
    """The steps of the paper for this request: (title, sentence, pictures)."""
    steps = [sampled_frames(session)]
    for row, result in enumerate(session.results):
        for token in range(len(session.output.located[row])):
            steps.append(proposals(session, grounder, row, token))
        if len(result):
            steps.append(first_masks(session, row))
    if session.places:
        steps.append(prompted_again(session, grounder))
    return steps


def sampled_frames(session: Session) -> tuple[str, str, list[Picture]]:
    sampled = session.results[0].sampled_frames
    pictures = [
        Picture.of(frame, THUMBNAIL_WIDTH, f"sampled frame {index}", f"frame {index}")
        for index, frame in zip(sampled, session.reader.read(sampled), strict=True)
    ]
    sentence = (
        f"The language model saw {len(sampled)} of {len(session.reader)} frames, read the question and wrote the "
        "answer. Each [BOX] and [SEG] that it wrote is a question to the mask tracker's features."
    )
    return "Sampled frames", sentence, pictures


def proposals(session: Session, grounder: Grounder, row: int, token: int) -> tuple[str, str, list[Picture]]:
    """The proposals of one [BOX], best first; chosen ones in the colour of their object."""
    place = session.output.located[row][token]
    colours = {}
    for number, (owner, k) in enumerate(session.places):
        found = session.output.objects[owner][k]
        if owner == row and found.box is not None and found.frame_index == place.frame_index:
            for position, box in enumerate(place.boxes):
                if torch.equal(box, found.box):
                    colours[position] = object_color(number)
    best = place.confidence.argsort(descending=True)[:SHOWN_PROPOSALS].tolist()
    frame = session.reader.read([place.frame_index])[0]
    all_boxes = place.proposals.boxes[0].numpy()
    rejected = [(all_boxes[index], f"{place.confidence[index]:.2f}", (235, 235, 235)) for index in reversed(best)]
    chosen = [
        (box.numpy(), f"{score:.2f}", colours.get(position, (255, 255, 255)))
        for position, (box, score) in enumerate(zip(place.boxes, place.scores, strict=True))
    ]
    pictures = [
        Picture.of(draw_boxes(frame, rejected), PICTURE_WIDTH, "region proposals", "proposals with their keep scores"),
        Picture.of(draw_boxes(frame, chosen), PICTURE_WIDTH, "chosen boxes", "chosen and refined"),
    ]
    sentence = (
        f"[BOX] {token + 1} of “{session.results[row].query}” was compared with {len(all_boxes)} region proposals on "
        f"frame {place.frame_index}. The best {len(best)} are drawn; a score of {grounder.score_threshold:.2f} keeps "
        f"a box, {len(place.boxes)} {'was' if len(place.boxes) == 1 else 'were'} taken."
    )
    return "Proposals and chosen boxes", sentence, pictures


def first_masks(session: Session, row: int) -> tuple[str, str, list[Picture]]:
    """The mask of every object of an answer on the frame that it was prompted on."""
    pictures = []
    for found, track in zip(session.output.objects[row], session.results[row], strict=True):
        frame = found.frame_index
        drawn = draw_overlay(
            session.reader.read([frame])[0], track.mask(frame)[None], np.full((1, 4), np.nan), [""], [track.id]
        )
        caption = f"object {track.id} on frame {frame}, score {track.scores[frame]:.2f}"
        pictures.append(Picture.of(drawn, PICTURE_WIDTH, f"first mask of object {track.id}", caption))
    sentence = "Box and [SEG] prompted these masks; from here the memory carried them backwards and forwards."
    return "First masks", sentence, pictures


def prompted_again(session: Session, grounder: Grounder) -> tuple[str, str, list[Picture]]:
    threshold = grounder.model.config.mask_tracker_config.reprompt_threshold
    if threshold is None:
        return "Later prompts", "This model does not prompt again on the way.", []
    if not session.reprompts:
        return "Later prompts", f"No score fell below {threshold:.2f}, or nothing better was found there.", []
    pictures = []
    for item in session.reprompts[:SHOWN_PROPOSALS]:
        frame = session.reader.read([item.frame])[0]
        drawn = draw_boxes(frame, [(item.box, "", object_color(item.object_id))])
        caption = f"object {item.object_id}, frame {item.frame}"
        pictures.append(Picture.of(drawn, THUMBNAIL_WIDTH * 2, f"prompted again: {caption}", caption))
    sentence = f"{len(session.reprompts)} times a score fell below {threshold:.2f} and the object was located anew."
    return "Later prompts", sentence, pictures


def best_rejected(session: Session, grounder: Grounder) -> dict[int, tuple[str, Picture | None]]:
    """For every answer that points at nothing though it was asked to: a sentence, and what came closest."""
    if session.task == "ask":
        return {}
    found = {}
    for row, result in enumerate(session.results):
        if len(result):
            continue
        what = (
            f"Nothing in the video matched “{result.query}”."
            if session.task != "describe"
            else "No phrase is grounded."
        )
        places = session.output.located[row]
        if places:
            place = max(places, key=lambda item: item.confidence.max())
            index = int(place.confidence.argmax())
            sentence = (
                f"{what} The best candidate was rejected: it scored {place.confidence[index]:.2f}, and "
                f"{grounder.least_score:.2f} is needed. It is drawn on frame {place.frame_index}."
            )
            found[row] = (sentence, _candidate(session, place.proposals.boxes[0, index], place.frame_index))
        elif session.candidates is not None:
            objectness, index = session.candidates.scores[0].max(dim=0)
            sentence = (
                f"{what} The answer asked for no box, so nothing was scored against your words; the region of the "
                f"first frame that looks most like an object (objectness {objectness:.2f}) is drawn."
            )
            found[row] = (sentence, _candidate(session, session.candidates.boxes[0, index], 0))
        else:
            found[row] = (what, None)
    return found


def _candidate(session: Session, box: torch.Tensor, frame_index: int) -> Picture:
    drawn = draw_boxes(session.reader.read([frame_index])[0], [(box.numpy(), "?", (235, 235, 235))])
    return Picture.of(drawn, PICTURE_WIDTH, "the best rejected candidate")


def draw_boxes(frame: np.ndarray, boxes: list[tuple[np.ndarray, str, tuple[int, int, int]]]) -> np.ndarray:
    """Boxes with a few words each on a darkened frame of `PICTURE_WIDTH`; later ones lie on top.

    Args:
        frame: uint8 RGB (H, W, 3).
        boxes: ((4,) normalised xyxy, words, RGB).
    """
    width, height = PICTURE_WIDTH, max(1, round(frame.shape[0] * PICTURE_WIDTH / frame.shape[1]))
    image = Image.fromarray((frame * 0.7).astype(np.uint8)).resize((width, height))
    draw, font, line = ImageDraw.Draw(image), ImageFont.load_default(14), 2
    for box, words, colour in boxes:
        x0, y0, x1, y1 = np.clip(box, 0, 1) * (width - 1, height - 1, width - 1, height - 1)
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=(0, 0, 0), width=line + 2)
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour, width=line)
        if words:
            place = (min(x0 + line + 1, width - font.getlength(words)), min(y0, height - font.size - 2))
            draw.text(place, words, font=font, fill=colour, stroke_width=2, stroke_fill=(0, 0, 0))
    return np.asarray(image)
