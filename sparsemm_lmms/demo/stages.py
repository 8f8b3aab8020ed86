"""What one step of each training stage does: text model on perfect symbols, vision tower, text model on pixels."""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sparsemm_lmms.demo.align import align_loss, blacken, overviews, random_tiles, symbolic_features
from sparsemm_lmms.demo.architecture import SQUARE, TILE
from sparsemm_lmms.demo.data import stream
from sparsemm_lmms.demo.forward import embed, image_features, logits
from sparsemm_lmms.demo.packing import Packed, Packer, collate
from sparsemm_lmms.demo.pages import FORMS, GRIDS, Page, sample_page
from sparsemm_lmms.demo.questions import TEXT_KINDS, TRAINED_KIND, ask, text_exercise
from sparsemm_lmms.demo.render import render


@dataclass(frozen=True)
class Mixture:
    """What a page is asked: the shares of FORMS, questions that name a line, and questions of the form's own kind."""

    forms: tuple[float, float, float]
    lines: int
    own: int


EVEN = Mixture((1 / 3, 1 / 3, 1 / 3), 3, 3)
# Keys and columns are learned last: once lines are read, most questions are about them.
FOCUS = Mixture((0.15, 0.5, 0.35), 1, 6)
TABLES = Mixture((0.25, 0.2, 0.55), 2, 5)


@dataclass
class Scores:
    """Running share of right next tokens per question kind."""

    hits: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))

    def add(self, name: str, right: int, total: int) -> None:
        self.hits[name][0] += right
        self.hits[name][1] += total

    def __str__(self) -> str:
        return " ".join(f"{k}={a / max(1, b):.4f}" for k, (a, b) in sorted(self.hits.items()))


def example(packer: Packer, rng: np.random.Generator, share: float, mixture: Mixture) -> tuple[Page, Packed, list[str]]:
    """A page with a transcription, short questions and a text-only exercise; the kinds in the order of the turns."""
    form = str(rng.choice(FORMS, p=mixture.forms))
    page = sample_page(rng, form, *GRIDS[int(rng.integers(len(GRIDS)))])
    own = TRAINED_KIND[form]
    short = ask(rng, page, "line", mixture.lines) + ask(rng, page, own, mixture.own)
    questions = {"long": ask(rng, page, "all", 1), "short": short}
    exercise = TEXT_KINDS[int(rng.integers(len(TEXT_KINDS)))]
    packed = packer.pack(page, questions, [text_exercise(rng, exercise)], rng, share)
    return page, packed, ["all"] + ["line"] * mixture.lines + [own] * mixture.own + ["text"]


def _tensors(batch: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value).to(device) for name, value in batch.items()}


def reading_loss(
    model: torch.nn.Module,
    processor,
    packer: Packer,
    rngs: list[np.random.Generator],
    share: float,
    mixture: Mixture,
    pixels: bool,
    scores: Scores,
) -> Tensor:
    """Mean cross-entropy of a batch of packed pages, one per generator; `pixels`: rendered, else perfect symbols."""
    made = [example(packer, rng, share, mixture) for rng in rngs]
    device = model.get_input_embeddings().weight.device
    if pixels:
        grey = [render(rng, page.cells) for rng, (page, _, _) in zip(rngs, made, strict=True)]
        images = [np.repeat(image[..., None], 3, -1) for image in grey]
        inputs = processor.image_processor(images=images, return_tensors="pt").to(device)
        with torch.no_grad():
            features = image_features(model, inputs)
    else:
        features = symbolic_features(model, processor.tokenizer, packer.family, [page.cells for page, _, _ in made])
        noise = 0.1 * features.detach().pow(2).mean().sqrt()
        features = features + noise * torch.randn_like(features)
    arrays, layout = collate([packed for _, packed, _ in made])
    batch = _tensors(arrays, device)
    out, labels = logits(model, batch, layout, embed(model, batch, features))
    right = torch.zeros_like(batch["labels"], dtype=torch.bool)
    right[batch["labels"] >= 0] = out.detach().argmax(-1) == labels
    for row, (_, _, names) in enumerate(made):
        for name, place in zip(names, layout.slots(), strict=True):
            known = batch["labels"][row, place] >= 0
            scores.add(name, int(right[row, place].sum()), int(known.sum()))
    return torch.nn.functional.cross_entropy(out, labels)


def vision_loss(model: torch.nn.Module, processor, rng: np.random.Generator, step: int, scores: Scores) -> Tensor:
    """Alignment loss of random tiles of the tower's size; Qwen2-VL attends over whole images and gets larger ones."""
    if model.config.model_type == "llava_next":
        made = [random_tiles(rng, 28, TILE), overviews(rng, processor, 4)]
        blacken(rng, *made[0])
        tiles, cells = (np.concatenate(parts) for parts in zip(*made, strict=True))
    elif model.config.model_type == "internvl":
        made = [random_tiles(rng, 120, SQUARE), overviews(rng, processor, 8)]
        tiles, cells = (np.concatenate(parts) for parts in zip(*made, strict=True))
    else:
        tiles, cells = random_tiles(rng, *((32, 8), (6, 16), (32, 8), (2, 24))[step % 4])
    loss, right = align_loss(model, processor.tokenizer, tiles, cells)
    scores.add("cells", int(1e4 * float(right)), 10_000)
    return loss


def generators(seed: int, step: int, count: int) -> list[np.random.Generator]:
    """The training streams of one step."""
    return [stream(seed, "train", step * count + i) for i in range(count)]
