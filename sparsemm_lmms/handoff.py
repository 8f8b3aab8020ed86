"""How a cache tells the attention function which of its layers it is in: by an attribute of the keys it returns.

In transformers' models the tensor that `Cache.update` returns goes to the attention function as it is, in the same
layer and in later ones that share its keys (Gemma 3n, Gemma 4), whatever the thread, the autocast or inference mode.
A model that hands on a copy loses the attribute, and the reader says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

_NAME = "_sparsemm_lmms_handoff"


@dataclass
class Handoff:
    """What `update` says of the keys it returns.

    Attributes:
        source: the writer's own, never something that holds these keys: Python could not free the two.
        readers: attention functions that have read it; the first is that of the layer which updated.
    """

    source: Any
    readers: int = 0


def hand_on(key: Tensor, source: Any) -> Tensor:
    """The same tensor, saying where it comes from."""
    setattr(key, _NAME, Handoff(source))
    return key


def handed(key: Tensor) -> Handoff | None:
    """What `hand_on` said of this very tensor, None if it said nothing; `readers` then counts this look as well."""
    handoff: Handoff | None = getattr(key, _NAME, None)
    if handoff is not None:
        handoff.readers += 1
    return handoff
