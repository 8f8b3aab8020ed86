"""Which word is a token about to write?

Published rule (SparseMM §3): a token counts when its text occurs in exactly one word box. The research code tests the
raw piece ("▁the") on LLaVA and the decoded text (" the") on Qwen2-VL, so that a word's first token, which carries the
space before it, never matches a one-word box; by default the text is stripped here (``token_text="stripped"``), the two
published variants are ``"piece"`` and ``"decoded"``.

Samples with ``spans`` (characters of the answer -> box) use the alignment instead, see ``SpanMatcher``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from sparsemm_lmms.visual_heads.samples import Box, CalibrationSample, Span

TokenText = Literal["stripped", "decoded", "piece"]


class TokenTexts:
    """Text of single tokens, remembered by id; special tokens have none."""

    def __init__(self, tokenizer: Any, how: TokenText = "stripped") -> None:
        if how not in ("stripped", "decoded", "piece"):
            raise ValueError(f"token_text must be stripped, decoded or piece, got {how!r}.")
        self.tokenizer, self.how = tokenizer, how
        self._known: dict[int, str] = dict.fromkeys(tokenizer.all_special_ids, "")

    def __call__(self, token: int) -> str:
        if token not in self._known:
            if self.how == "piece":
                text = self.tokenizer.convert_ids_to_tokens(token)
            else:
                text = self.tokenizer.decode([token])
            self._known[token] = text.strip() if self.how == "stripped" else text
        return self._known[token]


class Matcher(Protocol):
    """Fed the tokens of one answer in order; says which word (index into ``words_of(sample)``) each writes, or -1."""

    def __call__(self, text: str) -> int: ...


class BoxMatcher:
    """The published rule: the one box whose text contains the token's, else -1. Stateless, hence cached by text.

    >>> match = BoxMatcher([Box("total", (0, 0, 9, 9)), Box("42", (9, 0, 18, 9))])
    >>> match("tot"), match("t"), match("4"), match("x"), match("")
    (0, 0, 1, -1, -1)
    """

    def __init__(self, boxes: Sequence[Box]) -> None:
        self.texts = [box.text for box in boxes]
        self._known: dict[str, int] = {"": -1}

    def __call__(self, text: str) -> int:
        if text not in self._known:
            found = [index for index, word in enumerate(self.texts) if text in word]
            self._known[text] = found[0] if len(found) == 1 else -1
        return self._known[text]


class SpanMatcher:
    """Walks along the answer: a token counts for the span that holds its characters, if it wrote the right ones.

    White space is passed over on both sides. A wrong token counts for nothing and moves on by its length, so that one
    misread character does not lose the rest.

    >>> match = SpanMatcher("AB C", [Span(0, 1, (0, 0, 9, 9)), Span(1, 2, (9, 0, 18, 9)), Span(3, 4, (0, 9, 9, 18))])
    >>> match("A"), match("X"), match(""), match("C"), match("C")
    (0, -1, -1, 2, -1)
    """

    def __init__(self, answer: str, spans: Sequence[Span]) -> None:
        self.answer, self.spans, self.place = answer, spans, 0

    def __call__(self, text: str) -> int:
        text = text.strip()
        if not text:
            return -1
        while self.place < len(self.answer) and self.answer[self.place].isspace():
            self.place += 1
        start, self.place = self.place, self.place + len(text)
        if self.answer[start : self.place] != text:
            return -1
        holding = (i for i, span in enumerate(self.spans) if span.start <= start and self.place <= span.stop)
        return next(holding, -1)


def words_of(sample: CalibrationSample) -> Sequence[Box | Span]:
    """The places that tokens of this sample may be about to write."""
    return sample.boxes if sample.spans is None else sample.spans


def matcher_of(sample: CalibrationSample) -> Matcher:
    return BoxMatcher(sample.boxes) if sample.spans is None else SpanMatcher(sample.answer, sample.spans)
