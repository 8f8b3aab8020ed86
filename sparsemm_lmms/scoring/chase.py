"""Chase: which heads look at the word that is being written? (SparseMM, https://arxiv.org/abs/2506.05344, §3)

For every sample the model reads (``free``: greedy decoding as published; ``teacher``: one forward over the known text);
at each token that belongs to exactly one word box, each query head whose attention row has its largest weight on one of
the word's n image tokens earns 1/n. A sample's score is the sum over its tokens, a head's score the mean over samples,
its standard error the samples' standard deviation / sqrt(count).

Deviations from the research code: exact token boxes (``token_grid``), stripped token text (``matching``), batches; the
rows, views and prompt are theirs by default.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from loguru import logger
from tqdm import tqdm

from sparsemm_lmms._version import __version__
from sparsemm_lmms.head_scores import HeadScores
from sparsemm_lmms.scoring.inputs import make_batch
from sparsemm_lmms.scoring.matching import TokenText, TokenTexts
from sparsemm_lmms.scoring.partial import PartialResults
from sparsemm_lmms.scoring.passes import Tally, free_running, pad_token, teacher_forced
from sparsemm_lmms.scoring.samples import CalibrationSample, SkipLog, Skipped, checked
from sparsemm_lmms.scoring.statistics import per_image_facts
from sparsemm_lmms.scoring.token_grid import Views, grid_for

Mode = Literal["free", "teacher"]
Source = Iterable[CalibrationSample | Skipped]


@dataclass(frozen=True)
class ChaseSettings:
    """How to chase; everything here is recorded in the provenance and compared when a run is resumed.

    mode: "free" (greedy decoding, the paper's) or "teacher" (one forward on the known text).
    views: LLaVA-NeXT only, image tokens that count: "high" (the paper's) or "all" (the base view as well).
    token_text: see ``matching``. max_new_tokens: the paper's 1024, free running only.
    per_token: divide each sample's score by its counted tokens, so that a mixture's short answers weigh as much as
    whole transcriptions (published rule: False, a sum).
    """

    mode: Mode = "free"
    views: Views = "high"
    token_text: TokenText = "stripped"
    batch_size: int = 1
    max_new_tokens: int = 1024
    per_token: bool = False

    def __post_init__(self) -> None:
        for name, known in (("mode", ("free", "teacher")), ("views", ("high", "all"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def text_shape(config: Any) -> tuple[int, int, int]:
    """(layers, query heads, kv heads) of a model's text part."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return text.num_hidden_layers, heads, getattr(text, "num_key_value_heads", None) or heads


def score_heads(
    model: Any,
    processor: Any,
    samples: Source,
    output: str | os.PathLike[str],
    settings: ChaseSettings | None = None,
    *,
    limit: int | None = None,
    model_id: str | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> HeadScores:
    """Score every head of ``model`` on ``samples`` and write ``output`` (with provenance beside it).

    ``samples``: any iterable; if it has ``describe()``, that names the data in the provenance. ``limit``: stop after so
    many inputs, skipped ones included. Killed runs continue from ``output``'s partial file.

    >>> # score_heads(model, processor, GeneratedPages(200), "scores.json", ChaseSettings(mode="teacher", batch_size=4))
    """
    settings = settings or ChaseSettings()
    output = Path(output)
    layers, heads, kv_heads = text_shape(model.config)
    facts: dict[str, Any] = {
        "kind": "chase",
        "model": model_id or getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "revision": revision,
        "model_type": model.config.model_type,
        "layers": layers,
        "q_heads": heads,
        "kv_heads": kv_heads,
        "dtype": str(model.dtype).removeprefix("torch."),
        "data": samples.describe() if hasattr(samples, "describe") else {"source": type(samples).__name__},
        "query_row": "predicting",
        **asdict(settings),
        "sparsemm_lmms": __version__,
    }
    reader = _Reader(model, processor, settings)
    was_training = model.training
    model.eval()
    try:
        with PartialResults(output, facts, settings.batch_size) as partial:
            if partial.records:
                logger.info(f"Continuing {output}: {len(partial.records)} inputs are done.")
            total = _length(samples, limit)
            with tqdm(total=total, initial=len(partial.records), desc="chase", disable=not progress) as bar:
                for batch in _batches(itertools.islice(samples, limit), settings.batch_size, len(partial.records)):
                    partial.append(reader.read(batch, first=len(partial.records)))
                    bar.update(len(batch))
            try:
                scores = reduce_records(partial.records[:limit], facts)
            except ValueError:
                partial.remove()  # of no use: going on with it after the images were mended would fail again
                raise
            scores.save(output)
            partial.remove()
    finally:
        model.train(was_training)
    return scores


def reduce_records(records: list[dict[str, Any]], facts: dict[str, Any]) -> HeadScores:
    """Means and standard errors over the samples that were read, with the counts a reader needs to judge them."""
    skipped = SkipLog([Skipped(record["name"], record["skipped"]) for record in records if "skipped" in record])
    read = [record for record in records if "score" in record]
    if not read:
        reasons = "; ".join(skipped.summary()["first"][:3])  # type: ignore[index]
        raise ValueError(f"No usable calibration images among {len(records)}{': ' + reasons if reasons else ''}.")
    counted = sum(record["counted"] for record in read)
    if not counted:
        raise ValueError(
            f"Not one of {sum(r['tokens'] for r in read)} written tokens occurs in exactly one word box; "
            "the model does not read these images, or token_text does not fit its tokenizer."
        )
    table = np.array([record["score"] for record in read])
    if facts["per_token"]:
        table /= np.maximum([record["counted"] for record in read], 1)[:, None, None]
    stderr = table.std(axis=0, ddof=1) / np.sqrt(len(read)) if len(read) > 1 else None
    mass = np.sum([record["mass"] for record in read], axis=0) / counted
    counts = {
        "images": len(read),
        "tokens": sum(record["tokens"] for record in read),
        "tokens_counted": counted,
        "images_without_counted_tokens": sum(not record["counted"] for record in read),
        "skipped": skipped.summary(),
        **per_image_facts(table),
        "attention_mass": np.round(mass, 9).tolist(),
    }
    return HeadScores(table.mean(axis=0), stderr, {**facts, **counts})


class _Reader:
    """Turns a batch of samples into one record each."""

    def __init__(self, model: Any, processor: Any, settings: ChaseSettings) -> None:
        self.model, self.processor, self.settings = model, processor, settings
        self.family = grid_for(model.config)
        self.texts = TokenTexts(processor.tokenizer, settings.token_text)
        self.pad = pad_token(processor.tokenizer)
        self.shape = text_shape(model.config)[:2]

    def read(self, batch: list[CalibrationSample | Skipped], first: int) -> list[dict[str, Any]]:
        good = [sample for sample in batch if isinstance(sample, CalibrationSample)]
        tally = self._tally(good) if good else None
        records: list[dict[str, Any]] = []
        row = 0
        for index, sample in enumerate(batch, start=first):
            if isinstance(sample, Skipped):
                logger.warning(f"Skipping {sample.name}: {sample.reason}")
                records.append({"index": index, "name": sample.name, "skipped": sample.reason})
                continue
            assert tally is not None
            records.append(
                {
                    "index": index,
                    "name": sample.name,
                    "tokens": tally.tokens[row],
                    "counted": tally.counted[row],
                    "score": tally.score[row].tolist(),
                    "mass": tally.mass[row].tolist(),
                }
            )
            row += 1
        return records

    def _tally(self, samples: list[CalibrationSample]) -> Tally:
        batch = make_batch(samples, self.processor, self.family, self.settings.views, self.model)
        if self.settings.mode == "teacher":
            return teacher_forced(self.model, batch, self.texts, self.pad, self.shape)
        return free_running(self.model, batch, self.texts, self.pad, self.shape, self.settings.max_new_tokens)


def _batches(
    samples: Iterable[CalibrationSample | Skipped], size: int, done: int
) -> Iterator[list[CalibrationSample | Skipped]]:
    """Groups of ``size``, always cut at the same places; the first ``done`` samples are passed over."""
    iterator = itertools.islice(samples, done, None)
    while batch := list(itertools.islice(iterator, size)):
        yield [checked(sample) if isinstance(sample, CalibrationSample) else sample for sample in batch]


def _length(samples: Source, limit: int | None) -> int | None:
    length = len(samples) if hasattr(samples, "__len__") else None  # type: ignore[arg-type]
    return limit if length is None else length if limit is None else min(length, limit)
