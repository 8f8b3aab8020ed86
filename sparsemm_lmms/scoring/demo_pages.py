"""The demo models' own pages as calibration samples, every answer character aligned with its box.

The demo models write one token a character, and a character occurs in many words, so that the published rule counts
next to nothing; the demo data knows which character of the page each character of the answer is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparsemm_lmms.scoring.samples import Box, CalibrationSample, Skipped, Span


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


def to_calibration(example: Any, name: str = "") -> CalibrationSample:
    """A ``demo.data.Sample`` with one span a written character."""
    boxes = _asked_for(example)
    places = [index for index, character in enumerate(example.answer) if not character.isspace()]
    told = "".join(example.answer[index] for index in places)
    shown = "".join(character["text"] for character in boxes)
    if told != shown:
        raise ValueError(f"{name}: the answer {told!r} is not what stands at the asked place, {shown!r}.")
    spans = tuple(
        Span(index, index + 1, tuple(float(edge) for edge in character["box"]))
        for index, character in zip(places, boxes, strict=True)
    )
    words = tuple(Box(word["text"], tuple(float(edge) for edge in word["box"])) for word in example.words)
    return CalibrationSample(example.image, example.question, example.answer, words, spans, name=name)


def _asked_for(example: Any) -> list[dict[str, Any]]:
    """Characters of the page that the answer consists of, in its order."""
    from sparsemm_lmms.demo.questions import TEMPLATES, answers

    characters = example.characters
    if example.kind == "all":
        return characters
    target = next(
        target
        for target, answer in answers(example.page, example.kind)
        if answer == example.answer
        and any(template.format(target) == example.question for template in TEMPLATES[example.kind])
    )
    words = example.page.words
    if example.kind == "value":
        chosen = {words.index(word) + 1 for word in words if word[0] == f"{target}:"}
    else:
        axis = {"line": 1, "column": 2}[example.kind]
        place = sorted({word[axis] for word in words})[int(target) - 1]
        chosen = {index for index, word in enumerate(words) if word[axis] == place}
    owner = [index for index, word in enumerate(words) for _ in word[0]]
    return [character for index, character in zip(owner, characters, strict=True) if index in chosen]
