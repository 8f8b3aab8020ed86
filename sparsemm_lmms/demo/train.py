"""Train a demo model from scratch: python -m sparsemm_lmms.demo.train --family qwen2_vl --output DIR.

InternVL starts with the text model of the LLaVA-NeXT demo, as real ones share theirs; the other two start from nothing.
Stages: `text` (the text model reads pages of perfect symbols), `focus` (the same, mostly keys and columns),
`vision` (the tower learns to write the symbols' embeddings), `joint` (the text model gets used to rendered images and
complete prompts), `polish` (complete prompts alone, for InternVL). A run that was stopped goes on from
DIR/checkpoint.pt.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from sparsemm_lmms.demo import FAMILIES, model_path
from sparsemm_lmms.demo.architecture import build_model, build_processor
from sparsemm_lmms.demo.forward import ATTENTION
from sparsemm_lmms.demo.muon import Muon
from sparsemm_lmms.demo.packing import Packer
from sparsemm_lmms.demo.stages import EVEN, FOCUS, TABLES, Mixture, Scores, generators, reading_loss, vision_loss
from sparsemm_lmms.demo.vocabulary import build_tokenizer

STAGES = ("text", "focus", "vision", "joint", "polish")


@dataclass(frozen=True)
class Recipe:
    """Steps, examples a step, learning rate, the part of the stage over which it falls to zero, and the questions."""

    steps: int
    batch: int
    rate: float
    decay: float
    mixture: Mixture = EVEN

    def rate_at(self, step: int) -> float:
        warm = min(1.0, (step + 1) / 30)
        left = (self.steps - step) / max(1.0, self.steps * self.decay)
        return self.rate * warm * (max(0.01, min(1.0, left)) if self.decay else 1.0)


RECIPES = {
    "llava_next": {
        "text": Recipe(1700, 4, 6e-3, 0.0),
        "focus": Recipe(1650, 4, 6e-3, 0.2, FOCUS),
        "vision": Recipe(600, 1, 2e-3, 0.7),
        "joint": Recipe(250, 4, 1.5e-3, 1.0),
    },
    "internvl": {
        "text": Recipe(400, 4, 5e-3, 0.0),
        "focus": Recipe(125, 4, 5e-3, 0.0, TABLES),
        "vision": Recipe(600, 1, 2e-3, 0.7),
        "joint": Recipe(250, 4, 4e-3, 1.0, TABLES),
        "polish": Recipe(120, 4, 2.5e-3, 1.0),
    },
    "qwen2_vl": {
        "text": Recipe(1300, 4, 5e-3, 0.0),
        "focus": Recipe(700, 4, 5e-3, 0.0, FOCUS),
        "vision": Recipe(600, 1, 2e-3, 0.7),
        "joint": Recipe(250, 4, 1.5e-3, 1.0),
    },
}


STARTS = {"internvl": "llava_next"}  # family -> the demo model whose text model it starts with
ALIKE = {"assistant": "ASSISTANT:", "user": "USER:", "<|im_end|>": "</s>"}  # InternVL's token -> LLaVA-NeXT's


def start_from(model: torch.nn.Module, family: str, source: str) -> None:
    """Give `model` the layers of the demo model `source` and its embeddings of the tokens that both know, in place.

    What only `model` has (biases, tokens of its chat) stays as it was drawn.
    """
    given = AutoModelForImageTextToText.from_pretrained(model_path(source), dtype=torch.float32, local_files_only=True)
    state = {k: v for k, v in given.get_decoder().state_dict().items() if not k.startswith("embed_tokens")}
    model.get_decoder().load_state_dict(state, strict=False)
    old, table = build_tokenizer(source).get_vocab(), given.get_input_embeddings().weight
    with torch.no_grad():
        for token, index in build_tokenizer(family).get_vocab().items():
            known = old.get(ALIKE.get(token, token))
            if known is not None:
                model.get_input_embeddings().weight[index] = table[known]


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
        self.model = build_model(family, seed)
        if family in STARTS:
            start_from(self.model, family, STARTS[family])
        self.model.to(device)
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

    def loss(self, stage: str, step: int, recipe: Recipe, scores: Scores) -> torch.Tensor:
        rngs = generators(self.seed + 1000 * STAGES.index(stage), step, recipe.batch)
        if stage == "vision":
            return vision_loss(self.model, self.processor, rngs[0], step, scores)
        # Complete prompts are dear: only the last stages see them, `joint` every second step.
        whole = stage == "polish" or stage == "joint" and step % 2
        share = 1.0 if whole else (0.02, 0.05, 0.1, 0.2)[step % 4]
        pixels = stage in ("joint", "polish")
        return reading_loss(self.model, self.processor, self.packer, rngs, share, recipe.mixture, pixels, scores)

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
            loss = self.loss(stage, step, recipe, scores)
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
    for stage in STAGES:
        if stage not in RECIPES[args.family] and getattr(args, f"{stage}_steps") is not None:
            known = ", ".join(RECIPES[args.family])
            parser.error(f"--{stage}-steps: {args.family} has no stage `{stage}`; it has {known}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    run = Run(args.family, args.output, args.seed, args.device)
    states = run.load()
    for name, recipe in RECIPES[args.family].items():
        steps = getattr(args, f"{name}_steps")
        recipe = recipe if steps is None else replace(recipe, steps=steps)
        if run.done.get(name, 0) < recipe.steps:
            run.stage(name, recipe, states.get(name, []))
    run.export()


if __name__ == "__main__":
    main()
