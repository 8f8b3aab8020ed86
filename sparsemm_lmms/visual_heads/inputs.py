"""From samples to model inputs: chat template, processor, known answer, and which prompt positions show which word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsemm_lmms.visual_heads.matching import words_of
from sparsemm_lmms.visual_heads.samples import CalibrationSample
from sparsemm_lmms.visual_heads.token_grid import GridFamily, Views

WRITTEN = {"paligemma": 1}
"""Type of the tokens that a model writes, by model type, where that isn't 0, as of all other text."""


@dataclass
class Batch:
    """inputs: tensors for the model, left-padded to ``prompt`` tokens. words: bool ``[batch, words, prompt]``, image
    tokens of each word; sizes: int64 ``[batch, words]``, how many those are (0 also for filling)."""

    samples: Sequence[CalibrationSample]
    inputs: dict[str, torch.Tensor]
    prompt: int
    words: torch.Tensor
    sizes: torch.Tensor


def chat_messages(sample: CalibrationSample) -> list[dict[str, Any]]:
    """One user turn: the pictures, then the question, in transformers' chat format."""
    if sample.video:
        shown: list[dict[str, Any]] = [{"type": "video"}]
    else:
        shown = [{"type": "image"} for _ in sample.images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": sample.prompt}]}]


def make_batch(
    samples: Sequence[CalibrationSample], processor: Any, family: GridFamily, views: Views, model: Any
) -> Batch:
    """Process a batch of samples for ``model``; the grids follow the processor's output."""
    texts = [
        processor.apply_chat_template(chat_messages(sample), tokenize=False, add_generation_prompt=True)
        for sample in samples
    ]
    images = [list(sample.images) for sample in samples if not sample.video]
    videos = [list(sample.video) for sample in samples if sample.video]
    bos = getattr(processor.tokenizer, "bos_token", None)
    options: dict[str, Any] = {"images": images or None, "padding": True, "padding_side": "left"}
    if videos:
        options["videos"] = videos
    if bos and texts[0].startswith(bos):  # the template wrote it; a second one is not what the model was trained on
        options["add_special_tokens"] = False
    inputs = dict(processor(text=texts, return_tensors="pt", **options))
    inputs.pop("labels", None)  # PaliGemma's processor writes what training would need
    grids = family.grids(
        {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()},
        [image.size for own in images for image in own],
        [video[0].size for video in videos],
        processor,
    )
    prompt = inputs["input_ids"].shape[1]
    most = max(len(words_of(sample)) for sample in samples)
    words = torch.zeros(len(samples), most, prompt, dtype=torch.bool)
    for row, (sample, grid) in enumerate(zip(samples, grids, strict=True)):
        for index, word in enumerate(words_of(sample)):
            words[row, index, torch.from_numpy(grid.inside(word.xyxy, word.item, views))] = True
    device = model.device
    inputs = {
        key: value.to(device, model.dtype if value.is_floating_point() else None) for key, value in inputs.items()
    }
    return Batch(samples, inputs, prompt, words.to(device), words.sum(dim=-1).to(device))


def with_answers(batch: Batch, answers: Sequence[Sequence[int]], pad: int, model: Any) -> dict[str, torch.Tensor]:
    """Inputs of one teacher-forced pass: the padded prompts, then the answers, padded at their end.

    Token j of every row is predicted at position ``batch.prompt - 1 + j``; later padding can't reach earlier rows.
    """
    inputs = dict(batch.inputs)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    longest = max(map(len, answers))
    tail = torch.full((len(answers), longest), pad, dtype=ids.dtype)
    lengths = torch.tensor([len(answer) for answer in answers])
    for row, answer in enumerate(answers):
        tail[row, : len(answer)] = torch.tensor(answer, dtype=ids.dtype)
    real = (torch.arange(longest)[None, :] < lengths[:, None]).to(mask)
    inputs["input_ids"] = torch.cat([ids, tail.to(ids.device)], dim=1)
    inputs["attention_mask"] = torch.cat([mask, real], dim=1)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            kinds = inputs[name]
            written = torch.full_like(tail, WRITTEN.get(model.config.model_type, 0))
            inputs[name] = torch.cat([kinds, written.to(kinds)], dim=1)
    if not hasattr(model.base_model, "get_rope_index"):
        # What `generate` does for left padding; models with positions in three axes find them from the mask themselves.
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return inputs
