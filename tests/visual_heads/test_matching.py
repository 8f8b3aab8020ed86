"""Which word a token writes: the published substring rule, its three readings of a token's text, and aligned spans."""

import doctest

import pytest

from sparsemm_lmms.visual_heads import matching
from sparsemm_lmms.visual_heads.matching import BoxMatcher, SpanMatcher, TokenTexts
from sparsemm_lmms.visual_heads.samples import Box, Span

from . import tiny

BOXES = [Box("the total", (0, 0, 1, 1)), Box("total 42", (0, 0, 1, 1)), Box("the end", (0, 0, 1, 1))]


@pytest.mark.parametrize(
    "text, word", [("total", -1), ("42", 1), ("end", 2), ("the", -1), (" the", -1), ("he e", 2), ("", -1), ("zz", -1)]
)
def test_exactly_one_box(text, word):
    assert BoxMatcher(BOXES)(text) == word


def test_same_text_twice_never_counts():
    assert BoxMatcher([Box("42", (0, 0, 1, 1))] * 2)("4") == -1


def test_token_texts():
    tokenizer = tiny.tokenizer(words=(" total", "42"))
    total, number = (tokenizer.convert_tokens_to_ids(word) for word in (" total", "42"))
    assert TokenTexts(tokenizer)(total) == "total" and TokenTexts(tokenizer)(number) == "42"
    assert TokenTexts(tokenizer, "decoded")(total) == " total" == TokenTexts(tokenizer, "piece")(total)
    assert TokenTexts(tokenizer)(tokenizer.eos_token_id) == "" == TokenTexts(tokenizer, "piece")(3)
    assert TokenTexts(tokenizer)(tokenizer.convert_tokens_to_ids(" ")) == ""
    with pytest.raises(ValueError, match="token_text must be"):
        TokenTexts(tokenizer, "words")


def test_spans_follow_the_answer_over_white_space_and_misreadings():
    answer = "AAB\nBA C"
    spans = [Span(k, k + 1, (k, 0, k + 1, 1)) for k, c in enumerate(answer) if not c.isspace()]
    match = SpanMatcher(answer, spans)
    assert [match(c) for c in ["A", "A", "X", "\n", "B", "A", "C", "A"]] == [0, 1, -1, -1, 3, 4, 5, -1]
    words = SpanMatcher("to be", [Span(0, 2, (0, 0, 1, 1)), Span(3, 5, (1, 0, 2, 1))])
    assert [words(t) for t in ["to", " b", "e"]] == [0, 1, 1]
    across = SpanMatcher("abcd", [Span(0, 2, (0, 0, 1, 1)), Span(2, 4, (1, 0, 2, 1))])
    assert [across(t) for t in ["a", "bc", "d"]] == [0, -1, 1]


def test_examples():
    assert doctest.testmod(matching).failed == 0
