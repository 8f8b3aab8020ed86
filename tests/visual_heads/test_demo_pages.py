"""Every character of a demo answer is aligned with the cell that shows it."""

import pytest

pytest.importorskip("sparsemm_lmms.demo.data", reason="the demo data is not installed")

from sparsemm_lmms.demo.questions import KINDS_OF_FORM
from sparsemm_lmms.visual_heads.demo_pages import DemoPages
from sparsemm_lmms.visual_heads.samples import Skipped, checked

KINDS = sorted({kind for kinds in KINDS_OF_FORM.values() for kind in kinds})


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


def test_an_answer_that_stands_nowhere_or_twice_is_skipped():
    from dataclasses import replace

    from sparsemm_lmms.demo.data import sample
    from sparsemm_lmms.visual_heads.demo_pages import to_calibration

    example = sample("line", 0, "calibration", 0)
    assert "0 places" in to_calibration(replace(example, answer="?"), "page").reason
    twice = replace(example, words=[{**word, "box": [0, 0, 1, 1]} for word in example.words])
    assert isinstance(to_calibration(twice, "page"), Skipped)
