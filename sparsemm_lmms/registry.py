"""Scorers and allocators by name: files of the packages `scorers` and `allocators`, or entry points of other packages.

A package of a stranger adds one in its pyproject.toml, under the name that `--model_args scorer=...` then takes:

    [project.entry-points."sparsemm_lmms.scorers"]
    mine = "their_package:Mine"
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from importlib.metadata import EntryPoint, entry_points

from sparsemm_lmms.allocators.base import Allocator
from sparsemm_lmms.scorers.base import Scorer
from sparsemm_lmms.settings import unknown_name


def scorer_names() -> tuple[str, ...]:
    """All scorers that can be asked for."""
    return _names("scorers")


def allocator_names() -> tuple[str, ...]:
    """All allocators that can be asked for."""
    return _names("allocators")


def find_scorer(name: str) -> type[Scorer]:
    """The class of a scorer.

    Raises:
        ValueError: for an unknown name, or an entry point that is no scorer.
    """
    return _find("scorers", name, Scorer)


def find_allocator(name: str) -> type[Allocator]:
    """The class of an allocator; raises as `find_scorer`."""
    return _find("allocators", name, Allocator)


@functools.cache
def _find(kind: str, name: str, base: type) -> type:
    if name in _own(kind):
        module = importlib.import_module(f"sparsemm_lmms.{kind}.{name}")
        [found] = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
        ]
        return found
    if name not in _foreign(kind):
        raise ValueError(unknown_name(kind.removesuffix("s"), name, _names(kind)))
    found = _foreign(kind)[name].load()
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"The entry point {name} of sparsemm_lmms.{kind} is no {base.__name__}: {found!r}.")
    return found


def _names(kind: str) -> tuple[str, ...]:
    return (*_own(kind), *(name for name in _foreign(kind) if name not in _own(kind)))


@functools.cache
def _own(kind: str) -> tuple[str, ...]:
    package = importlib.import_module(f"sparsemm_lmms.{kind}")
    return tuple(module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "base")


@functools.cache
def _foreign(kind: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=f"sparsemm_lmms.{kind}")}
