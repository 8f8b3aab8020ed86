"""`sparsemm-lmms vlmeval --list`: which names there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sparsemm_lmms.methods import METHODS
from sparsemm_lmms.model_wrappers.arguments import DEMO
from sparsemm_lmms.model_wrappers.vlmevalkit.names import BASES, CONTROLS, vocabulary
from sparsemm_lmms.settings import unknown_name

DATASETS = "the datasets' own"
Rows = Sequence[tuple[str, ...]]


def listing(family: str | None = None) -> str:
    """The parts of all names as text, or of the names of one family.

    Raises:
        ValueError: for a family without names.
    """
    families = tuple(dict.fromkeys(base.family for base in BASES.values()))
    if family is not None and family not in families:
        raise ValueError(unknown_name("family", family, families))
    first = next(word for word, base in BASES.items() if family in (None, base.family))
    header = ("family", "checkpoint", "weights", "prompts of")
    parts = [
        "Names are CHECKPOINT_METHOD and a word for each setting that is not the default, for example",
        f"{first}_sparsemm_b64, {first}_snapkv_b128_w16 or {first}_fullkv.\n",
        *columns([header, *checkpoint_rows(family)]),
        "\nmethod (what each does: sparsemm-lmms methods)",
        *method_words(),
        "",
        *columns([("word", "setting"), *word_rows()]),
    ]
    return "\n".join(parts)


def checkpoint_rows(family: str | None = None) -> Rows:
    """Family, first word of the names, repository or the host's name of it, and the host's class of the prompts."""
    return [
        (base.family, word, base.repository or base.stock or DEMO, base.adapter.stock or DATASETS)
        for word, base in BASES.items()
        if family in (None, base.family)
    ]


def method_words() -> list[str]:
    """What stands behind the checkpoint."""
    return [f"{name}_b<budget>" if method.compresses else name for name, method in METHODS.items()]


def word_rows() -> Rows:
    """Every word and the setting that it states."""
    numbers, flags = vocabulary()
    rows = [(f"{word}<number>", name) for word, (name, _) in numbers.items()]
    rows += [(word, f"{name}={value}") for word, (name, value) in flags.items()]
    rows += [(f"hs-{word}", f"head_scores={value}") for word, value in CONTROLS.items()]
    return [*rows, ("hs-<hash>", "head_scores=PATH of a file given with --head-scores")]


def columns(rows: Rows) -> Iterator[str]:
    """Lines of a table whose cells are never cut."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
