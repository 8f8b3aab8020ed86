"""Scorers and allocators that a test brings, as an entry point of another package would."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sparsemm_lmms import registry


def plugin(monkeypatch: pytest.MonkeyPatch, kind: str, name: str, found: Any) -> None:
    """Register `found` under `name` in `scorers` or `allocators` for the time of a test."""
    before, entry = registry._foreign, {name: SimpleNamespace(load=lambda: found)}
    monkeypatch.setattr(registry, "_foreign", lambda of: {**before(of), **(entry if of == kind else {})})
    monkeypatch.setattr(registry, "_find", getattr(registry._find, "__wrapped__", registry._find))  # no cache
