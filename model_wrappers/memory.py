"""Documents that do not fit into memory: named, and left out only where that was asked for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from loguru import logger

from sparsemm_lmms.session import CompressionSession

T = TypeVar("T")


@dataclass
class MemoryGuard:
    """Runs batches; the documents of one that does not fit are tried one by one.

    Attributes:
        session: its newest cache is given back before another try.
        describe: names the document of an index in a sentence.
        skip: leave documents out that do not fit alone, instead of stopping.
        skipped: indices of those that were left out.
    """

    session: CompressionSession
    describe: Callable[[int], str]
    skip: bool = False
    skipped: list[int] = field(default_factory=list)

    def __call__(self, picked: Sequence[tuple[int, T]], answer: Callable[[Sequence[tuple[int, T]]], None]) -> None:
        """`answer(picked)`, which must not record anything before it has everything.

        Raises:
            RuntimeError: naming the document that is too large.
        """
        try:
            return answer(picked)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            name = self.describe(picked[0][0])
            if len(picked) == 1 and not self.skip:
                raise RuntimeError(
                    f"{name} does not fit into memory. Lower batch_size or the image size (max_pixels), or leave such "
                    "documents out with skip_oom=true."
                ) from error
        self.session.cache = None  # outside of `except`: the error's frames hold tensors
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(picked) == 1:
            logger.warning(f"{name} does not fit into memory and is left out (skip_oom=true).")
            self.skipped.append(picked[0][0])
        else:
            for one in picked:
                self([one], answer)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the GPU or on the CPU (where torch raises a plain RuntimeError)."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
