"""Train a demo model from scratch: python -m sparsemm_lmms.demo.train --family qwen2_vl --output DIR.

Stages: `text` (the text model reads pages of perfect symbols), `focus` (the same, mostly keys and columns),
`vision` (the tower learns to write the symbols' embeddings), `joint` (the text model gets used to rendered images and
complete prompts). A run that was stopped goes on from DIR/checkpoint.pt.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsemm_lmms.demo import FAMILIES
from sparsemm_lmms.demo.architecture import build_model, build_processor
from sparsemm_lmms.demo.forward import ATTENTION
from sparsemm_lmms.demo.muon import Muon
from sparsemm_lmms.demo.packing import Packer
from sparsemm_lmms.demo.stages import EVEN, FOCUS, Scores, generators, reading_loss, vision_loss

STAGES = ("text", "focus", "vision", "joint")


@dataclass(frozen=True)
class Recipe:
    """Steps, examples a step, learning rate and the part of the stage over which it falls to zero."""

    steps: int
    batch: int
    rate: float
    decay: float

    def rate_at(self, step: int) -> float:
        warm = min(1.0, (step + 1) / 30)
        left = (self.steps - step) / max(1.0, self.steps * self.decay)
        return self.rate * warm * (max(0.01, min(1.0, left)) if self.decay else 1.0)


RECIPES = {
    "llava_next": {
        "text": Recipe(1700, 4, 6e-3, 0.0),
        "focus": Recipe(1650, 4, 6e-3, 0.2),
        "vision": Recipe(600, 1, 2e-3, 0.7),
        "joint": Recipe(250, 4, 1.5e-3, 1.0),
    },
    "qwen2_vl": {
        "text": Recipe(1300, 4, 5e-3, 0.0),
        "focus": Recipe(700, 4, 5e-3, 0.0),
        "vision": Recipe(600, 1, 2e-3, 0.7),
        "joint": Recipe(250, 4, 1.5e-3, 1.0),
    },
}


def _is_vision(name: str) -> bool:
    return any(part in name for part in ("vision_tower", "multi_modal_projector", "visual"))


def optimizers(model: torch.nn.Module, stage: str, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the text model's matrices, AdamW for everything else that the stage trains; rates are factors."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        if _is_vision(name) != (stage == "vision"):
            continue
        hidden = p.ndim == 2 and "embed" not in name and "lm_head" not in name and not _is_vision(name)
        (matrices if hidden else others).append(p)
    found = [torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)]
    return found + ([Muon(matrices, lr=rate)] if matrices else [])


class Run:
    """One training run with its checkpoint."""

    def __init__(self, family: str, output: Path, seed: int, device: str):
        self.family, self.output, self.seed = family, output, seed
        self.model = build_model(family, seed).to(device)
        self.model.set_attn_implementation({"text_config": ATTENTION, "vision_config": "sdpa"})
        self.processor = build_processor(family)
        self.packer = Packer(family, lambda text: self.processor.tokenizer(text, add_special_tokens=False).input_ids)
        self.done: dict[str, int] = {}
        self.seconds = 0.0
        self.optimizers: list[torch.optim.Optimizer] = []
        self.file = output / "checkpoint.pt"

    def save(self, stage: str) -> None:
        """Write the checkpoint in one move, so that an interrupted save leaves the one before."""
        state = {"model": self.model.state_dict(), "done": self.done, "seconds": self.seconds, "family": self.family}
        state |= {"stage": stage, "optimizers": [o.state_dict() for o in self.optimizers]}
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.file)

    def load(self) -> dict[str, list[dict]]:
        """Take up the checkpoint if there is one; stage -> states of its optimizers."""
        if not self.file.is_file():
            return {}
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        if state["family"] != self.family:
            raise ValueError(f"{self.file} holds a {state['family']} run, not {self.family}")
        self.model.load_state_dict(state["model"])
        self.done, self.seconds = state["done"], state["seconds"]
        return {state.get("stage", "text"): state["optimizers"]}

    def loss(self, stage: str, step: int, batch: int, scores: Scores) -> torch.Tensor:
        rngs = generators(self.seed + 1000 * STAGES.index(stage), step, batch)
        if stage == "vision":
            return vision_loss(self.model, self.processor, rngs[0], step, scores)
        # Complete prompts are dear: only the joint stage sees them, every second step.
        share = 1.0 if stage == "joint" and step % 2 else (0.02, 0.05, 0.1, 0.2)[step % 4]
        pixels = stage == "joint"
        mixture = FOCUS if stage == "focus" else EVEN
        return reading_loss(self.model, self.processor, self.packer, rngs, share, mixture, pixels, scores)

    def stage(self, stage: str, recipe: Recipe, states: list[dict]) -> None:
        """Run one stage to its end."""
        self.optimizers = optimizers(self.model, stage, recipe.rate)
        for optimizer, state in zip(self.optimizers, states, strict=False):
            optimizer.load_state_dict(state)
        params = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
        scores, begun = Scores(), time.process_time()
        for step in range(self.done.get(stage, 0), recipe.steps):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate_at(step)
                optimizer.zero_grad()
            loss = self.loss(stage, step, recipe.batch, scores)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.done[stage] = step + 1
            if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
                self.seconds += time.process_time() - begun
                begun = time.process_time()
                at = f"{stage} {step + 1}/{recipe.steps} {self.seconds:.0f}s"
                print(f"{at} loss {loss.item():.3f} {scores}", flush=True)
                scores = Scores()
                self.save(stage)

    def export(self) -> None:
        """The model (float16 on disk, float32 in the config), processor and tokenizer in the Hugging Face layout."""
        self.model.set_attn_implementation("sdpa")
        self.model.half().save_pretrained(self.output)
        config = self.model.config
        for part in (config, config.text_config, config.vision_config):
            part.dtype = torch.float32  # CPUs compute slowly in float16, and dtype="auto" follows the config
        config.save_pretrained(self.output)
        self.processor.save_pretrained(self.output)
        (self.output / "model.safetensors").chmod(0o644)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sparsemm_lmms.demo.train", description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    for stage in STAGES:
        parser.add_argument(f"--{stage}-steps", type=int, help=f"steps of the stage `{stage}`")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    run = Run(args.family, args.output, args.seed, args.device)
    states = run.load()
    for name in STAGES:
        recipe, steps = RECIPES[args.family][name], getattr(args, f"{name}_steps")
        recipe = Recipe(recipe.steps if steps is None else steps, recipe.batch, recipe.rate, recipe.decay)
        if run.done.get(name, 0) < recipe.steps:
            run.stage(name, recipe, states.get(name, []))
    run.export()


if __name__ == "__main__":
    main()
