"""A method: a scorer says which tokens of a head stay, an allocator how many. By name, and at work on a model.

A name is one of `presets.METHODS`, or a free combination `SCORER+ALLOCATOR`, for example `keydiff+pyramid`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sparsemm_lmms import presets
from sparsemm_lmms.allocators.base import Allocator, LayerPrompt, Model, Shape
from sparsemm_lmms.registry import allocator_names, find_allocator, find_scorer, scorer_names
from sparsemm_lmms.retention import MEND, Retention
from sparsemm_lmms.scorers.base import LayerView, Scorer
from sparsemm_lmms.settings import Setting, declared, unknown_name

if TYPE_CHECKING:
    from sparsemm_lmms.config import CompressionConfig

__all__ = ["METHODS", "LayerPrompt", "Method", "Model", "Parts", "find_method"]


@dataclass(frozen=True)
class Parts:
    """What a method is made of.

    Attributes:
        scorer: class of the scorer, or None where nothing is ranked.
        allocator: class of the allocator.
    """

    scorer: type[Scorer] | None
    allocator: type[Allocator]

    @property
    def compresses(self) -> bool:
        """Whether anything is evicted."""
        return self.allocator.compresses

    @property
    def needs_head_scores(self) -> bool:
        """Whether measured head scores must be given."""
        return self.allocator.needs_head_scores

    @property
    def reads_vision(self) -> bool:
        """Whether image tokens must be told apart."""
        return self.allocator.reads_vision or (self.scorer is not None and self.scorer.reads_vision)

    @property
    def uses_seed(self) -> bool:
        """Whether `seed` has an effect; it also draws `head_scores=random` and `permuted`."""
        return self.allocator.draws or self.needs_head_scores

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """The settings that the scorer and the allocator declare.

        Raises:
            ValueError: if both declare one of the same name.
        """
        own, theirs = declared(self.scorer) if self.scorer else {}, declared(self.allocator)
        if both := own.keys() & theirs.keys():
            raise ValueError(f"{self.scorer} and {self.allocator} both declare {', '.join(sorted(both))}.")
        return {**own, **theirs}

    def papers(self, values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        """(name, arXiv id) of what a user of these settings cites: those of the allocator, the scorer and settings."""
        told = (known for name, known in self.settings.items() if values.get(name, known.default) != known.default)
        papers = (*self.allocator.papers, *(self.scorer.papers if self.scorer else ()))
        papers += tuple(known.paper for known in told if known.paper)
        compacted = values.get("max_cache", 0) and values.get("compact_by", "window") != "window"
        return (*papers, *find_scorer(values["compact_by"]).papers) if compacted else papers


METHODS = {
    name: Parts(find_scorer(preset.scorer) if preset.scorer else None, find_allocator(preset.allocator))
    for name, preset in presets.METHODS.items()
}
"""The parts of every preset, by its name."""


def find_method(name: str) -> Parts:
    """The parts of a method.

    Raises:
        ValueError: for an unknown name, or an allocator that compares heads by scores that cannot be compared.
    """
    if name in METHODS:
        return METHODS[name]
    scorer, plus, allocator = name.partition("+")
    if not plus:
        raise ValueError(unknown_name("method", name, (*METHODS, "SCORER+ALLOCATOR")))
    parts = Parts(find_scorer(scorer), find_allocator(allocator))
    if parts.allocator.compares_heads and not find_scorer(scorer).comparable:
        able = [other for other in scorer_names() if find_scorer(other).comparable]
        able.sort(key=lambda other: other != presets.FREE_PARTS["scorer"])  # the usual one first
        raise ValueError(
            f"allocator={allocator} holds the scores of heads against each other, which those of scorer={scorer} do "
            f"not allow; use {', '.join(able)}, or another of {', '.join(allocator_names())}."
        )
    return parts


def all_settings() -> dict[str, Setting]:
    """Every setting that a preset's scorer or allocator declares, by name."""
    return {name: known for parts in METHODS.values() for name, known in parts.settings.items()}


