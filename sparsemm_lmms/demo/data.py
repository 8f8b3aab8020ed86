"""Seeded examples of the demo data: pages, images, questions and where every word stands in the image."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sparsemm_lmms.demo.glyphs import CELL
from sparsemm_lmms.demo.pages import FORMS, GRIDS, Page, sample_page
from sparsemm_lmms.demo.questions import KINDS, KINDS_OF_FORM, ask
from sparsemm_lmms.demo.render import render

# Every random stream is seeded by (seed, split, index): splits never share a stream.
SPLITS = {"train": 0, "heldout": 1, "ocr_task": 2, "vqa_task": 3, "calibration": 4}


@dataclass
class Sample:
    """One image with one question. words: `{"text", "box"}`, box [x0, y0, x1, y1] in pixels, in reading order."""

    image: Image.Image
    question: str
    answer: str
    words: list[dict]
    kind: str
    page: Page

    def __iter__(self):
        return iter((self.image, self.question, self.answer, self.words))

    @property
    def characters(self) -> list[dict]:
        """The same per character: `{"text", "box"}`."""
        out = []
        for text, row, col in self.page.words:
            out += [{"text": c, "box": _box(row, col + i, 1)} for i, c in enumerate(text)]
        return out


def stream(seed: int, split: str, index: int) -> np.random.Generator:
    """The random generator of one example of one split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    return np.random.default_rng([seed, SPLITS[split], index])


def _box(row: int, col: int, length: int) -> list[int]:
    return [col * CELL, row * CELL, (col + length) * CELL, (row + 1) * CELL]


def sample(kind: str, seed: int, split: str, index: int, grid: tuple[int, int] | None = None) -> Sample:
    """Example `index` of a split: kind is one of KINDS or "mixed"; forms and grids take turns."""
    rng = stream(seed, split, index)
    forms = [f for f in FORMS if kind == "mixed" or kind in KINDS_OF_FORM[f]]
    if not forms:
        raise ValueError(f"unknown question kind {kind!r}; known: {', '.join(KINDS)}, mixed")
    form = forms[int(rng.integers(len(forms)))]
    page = sample_page(rng, form, *(grid or GRIDS[int(rng.integers(len(GRIDS)))]))
    chosen = str(rng.choice(KINDS_OF_FORM[form])) if kind == "mixed" else kind
    [(question, answer)] = ask(rng, page, chosen, 1)
    image = Image.fromarray(render(rng, page.cells)).convert("RGB")
    words = [{"text": text, "box": _box(row, col, len(text))} for text, row, col in page.words]
    return Sample(image, question, answer, words, chosen, page)


def samples(
    kind: str, count: int, seed: int = 0, split: str = "heldout", grid: tuple[int, int] | None = None
) -> Iterator[Sample]:
    """`count` seeded examples; each unpacks as (image, question, answer, words)."""
    return (sample(kind, seed, split, index, grid) for index in range(count))
