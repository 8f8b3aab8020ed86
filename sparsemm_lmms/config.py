"""The settings of one compressed cache: validated once, frozen, and part of every record."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sparsemm_lmms.settings import Setting, declared, setting, unknown_name

KERNEL_BACKENDS = ("auto", "triton", "torch")
CUDA_GRAPHS = ("auto", "on", "off")
COMPACT_BY = ("window", "rkv")


@dataclass(frozen=True, init=False)
class CompressionConfig:
    """How the KV cache is compressed after prefill. Names and defaults are those of the SparseMM paper and its code.

    Beside the settings below it takes those of the method's scorer and allocator (`kernel_size`, `ratio`, ...: see
    `scorers/` and `allocators/`), which are attributes as well. Those of other methods are checked and left out.

    Attributes:
        method: one of `presets.METHODS`, or `SCORER+ALLOCATOR`.
        settings: of the method's scorer and allocator, by name.

    Raises:
        ValueError: one sentence naming the argument, the value and what is accepted.
    """

    method: str = setting("sparsemm", help="which tokens stay, and how many in each head")
    budget: int = setting(
        256, help="tokens kept per kv head on average, the local window included (B)", word="b", low=1, shared=True
    )
    window_size: int = setting(
        32, help="last prompt tokens: always kept, and they judge the others (W)", word="w", low=1, shared=True
    )
    redistribute: bool = setting(
        False,
        help="spend exactly `min(budget, prompt)` tokens per head on average; the published rules lose some",
        words={"redist": True},
        shared=True,
    )
    seed: int = setting(0, help="which random table or heads are drawn", word="s", low=0, shared=True)
    kernel_backend: str = setting(
        "auto",
        help="`auto` (Triton on CUDA, torch elsewhere), `triton` or `torch`",
        words={"torch": "torch", "triton": "triton"},
        choices=KERNEL_BACKENDS,
        shared=True,
    )
    max_cache: int = setting(
        0,
        help="tokens per kv head, on average, at which a cache that grows while it writes is compacted to `budget` "
        "again; 0: never",
        word="cap",
        low=0,
        shared=True,
    )
    compact_by: str = setting(
        "window",
        help="what stays then: `window`, by the method's scorer with the newest `window_size` queries, or `rkv`, by "
        "R-KV's score",
        words={"rkv": "rkv"},
        choices=COMPACT_BY,
        shared=True,
    )
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __init__(self, method: str = "sparsemm", **given: Any) -> None:
        from sparsemm_lmms.methods import all_settings, find_method

        shared = declared(type(self))
        own = find_method(shared["method"].checked(method)).settings
        known = {**all_settings(), **shared, **own}
        for name in given:
            if name not in known:
                raise ValueError(unknown_name("argument", name, tuple(known)))
        defaults = {name: known[name].default for name in {**shared, **own}}
        values = {name: known[name].checked(value) for name, value in {**defaults, **given, "method": method}.items()}
        for name in shared:
            object.__setattr__(self, name, values[name])
        object.__setattr__(self, "settings", {name: values[name] for name in own})
        if find_method(method).compresses:
            self._check_sizes()

    def _check_sizes(self) -> None:
        from sparsemm_lmms.methods import find_method

        if self.budget <= self.window_size:
            raise ValueError(
                f"budget={self.budget} must be larger than window_size={self.window_size}: the budget counts the local "
                "window, so raise budget or lower window_size."
            )
        if 0 < self.max_cache <= self.budget:
            raise ValueError(
                f"max_cache={self.max_cache} must be larger than budget={self.budget}, to which heads are compacted; "
                f"use for example {2 * self.budget}, or 0 for never."
            )
        scorer = find_method(self.method).scorer
        if self.max_cache and self.compact_by == "window" and scorer is not None and scorer.reads_turn:
            raise ValueError(
                f"method={self.method!r} reads how the queries of a whole prompt were rotated, which max_cache="
                f"{self.max_cache} does not keep of the newest; use compact_by=rkv, or max_cache=0."
            )

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__.get("settings", {})
        if name in settings:
            return settings[name]
        raise AttributeError(f"{type(self).__name__} of method {self.__dict__.get('method')!r} has no setting {name!r}")

    def __hash__(self) -> int:
        return hash(tuple(self.to_dict().items()))

    @property
    def base(self) -> int:
        """Tokens per kv head outside the window (`budget - window_size`)."""
        return self.budget - self.window_size

    @property
    def chunk(self) -> int:
        """Generated tokens between two compactions (`max_cache - budget`); 0 where nothing is compacted."""
        from sparsemm_lmms.methods import find_method

        return self.max_cache - self.budget if self.max_cache and find_method(self.method).compresses else 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CompressionConfig:
        """Build from a mapping whose values may be the strings of a command line (`"64"`, `"true"`).

        Raises:
            ValueError: for an unknown key (with the known ones and the nearest) or a bad value.
        """
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All settings of this method as plain JSON values."""
        return {**{name: getattr(self, name) for name in declared(type(self))}, **self.settings}

    @classmethod
    def settings_of(cls, method: str) -> dict[str, Setting]:
        """The declarations of all settings of a method, by name: those above and those of its scorer and allocator."""
        from sparsemm_lmms.methods import find_method

        return {**declared(cls), **find_method(method).settings}
