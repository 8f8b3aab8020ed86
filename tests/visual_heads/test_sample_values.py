"""Samples and their words: which are usable, what is asked of a page, and where drawn and turned words stand."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from sparsemm_lmms.visual_heads.matching import BoxMatcher, SpanMatcher
from sparsemm_lmms.visual_heads.render import GeneratedPages, _colours, _edges, _font, _turn, font_files
from sparsemm_lmms.visual_heads.samples import (
    PAPER_PROMPT,
    Box,
    CalibrationSample,
    Page,
    SkipLog,
    Skipped,
    Span,
    ask,
    checked,
)

PICTURE = Image.new("RGB", (50, 40))
WHOLE = (0.0, 0.0, 9.0, 9.0)


@pytest.mark.parametrize(
    ("xyxy", "usable"),
    [
        ((0, 0, 50, 40), True),
        ((49, 39, 50, 40), True),
        ((49.5, 0, 99, 9), True),
        ((50, 0, 60, 9), False),
        ((0, 40, 9, 50), False),
        ((-9, 0, 0.5, 9), True),
        ((-9, 0, 0, 9), False),
        ((0, -9, 9, 0.5), True),
        ((0, -9, 9, 0), False),
        ((5, 5, 5, 9), False),
        ((5, 5, 9, 5), False),
        ((5, 5, 5.1, 5.1), True),
    ],
)
def test_a_word_must_show_a_piece_of_the_picture(xyxy: tuple[float, ...], usable: bool) -> None:
    words = CalibrationSample(PICTURE, "?", "a", (Box("b", WHOLE), Box("a", xyxy)), name="n")
    spans = CalibrationSample(PICTURE, "?", "ab", spans=(Span(0, 1, WHOLE), Span(1, 2, xyxy)), name="n")
    for sample, label in ((words, "'a'"), (spans, "of characters 1:2")):
        found = checked(sample)
        assert (found is sample) == usable
        if not usable:
            assert found == Skipped("n", f"box {label} at {xyxy} is empty or outside the 50x40 image.")


def test_a_word_names_its_picture_or_the_one_video() -> None:
    wide, tall = Image.new("RGB", (80, 20)), Image.new("RGB", (20, 80))
    for item, xyxy, usable in [(0, (70, 0, 80, 9), True), (1, (70, 0, 80, 9), False), (1, (0, 70, 9, 80), True)]:
        sample = CalibrationSample((wide, tall), "?", "a", (Box("a", xyxy, item),))
        assert (checked(sample) is sample) == usable and sample.item_sizes == [(80, 20), (20, 80)]
    for item in (2, -1):
        found = checked(CalibrationSample((wide, tall), "?", "a", (Box("a", WHOLE, item),), name="n"))
        assert found == Skipped("n", f"box 'a' names image {item}, there are 2.")
    film = CalibrationSample((), "?", "a", (Box("a", (0, 70, 9, 80)),), video=(tall, tall))
    assert checked(film) is film and film.item_sizes == [(20, 80)]
    assert isinstance(checked(CalibrationSample((), "?", "a", (Box("a", WHOLE, 1),), video=(tall, tall))), Skipped)


@pytest.mark.parametrize(("size", "usable"), [((2, 399), True), ((2, 400), False), ((400, 2), False), ((399, 2), True)])
def test_pictures_too_thin_for_the_processors(size: tuple[int, int], usable: bool) -> None:
    sample = CalibrationSample(Image.new("RGB", size), "?", "a", (Box("a", (0, 0, 2, 2)),))
    assert (checked(sample) is sample) == usable


def test_every_question_of_a_page_is_answered_by_its_lines() -> None:
    """ "tax" occurs twice: it names no line and no word, but may be an answer."""
    lines = [["total", "42", "tax"], ["tax", "7"], [], ["end"]]
    boxes = tuple(tuple(Box(word, WHOLE) for word in line) for line in lines)
    flat = tuple(box for line in boxes for box in line)
    allowed = {
        PAPER_PROMPT: "total 42 tax\ntax 7\nend",
        'Read the line of this image that starts with "total".': "total 42 tax",
        'Read the line of this image that starts with "end".': "end",
        'Which word comes right after "total" in this image?': "42",
        'Which word comes right after "42" in this image?': "tax",
    }
    asked: dict[str, int] = {}
    for k in range(120):
        [sample] = ask(Page(PICTURE, boxes, f"page {k}"), "mixture", 0)
        assert isinstance(sample, CalibrationSample)
        assert (sample.answer, sample.boxes, sample.name) == (allowed[sample.prompt], flat, f"page {k}")
        asked[sample.prompt] = asked.get(sample.prompt, 0) + 1
        assert list(ask(Page(PICTURE, boxes, f"page {k}"), "mixture", 0)) == [sample]
    assert asked.keys() == allowed.keys() and 20 < asked[PAPER_PROMPT] < 60
    [sample] = ask(Page(PICTURE, boxes, "page"), "transcribe", 0, prompt="Read.")
    assert (sample.prompt, sample.answer) == ("Read.", allowed[PAPER_PROMPT])  # type: ignore[union-attr]
    twice = tuple((Box("x", WHOLE),) for _ in range(2))
    prompts = {s.prompt for k in range(30) for s in ask(Page(PICTURE, twice, str(k)), "mixture", 0)}  # type: ignore[union-attr]
    assert prompts == {PAPER_PROMPT}  # no word occurs once
    seeds = [[s.prompt for s in GeneratedPages(8, seed=s, readings="mixture")] for s in (0, 0, 1)]  # type: ignore[union-attr]
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.parametrize("angle", [-4.0, -1.3, 2.0, 4.0, 90.0])
@pytest.mark.parametrize("size", [(200, 120), (90, 160)])
def test_a_turned_word_stands_where_pil_turns_its_pixels(angle: float, size: tuple[int, int]) -> None:
    for left, top, right, bottom in [(20, 30, 60, 45), (50, 10, 85, 90), (5, 100, 80, 118)]:
        layer = Image.new("L", size)
        ImageDraw.Draw(layer).rectangle((left, top, right - 1, bottom - 1), fill=255)
        shown = layer.rotate(angle, resample=Image.Resampling.BICUBIC).point(lambda v: 255 * (v > 100)).getbbox()
        turned = _turn((left, top, right, bottom), angle, *size)
        assert shown is not None and np.abs(np.subtract(turned, shown)).max() <= 1.6, (turned, shown)
    assert _turn((1, 2, 3, 4), 0.0, 9, 9) == pytest.approx((1, 2, 3, 4))


@pytest.mark.parametrize("file", font_files())
def test_edges_are_those_of_the_ink(file: str) -> None:
    layer = Image.new("L", (300, 80))
    canvas, font = ImageDraw.Draw(layer), _font(file, 24)
    canvas.text((21, 17), "Quay42", fill=255, font=font)
    off = np.abs(np.subtract(_edges(canvas, 21, 17, "Quay42", font), layer.getbbox()))
    assert (off <= [2, 1, 4, 1]).all()  # the last letter takes its space with it


def test_paper_and_ink_differ_either_way_round() -> None:
    darker = 0
    for k in range(200):
        paper, ink = (
            sum(c * w for c, w in zip(colour, (0.3, 0.59, 0.11), strict=True)) for colour in _colours(random.Random(k))
        )
        assert abs(paper - ink) >= 90
        darker += ink < paper
    assert 60 < darker < 140


@settings(max_examples=80, derandomize=True, deadline=None)
@given(st.lists(st.text("ab1", max_size=4), max_size=5), st.text("ab1", max_size=3))
def test_a_token_names_the_only_box_that_holds_it(boxes: list[str], token: str) -> None:
    holding = [i for i, text in enumerate(boxes) if token and token in text]
    match = BoxMatcher([Box(text, WHOLE) for text in boxes])
    assert [match(token)] * 2 == [match(token), match(token)]
    assert match(token) == (holding[0] if len(holding) == 1 else -1)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(
    st.text("ab", max_size=8),
    st.lists(st.sampled_from(["a", "b", " a", "ab ", "ba", "abb", " ", ""]), max_size=6),
    st.data(),
)
def test_spans_are_walked_character_by_character(answer: str, tokens: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(answer)), max_size=4)))
    spans = [Span(a, b, WHOLE) for a, b in zip(cuts, cuts[1:], strict=False)]
    spaced = "".join(f"{c} \n" for c in answer)  # each character with white space behind it
    wide = [Span(3 * span.start, 3 * span.stop, WHOLE) for span in spans]
    match, letters, begin = SpanMatcher(answer, spans), SpanMatcher(spaced, wide), 0
    for token in tokens:
        text = token.strip()
        end = begin + len(text)
        holding = [k for k, s in enumerate(spans) if s.start <= begin and end <= s.stop]
        wanted = holding[0] if text and answer[begin:end] == text and holding else -1
        assert match(token) == wanted
        if len(text) < 2:
            assert letters(token) == wanted
        else:
            letters = SpanMatcher(spaced[3 * end :], [Span(s.start - 3 * end, s.stop - 3 * end, WHOLE) for s in wide])
        begin = end


def test_what_was_skipped_is_counted_and_the_first_twenty_told() -> None:
    log = SkipLog([Skipped(f"p{i}", f"is {i}.") for i in range(23)])
    assert log.summary() == {"count": 23, "first": [f"p{i}: is {i}." for i in range(20)]}
    assert len(GeneratedPages(7)) == 7 and len(list(GeneratedPages(3, seed=2))) == 3
