"""Training examples as packed sequences: one image prefix, then several questions that see the image, not each other.

Items are those of the real model, in its order. Positions are those of the full prompt, so blank image cells may be
left out of a training sequence (`share` < 1) without moving anything else: that makes steps several times cheaper,
and the last part of the training uses complete prompts.

Layout of a packed row: prefix, padded to P, then groups of questions, each group a block of `count` slots of the same
`size`. Questions of the first groups see the prefix; those of the last group (exercises) see themselves alone.
"""

from dataclasses import dataclass

import numpy as np

from sparsemm_lmms.demo.architecture import SQUARE, SYSTEM, TILE
from sparsemm_lmms.demo.pages import Page

NEWLINE, OVERVIEW = -1, -2  # image items that are no cell
IGNORE = -100


@dataclass
class Turn:
    """A question with its answer. ids, labels: int64 [S]; labels[i] is what follows ids[i], IGNORE in the question."""

    group: str
    start: int  # position of its first token
    ids: np.ndarray
    labels: np.ndarray


@dataclass
class Packed:
    """One example. image: bool [P]; index: int64 [P]; positions: int64 [3, P] (rows t, h, w) of the prefix.

    index: token id of a text item, number in the sequence of image features of an image item.
    """

    image: np.ndarray
    index: np.ndarray
    positions: np.ndarray
    turns: list[Turn]


@dataclass(frozen=True)
class Layout:
    """Where things are in a batch of packed rows: prefix length, then (count, size, sees the prefix) of each group."""

    prefix: int
    groups: tuple[tuple[int, int, bool], ...]

    @property
    def length(self) -> int:
        return self.prefix + sum(count * size for count, size, _ in self.groups)

    def slots(self) -> list[slice]:
        """Place of every question, in order."""
        out, at = [], self.prefix
        for count, size, _ in self.groups:
            out += [slice(at + i * size, at + (i + 1) * size) for i in range(count)]
            at += count * size
        return out


def frame(family: str) -> tuple[str, str, str, str]:
    """Chat text before the image, between image and question, between question and answer, after the answer."""
    if family == "llava_next":
        return "USER: ", "\n", " ASSISTANT:", "</s>"
    if family == "internvl":
        return "<|im_start|>user\n<img>", "</img>\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
    system = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    return system + "<|vision_start|>", "<|vision_end|>", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"


def image_items(family: str, rows: int, cols: int) -> np.ndarray:
    """Cell number row * cols + col of each image feature in the model's order, or NEWLINE, or OVERVIEW: int64 [N]."""
    cells = np.arange(rows * cols)
    if family == "qwen2_vl":
        return cells
    if family == "internvl":
        tiles = cells.reshape(rows // SQUARE, SQUARE, cols // SQUARE, SQUARE).transpose(0, 2, 1, 3)
        return np.concatenate([tiles.ravel(), np.full(SQUARE * SQUARE, OVERVIEW)])
    grid = np.full((rows, cols + 1), NEWLINE)
    grid[:, :cols] = cells.reshape(rows, cols)
    return np.concatenate([np.full(TILE * TILE, OVERVIEW), grid.ravel()])


def image_positions(family: str, rows: int, cols: int, start: int) -> tuple[np.ndarray, int]:
    """Positions [3, N] of the image items when the first stands at `start`, and the position after the image."""
    count = len(image_items(family, rows, cols))
    if family == "qwen2_vl":
        cells = np.arange(count)
        return start + np.stack([cells * 0, cells // cols, cells % cols]), start + max(rows, cols)
    return np.tile(start + np.arange(count), (3, 1)), start + count


def _keep(rng: np.random.Generator, page: Page, items: np.ndarray, share: float) -> np.ndarray:
    """Numbers of the items that stay: all printed cells and the cells beside them, `share` of the others."""
    printed = page.cells.ravel() > 0
    near = printed | np.roll(printed, 1) | np.roll(printed, -1)
    return np.flatnonzero((rng.random(len(items)) < share) | ((items >= 0) & near[items]))


class Packer:
    """Packs pages and questions for one family. `encode(text)` gives token ids."""

    def __init__(self, family: str, encode):
        self.family = family
        self.encode = lambda text: np.asarray(encode(text), dtype=np.int64)
        before, self.middle, self.after, self.end = frame(family)
        self.before, self.plain = self.encode(before), before.removesuffix("<|vision_start|>").removesuffix("<img>")

    def _turn(self, group: str, start: int, opening: str, question: str, answer: str) -> Turn:
        head = self.encode(opening + question + self.after)  # in one piece: " Copy" is one token
        target = self.encode(answer + self.end)
        labels = np.full(len(head) + len(target) - 1, IGNORE)
        labels[len(head) - 1 :] = target
        return Turn(group, start, np.concatenate([head, target[:-1]]), labels)

    def pack(
        self,
        page: Page,
        questions: dict[str, list[tuple[str, str]]],
        exercises: list[tuple[str, str]] = (),
        rng: np.random.Generator | None = None,
        share: float = 1.0,
    ) -> Packed:
        """One example. questions: group name -> (question, answer) pairs; groups must be alike over a batch.

        `share` < 1 leaves out that part of the blank cells, newlines and overview tokens.
        """
        lead = len(self.before)
        positions, after = image_positions(self.family, page.rows, page.cols, lead)
        items = image_items(self.family, page.rows, page.cols)
        keep = _keep(rng, page, items, share) if share < 1 else np.arange(len(items))
        turns = [self._turn(g, after, self.middle, q, a) for g, pairs in questions.items() for q, a in pairs]
        turns += [self._turn("text", 0, self.plain, q, a) for q, a in exercises]
        return Packed(
            np.arange(lead + len(keep)) >= lead,
            np.concatenate([self.before, keep]),
            np.concatenate([np.tile(np.arange(lead), (3, 1)), positions[:, keep]], axis=1),
            turns,
        )


def _round(size: int) -> int:
    return -(-size // 8) * 8


def collate(items: list[Packed]) -> tuple[dict[str, np.ndarray], Layout]:
    """Batch of image, index, labels [B, L], positions [3, B, L], valid [B, P] and its layout."""
    prefix = _round(max(len(p.index) for p in items))
    names = [t.group for t in items[0].turns]
    if any([t.group for t in p.turns] != names for p in items):
        raise ValueError("all examples of a batch need the same groups of questions in the same order")
    groups = []
    for name in dict.fromkeys(names):
        size = _round(max(len(t.ids) for p in items for t in p.turns if t.group == name))
        groups.append((names.count(name), size, name != "text"))
    layout = Layout(prefix, tuple(groups))
    shape = (len(items), layout.length)
    batch = {"image": np.zeros(shape, bool), "index": np.zeros(shape, np.int64)}
    batch |= {"labels": np.full(shape, IGNORE), "positions": np.zeros((3, *shape), np.int64)}
    batch["valid"] = np.zeros((len(items), prefix), bool)
    for row, item in enumerate(items):
        size = len(item.index)
        batch["valid"][row, :size] = True
        batch["image"][row, :size], batch["index"][row, :size] = item.image, item.index
        batch["positions"][:, row, :size] = item.positions
        for slot, turn in zip(layout.slots(), item.turns, strict=True):
            place = slice(slot.start, slot.start + len(turn.ids))
            batch["index"][row, place], batch["labels"][row, place] = turn.ids, turn.labels
            batch["positions"][:, row, place] = turn.start + np.arange(len(turn.ids))
    return batch, layout
