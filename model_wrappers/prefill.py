"""Prompts that reach the cache in parts: which columns come when, where they stand, and what the images add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsemm_lmms.cache import CACHE_NAME, RaggedCache
from sparsemm_lmms.families import FAMILIES
from sparsemm_lmms.session import vision_ids

TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class Parts:
    """A left-padded batch cut into consecutive parts, each left-padded by itself.

    Attributes:
        ids, mask: int64 `[batch, n]`; the padding of a later part lies between the parts.
        positions: `[..., batch, n]`, of the uncut prompt.
        ends: column behind each part; the last is n.
        vision: pixel values and sizes, which belong to the first part.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    ends: tuple[int, ...]
    vision: dict[str, Tensor]

    def for_generate(self) -> dict[str, Tensor]:
        """Arguments of `model.generate`, which runs on from where the cache ends."""
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}


def cut(model: Any, inputs: Mapping[str, Tensor], ends: Sequence[Tensor]) -> Parts:
    """Cut a left-padded batch behind the columns `ends`, one `[batch]` a part; all behind the last is dropped."""
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
    pad = model.generation_config.pad_token_id or 0
    positions = positions.gather(-1, columns.expand(*positions.shape[:-1], -1)).masked_fill(~mask, 0)
    return Parts(
        ids=ids.gather(1, columns).masked_fill(~mask, pad),
        mask=mask.long(),
        positions=positions,
        ends=tuple(int(end) for end in torch.tensor(widths).cumsum(0)),
        vision={name: value for name, value in inputs.items() if name not in TEXT_INPUTS},
    )


@torch.no_grad()
def run(model: Any, cache: RaggedCache, parts: Parts, count: int) -> Tensor:
    """Run the first `count` parts, each in one pass, behind what `cache` holds.

    Returns:
        Logits `[batch, vocabulary]` behind the last.
    """
    begin, vision = cache.get_seq_length(), parts.vision
    for end in parts.ends[:count]:
        out = model(
            input_ids=parts.ids[:, begin:end],
            attention_mask=parts.mask[:, :end],
            position_ids=parts.positions[..., begin:end],
            logits_to_keep=1,
            **{CACHE_NAME: cache},
            **vision,
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
    family = FAMILIES.get(getattr(model.config, "model_type", ""))
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
