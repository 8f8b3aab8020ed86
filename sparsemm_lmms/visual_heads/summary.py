"""What a score file says about its model's heads, as numbers: for `sparsemm-lmms heads` and its JSON."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsemm_lmms.head_scores import HeadScores
from sparsemm_lmms.head_statistics import agreement, heads_holding, top_count, top_share

# of the provenance, in this order, where a file has it
FACTS = ("model", "model_type", "kv_heads", "data", "mode", "views", "per_token", "images", "tokens", "tokens_counted")


def summarise(scores: HeadScores) -> dict[str, Any]:
    """Shape, concentration, spread and agreement of the images; JSON-able. Shares and errors are fractions of 1.

    relative_stderr_top_10_percent: standard error / score over the best tenth of the heads, ``median`` and ``most``,
    and what ``most`` would be with 50 images (errors shrink with the square root of the count).
    """
    facts, values = scores.provenance, scores.values
    found: dict[str, Any] = {key: facts[key] for key in FACTS if key in facts}
    found |= {"skipped": facts["skipped"]["count"]} if "skipped" in facts else {}
    found |= {"layers": scores.layers, "q_heads": scores.heads, "content_hash": scores.content_hash}
    for name, share in (("top_5_percent", 0.05), ("top_10_percent", 0.10)):
        found[name] = {"heads": top_count(values.size, share), "share": round(top_share(values, share), 6)}
    found["heads_holding"] = {"50_percent": heads_holding(values, 0.5), "90_percent": heads_holding(values, 0.9)}
    if scores.stderr is not None:
        best = np.argsort(-values, axis=None, kind="stable")[: top_count(values.size, 0.10)]
        relative = scores.stderr.reshape(-1)[best] / values.reshape(-1)[best]
        errors = {"median": float(np.median(relative)), "most": float(relative.max())}
        if "images" in facts:
            errors["most_with_50_images"] = errors["most"] * (facts["images"] / 50) ** 0.5
        found["relative_stderr_top_10_percent"] = {key: round(value, 6) for key, value in errors.items()}
    return found | {key: facts[key] for key in ("split_half", "groups_of_50") if facts.get(key)}


def sentences(scores: HeadScores) -> list[str]:
    """``summarise`` in words, one fact a line."""
    found = summarise(scores)
    size = scores.values.size
    top5, top10 = found["top_5_percent"], found["top_10_percent"]
    half, most = found["heads_holding"].values()
    told = [
        f"Of the total score the top 5 % of heads ({top5['heads']} of {size}) hold {top5['share']:.0%}, "
        f"the top 10 % ({top10['heads']}) {top10['share']:.0%}; {half} heads ({half / size:.0%}) hold half of it, "
        f"{most} ({most / size:.0%}) nine tenths."
    ]
    if "tokens" in found:
        told.append(
            f"{found['images']} images ({found['skipped']} skipped), {found['tokens_counted']} of {found['tokens']} "
            f"tokens counted, mode {found['mode']}."
        )
    if errors := found.get("relative_stderr_top_10_percent"):
        with_50 = f"; with 50 images about {errors['most_with_50_images']:.1%}" if "images" in found else ""
        told.append(f"Standard error of a top 10 % head: at most {errors['most']:.1%} of its score{with_50}.")
    if halves := found.get("split_half"):
        told.append(f"Two disjoint halves of the images: {in_words(halves)}")
    if groups := found.get("groups_of_50"):
        told.append(
            f"Disjoint groups of {groups['size']} images ({groups['groups']}, all pairs): Spearman "
            f"{groups['spearman_mean']:.3f} on average, {groups['spearman_least']:.3f} at least; overlap of the top "
            f"10 % {groups['top_10_percent_overlap_mean']:.0%}, {groups['top_10_percent_overlap_least']:.0%} at least."
        )
    return [*told, f"Content hash {scores.content_hash}."]


def compare(first: HeadScores, second: HeadScores) -> dict[str, float]:
    """Agreement of two files of one shape."""
    return agreement(first.values, second.values)


def in_words(found: dict[str, float]) -> str:
    return (
        f"Spearman {found['spearman']:.3f}; overlap of the top 5 % {found['top_5_percent_overlap']:.0%}, "
        f"of the top 10 % {found['top_10_percent_overlap']:.0%}."
    )
