"""Generation settings as the host gives them, and stop strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsemm_lmms.settings import parse_value
from sparsemm_lmms.step_clock import StepClock as StepClock  # part of what a generation is given


@dataclass(frozen=True)
class GenerationSettings:
    """How one batch is generated: greedy unless the task or `--gen_kwargs` asks for more.

    Sampling happens when `temperature` > 0 (the rule of the host's stock models) unless `do_sample` says no;
    `do_sample=True` alone means temperature 1.
    """

    max_new_tokens: int
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int = 1
    repetition_penalty: float | None = None

    @classmethod
    def from_host(cls, gen_kwargs: Mapping[str, Any], max_new_tokens: int) -> GenerationSettings:
        """Read the host's `gen_kwargs`; `max_new_tokens` is the default of the family.

        >>> GenerationSettings.from_host({"until": "\\n", "temperature": 0}, 16)
        GenerationSettings(max_new_tokens=16, until=('\\n',), temperature=0.0, top_p=None, top_k=None, num_beams=1, \
repetition_penalty=None)
        """
        values = {key: value for key, value in gen_kwargs.items() if value is not None and value != "None"}
        sampling = values.get("do_sample")
        temperature = parse_value("temperature", values.get("temperature", 1.0 if sampling else 0.0), "float")
        if sampling is not None and not parse_value("do_sample", sampling, "bool"):
            temperature = 0.0
        numbers = {
            name: parse_value(name, values[name], kind)
            for name, kind in (
                ("max_new_tokens", "int"),
                ("top_p", "float"),
                ("top_k", "int"),
                ("num_beams", "int"),
                ("repetition_penalty", "float"),
            )
            if name in values
        }
        settings = cls(**{"max_new_tokens": max_new_tokens, **numbers}, temperature=temperature, until=_until(values))
        settings._check()
        return settings

    def _check(self) -> None:
        """Refuse what cannot be generated.

        `top_p=0` stands beside `temperature=0` in many tasks of the host: it is refused only where it would be used.
        """
        for name, count, least in (
            ("max_new_tokens", self.max_new_tokens, 1),
            ("num_beams", self.num_beams, 1),
            ("top_k", self.top_k, 0),  # 0 is off
        ):
            if count is not None and count < least:
                raise ValueError(f"{name}={count} must be at least {least}.")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative; 0 is greedy.")
        if self.top_p is not None and (not 0 <= self.top_p <= 1 or self.top_p == 0 and self.temperature > 0):
            raise ValueError(f"top_p={self.top_p} must be larger than 0 and at most 1.")
        if self.repetition_penalty is not None and not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be larger than 0; 1 is none.")

    @staticmethod
    def ignored(gen_kwargs: Mapping[str, Any]) -> list[str]:
        """Keys of `gen_kwargs` that have no meaning here (the stock models pass over them as well)."""
        return sorted(set(gen_kwargs) - {"do_sample"} - set(GenerationSettings.__dataclass_fields__))

    def for_generate(self) -> dict[str, Any]:
        """Arguments of `model.generate`; a checkpoint's own sampling defaults are switched off when greedy."""
        sample = self.temperature > 0
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": sample,
            "temperature": self.temperature if sample else None,
            "top_p": self.top_p if sample else None,
            "top_k": self.top_k if sample else None,
            "num_beams": self.num_beams,
        }
        if self.repetition_penalty is not None:
            arguments["repetition_penalty"] = self.repetition_penalty
        return arguments

    def cut(self, text: str) -> str:
        """`text` up to the first stop string.

        >>> GenerationSettings(8, until=("B", "D")).cut("ACDB")
        'AC'
        """
        return text[: min((text.index(stop) for stop in self.until if stop in text), default=len(text))]


def _until(values: Mapping[str, Any]) -> tuple[str, ...]:
    until = values.get("until", ())
    if isinstance(until, str):
        until = (until,)
    if not isinstance(until, Sequence) or not all(isinstance(stop, str) for stop in until if stop is not None):
        raise ValueError(f"until={until!r} must be a string or a list of strings.")
    return tuple(stop for stop in until if stop)
