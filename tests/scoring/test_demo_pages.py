"""Every character of a demo answer is aligned with the cell that shows it."""

import pytest

pytest.importorskip("sparsemm_lmms.demo.data", reason="the demo data is not installed")

from sparsemm_lmms.demo.questions import KINDS
from sparsemm_lmms.scoring.demo_pages import DemoPages
from sparsemm_lmms.scoring.samples import checked


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_spans_hold_the_characters_that_the_page_shows(kind):
    for sample in DemoPages(6, kind, seed=1):
        assert checked(sample) is sample
        written = [(index, c) for index, c in enumerate(sample.answer) if not c.isspace()]
        assert [span.start for span in sample.spans] == [index for index, _ in written]
        for span, (_, character) in zip(sample.spans, written, strict=True):
            left, top, right, bottom = span.xyxy
            (word,) = [
                box for box in sample.boxes if box.xyxy[0] <= left and right <= box.xyxy[2] and box.xyxy[1] == top
            ]
            cell = right - left
            assert word.text[round((left - word.xyxy[0]) / cell)] == character


def test_disjoint_halves():
    whole = [sample.answer for sample in DemoPages(6)]
    assert whole == [s.answer for s in DemoPages(3)] + [s.answer for s in DemoPages(3, first=3)]
