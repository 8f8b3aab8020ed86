"""`quantization=...`: weights quantised while they are read, by transformers' integrations of other packages.

Checkpoints that are quantised already (compressed-tensors, AWQ, GPTQ, ...) need no argument: their config says how.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers import AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsemm_lmms.model_wrappers.arguments import QUANTIZATIONS

PACKED = (32, 64)
"""Rows and columns that bitsandbytes packs together in 4 bits where a CPU has AVX512-BF16."""


def quantization_of(config: Any) -> str | None:
    """How the weights of a checkpoint are quantised already, as its configuration says; None if they are not."""
    stored = getattr(config, "quantization_config", None)
    stored = stored or getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if stored is None:
        return None
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    return str(stored.get("quant_method") or "bitsandbytes")


def quantization_config(
    word: str | None, config: Any, architecture: type, pretrained: str, device: torch.device, dtype: torch.dtype
) -> QuantizationConfigMixin | None:
    """What `from_pretrained` needs to quantise the weights; None to leave them as they are.

    Args:
        word: one of `QUANTIZATIONS`, or None.
        config: the checkpoint's configuration, which may say that it is quantised already.
        architecture: the model's class.
        pretrained: what sentences call the checkpoint.
        device: where the model will run.
        dtype: of the arithmetic.

    Raises:
        ValueError: one sentence, where the weights are quantised already, a package is missing or the device cannot.
    """
    stored = quantization_of(config)
    if stored is not None:
        if word is not None:
            raise ValueError(
                f"quantization={word} cannot be had of pretrained={pretrained}, whose weights are quantised already "
                f"({stored}); leave quantization out."
            )
        _check_stored(config, stored, pretrained)
        return None
    if word is None:
        return None
    package = QUANTIZATIONS[word]
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"quantization={word} needs the {package} package; `pip install {package}`, or leave quantization out."
        )
    if package == "torchao":
        return TorchAoConfig(_torchao(word))
    _check_bitsandbytes(word, config, architecture, device)
    if word == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _torchao(word: str) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    kind = Int8WeightOnlyConfig if word == "torchao-int8wo" else Float8WeightOnlyConfig
    return kind(set_inductor_config=False)  # settings of the whole process


def _check_bitsandbytes(word: str, config: Any, architecture: type, device: torch.device) -> None:
    import bitsandbytes
    from bitsandbytes.functional import has_avx512bf16

    if device.type not in bitsandbytes.supported_torch_devices:
        known = ", ".join(sorted(bitsandbytes.supported_torch_devices))
        raise ValueError(
            f"quantization={word} cannot run on {device}: bitsandbytes {bitsandbytes.__version__} runs on {known}; "
            "use quantization=torchao-int8wo, or one of these devices."
        )
    if word == "bnb-4bit" and device.type == "cpu" and has_avx512bf16():
        with torch.device("meta"):
            model: Any = architecture(config)
        kept = model.get_output_embeddings()
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear) or module is kept:
                continue
            rows, columns = module.weight.shape
            if rows % PACKED[0] or columns % PACKED[1]:
                raise ValueError(
                    f"quantization={word} cannot run this model on this CPU, where bitsandbytes packs {PACKED[0]} rows "
                    f"by {PACKED[1]} columns and {name} has {rows} by {columns}; use quantization=bnb-8bit or "
                    "torchao-int8wo, or a GPU."
                )


def _check_stored(config: Any, method: str, pretrained: str) -> None:
    """Refuse a quantised checkpoint that this machine cannot read, in the words of transformers' integration."""
    stored = getattr(config, "quantization_config", None) or config.get_text_config(decoder=True).quantization_config
    try:
        AutoHfQuantizer.from_config(stored, pre_quantized=True).validate_environment(device_map=None)
    except (ImportError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"pretrained={pretrained} holds weights quantised with {method}, which cannot be read here: {reason}."
        ) from error
