"""What a run says about itself: settings, versions, machine, and a name that no differing run shares."""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from sparsemm_lmms.kernels.backend import resolve_backend
from sparsemm_lmms.model_wrappers.compressed import CompressedModel
from sparsemm_lmms.model_wrappers.loading import checkpoint_path
from sparsemm_lmms.source_commit import source_commit
from sparsemm_lmms.visual_heads.checkpoints import checkpoint_version
from sparsemm_lmms.visual_heads.identity import file_sha256, files_sha256, visible_files

PACKAGES = ("sparsemm-lmms", "torch", "triton", "transformers", "lmms-eval")
WITHOUT_EFFECT = frozenset(
    "config output_path hf_hub_log_args wandb_args wandb_log_samples swanlab_args swanlab_log_samples verbosity "
    "log_samples log_samples_suffix use_cache cache_requests show_config process_docs_parallel timezone "
    "check_integrity write_out tui include_path launcher_args model model_args batch_size max_batch_size device "
    "power_analysis effect_size alpha power correlation std_a std_b".split()
)
"""Arguments of lmms-eval that do not change answers or scores, or that the model's settings hold resolved."""

BUILDERS = frozenset(
    "csv json parquet text pandas arrow xml webdataset imagefolder audiofolder videofolder pdffolder".split()
)
"""Words in `dataset_path` that name a format of `datasets`, not a place."""


def environment(model: CompressedModel) -> dict[str, Any]:
    """Versions, commit, machine, and what was left open: backend, checkpoint, image size limits (of Qwen2-VL: pixels).

    Call it while the model is loaded.
    """
    weights = next(model.model.parameters())
    cuda = weights.device.type == "cuda"
    images = getattr(model._ready().processor, "image_processor", None)
    size = getattr(images, "size", None)
    return {
        "versions": {**versions(), "python": platform.python_version()},
        "git_commit": source_commit(),
        "gpu": torch.cuda.get_device_name(weights.device) if cuda else None,
        "kernel_backend": resolve_backend(model.compression.kernel_backend, weights),
        "checkpoint": checkpoint_version(
            checkpoint_path(model.family, model.options), model.options.revision, model.model.config
        ),
        "image_size": None if size is None else {k: v for k, v in dict(size).items() if v is not None},
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
    """What decides the scores besides the model: lmms-eval's arguments, the tasks with their data, and their code.

    Args:
        arguments: of lmms-eval.
        tasks: name -> the task's configuration, as `Task.dump_config` gives it, or its fields, functions included.

    Returns:
        JSON values in which no place or address in memory stands: files are told by name and SHA-256.
    """
    used = {name: value for name, value in arguments.items() if name not in WITHOUT_EFFECT}
    told = {name: _stable(_with_data(config)) for name, config in sorted(tasks.items())}
    given = arguments.get("include_path") or []
    folders = [Path(folder) for folder in ([given] if isinstance(given, (str, Path)) else given)]
    code = [_code_sha256(folder) for folder in folders if folder.is_dir()]
    return {**_stable(used), "tasks": told, "task_code": code or None}


def _with_data(config: dict[str, Any]) -> dict[str, Any]:
    """A task's configuration without what is not set, with digests in place of the local files that it names."""
    config = {name: value for name, value in config.items() if value is not None}
    path, kwargs = config.get("dataset_path"), config.get("dataset_kwargs")
    packaged = path in BUILDERS
    if isinstance(path, str) and not packaged and os.path.exists(path):
        config["dataset_path"] = _files(path)
    if isinstance(kwargs, dict):
        named = {name: _local(kwargs[name], packaged) for name in ("data_files", "data_dir") if name in kwargs}
        config["dataset_kwargs"] = {**kwargs, **named}
    return config


def _local(value: Any, packaged: bool) -> Any:
    """`data_files`, with digests for what lies on this machine; names in a repository of the hub stay as they are."""
    if isinstance(value, dict):
        return {name: _local(inner, packaged) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_local(inner, packaged) for inner in value]
    return _files(value) if isinstance(value, str) and (packaged or os.path.isabs(value)) else value


def _files(pattern: str) -> str | dict[str, str]:
    """Name and SHA-256 of a file, a folder, or the files of a pattern; the pattern if there are none."""
    path = Path(pattern)
    if path.is_file():
        return {"name": path.name, "sha256": file_sha256(path)}
    found = visible_files(path) if path.is_dir() else [Path(name) for name in glob.glob(pattern, recursive=True)]
    files = [file for file in found if file.is_file()]
    if not files:
        return pattern
    return {"name": path.name, "sha256": files_sha256(Path(os.path.commonpath([file.parent for file in files])), files)}


def _code_sha256(folder: Path) -> str:
    """SHA-256 over the task files in a folder: a configuration names functions, and those use others."""
    return files_sha256(folder, (file for file in visible_files(folder) if file.suffix in (".py", ".yaml", ".yml")))


def _stable(value: Any) -> Any:
    """JSON values that are equal in every process: functions by name and source, nothing by its address."""
    if isinstance(value, dict):
        return {str(name): _stable(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_stable(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, functools.partial):
        return {**_stable(value.func), "arguments": _stable([value.args, value.keywords])}
    if callable(value):
        known = value if hasattr(value, "__code__") or isinstance(value, type) else type(value)
        try:
            source = inspect.getsourcefile(known)
        except TypeError:  # built in
            source = None
        name = getattr(value, "__qualname__", known.__qualname__)
        return {"function": name, "sha256": file_sha256(Path(source)) if source else None}
    text = str(value)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text) if text.startswith(("<", "functools.partial(")) else text


def fingerprint(*parts: Any) -> str:
    """SHA-256 over JSON values; equal exactly when all parts are equal."""
    text = json.dumps(parts, sort_keys=True, default=_stable, separators=(",", ":"))
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
