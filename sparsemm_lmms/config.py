"""The settings of one compressed cache: validated once, frozen, and part of every record."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

POOLINGS = ("avgpool", "maxpool")
GQA_FUNCS = ("mean", "max")
KERNEL_BACKENDS = ("auto", "triton", "torch")
CUDA_GRAPHS = ("auto", "on", "off")

LARGEST = 2**63 - 1
"""The largest whole number that a setting may be: what random generators and tensors take."""

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


@dataclass(frozen=True)
class CompressionConfig:
    """How the KV cache is compressed after prefill. Names and defaults are those of the SparseMM paper and its code.

    Args:
        method: one of `sparsemm_lmms.methods.METHODS`.
        budget: tokens kept per kv head on average, the local window included (B).
        window_size: the last W prompt tokens: always kept, and their queries score all other tokens.
        kernel_size: width of the pooling over positions (odd).
        pooling: `avgpool` or `maxpool` over positions.
        gqa_func: `mean` or `max` over the query heads of one kv head.
        ratio: sparsemm and random: share of `budget - window_size` that every head gets (rho of the paper).
        floor_ratio: adakv: share of a head's budget that is not shared out inside the layer.
        normalize: adakv: weigh heads by the attention mass that their best tokens hold.
        skip: adakv: the first `skip` layers keep a uniform budget.
        beta: pyramidkv: the shallowest share is `budget / beta`.
        redistribute: spend exactly `min(budget, prompt)` tokens per head on average; the published rules lose some.
        seed: random, mask_random: which random table or heads are drawn.
        mask_ratio: mask, mask_random: share of the model's query heads that is silenced.
        kernel_backend: `auto` (Triton on CUDA, torch elsewhere), `triton` or `torch`.

    Raises:
        ValueError: one sentence naming the argument, the value and what is accepted.
    """

    method: str = "sparsemm"
    budget: int = 256
    window_size: int = 32
    kernel_size: int = 5
    pooling: str = "avgpool"
    gqa_func: str = "mean"
    ratio: float = 0.1
    floor_ratio: float = 0.2
    normalize: bool = True
    skip: int = 0
    beta: int = 20
    redistribute: bool = False
    seed: int = 0
    mask_ratio: float = 0.1
    kernel_backend: str = "auto"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, parse_value(field.name, getattr(self, field.name), str(field.type)))
        from sparsemm_lmms.methods import METHODS

        _one_of("method", self.method, tuple(METHODS))
        _one_of("pooling", self.pooling, POOLINGS)
        _one_of("gqa_func", self.gqa_func, GQA_FUNCS)
        _one_of("kernel_backend", self.kernel_backend, KERNEL_BACKENDS)
        _at_least("window_size", self.window_size, 1)
        _at_least("beta", self.beta, 1)
        _at_least("skip", self.skip, 0)
        _at_least("seed", self.seed, 0)
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd and positive, for example 5 or 7.")
        for name in ("ratio", "floor_ratio", "mask_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1.")
        if METHODS[self.method].compresses and self.budget <= self.window_size:
            raise ValueError(
                f"budget={self.budget} must be larger than window_size={self.window_size}: the budget counts the local "
                "window, so raise budget or lower window_size."
            )
        _at_least("budget", self.budget, 1)

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
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(unknown_name("argument", key, known))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain JSON values."""
        return dataclasses.asdict(self)


def parse_value(name: str, value: Any, kind: str) -> Any:
    """Convert `value` to the type named by `kind` (`int`, `float`, `bool`, `str`) or say in one sentence why not."""
    if kind == "bool":
        if isinstance(value, bool):
            return value
        word = str(value).strip().lower()
        if word in _TRUE + _FALSE:
            return word in _TRUE
    elif kind == "int" and not isinstance(value, bool):
        whole = _whole(value)
        if whole is not None and abs(whole) > LARGEST:
            raise ValueError(f"{name}={shown(value)} is too large: whole numbers reach up to {LARGEST}.")
        if whole is not None:
            return whole
    elif kind == "float" and not isinstance(value, bool):
        number = _real(value)
        if number is not None and not math.isfinite(number):
            raise ValueError(f"{name}={shown(value)} is not a finite number.")
        if number is not None:
            return number
    elif kind == "str" and isinstance(value, str):
        return value
    wanted = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a word"}[kind]
    raise ValueError(f"{name}={shown(value)} is not {wanted}.")


def _whole(value: Any) -> int | None:
    """`value` as an exact whole number (`64`, `"64"`, `64.0`, `"64.0"`), or None if it is none."""
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value == int(value) else None
    if not isinstance(value, str):
        try:
            return operator.index(value)
        except TypeError:
            return None
    if not (text := _decimal(value)):
        return None
    number = Decimal(text)
    if number.adjusted() > 19:  # larger than LARGEST; its digits need not be written out
        return 10**20
    return int(number) if number == number.to_integral_value() else None


def _real(value: Any) -> float | None:
    """`value` as a float, infinite where it is too large for one, or None if it is no number."""
    if isinstance(value, str) and "_" in value:
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return None


def _decimal(text: str) -> str | None:
    """The number that `text` writes in plain digits, perhaps with a fraction or an exponent, or None."""
    match = re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d{1,6})?", text.strip(), re.ASCII | re.IGNORECASE)
    return match and match[0]


def shown(value: Any) -> str:
    """`value` as a sentence quotes it: long ones are cut."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of more than 40 digits"
    return text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"


def unknown_name(what: str, name: str, known: list[str] | tuple[str, ...]) -> str:
    """The sentence for an unknown name: what is known, and which of it is nearest."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"Unknown {what} {shown(name)}; known: {', '.join(known)}.{hint}"


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(unknown_name(name, value, known))


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ValueError(f"{name}={value} must be at least {low}.")
