"""Chase: which heads look at the word that is being written? (SparseMM, https://arxiv.org/abs/2506.05344, §3)

For every sample the model reads (``free``: greedy decoding as published; ``teacher``: one forward over the known text);
at each token that belongs to exactly one word box, each query head whose attention row has its largest weight on one of
the word's n image tokens earns 1/n. A sample's score is the sum over its tokens, a head's score the mean over samples,
its standard error the samples' standard deviation / sqrt(count).

Deviations from the research code: exact token boxes (``token_grid``), stripped token text (``matching``), batches; the
rows, views and prompt are theirs by default.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from loguru import logger
from tqdm import tqdm
from transformers import DynamicCache

from sparsemm_lmms._version import __version__
from sparsemm_lmms.cache import is_full
from sparsemm_lmms.head_scores import HeadScores
from sparsemm_lmms.head_statistics import per_image_facts
from sparsemm_lmms.visual_heads.checkpoints import checkpoint_version
from sparsemm_lmms.visual_heads.identity import UNCHANGED, Changes, differing, sample_sha256
from sparsemm_lmms.visual_heads.inputs import make_batch
from sparsemm_lmms.visual_heads.matching import TokenText, TokenTexts
from sparsemm_lmms.visual_heads.partial import MEND, PartialResults
from sparsemm_lmms.visual_heads.passes import Tally, free_running, pad_token, teacher_forced
from sparsemm_lmms.visual_heads.retention import held_masses, retention_facts
from sparsemm_lmms.visual_heads.samples import CalibrationSample, SkipLog, Skipped, checked
from sparsemm_lmms.visual_heads.token_grid import Views, grid_for

Mode = Literal["free", "teacher"]
Source = Iterable[CalibrationSample | Skipped]


@dataclass(frozen=True)
class ChaseSettings:
    """How to chase; everything here is recorded in the provenance and compared when a run is resumed.

    mode: "free" (greedy decoding, the paper's) or "teacher" (one forward on the known text).
    views: image tokens that count where there is a base view: "high" (the paper's) or "all" (the base view as well).
    token_text: see ``matching``. max_new_tokens: the paper's 1024, free running only.
    per_token: divide each sample's score by its counted tokens, so that a mixture's short answers weigh as much as
    whole transcriptions (published rule: False, a sum).
    retention_images: for the first so many samples the retention curves are measured as well (see ``retention``).
    """

    mode: Mode = "free"
    views: Views = "high"
    token_text: TokenText = "stripped"
    batch_size: int = 1
    max_new_tokens: int = 1024
    per_token: bool = False
    retention_images: int = 64

    def __post_init__(self) -> None:
        for name, known in (("mode", ("free", "teacher")), ("views", ("high", "all"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.retention_images < 0:
            raise ValueError(f"retention_images must be at least 0, got {self.retention_images}.")


def text_shape(config: Any) -> tuple[int, int, int]:
    """(layers of full attention, query heads, kv heads) of a model's text part."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    layers = sum(is_full(layer) for layer in DynamicCache(config=config).layers)
    return layers, heads, getattr(text, "num_key_value_heads", None) or heads


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
    overwrite: bool = False,
    changes: Changes = UNCHANGED,
) -> HeadScores:
    """Score every head of ``model`` on ``samples`` and write ``output`` (with provenance beside it).

    ``samples``: any iterable; if it has ``describe()``, that names the data in the provenance. ``limit``: stop after so
    many inputs, skipped ones included. Killed runs continue from ``output``'s partial file; a finished ``output`` of
    the same model, data and settings is returned as it is. ``overwrite``: replace a file of others, which is a
    ValueError otherwise. A run that was killed may be ended with more or fewer inputs than it was to have. ``changes``:
    what was done to the weights of ``model``.

    >>> # score_heads(model, processor, GeneratedPages(200), "scores.json", ChaseSettings(mode="teacher", batch_size=4))
    """
    settings = settings or ChaseSettings()
    output = Path(output)
    layers, heads, kv_heads = text_shape(model.config)
    total = _length(samples, limit)
    facts: dict[str, Any] = {
        "kind": "chase",
        "model": model_id or getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "revision": revision,
        "model_type": model.config.model_type,
        "checkpoint": _checkpoint(model, model_id, revision),
        **asdict(changes),
        "processor": _processor(processor),
        "layers": layers,
        "q_heads": heads,
        "kv_heads": kv_heads,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "data": samples.describe() if hasattr(samples, "describe") else {"source": type(samples).__name__},
        "query_row": "predicting",
        **asdict(settings),
        "sparsemm_lmms": __version__,
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers", "pillow")},
    }
    if output.exists() and not overwrite:
        return _finished(output, {**facts, "inputs": total}, hasattr(samples, "describe"))
    reader = _Reader(model, processor, settings)
    was_training = model.training
    model.eval()
    try:
        with PartialResults(output, facts, settings.batch_size, total, overwrite) as partial:
            if partial.records:
                logger.info(f"Continuing {output}: {len(partial.records)} inputs are done.")
            with tqdm(total=total, initial=len(partial.records), desc="chase", disable=not progress) as bar:
                for batch in _batches(itertools.islice(samples, limit), settings.batch_size, partial):
                    partial.append(reader.read(batch, first=len(partial.records)))
                    bar.update(len(batch))
            try:
                scores = reduce_records(partial.records, {**facts, "inputs": total})
            except ValueError:
                partial.remove()  # of no use: going on with it after the images were mended would fail again
                raise
            scores.save(output)
            partial.remove()
    finally:
        model.train(was_training)
    return scores


def _checkpoint(model: Any, model_id: str | None, revision: str | None) -> str | None:
    """Which weights these are, as far as can be told of a loaded model."""

    name = getattr(model.config, "_name_or_path", "") or model_id
    return checkpoint_version(name, revision, model.config) if name else None


def _processor(processor: Any) -> str:
    """12 hex digits for how images are resized and prompts written."""
    told = json.dumps([processor.to_dict(), processor.chat_template], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def _finished(output: Path, facts: dict[str, Any], described: bool) -> HeadScores:
    """The scores that a run with the same facts has written before; ValueError for any other file."""
    mend = "give another name, or --overwrite (overwrite=True) to replace it"
    try:
        scores = HeadScores.load(output)
    except ValueError as error:
        raise ValueError(f"--output {output} is there already and no finished score file ({error}); {mend}.") from None
    if scores.provenance.get("kind") != "chase":
        raise ValueError(f"--output {output} is there already, with no record of how it was made; {mend}.")
    if changed := differing(scores.provenance, json.loads(json.dumps(facts))):
        raise ValueError(f"--output {output} holds the scores of another run ({', '.join(changed)}); {mend}.")
    if not described:
        raise ValueError(f"--output {output} is there already, and these samples do not say what they are; {mend}.")
    logger.info(f"{output} is finished already; nothing is left to do.")
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
        **retention_facts([record["held"] for record in read if "held" in record]),
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
        tally, held = self._watched(good, first) if good else (None, [])
        records: list[dict[str, Any]] = []
        row = 0
        for index, sample in enumerate(batch, start=first):
            told = {"index": index, "name": sample.name, "sample": sample_sha256(sample)}
            if isinstance(sample, Skipped):
                logger.warning(f"Skipping {sample.name}: {sample.reason}")
                records.append({**told, "skipped": sample.reason})
                continue
            assert tally is not None
            records.append(
                {
                    **told,
                    "tokens": tally.tokens[row],
                    "counted": tally.counted[row],
                    "score": tally.score[row].tolist(),
                    "mass": tally.mass[row].tolist(),
                }
            )
            if held and (curves := held[row]) is not None:
                records[-1]["held"] = np.round(curves, 6).tolist()
            row += 1
        return records

    def _watched(self, samples: list[CalibrationSample], first: int) -> tuple[Tally, list[np.ndarray | None]]:
        """What the heads look at and, of the first batches, what they would hold."""
        batch = make_batch(samples, self.processor, self.family, self.settings.views, self.model)
        if self.settings.mode == "teacher":
            tally = teacher_forced(self.model, batch, self.texts, self.pad, self.shape)
        else:
            tally = free_running(self.model, batch, self.texts, self.pad, self.shape, self.settings.max_new_tokens)
        measured = first < self.settings.retention_images
        return tally, held_masses(self.model, batch, self.texts.tokenizer, self.pad) if measured else []


def _batches(
    samples: Iterable[CalibrationSample | Skipped], size: int, partial: PartialResults
) -> Iterator[list[CalibrationSample | Skipped]]:
    """Groups of ``size``, always cut at the same places; samples that are done are passed over, if they are the same.

    Raises ValueError where they are not.
    """
    iterator = (checked(sample) if isinstance(sample, CalibrationSample) else sample for sample in samples)
    for record in list(partial.records):
        sample = next(iterator, None)
        if sample is None or sample_sha256(sample) != record["sample"]:
            found = "none" if sample is None else "another" if sample.name == record["name"] else repr(sample.name)
            raise ValueError(
                f"{partial.path} belongs to a run on other images (input {record['index']}: {record['name']!r} there, "
                f"{found} here); {MEND}."
            )
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _length(samples: Source, limit: int | None) -> int | None:
    length = len(samples) if hasattr(samples, "__len__") else None  # type: ignore[arg-type]
    return limit if length is None else length if limit is None else min(length, limit)
