"""Head scores: how much each attention head of a model looks at the word it is about to write.

SparseMM (https://arxiv.org/abs/2506.05344, §3) gives every query head one number and spends the KV budget by it.

**Files.** A score file is the JSON that the research code publishes: an object with keys ``"layer-head"`` whose
values are a list of floats (one an image, or already reduced) or one float; the head's score is their mean. The keys
decide, not the order. Two things of ours had to fit without breaking the research code's reader, which takes
``[np.mean(v) for v in json.load(f).values()]`` and views it as ``[layers, heads]``, so that one additional key of
whatever name stops it:

* the *standard error* ``e`` of a score ``m`` is written inside the published format as the pair ``[m - e, m + e]``. The
  mean of the two is ``m`` to the last bit, their standard error by the usual formula (``|a - b| / 2``) is ``e``, and no
  entry is negative, since scores are means of non-negative values and then ``e <= m``;
* *provenance* (model, data, counts, versions) lies beside the file: ``scores.json`` -> ``scores.provenance.json``. It
  names the content hash of the scores it describes; when that differs it is ignored with a warning. A score file
  without it is complete.

Importing this module needs NumPy only, neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sparsemm_lmms._version import __version__
from sparsemm_lmms.head_statistics import per_image_facts
from sparsemm_lmms.json_files import quoted, read_json
from sparsemm_lmms.retention import Retention

_KEY = re.compile(r"(\d{1,9})-(\d{1,9})", re.ASCII)


@dataclass(frozen=True, eq=False)
class HeadScores:
    """One non-negative score per query head.

    values: float64 ``[layers, q_heads]``, means over the calibration images; finite, not all zero.
    stderr: float64 ``[layers, q_heads]`` or None, the standard error of each mean.
    provenance: JSON-able facts on where the scores come from; never used in computing.

    >>> HeadScores.uniform(2, 4).values.shape
    (2, 4)
    """

    values: np.ndarray
    stderr: np.ndarray | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = _frozen_table(self.values, "head scores")
        if not values.any():
            raise ValueError("All head scores are zero: no head ever hit a word; score more or clearer images.")
        with np.errstate(over="ignore"):
            if not np.isfinite(values.sum()):
                raise ValueError("Head scores add up to more than a float64 holds; divide all of them by one number.")
        object.__setattr__(self, "values", values)
        if self.stderr is not None:
            stderr = _frozen_table(self.stderr, "standard errors")
            if stderr.shape != values.shape:
                raise ValueError(f"Standard errors have shape {stderr.shape}, scores {values.shape}; they must agree.")
            object.__setattr__(self, "stderr", stderr)
        object.__setattr__(self, "provenance", dict(self.provenance))

    # ---- facts ----
    @property
    def layers(self) -> int:
        return self.values.shape[0]

    @property
    def heads(self) -> int:
        """Query heads in each layer."""
        return self.values.shape[1]

    @property
    def content_hash(self) -> str:
        """16 hex digits of the sha256 of shape and values: equal scores, equal hash, whatever the file looks like."""
        shape = f"{self.layers}x{self.heads}:".encode()
        return hashlib.sha256(shape + self.values.astype("<f8").tobytes()).hexdigest()[:16]

    def check_shape(self, layers: int, q_heads: int, model_name: str) -> None:
        """Raise unless these scores fit a model of ``layers`` layers with ``q_heads`` query heads."""
        if (self.layers, self.heads) != (layers, q_heads):
            origin = self.provenance.get("path") or self.provenance.get("model") or self.provenance.get("kind", "")
            raise ValueError(
                f"Head scores {f'of {origin} ' if origin else ''}are for {self.layers} layers x {self.heads} heads, "
                f"but {model_name} has {layers} layers x {q_heads} heads; make scores for this model with "
                "`sparsemm-lmms chase`."
            )

    @cached_property
    def retention(self) -> Retention | None:
        """The retention curves that were measured with these scores; drawn or alike where the scores are.

        Raises:
            ValueError: for curves that are none.
        """
        kind = self.provenance.get("kind")
        if kind == "random":
            return Retention.random(self.layers, self.heads, self.provenance.get("seed", 0))
        if kind == "uniform":
            return Retention.uniform(self.layers, self.heads)
        return Retention.of(self.provenance)

    # ---- controls ----
    @classmethod
    def uniform(cls, layers: int, heads: int) -> HeadScores:
        """The same score for every head: SparseMM becomes an even split."""
        return cls(np.full((layers, heads), 1.0 / (layers * heads)), provenance={"kind": "uniform"})

    @classmethod
    def random(cls, layers: int, heads: int, seed: int = 0) -> HeadScores:
        """One table of uniform [0, 1) draws, normalised over the whole model (the reference: one draw a layer)."""
        table = np.random.default_rng(seed).random((layers, heads))
        return cls(table / table.sum(), provenance={"kind": "random", "seed": seed})

    def layer_mean(self) -> HeadScores:
        """Each head gets its layer's mean: the control that tells sparsity of heads from sparsity of layers."""
        table = np.repeat(self.values.mean(axis=1, keepdims=True), self.heads, axis=1)
        curves = {} if self.retention is None else {"retention": self.retention.layer_mean().facts()}
        return HeadScores(table, provenance={"kind": "layer_mean", "of": self.content_hash, **curves})

    def permuted(self, seed: int = 0) -> HeadScores:
        """The same scores dealt to other heads of the whole model: the right unevenness in the wrong places."""
        flat = np.random.default_rng(seed).permutation(self.values.reshape(-1))
        curves = {} if self.retention is None else {"retention": self.retention.permuted(seed).facts()}
        facts = {"kind": "permuted", "seed": seed, "of": self.content_hash, **curves}
        return HeadScores(flat.reshape(self.values.shape), provenance=facts)

    # ---- files ----
    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadScores:
        """Read a published or own score file.

        Raises:
            FileNotFoundError: where there is no such file.
            ValueError: for any defect, in one sentence that names the file and the mend.
        """
        path = Path(path)
        table, stderr, columns = _parse(path)
        try:
            scores = cls(table, stderr)
        except ValueError as error:
            raise ValueError(f"Head-score file {path}: {error}") from None
        facts = {**_image_facts(columns), **_read_provenance(path, scores.content_hash), "path": str(path)}
        return cls(table, stderr, facts)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the scores and, beside them, their provenance, each by an atomic rename; returns the path.

        ``path`` itself is in the published format and readable by the research code (module docstring).
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        errors = [[None] * self.heads] * self.layers if self.stderr is None else self.stderr.tolist()
        lines = [
            f'"{layer}-{head}": {json.dumps(_pair(mean, errors[layer][head]))}'
            for layer, row in enumerate(self.values.tolist())
            for head, mean in enumerate(row)
        ]
        facts = {key: value for key, value in self.provenance.items() if key != "path"}
        facts |= {"layers": self.layers, "q_heads": self.heads, "content_hash": self.content_hash}
        facts.setdefault("sparsemm_lmms", __version__)
        write_atomically(provenance_path(path), json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        write_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")
        return path


def provenance_path(path: str | os.PathLike[str]) -> Path:
    """Where the provenance of a score file lies: ``scores.json`` -> ``scores.provenance.json``."""
    path = Path(path)
    return path.with_name(path.stem + ".provenance.json")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content`` so that a reader, a full disk or a kill never meets half a file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes 0600, which a shared cache or a package can't serve
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say where
        raise


def _frozen_table(table: Any, what: str) -> np.ndarray:
    array = np.array(table, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{what} must be a table [layers, heads], got shape {array.shape}.")
    for bad, word in ((~np.isfinite(array), "not finite"), (array < 0, "negative")):
        if bad.any():
            layer, head = np.argwhere(bad)[0]
            raise ValueError(f"{what}: layer {layer}, head {head} is {word} ({array[layer, head]}); remake the file.")
    array.setflags(write=False)
    return array


def _pair(mean: float, error: float | None) -> list[float]:
    """``[m - e, m + e]`` whose float64 mean is exactly m: the lower is rounded to a step that divides both."""
    if not error:
        return [mean]
    step = float(np.spacing(2 * mean))
    low = min(max(round((mean - error) / step) * step, 0.0), mean)
    return [low, 2 * mean - low]


def _parse(path: Path) -> tuple[np.ndarray, np.ndarray | None, list[list[float]]]:
    """Means [layers, heads]; standard errors, where heads have several values; the values of each head in order."""
    where = f"Head-score file {path}"
    content = read_json(
        path, "Head-score file", f"make one with `sparsemm-lmms chase --output {path}`", unique_keys=True
    )
    if not isinstance(content, dict) or not content:
        raise ValueError(f'{where} holds no scores; expected an object like {{"0-0": [0.1, 0.2], "0-1": [0.3]}}.')
    entries: dict[tuple[int, int], list[float]] = {}
    for key, value in content.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f'{where} has the extra entry {quoted(key)}; keys must be "layer-head", so remove it.')
        place = int(match[1]), int(match[2])
        if place in entries:
            raise ValueError(f'{where} has the entry "{key}" twice; remove one of the two.')
        entries[place] = _numbers(value, key, where)
    layers, heads = (1 + max(place[axis] for place in entries) for axis in (0, 1))
    if len(entries) != layers * heads:
        missing = next((i, j) for i in range(layers) for j in range(heads) if (i, j) not in entries)
        raise ValueError(
            f'{where} lacks {layers * heads - len(entries)} of {layers} x {heads} heads, the first is "{missing[0]}-'
            f'{missing[1]}"; remake or complete the file.'
        )
    table, stderr = np.zeros((layers, heads)), np.zeros((layers, heads))
    with np.errstate(over="ignore"):  # infinite means and standard errors are refused with the rest of the table
        for place, numbers in entries.items():
            table[place] = np.mean(numbers)  # as the research code, to the last bit
            stderr[place] = np.std(numbers, ddof=1) / np.sqrt(len(numbers)) if len(numbers) > 1 else 0.0
    several = any(len(numbers) > 1 for numbers in entries.values())
    return table, stderr if several else None, [entries[place] for place in np.ndindex(layers, heads)]


def _image_facts(columns: list[list[float]]) -> dict[str, Any]:
    """How far the images agree, where every head has a value of each (the published files; ours keep it beside)."""
    images = len(columns[0])
    if images < 4 or any(len(column) != images for column in columns):
        return {}
    return {"images": images, **per_image_facts(np.array(columns).T)}


def _numbers(value: Any, key: str, where: str) -> list[float]:
    numbers = value if isinstance(value, list) else [value]
    if not numbers or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers):
        raise ValueError(f'{where}: entry "{key}" must be a float or a non-empty list of floats; remake the file.')
    values = [float(number) for number in numbers]
    for number in values:
        if not math.isfinite(number) or number < 0:
            raise ValueError(f'{where}: entry "{key}" holds {number}; scores are finite and not negative, remake it.')
    return values


def _read_provenance(path: Path, content_hash: str) -> dict[str, Any]:
    beside = provenance_path(path)
    try:
        facts = read_json(beside, "Provenance", "delete it")
        if isinstance(facts, dict) and facts.get("content_hash") == content_hash:
            return facts
        problem = f"Provenance {beside} has not the content hash of the scores in {path}; delete it."
    except FileNotFoundError:
        return {}
    except ValueError as error:
        problem = str(error)
    from loguru import logger

    logger.warning(f"Ignored: {problem}")
    return {}
