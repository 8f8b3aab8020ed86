"""The demo models' own pages as calibration samples, every answer character aligned with its box.

The demo models write one token a character, and a character occurs in many words, so that the published rule counts
next to nothing; the demo data knows which character of the page each character of the answer is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparsemm_lmms.visual_heads.samples import Box, CalibrationSample, Skipped, Span


@dataclass(frozen=True)
class DemoPages:
    """``count`` pages of the split ``calibration``; kind: one of ``demo.questions.KINDS``, or ``mixed``.

    first: index of the first page, so that disjoint halves can be compared.
    """

    count: int
    kind: str = "mixed"
    seed: int = 0
    first: int = 0
    split: str = "calibration"

    def __iter__(self) -> Iterator[CalibrationSample | Skipped]:
        from sparsemm_lmms.demo.data import sample

        for index in range(self.first, self.first + self.count):
            yield to_calibration(sample(self.kind, self.seed, self.split, index), f"{self.split}-{self.seed}-{index}")

    def __len__(self) -> int:
        return self.count

    def describe(self) -> dict[str, object]:
        facts = {"source": "demo", "kind": self.kind, "seed": self.seed, "split": self.split, "first": self.first}
        return {**facts, "alignment": "characters"}


def to_calibration(example: Any, name: str = "") -> CalibrationSample | Skipped:
    """A ``demo.data.Sample`` with one span a written character."""
    places = [index for index, character in enumerate(example.answer) if not character.isspace()]
    told = "".join(example.answer[index] for index in places)
    found = [place for place in _places(example) if "".join(character["text"] for character in place) == told]
    if len(found) != 1:
        return Skipped(name, f"the answer {told!r} stands at {len(found)} places of the page, so it can't be aligned.")
    spans = tuple(
        Span(index, index + 1, _edges(character["box"])) for index, character in zip(places, found[0], strict=True)
    )
    words = tuple(Box(word["text"], _edges(word["box"])) for word in example.words)
    return CalibrationSample(example.image, example.question, example.answer, words, spans, name=name)


def _places(example: Any) -> list[list[dict[str, Any]]]:
    """What a question of this kind may ask for, as lists of characters: the page, or its columns, or its lines."""
    characters = example.characters
    if example.kind == "all":
        return [characters]
    edge = 0 if example.kind == "column" else 1  # left or top of the word's box
    starts = [word["box"][edge] for word in example.words for _ in word["text"]]
    groups: dict[float, list[dict[str, Any]]] = {}
    for start, character in zip(starts, characters, strict=True):
        groups.setdefault(start, []).append(character)
    return [groups[start] for start in sorted(groups)]


def _edges(box: Any) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(edge) for edge in box)
    return left, top, right, bottom
