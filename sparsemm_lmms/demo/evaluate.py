"""How well a demo model reads held-out images: python -m sparsemm_lmms.demo.evaluate --family qwen2_vl.

Plain transformers: `generate` with the full cache, greedy, in batches with left padding.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from sparsemm_lmms.demo import FAMILIES, model_path
from sparsemm_lmms.demo.data import Sample, samples
from sparsemm_lmms.demo.metrics import character_accuracy
from sparsemm_lmms.demo.pages import GRIDS
from sparsemm_lmms.demo.questions import KINDS

LONGEST = 96  # new tokens; the longest answer has 70 characters


def load(path: str | Path) -> tuple[torch.nn.Module, object]:
    """Model in float32 and processor of a saved demo model."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(path, local_files_only=True)


@torch.inference_mode()
def read(model: torch.nn.Module, processor, batch: list[Sample]) -> list[str]:
    """The model's answers."""
    messages = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": s.question}]}] for s in batch]
    texts = [processor.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in messages]
    inputs = processor(images=[[s.image] for s in batch], text=texts, return_tensors="pt", padding=True)
    inputs = inputs.to(model.device)
    out = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(path: str | Path, limit: int, batch: int = 8, seed: int = 0, device: str = "cpu") -> list[dict]:
    """Character accuracy and exact match of `limit` held-out images for every question kind and grid."""
    model, processor = load(path)
    model.to(device)
    rows = []
    for kind in KINDS:
        for grid in GRIDS:
            chosen = list(samples(kind, limit, seed, "heldout", grid))
            got = [a for i in range(0, limit, batch) for a in read(model, processor, chosen[i : i + batch])]
            pairs = [(s.answer, a) for s, a in zip(chosen, got, strict=True)]
            rows.append(
                {
                    "kind": kind,
                    "grid": f"{grid[0]}x{grid[1]}",
                    "images": limit,
                    "characters": sum(character_accuracy(w, g) for w, g in pairs) / limit,
                    "exact": sum(w == g for w, g in pairs) / limit,
                }
            )
            line = "{kind:8s} {grid:6s} {images:4d} images  characters {characters:.4f}  exact {exact:.3f}"
            print(line.format(**rows[-1]), flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sparsemm_lmms.demo.evaluate", description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--path", help="another folder than the embedded model's")
    parser.add_argument("--limit", type=int, default=32, help="images for each question kind and grid")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)
    path = args.path or model_path(args.family)
    rows = evaluate(path, args.limit, args.batch, args.seed, args.device)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
