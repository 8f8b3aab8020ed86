"""The settings of one compressed cache: validated once, frozen, and part of every record."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sparsemm_lmms.settings import Setting, declared, setting, unknown_name

KERNEL_BACKENDS = ("auto", "triton", "torch")
CUDA_GRAPHS = ("auto", "on", "off")


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
        if find_method(method).compresses and self.budget <= self.window_size:
            raise ValueError(
                f"budget={self.budget} must be larger than window_size={self.window_size}: the budget counts the local "
                "window, so raise budget or lower window_size."
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
