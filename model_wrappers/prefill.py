"""Prompts that reach the cache in parts: which columns come when, where they stand, and what the images add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sparsemm_lmms.cache import CACHE_NAME, RaggedCache, is_full
from sparsemm_lmms.families import family_for
from sparsemm_lmms.session import vision_ids

KINDS = ("token_type_ids", "mm_token_type_ids")
"""Inputs with the kind of each token. Some models attend in both directions among tokens of one kind."""
TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids", *KINDS)


@dataclass(frozen=True)
class Parts:
    """A left-padded batch cut into consecutive parts, each left-padded by itself.

    Attributes:
        ids, mask: int64 `[batch, n]`; the padding of a later part lies between the parts.
        positions: `[..., batch, n]`, of the uncut prompt.
        ends: column behind each part; the last is n.
        vision: pixel values and sizes, which belong to the first part.
        kinds: int64 `[batch, n]` each, the `KINDS` that the processor gave; read in a part that begins the cache.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    ends: tuple[int, ...]
    vision: dict[str, Tensor]
    kinds: dict[str, Tensor] = field(default_factory=dict)

    def for_generate(self) -> dict[str, Tensor]:
        """Arguments of `model.generate`, which runs on from where the cache ends."""
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}


def cut(model: Any, inputs: Mapping[str, Tensor], ends: Sequence[Tensor]) -> Parts:
    """Cut a left-padded batch behind the columns `ends`, one `[batch]` a part; all behind the last is dropped.

    Raises:
        ValueError: see `check_causal` and `check_gaps`.
    """
    for end in ends[:-1]:
        check_causal(model, inputs, end)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = token_positions(model, inputs)
    begin, blocks, real, widths = (mask == 0).sum(1), [], [], []
    for end in ends:
        width = int((end - begin).max())
        columns = end[:, None] - width + torch.arange(width, device=ids.device)
        blocks.append(columns.clamp(min=0))
        real.append(columns >= begin[:, None])
        widths.append(width)
        begin = end
    columns, mask = torch.cat(blocks, 1), torch.cat(real, 1)
    check_gaps(model, mask)
    pad = model.generation_config.pad_token_id or 0
    positions = positions.gather(-1, columns.expand(*positions.shape[:-1], -1)).masked_fill(~mask, 0)
    return Parts(
        ids=ids.gather(1, columns).masked_fill(~mask, pad),
        mask=mask.long(),
        positions=positions,
        ends=tuple(int(end) for end in torch.tensor(widths).cumsum(0)),
        vision={name: value for name, value in inputs.items() if name not in TEXT_INPUTS},
        kinds={name: inputs[name].gather(1, columns).masked_fill(~mask, 0) for name in KINDS if name in inputs},
    )


def heeds_gaps(model: Any) -> bool:
    """Whether padding between the parts of a prompt changes it: a sliding window counts it, a state takes it up."""
    return not all(map(is_full, DynamicCache(config=model.config).layers))


def check_gaps(model: Any, mask: Tensor) -> None:
    """Refuse padding behind tokens in a mask `[batch, n]`, for models that heed it.

    Raises:
        ValueError: one sentence.
    """
    if heeds_gaps(model) and bool((mask[:, :-1].bool() & ~mask[:, 1:].bool()).any()):
        raise ValueError(
            f"{type(model).__name__} has layers whose windows or states would take up the padding between the parts of "
            "prompts of several lengths; give it one prompt at a time (batch_size=1)."
        )


def check_causal(model: Any, inputs: Mapping[str, Tensor], start: Tensor) -> None:
    """Refuse to run what begins at column `start`, int64 `[batch]`, after the rest, if anything attends ahead into it.

    The model's own masks tell: they let the tokens of an image see each other (Gemma 3), or those of the whole prompt
    (PaliGemma).

    Raises:
        ValueError: one sentence.
    """
    kinds = {name: inputs[name] for name in KINDS if name in inputs}
    make = getattr(type(model), "create_masks_for_generate", None)
    if make is None or not kinds:
        return
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    masks = make(
        config=model.config, inputs_embeds=torch.zeros(*ids.shape, 1, device=ids.device), attention_mask=real,
        position_ids=None, **{CACHE_NAME: None}, **kinds,
    )  # fmt: skip
    column = torch.arange(ids.shape[1], device=ids.device)
    ahead = (column > column[:, None]) & (column >= start[:, None, None]) & real[:, None] & real[:, :, None]
    for mask in masks.values() if isinstance(masks, dict) else [masks]:
        if mask is None or mask.ndim != 4:  # causal, or a kernel that knows nothing else
            continue
        seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
        if bool((seen & ahead).any()):
            raise ValueError(
                f"{type(model).__name__} lets all tokens of a prompt or of an image attend to each other, so they "
                "cannot be read one after the other: leave compress_before_question out, and use rounds=independent."
            )


@torch.no_grad()
def run(model: Any, cache: RaggedCache, parts: Parts, count: int) -> Tensor:
    """Run the first `count` parts, each in one pass, behind what `cache` holds.

    Returns:
        Logits `[batch, vocabulary]` behind the last.
    """
    begin, vision = cache.get_seq_length(), parts.vision
    for end in parts.ends[:count]:
        kinds = {name: kind[:, :end] for name, kind in parts.kinds.items()} if begin == 0 else {}
        out = model(
            input_ids=parts.ids[:, begin:end],
            attention_mask=parts.mask[:, :end],
            position_ids=parts.positions[..., begin:end],
            logits_to_keep=1,
            **{CACHE_NAME: cache},
            **vision,
            **kinds,
        )
        begin, vision = end, {}
    return out.logits[:, -1]


def token_positions(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Positions of all columns as `generate` counts them: `[batch, n]`, or `[4, batch, n]` under M-RoPE."""
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    return model._prepare_position_ids_for_generation(inputs["input_ids"], others)


def question_starts(model: Any, ids: Tensor) -> Tensor:
    """First column behind the last image or video token, int64 `[batch]`; the last column where there is none.

    A prompt without images has nothing before its question: all but its last token count as its first part.
    """
    end = getattr(model.config, "vision_end_token_id", None)
    tokens = [*placeholders(model), *([] if end is None else [end])]
    last = ids.shape[1] - 1
    columns = torch.arange(last + 1, device=ids.device)
    behind = torch.where(torch.isin(ids, torch.tensor(tokens, device=ids.device)), columns + 1, 0).amax(1)
    return torch.where(behind == 0, last, behind).clamp(max=last)


def newest_vision(inputs: Mapping[str, Tensor], images: int, videos: int) -> dict[str, Tensor]:
    """Pixel values and sizes without those of the first `images` images and `videos` videos (a batch of one)."""
    kept = {}
    for pixels, grid, before in (
        ("pixel_values", "image_grid_thw", images),
        ("pixel_values_videos", "video_grid_thw", videos),
    ):
        if grid in inputs and len(inputs[grid]) > before:  # patches of all images in one list
            kept[pixels] = inputs[pixels][int(inputs[grid][:before].prod(-1).sum()) :]
            kept[grid] = inputs[grid][before:]
    if "image_sizes" in inputs and len(inputs["image_sizes"]) > images:
        kept |= {name: inputs[name][images:] for name in ("pixel_values", "image_sizes")}
    return kept


def placeholders(model: Any) -> set[int]:
    """Ids of the tokens that stand for a piece of an image or a video."""
    family = family_for(getattr(model.config, "model_type", ""))
    if family is None:
        return set(vision_ids(model))
    return {token for name in family.vision_tokens if (token := getattr(model.config, name, None)) is not None}


def shared_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common.

    >>> shared_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))
