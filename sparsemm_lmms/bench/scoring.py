"""What chase costs: time against the same generation without scoring, and peak memory over the prompt's length.

The time is a ratio of one run: every batch is generated with and without scoring in turn, which of the two comes first
alternates, and the median over all such pairs counts. The memory is that of tensors, made and alive, seen by a
dispatch mode while one answer is written to prompts of one image and of several; the largest tensor that is made with
scoring and not without tells whether there ever was an attention matrix.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from sparsemm_lmms.visual_heads.commands import DEFAULT_FAMILY, ModelFamily, calibration_source, named_model

MODES = ("free", "teacher")


def scoring(
    model: Annotated[ModelFamily, typer.Option(help="Family of the model.")] = DEFAULT_FAMILY,
    pretrained: Annotated[str, typer.Option(help="Hugging Face id, folder, or demo.")] = "demo",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
    images: Annotated[int, typer.Option(min=1, help="Calibration images to generate from.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Times that every batch is generated each way.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    longer: Annotated[int, typer.Option(min=2, help="Images in the long prompt of the memory measurement.")] = 4,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu; default CUDA before CPU.")] = "",
    output: Annotated[Path | None, typer.Option(help="The numbers as JSON.")] = None,
) -> None:
    """Time and memory that chase adds to a generation."""
    from sparsemm_lmms.bench.measure import circumstances
    from sparsemm_lmms.head_scores import write_atomically
    from sparsemm_lmms.visual_heads.samples import CalibrationSample

    _, loaded, processor = named_model(model, pretrained, revision, device)
    source = calibration_source("demo" if pretrained == "demo" else "generated", max(images, longer))
    samples = [sample for sample in source if isinstance(sample, CalibrationSample)]
    cost = {
        "model": f"demo/{model.value}" if pretrained == "demo" else pretrained,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        **circumstances(loaded.device),
        "time": time_ratio(loaded, processor, samples[:images], batch_size, repeats, max_new_tokens),
        "memory": [memory_growth(loaded, processor, samples, mode, longer) for mode in MODES],
    }
    _print(cost)
    if output is not None:
        write_atomically(output, json.dumps(cost, indent=2) + "\n")
        print(f"Written: {output}")


def time_ratio(
    model: Any, processor: Any, samples: Sequence[Any], batch_size: int, repeats: int, max_new_tokens: int
) -> dict[str, Any]:
    """Seconds of chase's generation over those of the same generation without scoring.

    ratio: median over all pairs of a batch generated both ways, one right after the other, so that other load hits both
    alike; ratio_quartiles: of the same. seconds: sums over the batches of each batch's median.
    """
    import numpy as np
    import torch

    from sparsemm_lmms.bench.measure import in_turn
    from sparsemm_lmms.visual_heads.chase import text_shape
    from sparsemm_lmms.visual_heads.inputs import make_batch
    from sparsemm_lmms.visual_heads.matching import TokenTexts
    from sparsemm_lmms.visual_heads.passes import GREEDY, end_tokens, free_running, pad_token
    from sparsemm_lmms.visual_heads.token_grid import grid_for

    family, texts, pad = grid_for(model.config), TokenTexts(processor.tokenizer), pad_token(processor.tokenizer)
    shape, ends = text_shape(model.config)[:2], end_tokens(model, processor.tokenizer)
    groups = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    batches = [make_batch(group, processor, family, "high", model) for group in groups]

    def plain(batch: Any) -> list[int]:
        with torch.no_grad():
            told = model.generate(**batch.inputs, **GREEDY, max_new_tokens=max_new_tokens, pad_token_id=pad)
        rows = told[:, batch.prompt :].tolist()
        return [next((i for i, token in enumerate(row) if token in ends), len(row)) for row in rows]

    def scored(batch: Any) -> list[int]:
        return free_running(model, batch, texts, pad, shape, max_new_tokens).tokens

    tokens = 0
    for batch in batches:  # warms up, and makes sure that both write the same
        lengths, watched = plain(batch), scored(batch)
        if lengths != watched:
            raise RuntimeError(f"Scoring changed what the model writes: {lengths} tokens without, {watched} with it.")
        tokens += sum(lengths)
    times = [
        in_turn({"without": partial(plain, batch), "with": partial(scored, batch)}, model.device, repeats)
        for batch in batches
    ]
    without, with_it = (sum(median(spent[name]) for spent in times) / 1e3 for name in ("without", "with"))
    pairs = [np.divide(spent["with"], spent["without"]) for spent in times]
    return {
        "images": len(samples),
        "batch_size": batch_size,
        "tokens_written": tokens,
        "repeats": repeats,
        "seconds_without": round(without, 4),
        "seconds_with": round(with_it, 4),
        "ratio": round(float(np.median(pairs)), 4),
        "ratio_quartiles": [round(float(quartile), 4) for quartile in np.quantile(pairs, (0.25, 0.75))],
    }


def memory_growth(model: Any, processor: Any, samples: Sequence[Any], mode: str, longer: int) -> dict[str, Any]:
    """Peak of tensor bytes with and without scoring for a prompt of one image and of ``longer`` images.

    The words are those of the first image both times, so that only the sequence grows.
    """
    return {"mode": mode, "prompts": [_memory(model, processor, samples[:count], mode) for count in (1, longer)]}


def _memory(model: Any, processor: Any, samples: Sequence[Any], mode: str) -> dict[str, Any]:
    import torch

    from sparsemm_lmms.bench.tensor_log import TensorLog
    from sparsemm_lmms.visual_heads.chase import text_shape
    from sparsemm_lmms.visual_heads.inputs import make_batch, with_answers
    from sparsemm_lmms.visual_heads.matching import TokenTexts
    from sparsemm_lmms.visual_heads.passes import GREEDY, free_running, pad_token, teacher_forced
    from sparsemm_lmms.visual_heads.token_grid import grid_for

    sample = replace(samples[0], image=tuple(image for sample in samples for image in sample.images))
    family, texts, pad = grid_for(model.config), TokenTexts(processor.tokenizer), pad_token(processor.tokenizer)
    batch = make_batch([sample], processor, family, "high", model)
    layers, heads, _ = text_shape(model.config)
    few = 4  # tokens: the prompt is what makes the peak
    with torch.no_grad(), TensorLog() as without:
        if mode == "free":
            model.generate(**batch.inputs, **GREEDY, max_new_tokens=few, pad_token_id=pad)
        else:
            answer = texts.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
            model(**with_answers(batch, [answer], pad, model), use_cache=False, logits_to_keep=1)
    with TensorLog() as scored:
        if mode == "free":
            free_running(model, batch, texts, pad, (layers, heads), few)
        else:
            teacher_forced(model, batch, texts, pad, (layers, heads))
    return {
        "tokens": batch.prompt,
        "peak_bytes_without": without.peak,
        "peak_bytes_with": scored.peak,
        "largest_tensor_added_bytes": max(scored.sizes - without.sizes, default=0),
        "attention_matrix_bytes": 4 * heads * batch.prompt**2,
    }


def _print(cost: dict[str, Any]) -> None:
    spent = cost["time"]
    low, high = spent["ratio_quartiles"]
    print(f"{cost['model']} on {cost['device']}, {cost['dtype']}, {cost['threads']} threads")
    print(
        f"Generation with scoring takes {spent['ratio']:.2f} x the time without (quartiles {low:.2f} and {high:.2f}, "
        f"{spent['repeats']} repeats in turn): {spent['seconds_with']:.2f} s against {spent['seconds_without']:.2f} s "
        f"for {spent['tokens_written']} tokens of {spent['images']} images."
    )
    for growth in cost["memory"]:
        short, long = growth["prompts"]
        extra, more = (prompt["peak_bytes_with"] - prompt["peak_bytes_without"] for prompt in (short, long))
        print(
            f"Peak of tensors, {growth['mode']}: scoring adds {extra / 2**20:.2f} MiB at {short['tokens']} prompt "
            f"tokens and {more / 2**20:.2f} MiB at {long['tokens']}; the largest tensor that it makes there has "
            f"{long['largest_tensor_added_bytes'] / 2**20:.2f} MiB, one layer's attention matrix would have "
            f"{long['attention_matrix_bytes'] / 2**20:.0f}."
        )
