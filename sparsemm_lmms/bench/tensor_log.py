"""Which tensors a piece of code makes: bytes alive at the peak, and how large single ones are."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorLog(TorchDispatchMode):
    """Inside the block every operator's outputs are counted by storage, on any device, without an allocator's help.

    peak: largest sum of bytes alive at a time, of storages made inside. sizes: how many storages of so many bytes were
    made; a view, which may broadcast for nothing, makes none.

    >>> with TensorLog() as log:
    ...     _ = torch.zeros(10) + torch.ones(10)
    >>> log.peak, log.sizes
    (120, Counter({40: 3}))
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self.sizes: Counter[int] = Counter()
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            # a view of what existed before the block (a weight) makes no storage
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in given:
                self._see(tensor)
        return made

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self._known:  # PyTorch keeps one Python object a storage while it is referenced
            self._known.add(id(storage))
            weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
            self.sizes[storage.nbytes()] += 1
            self._alive += storage.nbytes()
            self.peak = max(self.peak, self._alive)

    def _gone(self, known: int, size: int) -> None:
        self._known.discard(known)
        self._alive -= size
