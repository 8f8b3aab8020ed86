"""A named model without its host: arguments checked, weights and head scores loaded, settings told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, PreTrainedModel

from sparsemm_lmms.config import CompressionConfig
from sparsemm_lmms.families import ANY, FAMILIES, Family
from sparsemm_lmms.head_scores import HeadScores
from sparsemm_lmms.methods import find_method
from sparsemm_lmms.model_wrappers.adapters import adapter_sha256
from sparsemm_lmms.model_wrappers.arguments import (
    RunOptions,
    known_run_options,
    known_settings,
    split_arguments,
    unused_settings,
)
from sparsemm_lmms.model_wrappers.loading import (
    Checkpoint,
    check_possible,
    checkpoint_path,
    find_family,
    load_checkpoint,
    read_config,
)
from sparsemm_lmms.presets import FREE, FREE_PARTS
from sparsemm_lmms.session import check_vision
from sparsemm_lmms.visual_heads import resolve_head_scores
from sparsemm_lmms.visual_heads.checkpoints import PACKAGED
from sparsemm_lmms.visual_heads.identity import UNCHANGED, Changes

FROM_THE_MODEL = ("auto", "layer_mean", "permuted")  # head scores that may have to be found with the loaded model


class CompressedModel:
    """What the wrappers of all hosts share. `configure` checks all arguments before `load` reads any weight.

    Attributes:
        family: of the checkpoint; where `any_checkpoint`, `configure` finds it.
        changes: what is done to the checkpoint's weights.
    """

    family: Family
    any_checkpoint: bool = False
    method: str
    options: RunOptions
    compression: CompressionConfig
    checkpoint: Checkpoint | None = None
    head_scores: HeadScores | None = None
    changes: Changes = UNCHANGED
    _device: torch.device

    def configure(self, given: dict[str, Any]) -> None:
        """Split and check the arguments; see `RunOptions` and `CompressionConfig` for what they mean."""
        if self.any_checkpoint:
            self.family = find_family(self.registered_name, given)
        self.options, self.compression = split_arguments(
            self.family, self.method, given, name_of_model=self.registered_name
        )

    def load(self, device: torch.device, progress: bool = True, checkpoint: Checkpoint | None = None) -> Checkpoint:
        """Read config, weights and head scores; `progress` shows a bar where scores must be found first.

        Args:
            checkpoint: weights and processor loaded before, under options that differ at most in those of the method.
        """
        self._device = device
        check_possible(self.options, self.compression, device)
        config = read_config(self.family, self.options, self.method)
        adapter = None if self.options.peft is None else adapter_sha256(self.options.peft)
        self.changes = Changes(self.options.quantization, adapter)
        needs_model = self.options.head_scores.partition(":")[0] in FROM_THE_MODEL
        check_head_scores(self.family, self.options, self.compression)
        scores = None if needs_model else self._read_head_scores(config, progress)
        self.checkpoint = checkpoint or load_checkpoint(self.family, self.options, device)
        check_vision(self.compression.method, self.checkpoint.model)
        self.head_scores = self._read_head_scores(config, progress) if needs_model else scores
        return self.checkpoint

    @property
    def registered_name(self) -> str:
        """`<family>_<method>`, or `vlm_<method>`."""
        return f"{ANY if self.any_checkpoint else self.family.model_type}_{self.method}"

    @property
    def model(self) -> PreTrainedModel:
        return self._ready().model

    @property
    def tokenizer(self) -> Any:
        return self._ready().processor.tokenizer

    @property
    def device(self) -> torch.device:
        return self._device

    def settings(self) -> dict[str, Any]:
        """Everything that decides the answers, resolved: arguments, defaults and the identity of the head scores."""
        method = self.compression.method
        unused = set(unused_settings(method))
        known = known_run_options(self.family, method) - unused - {"head_scores", "foreign_head_scores"}
        run = {name: value for name, value in vars(self.options).items() if name in known}
        if run["quantization"] is None:
            del run["quantization"]
        if run.pop("peft") is not None:
            run["peft"] = {"source": self.options.peft, "sha256": self.changes.adapter}
        run |= {"device": str(self.device), "dtype": str(self.model.dtype).removeprefix("torch.")}
        free = dict(zip(FREE_PARTS, method.split("+"), strict=True)) if self.method == FREE else {}
        scores = None
        if self.head_scores is not None:
            scores = {"source": self.options.head_scores, "sha256": self.head_scores.content_hash}
        used = known_settings(method) - unused
        compression = {name: value for name, value in self.compression.to_dict().items() if name in used}
        found = {}
        if self.any_checkpoint:
            kind = self.family.model_type
            found = {"family": kind if kind in FAMILIES else "generic", "model_type": self.model.config.model_type}
        return {"model": self.registered_name, **found, **run, **compression, "head_scores": scores, **free}

    def _read_head_scores(self, config: dict[str, Any], progress: bool) -> HeadScores | None:
        """The scores of this model, or None for a method without. Finding them (`auto`) needs the loaded model."""
        if not find_method(self.compression.method).needs_head_scores:
            return None
        path, revision = checkpoint_path(self.family, self.options), self.options.revision
        loaded: dict[str, Any] = {}
        if self.checkpoint is not None:  # a processor of its own: pixel limits of this run must not shape kept scores
            loaded = {
                "model": self.checkpoint.model,
                "processor": AutoProcessor.from_pretrained(path, revision=revision),
            }
        return resolve_head_scores(
            self.options.head_scores,
            config,
            path,
            revision,
            seed=self.compression.seed,
            foreign=self.options.foreign_head_scores,
            progress=progress,
            changes=self.changes,
            **loaded,
        )

    def _ready(self) -> Checkpoint:
        if self.checkpoint is None:
            raise RuntimeError("This model was cleaned away after its evaluation; create a new one.")
        return self.checkpoint


def check_head_scores(family: Family, options: RunOptions, compression: CompressionConfig) -> None:
    """Refuse to find head scores in images whose tokens cannot be placed; those of a file can be used.

    Raises:
        ValueError: one sentence.
    """
    word, _, file = options.head_scores.partition(":")
    if not find_method(compression.method).needs_head_scores or word not in FROM_THE_MODEL or file:
        return
    packaged = Path(checkpoint_path(family, options), PACKAGED).is_file() and options.peft is None
    if family.grid is None and not packaged:
        raise ValueError(
            f"head_scores={word} cannot find the visual heads of pretrained={options.pretrained}: no token grid is "
            f"known for {family.model_type!r} models; give head_scores=PATH, or a method without head scores, for "
            "example snapkv."
        )
