"""``head_scores=...`` -> a table, so that a model with nothing but ``budget=64`` simply works.

    auto         ``head_scores.json`` inside the model's folder (the demo models have one); else the user cache; else
                 chase on generated pages once, with a progress bar, and keep the result in the user cache
    PATH         a score file, see ``sparsemm_lmms.head_scores``
    uniform      every head the same
    random       one seeded table over the whole model
    layer_mean   each head gets its layer's mean of auto (or of ``layer_mean:PATH``)
    permuted     auto's scores (or ``permuted:PATH``'s) dealt to other heads, seeded

A file whose provenance names another model is refused; one without provenance is taken.

The cache follows huggingface_hub (``HF_ASSETS_CACHE/sparsemm_lmms/head_scores/...``) and is keyed by model id, revision
(its commit where known; for a folder: ``folder_version``) and shape. Several processes: one computes under a file
lock, the others wait for its file.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loguru import logger

from sparsemm_lmms.head_scores import HeadScores
from sparsemm_lmms.visual_heads.chase import ChaseSettings, score_heads, text_shape
from sparsemm_lmms.visual_heads.checkpoints import PACKAGED, checkpoint_version, full_name
from sparsemm_lmms.visual_heads.identity import UNCHANGED, Changes
from sparsemm_lmms.visual_heads.render import GeneratedPages

WORDS = ("auto", "uniform", "random", "layer_mean", "permuted")
TRANSFORMATIONS = ("layer_mean", "permuted")
# Teacher forcing: one forward a page. A mixture, each answer with the same weight, because users ask short questions as
# well, and summed scores would be those of the transcriptions, which are about ten times as long.
AUTO_PAGES = 128
AUTO_SETTINGS = ChaseSettings(mode="teacher", per_token=True)


def resolve_head_scores(
    spec: str,
    config: Any,
    pretrained: str,
    revision: str | None = "main",
    *,
    seed: int = 0,
    model: Any = None,
    processor: Any = None,
    cache_dir: str | os.PathLike[str] | None = None,
    device: str | None = None,
    pages: int = AUTO_PAGES,
    progress: bool = True,
    foreign: bool = False,
    changes: Changes = UNCHANGED,
) -> HeadScores:
    """Head scores for a model, checked against its shape and, where they tell, against the model they were found on.

    spec: see the module docstring. config: the model's config, or the content of its config.json. pretrained, revision:
    what ``from_pretrained`` gets. model, processor: used for chase if given, else loaded for it (on ``device``, default
    CUDA before CPU) and dropped. cache_dir: in place of the user cache. foreign: take a file that was made for another
    model. changes: what was done to the weights of ``model``, which an adapter makes another model. Raises
    ValueError or FileNotFoundError, one sentence each.
    """
    config = _as_config(config)
    layers, heads, _ = text_shape(config)
    word, _, rest = str(spec).partition(":")
    if word == "uniform" and not rest:
        return HeadScores.uniform(layers, heads)
    if word == "random" and not rest:
        return HeadScores.random(layers, heads, seed)
    if word in TRANSFORMATIONS:
        inner = rest.partition(":")[0]
        if inner in TRANSFORMATIONS:
            raise ValueError(
                f"head_scores={word}:{inner}... transforms the scores twice; give {word}:PATH or {word} alone."
            )
        base = resolve_head_scores(
            rest or "auto", config, pretrained, revision, seed=seed, model=model, processor=processor,
            cache_dir=cache_dir, device=device, pages=pages, progress=progress, foreign=foreign, changes=changes,
        )  # fmt: skip
        return base.layer_mean() if word == "layer_mean" else base.permuted(seed)
    if spec != "auto":
        if not os.path.exists(spec):
            raise FileNotFoundError(
                f"head_scores={spec!r} is neither a file nor one of {', '.join(WORDS)}; make a file with "
                "`sparsemm-lmms chase`."
            )
        scores = _checked(HeadScores.load(spec), config, pretrained)
        _check_origin(scores, spec, config, pretrained, revision, foreign, changes)
        if foreign:  # `compress` looks at the kind of model again
            scores = replace(scores, provenance={**scores.provenance, "model_type": None})
        return scores
    packaged = os.path.join(pretrained, PACKAGED)
    if os.path.isfile(packaged) and changes.adapter is None:
        return _checked(HeadScores.load(packaged), config, pretrained)
    try:
        cached = cache_file(config, pretrained, revision, cache_dir, changes)

        def make() -> None:
            _make(cached, pretrained, revision, model, processor, device, pages, progress, changes)

        _make_once(cached, pretrained, make)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise ValueError(
            f"head_scores=auto cannot keep what it finds ({error}); set HF_ASSETS_CACHE to a folder that can be "
            "written, or give head_scores=PATH."
        ) from error
    try:
        scores = HeadScores.load(cached)
    except ValueError as error:
        raise ValueError(f"{error} It was kept by head_scores=auto: delete it, and it is made again.") from None
    return _checked(scores, config, pretrained)


def cache_file(
    config: Any,
    pretrained: str,
    revision: str | None = "main",
    cache_dir: str | os.PathLike[str] | None = None,
    changes: Changes = UNCHANGED,
) -> Path:
    """Where ``auto`` keeps the scores of this model, revision, changes of its weights, and shape."""
    from huggingface_hub import cached_assets_path

    config = _as_config(config)
    layers, heads, _ = text_shape(config)
    name, version = pretrained, changes.version(checkpoint_version(pretrained, revision, config))
    if os.path.isdir(pretrained):
        name = str(Path(pretrained).resolve())
    readable = "".join(c if c.isalnum() or c in "._-" else "-" for c in f"{Path(name).name}-{version}")[:80]
    digest = hashlib.sha256(f"{name}\n{version}".encode()).hexdigest()[:12]
    root = cached_assets_path(
        library_name="sparsemm_lmms",
        namespace="head_scores",
        subfolder=f"{readable}-{digest}",
        assets_dir=None if cache_dir is None else Path(cache_dir),
    )
    return root / f"{layers}x{heads}.json"


def _as_config(config: Any) -> Any:
    """A config object: the defaults that a config.json leaves out decide the shape as well."""
    if not isinstance(config, Mapping):
        return config
    from transformers import AutoConfig

    facts = dict(config)
    commit = facts.pop("_commit_hash", None)
    built = AutoConfig.for_model(facts.pop("model_type"), **facts)
    built._commit_hash = commit
    return built


def _check_origin(
    scores: HeadScores,
    spec: str,
    config: Any,
    pretrained: str,
    revision: str | None,
    foreign: bool,
    changes: Changes,
) -> None:
    """Refuse scores whose provenance names another model; warn where the same one has changed since."""
    model, kind, there = (scores.provenance.get(name) for name in ("model", "model_type", "checkpoint"))
    if model in (getattr(config, "architectures", None) or ()):
        model = None  # a model without a name was called by its class
    if model is None and kind is None:
        return
    here = checkpoint_version(pretrained, revision, config)
    adapter = scores.provenance.get("adapter")
    same_kind = kind in (None, config.model_type)
    same_name = model is None or full_name(str(model)) == full_name(pretrained)
    if there is not None:
        same_name &= scores.provenance.get("revision") in (None, revision)
    same_adapter = adapter == changes.adapter
    if same_kind and same_adapter and (there == here or (same_name and there is None)):
        return
    found = f"{model or 'another model'}{'' if kind is None else f' ({kind})'}{_with(adapter)}"
    told = (
        f"head_scores={spec} were found on {found}, and the model is {pretrained} ({config.model_type})"
        f"{_with(changes.adapter)}"
    )
    if same_kind and same_name and same_adapter:
        logger.warning(
            f"{told} whose files have changed since (checkpoint {there} there, {here} now): make the scores anew with "
            "`sparsemm-lmms chase --overwrite` if its weights are others."
        )
    elif foreign:
        logger.warning(f"{told}; they are used all the same, as foreign_head_scores asks.")
    else:
        raise ValueError(
            f"{told}: make scores for this model with `sparsemm-lmms chase`, or set foreign_head_scores=true to use "
            "these all the same."
        )


def _with(adapter: str | None) -> str:
    return "" if adapter is None else f" with the adapter {adapter[:12]}"


def _checked(scores: HeadScores, config: Any, pretrained: str) -> HeadScores:
    layers, heads, _ = text_shape(config)
    scores.check_shape(layers, heads, pretrained)
    return scores


def _make_once(cached: Path, pretrained: str, make: Callable[[], None]) -> None:
    """Call ``make`` unless the file is there; of several processes one makes it while the others wait."""
    from filelock import FileLock, Timeout

    if cached.is_file():  # it appeared by an atomic rename, so no lock to read
        return
    lock = FileLock(cached.with_name(cached.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info(f"Another process makes the head scores of {pretrained}; waiting for {cached}.")
        lock.acquire()
    try:
        if not cached.is_file():
            make()
    finally:
        lock.release()


def _make(
    cached: Path,
    pretrained: str,
    revision: str | None,
    model: Any,
    processor: Any,
    device: str | None,
    pages: int,
    progress: bool,
    changes: Changes,
) -> None:
    logger.info(
        f"No head scores for {pretrained} yet: finding its visual heads on {pages} generated pages, one forward pass "
        f"each, as long as prefilling {pages} prompts (the bar tells). They are kept in {cached}; "
        "head_scores=PATH uses a file of yours instead."
    )
    if model is None or processor is None:
        model, processor = load_model(pretrained, revision, device)
    score_heads(
        model, processor, GeneratedPages(pages, seed=0, readings="mixture"), cached, AUTO_SETTINGS,
        model_id=pretrained, revision=revision, progress=progress, overwrite=True, changes=changes,
    )  # fmt: skip


def load_config(pretrained: str, revision: str | None = None) -> Any:
    """The config of a checkpoint."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(pretrained, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise _not_loaded(pretrained, error) from error


def load_model(pretrained: str, revision: str | None = None, device: str | None = None) -> tuple[Any, Any]:
    """(model in evaluation mode on the device, processor); sdpa attention where it can, the checkpoint's own dtype."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    place = torch.device(device) if device else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        processor = AutoProcessor.from_pretrained(pretrained, revision=revision or "main")
        model: Any = AutoModelForImageTextToText.from_pretrained(pretrained, revision=revision or "main", dtype="auto")
    except (OSError, ValueError) as error:
        raise _not_loaded(pretrained, error) from error
    return model.to(place).eval(), processor


def _not_loaded(pretrained: str, error: Exception) -> ValueError:
    reason = str(error).strip().split("\n")[0]
    return ValueError(f"{pretrained} could not be loaded to find its visual heads: {reason}")
