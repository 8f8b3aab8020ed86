"""What a run says about itself: settings, versions, machine, and a name that no differing run shares."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from ..kernels.backend import resolve_backend
from ..source_commit import source_commit
from .compressed import CompressedModel
from .loading import checkpoint_version

PACKAGES = ("sparsemm-lmms", "torch", "triton", "transformers", "lmms-eval")
WITHOUT_EFFECT = frozenset(
    "config output_path hf_hub_log_args wandb_args wandb_log_samples swanlab_args swanlab_log_samples verbosity "
    "log_samples log_samples_suffix use_cache cache_requests show_config process_docs_parallel timezone "
    "check_integrity write_out tui include_path launcher_args model model_args batch_size max_batch_size device "
    "power_analysis effect_size alpha power correlation std_a std_b".split()
)
"""Arguments of lmms-eval that do not change answers or scores, or that the model's settings hold resolved."""


def environment(model: CompressedModel) -> dict[str, Any]:
    """Versions, commit, machine, and what was left open: backend, checkpoint, image size limits (of Qwen2-VL: pixels).

    Call it while the model is loaded.
    """
    weights = next(model.model.parameters())
    cuda = weights.device.type == "cuda"
    images = getattr(model._ready().processor, "image_processor", None)
    return {
        "versions": {**versions(), "python": platform.python_version()},
        "git_commit": source_commit(),
        "gpu": torch.cuda.get_device_name(weights.device) if cuda else None,
        "kernel_backend": resolve_backend(model.compression.kernel_backend, weights),
        "checkpoint": checkpoint_version(model.family, model.options, model.model.config),
        "image_size": None if images is None else {k: v for k, v in dict(images.size).items() if v is not None},
    }


def versions() -> dict[str, str | None]:
    """Installed versions; None for what is missing (triton outside Linux)."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def settings_of_evaluation(arguments: dict[str, Any], tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What decides the scores besides the model: lmms-eval's arguments and each task's resolved settings."""
    used = {name: value for name, value in arguments.items() if name not in WITHOUT_EFFECT}
    keys = ("dataset_path", "dataset_name", "test_split", "generation_kwargs", "num_fewshot", "repeats")
    return {**used, "tasks": {name: {key: config.get(key) for key in keys} for name, config in sorted(tasks.items())}}


def fingerprint(*parts: Any) -> str:
    """SHA-256 over JSON values; equal exactly when all parts are equal."""
    text = json.dumps(parts, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def run_name(model: CompressedModel, digest: str) -> str:
    """Folder name of a run: what a reader looks for first, and the digest that tells the rest apart.

    For example `llava-v1.6-vicuna-7b-hf__llava_next_sparsemm__budget256__1f0c2a9b7d`.
    """
    settings = model.settings()
    budget = f"__budget{settings['budget']}" if "budget" in settings else ""
    checkpoint = "".join(c if c.isalnum() or c in "._-" else "_" for c in Path(model.options.pretrained).name)
    return f"{checkpoint}__{settings['model']}{budget}__{digest[:10]}"


def command_line() -> list[str]:
    """The command as it was typed."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
