"""What chase reads: an image whose words have known boxes, a question, and (for teacher forcing) the right answer.

Sources (``render.py``, ``sources.py``) yield ``CalibrationSample`` or, for an input that can't be used, ``Skipped``,
which chase names, counts and passes over. ``readings`` turns one annotated image into the questions asked of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

PAPER_PROMPT = "Provide all the OCR results of this image."  # SparseMM §3 and its chase scripts
Readings = Literal["transcribe", "mixture"]


@dataclass(frozen=True)
class Box:
    """A word (or line) and where it stands: (left, top, right, bottom) in pixels of image or video ``item``."""

    text: str
    xyxy: tuple[float, float, float, float]
    item: int = 0


@dataclass(frozen=True)
class Span:
    """Extension for aligned data: answer characters ``start:stop`` are written at ``xyxy``.

    A sample with spans does not use the published substring rule: a token counts for the span that contains all of its
    characters (white space aside). Needed when tokens are single characters, which occur in many boxes.
    """

    start: int
    stop: int
    xyxy: tuple[float, float, float, float]
    item: int = 0


@dataclass(frozen=True)
class CalibrationSample:
    """One question about one picture.

    image: PIL image, or several of them. video: frames of one video, shown instead of images (families that take them);
    boxes then hold for all frames. answer: the known text, used by teacher forcing.
    boxes: words for the published rule. spans: see ``Span``; with spans, boxes may be empty.
    """

    image: Image.Image | tuple[Image.Image, ...]
    prompt: str
    answer: str
    boxes: tuple[Box, ...] = ()
    spans: tuple[Span, ...] | None = None
    video: tuple[Image.Image, ...] = ()
    name: str = ""

    @property
    def images(self) -> tuple[Image.Image, ...]:
        return (self.image,) if isinstance(self.image, Image.Image) else tuple(self.image)

    @property
    def item_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of each item that a box may name: the images, or the one video."""
        return [self.video[0].size] if self.video else [image.size for image in self.images]


@dataclass(frozen=True)
class Skipped:
    """An input that could not be used, and why, in one sentence."""

    name: str
    reason: str


@dataclass
class SkipLog:
    """Counts what was passed over; chase writes it into the provenance."""

    entries: list[Skipped] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        return {"count": len(self.entries), "first": [f"{entry.name}: {entry.reason}" for entry in self.entries[:20]]}


def checked(sample: CalibrationSample) -> CalibrationSample | Skipped:
    """The sample, or why it can't count: no boxes, or a box that lies outside its image."""
    marks: Sequence[Box | Span] = sample.boxes if sample.spans is None else sample.spans
    if not sample.images and not sample.video:
        return Skipped(sample.name, "has no image.")
    if not marks:
        return Skipped(sample.name, "has no text boxes.")
    for mark in marks:
        label = repr(mark.text) if isinstance(mark, Box) else f"of characters {mark.start}:{mark.stop}"
        if not 0 <= mark.item < len(sample.item_sizes):
            return Skipped(sample.name, f"box {label} names image {mark.item}, there are {len(sample.item_sizes)}.")
        width, height = sample.item_sizes[mark.item]
        if max(width, height) >= 200 * min(width, height):
            return Skipped(sample.name, f"is {width}x{height}, too long and thin for the image processors.")
        left, top, right, bottom = mark.xyxy
        if not (left < right and top < bottom and left < width and top < height and right > 0 and bottom > 0):
            return Skipped(sample.name, f"box {label} at {mark.xyxy} is empty or outside the {width}x{height} image.")
    return sample


@dataclass(frozen=True)
class Page:
    """An image with its words, line by line in reading order, before questions are asked."""

    image: Image.Image
    lines: tuple[tuple[Box, ...], ...]
    name: str = ""

    @property
    def boxes(self) -> tuple[Box, ...]:
        return tuple(box for line in self.lines for box in line)


def _text(line: Iterable[Box]) -> str:
    return " ".join(box.text for box in line)


def ask(page: Page, readings: Readings, seed: int, prompt: str = PAPER_PROMPT) -> Iterator[CalibrationSample | Skipped]:
    """The samples of one page.

    ``transcribe`` (default): the paper's single prompt. ``mixture``: one of three, drawn by page: transcribe
    everything; read the line that starts with a given word; say which word follows a given one (both occur once).
    Heads that only find a line, or a key, have little to do in a transcription, so calibrate with the kinds of reading
    your users ask for (on the demo models both tables serve questions about lines alike; see the README).
    """
    lines = [line for line in page.lines if line]
    whole = CalibrationSample(page.image, prompt, "\n".join(map(_text, lines)), page.boxes, name=page.name)
    if readings == "transcribe" or not lines:
        yield checked(whole)
        return
    draw = random.Random(f"{seed}:{page.name}")
    kind = draw.choice(["transcribe", "line", "key"])
    starts = [line for line in lines if _occurs_once(line[0].text, page.boxes)]
    keys = [(line, i) for line in lines for i in range(len(line) - 1) if _occurs_once(line[i].text, page.boxes)]
    if kind == "line" and starts:
        line = draw.choice(starts)
        question, answer = f'Read the line of this image that starts with "{line[0].text}".', _text(line)
    elif kind == "key" and keys:
        line, i = draw.choice(keys)
        question, answer = f'Which word comes right after "{line[i].text}" in this image?', line[i + 1].text
    else:
        question, answer = prompt, whole.answer
    yield checked(CalibrationSample(page.image, question, answer, page.boxes, name=page.name))


def _occurs_once(text: str, boxes: Iterable[Box]) -> bool:
    return sum(text == box.text for box in boxes) == 1
