"""Names under which VLMEvalKit knows our models: `LLaVA-NeXT-Vicuna-7B_sparsemm_b64_w16`.

The host keys its outputs by the model's name and `--reuse` never compares arguments. So a name states everything that
changes the answers: `<checkpoint>_<method>_b<budget>`, then one word for each setting that is not the default. No
name contains `Qwen2-VL`, to which the host passes arguments of its own (hence `Qwen2VL`).
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsemm_lmms.config import CompressionConfig
from sparsemm_lmms.families import FAMILIES, VLMEvalKit
from sparsemm_lmms.head_scores import HeadScores
from sparsemm_lmms.methods import METHODS, all_settings, find_method
from sparsemm_lmms.model_wrappers.adapters import adapter_sha256
from sparsemm_lmms.model_wrappers.arguments import QUANTIZATIONS, known_settings, unused_settings
from sparsemm_lmms.registry import allocator_names, scorer_names
from sparsemm_lmms.settings import Setting, declared, parse_value, unknown_name


@dataclass(frozen=True)
class Base:
    """A checkpoint: its family and how that stands in the host, the host's own name of the checkpoint, its repository.

    Without name and repository it is the packaged demo model; without a repository that of the host's entry is used.
    `spread` models need several GPUs: accelerate's device map places them.
    """

    family: str
    adapter: VLMEvalKit
    stock: str | None
    repository: str | None
    spread: bool = False


BASES = {
    word: Base(name, adapter, stock, adapter.repositories.get(word), word in adapter.spread)
    for name, family in FAMILIES.items()
    if family.vlmevalkit is not None
    for adapter in family.vlmevalkit.adapters
    for word, stock in adapter.checkpoints.items()
}
"""First word of a name -> the checkpoint."""

LISTED_BUDGETS = (64, 128, 256, 512, 1024)
"""Budgets that `register` lists by itself; any other is resolved when it is asked for."""

HOST_NUMBERS = {
    "minp": ("min_pixels", "int"),
    "maxp": ("max_pixels", "int"),
    "new": ("max_new_tokens", "int"),
}
"""Word in a name, followed by its number -> setting; those of the compression are declared with it."""

RUN_FLAGS: dict[str, tuple[str, Any]] = {
    "cbq": ("compress_before_question", True),
    "fp32": ("dtype", "float32"),
    "bf16": ("dtype", "bfloat16"),
    "fp16": ("dtype", "float16"),
    "eager": ("attn_implementation", "eager"),
    "fa2": ("attn_implementation", "flash_attention_2"),
    **{word.replace("-", ""): ("quantization", word) for word in QUANTIZATIONS},
}
HOST_FLAGS: dict[str, tuple[str, Any]] = {
    "stockgen": ("generation", "stock"),
    "dataprompt": ("use_custom_prompt", False),
}
"""Word in a name -> setting and its value: of the run, and of the host."""

CONTROLS = {"uniform": "uniform", "random": "random", "layermean": "layer_mean", "permuted": "permuted"}
"""Word after `hs-` -> `head_scores`; `hs-<8 hex digits>` stands for a score file by the hash of its content."""

HASH_DIGITS = 8


@functools.cache
def vocabulary(method: str | None = None) -> tuple[dict[str, tuple[str, str]], dict[str, tuple[str, Any]]]:
    """(word before a number -> setting and its type, other words -> setting and value) of a method, or of all presets.

    In the order in which names have them.
    """
    shared = declared(CompressionConfig)
    own = find_method(method).settings if method else all_settings()
    ordered = [*(shared[name] for name in ("budget", "window_size", "max_cache")), *own.values(), shared["seed"]]
    numbers = {known.word: (known.name, known.kind) for known in ordered if known.word is not None}
    backend = shared.pop("kernel_backend")
    flags = _flags([*own.values(), *shared.values()]) | RUN_FLAGS | _flags([backend]) | HOST_FLAGS
    return numbers | HOST_NUMBERS, flags


def _flags(settings: Iterable[Setting]) -> dict[str, tuple[str, Any]]:
    return {word: (known.name, value) for known in settings for word, value in known.words.items()}


@functools.cache
def known_methods() -> tuple[str, ...]:
    """The presets and all free combinations `SCORER+ALLOCATOR`."""
    return (*METHODS, *(f"{scorer}+{allocator}" for scorer in scorer_names() for allocator in allocator_names()))


def listed_names() -> list[str]:
    """Every checkpoint with every method, at the usual budgets."""
    names = []
    for base in BASES:
        for method, cls in METHODS.items():
            stem = f"{base}_{method}"
            names += [f"{stem}_b{budget}" for budget in LISTED_BUDGETS] if cls.compresses else [stem]
    return names


def is_ours(name: str) -> bool:
    """Whether `name` is meant to be one of ours: a known checkpoint before, or a known method after an underscore."""
    base, _, rest = name.partition("_")
    return bool(rest) and (base in BASES or any(_starts_with_word(rest, method) for method in known_methods()))


def parse_name(name: str, score_files: Mapping[str, str]) -> tuple[Base, str, dict[str, Any]]:
    """(checkpoint, method, settings) of a name.

    Args:
        name: for example `Qwen2VL-7B-Instruct_snapkv_b128_w16`.
        score_files: first 8 digits of a content hash -> path of the head scores (see `hash_scores`).

    Raises:
        ValueError: one sentence on the part that is unknown, without effect, doubled or missing.
    """
    base, _, rest = name.partition("_")
    if base not in BASES:
        raise ValueError(
            f"Unknown checkpoint {base!r} in model name {name!r}; `sparsemm-lmms vlmeval --list` prints those known."
            + nearest(base, BASES)
        )
    method = max((m for m in known_methods() if _starts_with_word(rest, m)), key=len, default=None)
    if method is None:
        raise ValueError(unknown_name("method", rest.partition("_")[0], tuple(METHODS)) + f" In model name {name!r}.")
    compresses = find_method(method).compresses
    settings: dict[str, Any] = {}
    for word in rest[len(method) :].split("_")[1:]:
        setting, value = _read_word(word, name, method, score_files)
        if setting in settings:
            raise ValueError(f"Model name {name!r} states {setting} twice; keep one of the two.")
        _check_effect(setting, word, name, method)
        settings[setting] = value
    if compresses and "budget" not in settings:
        raise ValueError(f"Model name {name!r} does not state its budget; call it {name}_b256, for example.")
    return BASES[base], method, settings


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence: which known name was perhaps meant, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def name_suffix(method: str, settings: Mapping[str, Any]) -> str:
    """`<method>_b<budget>...`: the part of a name that tells `settings` (those that differ from the defaults).

    >>> name_suffix("snapkv", {"window_size": 16, "budget": 128, "pooling": "maxpool"})
    'snapkv_b128_w16_maxpool'
    """
    numbers, flags = vocabulary(method)
    words = [f"{word}{settings[name]}" for word, (name, _) in numbers.items() if settings.get(name) is not None]
    words += [word for word, (name, value) in flags.items() if name in settings and settings[name] == value]
    tellable = {"head_scores", "system_prompt", "peft", *(name for name, _ in numbers.values())}
    for name, value in settings.items():
        if value is not None and name not in tellable and (name, value) not in flags.values():
            raise ValueError(
                f"{name}={value} has no word in VLMEvalKit's names, which tell all settings; leave it out."
            )
    if settings.get("head_scores") is not None:
        words.append(_scores_word(settings["head_scores"]))
    if settings.get("peft") is not None:  # told by its hash as the next is, so only `--config` files can state them
        words.append(f"peft-{adapter_sha256(settings['peft'])[:HASH_DIGITS]}")
    if settings.get("system_prompt") is not None:
        words.append(f"sys-{hashlib.sha256(settings['system_prompt'].encode()).hexdigest()[:HASH_DIGITS]}")
    return "_".join([method, *words])


def telling_settings(method: str, compression: CompressionConfig, others: Iterable[tuple[str, Any, Any]]) -> dict:
    """The settings that a name must tell: the budget, and all that differ from their default and have an effect.

    Args:
        others: (name, value, default) of the settings that are not the compression's.
    """
    used = known_settings(method) - set(unused_settings(method))
    fields = [
        (name, getattr(compression, name), known.default)
        for name, known in CompressionConfig.settings_of(method).items()
        if name != "method"
    ]
    told = {name: value for name, value, default in fields if name in used and value != default}
    if find_method(method).compresses:
        told["budget"] = compression.budget
    return told | {name: value for name, value, default in others if value != default}


def hash_scores(files: Iterable[str | Path]) -> dict[str, str]:
    """First digits of the content hash -> path, for the score files that names may refer to.

    Raises:
        ValueError, FileNotFoundError: one sentence for a file that holds no head scores.
    """
    return {HeadScores.load(file).content_hash[:HASH_DIGITS]: str(file) for file in files}


def _starts_with_word(text: str, word: str) -> bool:
    return text == word or text.startswith(word + "_")


def _read_word(word: str, name: str, method: str, score_files: Mapping[str, str]) -> tuple[str, Any]:
    numbers, flags = ({**theirs, **own} for theirs, own in zip(vocabulary(), vocabulary(method), strict=True))
    if word in flags:
        return flags[word]
    if word.startswith("hs-"):
        return "head_scores", _read_scores(word, name, score_files)
    match = re.fullmatch(r"([a-z]+?)([\d.].*)", word)
    if match is None or match[1] not in numbers:
        known = [f"{w}<{setting}>" for w, (setting, _) in numbers.items()] + [*flags, "hs-<head scores>"]
        raise ValueError(f"Model name {name!r}: {word!r} is no setting; known: {', '.join(known)}.")
    setting, kind = numbers[match[1]]
    try:
        return setting, parse_value(setting, match[2], kind)
    except ValueError as error:
        raise ValueError(f"Model name {name!r}: {error}") from None


def _read_scores(word: str, name: str, score_files: Mapping[str, str]) -> str:
    """`hs-permuted`, `hs-1a2b3c4d` or `hs-permuted-1a2b3c4d` -> the value of `head_scores`."""
    control, _, digits = word.removeprefix("hs-").rpartition("-")
    if not control and digits in CONTROLS:
        return CONTROLS[digits]
    if control and control not in CONTROLS:
        raise ValueError(unknown_name("head scores", control, tuple(CONTROLS)) + f" In model name {name!r}.")
    if digits not in score_files:
        given = ", ".join(f"{path} is hs-{known}" for known, path in score_files.items()) or "none was given"
        raise ValueError(
            f"Model name {name!r} refers to head scores {digits!r} ({given}); give their file with --head-scores, or "
            f"one of {', '.join(f'hs-{control}' for control in CONTROLS)}."
        )
    return f"{CONTROLS[control]}:{score_files[digits]}" if control else score_files[digits]


def _scores_word(spec: str) -> str:
    control, _, rest = spec.partition(":")
    words = {value: word for word, value in CONTROLS.items()}
    files = [rest] if control in words and rest else [] if control in words else [spec]
    parts = [words[control]] if control in words else []
    return "-".join(["hs", *parts, *hash_scores(files)])


def _check_effect(setting: str, word: str, name: str, method: str) -> None:
    """Refuse a setting of another method, or one that has no effect: its name would tell a difference there isn't."""
    of_another = setting in {*all_settings(), *CompressionConfig.settings_of(method)} - known_settings(method)
    needless = setting == "head_scores" and not find_method(method).needs_head_scores
    if of_another or needless or setting in unused_settings(method):
        raise ValueError(f"Model name {name!r}: {word!r} ({setting}) has no effect on {method}; leave it out.")