@dataclass(frozen=True, eq=False)
class Method:
    """A method with its settings, on the shape of a model.

    Attributes:
        config: the settings.
        model: shape of the model.
        head_scores: float64 `[layers, q_heads]` for methods that need them, else None.
        retention: measured curves for methods that need them, else None.
    """

    config: CompressionConfig
    model: Model
    head_scores: np.ndarray | None = None
    retention: Retention | None = None

    def __post_init__(self) -> None:
        if self.scorer is not None:
            self.scorer.check(self.model.num_layers, self.model.kv_heads)
        if not self.parts.needs_head_scores:
            return
        if self.head_scores is None:
            raise ValueError(f"method {self.config.method!r} needs head_scores.")
        wanted = (self.model.num_layers, self.model.q_heads)
        if tuple(np.shape(self.head_scores)) != wanted:
            raise ValueError(
                f"head_scores have shape {list(np.shape(self.head_scores))} but the model has "
                f"{wanted[0]} layers x {wanted[1]} query heads; use scores made for this model."
            )
        if not self.parts.allocator.needs_retention:
            return
        if self.retention is None:
            raise ValueError(
                f"method {self.config.method!r} needs retention curves, which these head scores lack; {MEND}, or use "
                "`sparsemm`."
            )
        self._curves()

    def _curves(self) -> Retention:
        """The curves of the kv heads."""
        assert self.retention is not None
        curves = self.retention.of_groups(self.model.kv_heads)
        found, wanted = curves.held.shape[:2], (self.model.num_layers, self.model.kv_heads)
        if found != wanted:
            raise ValueError(
                f"the retention curves are for {list(found)} layers and kv heads, and the model has {list(wanted)}; "
                f"{MEND}."
            )
        return curves

    @cached_property
    def parts(self) -> Parts:
        return find_method(self.config.method)

    @cached_property
    def scorer(self) -> Scorer | None:
        return self._made(self.parts.scorer) if self.parts.scorer else None

    @cached_property
    def compactor(self) -> Scorer | None:
        """What ranks the tokens of a cache that is compacted while it writes (`compact_by`)."""
        return self.scorer if self.config.compact_by == "window" else find_scorer(self.config.compact_by)()

    @cached_property
    def allocator(self) -> Allocator:
        return self._made(self.parts.allocator)

    @cached_property
    def shape(self) -> Shape:
        model, config = self.model, self.config
        scores = self.head_scores if self.parts.needs_head_scores else None
        return Shape(
            model.num_layers,
            model.q_heads,
            model.kv_heads,
            config.base,
            config.redistribute,
            config.seed,
            scores,
            self._curves() if self.parts.allocator.needs_retention else None,
        )

    @property
    def compresses(self) -> bool:
        return self.parts.compresses

    def keeps_whole(self, length: int) -> bool:
        """Whether a prompt with `length` tokens outside the window is kept whole: it is shorter than the budget."""
        return not self.compresses or length < self.config.base

    def capacities(self, prompt: LayerPrompt) -> np.ndarray:
        """What the allocator gives each head outside the window, perhaps too much: int64 `[batch, kv_heads]`."""
        return self._whole(self.allocator.counts(self.shape, prompt), prompt.lengths)

    def counts(self, prompt: LayerPrompt) -> np.ndarray:
        """Tokens that each head keeps outside the window: `capacities`, cut to what the prompt has."""
        return self._cut(self.capacities(prompt), prompt.lengths)

    def cascade(self, view: LayerView, prompt: LayerPrompt, seen: list[np.ndarray]) -> list[np.ndarray]:
        """Note a layer's number in `seen`, and share out among the layers so far: int64 `[batch, kv_heads]` of each."""
        number = self.allocator.observe(view, prompt.scores)
        number = number.detach().cpu().numpy() if isinstance(number, Tensor) else np.asarray(number)
        seen.append(np.broadcast_to(number.astype(np.float64), len(prompt.lengths)))
        rows = self.allocator.counts_so_far(self.shape, seen, prompt.lengths)
        return [self._cut(self._whole(row, prompt.lengths), prompt.lengths) for row in rows]

    def masked_heads(self) -> np.ndarray | None:
        """Query heads that contribute nothing to the output: bool `[layers, q_heads]`, or None for none."""
        return self.allocator.masked_heads(self.shape)

    def _made(self, kind: Any) -> Any:
        return kind(**{name: getattr(self.config, name) for name in declared(kind)})

    def _whole(self, counts: Any, lengths: tuple[int, ...]) -> np.ndarray:
        if isinstance(counts, Tensor):
            counts = counts.cpu().numpy()
        return np.broadcast_to(np.asarray(counts).astype(np.int64), (len(lengths), self.model.kv_heads))

    def _cut(self, counts: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
        whole = np.array([self.keeps_whole(length) for length in lengths])[:, None]
        most = np.array(lengths, dtype=np.int64)[:, None]
        return np.where(whole, most, np.clip(counts, 0, most))
