"""What each host model is asked in an evaluation.

The strings are interface constants: the official models were trained on them and their published numbers assume them.
SPARROW keeps VideoGLaMM's. No evaluation code for VidSTG and VideoGCG was published for GLUS and UniPixel; there
they get their own referring form (VidSTG) and VideoGLaMM's question (VideoGCG).
"""

from typing import Literal

Host = Literal["sparrow", "videoglamm", "glus", "unipixel"]

_HOSTS = ("sparrow", "videoglamm", "glus", "unipixel")
_VIDEOGLAMM_REFERRING = "What is {phrase} in this video? Please respond with segmentation masks."
_VIDEOGLAMM_QUESTION = "{phrase} Please respond with segmentation masks."
_VIDEOGLAMM_STATEMENT = "Can you segment {phrase} in this video?"
_GLUS_FRAME = "<image>\nCan you segment the {phrase} in this frame?"
_UNIPIXEL_QUERY = "Please segment the {phrase} in this video."
_UNIPIXEL_SENTENCE = "{phrase} Please provide the segmentation mask."
_UNIPIXEL_QUESTION = "{phrase} Please answer the question and provide the segmentation mask."
_CONVERSATION = (
    "Could you please give me a detailed description of the video? "
    "Please respond with interleaved segmentation masks for the corresponding parts of the answer."
)


def referring_prompt(expression: str, host: Host) -> str:
    """Prompt for one referring expression (MeViS, Ref-YouTube-VOS, Ref-DAVIS17, ReVOS, ReasonVOS).

    GLUS asks it before every frame. UniPixel has a form of its own for sentences that end with a question mark.

    Raises:
        ValueError: if the expression is empty or the host unknown.
    """
    _check(expression, host)
    if host == "glus":
        return _GLUS_FRAME.format(phrase=expression.strip().removesuffix(".").lower())
    if host == "unipixel":
        if expression.strip().endswith("?"):
            return _UNIPIXEL_SENTENCE.format(phrase=expression.strip())
        return _UNIPIXEL_QUERY.format(phrase=_bare_noun(expression))
    return _VIDEOGLAMM_REFERRING.format(phrase=" ".join(expression.lower().split()))


def vidstg_prompt(caption: str, interrogative: bool, host: Host) -> str:
    """Prompt for one VidSTG sentence; the wording is left as annotated.

    Raises:
        ValueError: if the caption is empty or the host unknown.
    """
    _check(caption, host)
    if host == "glus":
        return referring_prompt(caption, host)
    if host == "unipixel":
        return _UNIPIXEL_QUESTION.format(phrase=caption) if interrogative else referring_prompt(caption, host)
    return (_VIDEOGLAMM_QUESTION if interrogative else _VIDEOGLAMM_STATEMENT).format(phrase=caption)


def conversation_prompt() -> str:
    """The one question of VideoGCG: describe the video and ground the phrases."""
    return _CONVERSATION


def _bare_noun(expression: str) -> str:
    """UniPixel's clean-up: no dots at the ends, first letter in lower case, no leading article."""
    phrase = expression.strip().strip(".")
    phrase = phrase[:1].lower() + phrase[1:]
    for article in ("the ", "an ", "a "):
        phrase = phrase.removeprefix(article)
    return phrase


def _check(text: str, host: str) -> None:
    if not text.strip():
        raise ValueError("empty expression: expected the text to ground")
    if host not in _HOSTS:
        raise ValueError(f"host={host!r}: expected one of {', '.join(_HOSTS)}")
