"""Questions about a page and their answers; text-only exercises."""

import numpy as np

from sparsemm_lmms.demo.pages import CODE, Page

TEMPLATES = {
    "all": ("Provide all the OCR results of this image.", "Transcribe the whole image."),
    "line": ("What is written in line {0}?", "Read line {0} of the image."),
    "column": ("What is written in column {0}?", "Read column {0} of the table."),
    "key": ("Read the line of {0}.", "Which line belongs to {0}?"),
}
# "key" is asked in training only: the Qwen2-VL demo did not learn to find a line by its key.
KINDS = ("all", "line", "column")
KINDS_OF_FORM = {"page": ("all", "line"), "form": ("all", "line"), "table": ("all", "line", "column")}
TRAINED_KIND = {"page": "line", "form": "key", "table": "column"}
TEXT_KINDS = ("copy", "lookup", "sum", "reverse")
TEXT_TEMPLATES = {
    "copy": "Copy this text: {0}",
    "lookup": "Here is a list: {0}. What is the value of {1}?",
    "sum": "What is the sum of {0} and {1}?",
    "reverse": "Spell this word from right to left: {0}",
}


def answers(page: Page, kind: str) -> list[tuple[str, str]]:
    """Every (target, answer) that `kind` allows on this page; the target fills the template."""
    if kind == "all":
        return [("", "\n".join(page.lines))]
    if kind == "line":
        return [(str(i + 1), line) for i, line in enumerate(page.lines)]
    if kind == "column":
        return [(str(i + 1), column) for i, column in enumerate(page.columns)]
    if kind == "key":
        return [(key, f"{key}: {value}") for key, value in page.keys.items()]
    raise ValueError(f"unknown question kind {kind!r}; known: {', '.join(TEMPLATES)}")


def ask(rng: np.random.Generator, page: Page, kind: str, count: int) -> list[tuple[str, str]]:
    """`count` (question, answer) pairs of one kind about one page, without repetition while there are enough."""
    choices = answers(page, kind)
    order = [int(i) for i in rng.permutation(len(choices))]
    picked = [choices[order[i % len(order)]] for i in range(count)]
    return [(TEMPLATES[kind][int(rng.integers(2))].format(target), answer) for target, answer in picked]


def text_exercise(rng: np.random.Generator, kind: str) -> tuple[str, str]:
    """A question without an image: copying, lookup in a list, sums, spelling backwards."""

    def code(low: int, high: int) -> str:
        return "".join(rng.choice(CODE, int(rng.integers(low, high + 1))))

    template = TEXT_TEMPLATES[kind]
    if kind == "copy":
        text = " ".join(code(2, 6) for _ in range(int(rng.integers(1, 5))))
        return template.format(text), text
    if kind == "reverse":
        text = code(2, 6)
        return template.format(text), text[::-1]
    if kind == "sum":
        a, b = (int(x) for x in rng.integers(0, 10, 2))
        return template.format(a, b), str(a + b)
    keys = [str(c) for c in rng.choice(CODE[:26], 3, replace=False)]
    values = [code(2, 3) for _ in keys]
    pick = int(rng.integers(3))
    return template.format(", ".join(f"{k}: {v}" for k, v in zip(keys, values, strict=True)), keys[pick]), values[pick]
