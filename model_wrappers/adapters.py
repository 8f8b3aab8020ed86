"""`peft=...`: a LoRA adapter on a checkpoint, put in place by the peft package."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import PreTrainedModel

from sparsemm_lmms.visual_heads.identity import files_sha256

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.*"


def adapter_folder(path: str) -> Path:
    """The folder of an adapter, which may be a repository of Hugging Face.

    Raises:
        ValueError: one sentence, for a missing package, and a place that holds no adapter.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"peft={path} needs the peft package; `pip install peft`, or leave peft out.")
    folder = Path(path)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(path, allow_patterns=[CONFIG, WEIGHTS]))
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise ValueError(
                f"peft={path} is no local folder and could not be loaded from Hugging Face "
                f"({textwrap.shorten(reason, 200, placeholder=' ...')}); give the folder of a LoRA adapter."
            ) from error
    for pattern in (CONFIG, WEIGHTS):
        if not list(folder.glob(pattern)):
            raise ValueError(
                f"peft={path} holds no {pattern}; give the folder that peft's save_pretrained has written."
            )
    return folder


def adapter_sha256(path: str) -> str:
    """SHA-256 of an adapter: of its configuration and its weights, wherever they lie."""
    folder = adapter_folder(path)
    return files_sha256(folder, [folder / CONFIG, *folder.glob(WEIGHTS)])


def check_adapter(path: str, config: Any, architecture: type, pretrained: str) -> None:
    """Refuse an adapter that does not fit a model; the model's weights are not needed.

    Args:
        path: of the adapter.
        config: configuration of the model.
        architecture: its class.
        pretrained: what sentences call it.

    Raises:
        ValueError: one sentence.
    """
    from peft import PeftConfig, get_peft_model

    folder = adapter_folder(path)
    try:
        told = PeftConfig.from_pretrained(str(folder))
        if told.peft_type is None:
            raise ValueError("it names no peft_type")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"peft={path}: its {CONFIG} cannot be read ({_first_line(error)}).") from error
    if told.is_prompt_learning or told.is_adaption_prompt:
        raise ValueError(f"peft={path} is a {told.peft_type.value} adapter, which changes no weights; give a LoRA one.")
    misfit = f"peft={path} does not fit pretrained={pretrained}"
    mend = f"it was made for {told.base_model_name_or_path or 'another model'}"
    told.base_model_name_or_path = None  # else peft warns that the name of this one is another
    with torch.device("meta"):
        model: Any = architecture(config)
    try:
        adapted = get_peft_model(model, told)
        found = adapted.load_adapter(str(folder), "default", torch_device="cpu", low_cpu_mem_usage=True)
    except ValueError as error:
        modules = ", ".join(sorted(told.target_modules or ())) if not isinstance(told.target_modules, str) else ""
        reason = f"it adapts the modules {modules or told.target_modules}, of which {architecture.__name__} has none"
        raise ValueError(
            f"{misfit}: {reason if 'not found' in str(error) else _first_line(error)} ({mend})."
        ) from error
    except (RuntimeError, SafetensorError) as error:
        sizes = re.search(r"size mismatch for ([\w.]+):.*?(\[[\d, ]*\]).*?(\[[\d, ]*\])", str(error), re.DOTALL)
        reason = f"{sizes[1]} is {sizes[2]} in it and {sizes[3]} here" if sizes else _first_line(error)
        raise ValueError(f"{misfit}: {reason} ({mend}).") from error
    strange = [*found.unexpected_keys, *found.missing_keys]
    if strange:
        what = "has weights for" if found.unexpected_keys else "lacks weights for"
        raise ValueError(f"{misfit}: it {what} {len(strange)} modules, {strange[0]} the first ({mend}).")


def with_adapter(model: PreTrainedModel, path: str, quantised: bool) -> PreTrainedModel:
    """The adapted model; `check_adapter` has seen that it fits.

    The adapter is merged into the weights. Where these are `quantised`, merging would round them anew, so the adapter's
    layers stay beside them, as in its training.
    """
    from peft import PeftModel

    adapted: Any = PeftModel.from_pretrained(model, str(adapter_folder(path)), torch_device=str(model.device))
    return adapted.get_base_model() if quantised else adapted.merge_and_unload()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
