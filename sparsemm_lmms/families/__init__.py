"""The model families: one file each, named after transformers' `model_type`, with a `FAMILY` in it.

A package of its own adds families by entry points of the group `sparsemm_lmms.families`, which load to a `Family` or to
a module with `FAMILY`. Imported at every start of lmms-eval, so nothing heavy may be imported here or there.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from sparsemm_lmms.families.base import GENERIC, BenchModel, Family, FrameLimits, LmmsEvalDefaults, VLMEvalKit

__all__ = [
    "ANY",
    "FAMILIES",
    "GENERIC",
    "BenchModel",
    "Family",
    "FrameLimits",
    "LmmsEvalDefaults",
    "VLMEvalKit",
    "family_for",
    "family_of",
]

GROUP = "sparsemm_lmms.families"

ANY = "vlm"
"""`vlm_<method>` runs any checkpoint, and finds its family."""

FAMILIES: dict[str, Family]
"""Name (the `model_type`) -> family: those of this folder by name, then those of other packages. Read on first use, so
that a package with a family can import this one."""


def __getattr__(name: str) -> Any:
    if name != "FAMILIES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _families()


@functools.cache
def _families() -> dict[str, Family]:
    found: dict[str, Family] = {}
    for module in sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"):
        family = importlib.import_module(f"{__name__}.{module}").FAMILY
        found[family.model_type] = family
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        try:
            family = _loaded(entry)
            _check_new(family, found)
        except (Exception, SystemExit) as error:  # others' code: it must stop neither its neighbours nor lmms-eval
            from loguru import logger

            reason = " ".join(f"{type(error).__name__}: {error}".split())
            logger.warning(f"Model family {entry.name!r} ({entry.value}) is left out: {reason}")
        else:
            found[family.model_type] = family
    return found


def _loaded(entry: EntryPoint) -> Family:
    loaded = entry.load()
    family = getattr(loaded, "FAMILY", loaded)
    if not isinstance(family, Family):
        raise TypeError("it loads neither to a sparsemm_lmms.families.Family nor to a module with such a FAMILY.")
    return family


def _check_new(family: Family, known: dict[str, Family]) -> None:
    """Refuse names that are taken: the first who has a name keeps it."""
    if ANY in family.architectures:
        raise ValueError(f"the model type {ANY} is that of the models for any checkpoint.")
    for other in known.values():
        for kind, names, taken in zip(_NAMES, _names(family), _names(other), strict=True):
            if both := sorted(names & taken):
                raise ValueError(f"the {kind} {', '.join(both)} is that of the family {other.model_type} already.")


_NAMES = ("model type", "class word", "VLMEvalKit checkpoint", "VLMEvalKit class", "bench preset")


def _names(family: Family) -> Iterator[set[str]]:
    hosts = family.vlmevalkit.adapters if family.vlmevalkit else ()
    yield set(family.architectures)
    yield {family.class_word}
    yield {word for host in hosts for word in host.checkpoints}
    yield {host.name for host in hosts}
    yield set(family.bench)


def family_for(model_type: str) -> Family | None:
    """The family that runs checkpoints of this `model_type`; None if it is none of ours."""
    return next((family for family in _families().values() if model_type in family.architectures), None)


def family_of(model_id: str) -> str | None:
    """The family of a name `<family>_<method>` (perhaps `ANY`), whatever its method; None if it is none of ours."""
    return max((name for name in (*_families(), ANY) if model_id.startswith(f"{name}_")), key=len, default=None)
