"""What every kind of token grid shares: the tokens of a prompt, and how images are dealt to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

Views = Literal["high", "all"]
NEWLINE, BASE, HIGH = -1, 0, 1


@dataclass(frozen=True, eq=False)
class TokenGrid:
    """The image tokens of one prompt, in prompt order; all arrays have one entry a token.

    positions: int64, index in the (padded) prompt row. item: int64, which image or video of the prompt, in order of
    appearance. view: int8, NEWLINE, BASE or HIGH (families with one view: HIGH). frame: int64, temporal group of a
    video, 0 for images. boxes: float64 [tokens, 4], (left, top, right, bottom) in pixels of the original image, clipped
    to it; a token that shows no pixel of it (newline, leftover padding) has an empty box.
    """

    positions: np.ndarray
    item: np.ndarray
    view: np.ndarray
    frame: np.ndarray
    boxes: np.ndarray

    def inside(
        self, xyxy: Sequence[float], item: int = 0, views: Views = "high", frame: int | None = None
    ) -> np.ndarray:
        """Prompt positions (int64) of the tokens whose box overlaps ``xyxy`` at all, as in the paper's code."""
        left, top, right, bottom = xyxy
        width = np.minimum(self.boxes[:, 2], right) - np.maximum(self.boxes[:, 0], left)
        height = np.minimum(self.boxes[:, 3], bottom) - np.maximum(self.boxes[:, 1], top)
        chosen = (width > 0) & (height > 0) & (self.item == item)
        chosen &= self.view >= (HIGH if views == "high" else BASE)
        if frame is not None:
            chosen &= self.frame == frame
        return self.positions[chosen]


@dataclass(frozen=True, eq=False)
class Item:
    """Tokens of one image or video before they get positions."""

    view: np.ndarray
    frame: np.ndarray
    boxes: np.ndarray


class GridFamily(Protocol):
    """What a kind of grid provides."""

    def grids(
        self,
        inputs: Mapping[str, Any],
        image_sizes: Sequence[tuple[int, int]],
        video_sizes: Sequence[tuple[int, int]] = (),
        processor: Any = None,
    ) -> list[TokenGrid]:
        """One grid for each row of ``inputs["input_ids"]``; sizes are (width, height), flat over the batch.

        ``processor`` is the one that made the inputs; kinds whose views follow its settings need it.

        Raises:
            ValueError: where the prompt's image tokens, the sizes and the settings disagree.
        """
        ...


@dataclass(frozen=True)
class Shown:
    """One picture that the vision tower gets: ``rows`` x ``columns`` tokens over ``box``, a part of the image.

    box: (left, top, right, bottom) in pixels of the original image; it reaches beyond the image where that is padded.
    """

    box: tuple[float, float, float, float]
    rows: int
    columns: int
    view: int = HIGH


def item_of(pictures: Sequence[Shown], width: int, height: int) -> Item:
    """Tokens of one image of ``width`` x ``height`` pixels: picture by picture, each row by row."""
    boxes = []
    for picture in pictures:
        left, top, right, bottom = picture.box
        cell = (right - left) / max(picture.columns, 1), (bottom - top) / max(picture.rows, 1)
        boxes.append(cells(picture.rows, picture.columns, *cell) + np.array([left, top, left, top]))
    view = np.concatenate(
        [np.full(len(box), picture.view, np.int8) for box, picture in zip(boxes, pictures, strict=True)]
    )
    return Item(view, np.zeros(len(view), np.int64), clip(np.concatenate(boxes), width, height))


def with_blanks(item: Item, before: Sequence[int] | np.ndarray) -> Item:
    """The tokens, and one that shows no pixel before each of these indices, as ``np.insert`` counts them."""
    return Item(
        np.insert(item.view, before, NEWLINE),
        np.insert(item.frame, before, 0),
        np.insert(item.boxes, before, 0, axis=0),
    )


def cells(rows: int, columns: int, width: float, height: float) -> np.ndarray:
    """Boxes [rows * columns, 4] of a regular grid, row by row."""
    across, down = (np.arange(count)[:, None] + [0.0, 1.0] for count in (columns, rows))
    return outer(across * width, down * height)


def outer(across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Boxes [rows * columns, 4], row by row, of columns [columns, 2] and rows [rows, 2] that start and end there."""
    left_right, top_bottom = np.tile(across, (len(down), 1)), np.repeat(down, len(across), axis=0)
    return np.stack([left_right[:, 0], top_bottom[:, 0], left_right[:, 1], top_bottom[:, 1]], axis=1)


def clip(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.clip(boxes, 0, [width, height, width, height])


def place(input_ids: Any, items: Mapping[int, Sequence[Item]]) -> list[TokenGrid]:
    """Deal the images and videos of a batch to the placeholder tokens of its rows, in order of appearance."""
    rows = np.asarray(input_ids)
    queues = {token: list(queue) for token, queue in items.items()}
    grids = []
    for row in rows:
        slots = np.flatnonzero(np.isin(row, list(queues)))
        taken: list[Item] = []
        start = 0
        while start < len(slots):
            token = int(row[slots[start]])
            if not queues[token]:
                raise ValueError(f"The prompt has more image tokens (id {token}) than its images and videos explain.")
            item = queues[token].pop(0)
            stop = start + len(item.view)
            if stop > len(slots) or (row[slots[start:stop]] != token).any():
                raise ValueError(
                    f"An image needs {len(item.view)} tokens, but the prompt has {len(slots) - start} left; "
                    "processor and model config disagree on sizes, or the prompt was truncated."
                )
            taken.append(item)
            start = stop
        grids.append(_join(slots, taken))
    left = sum(len(queue) for queue in queues.values())
    if left:
        raise ValueError(f"{left} images or videos have no tokens in the prompts.")
    return grids


class OfProcessor:
    """The grid of images whose views follow the settings of the processor: a subclass says what an image becomes."""

    def __init__(self, config: Any, tokens: Sequence[int]) -> None:
        self.model_type: str = config.model_type
        self.image_token_id = tokens[0]

    def grids(
        self,
        inputs: Mapping[str, Any],
        image_sizes: Sequence[tuple[int, int]],
        video_sizes: Sequence[tuple[int, int]] = (),
        processor: Any = None,
    ) -> list[TokenGrid]:
        """See `GridFamily`."""
        if len(video_sizes):
            raise ValueError(f"{self.model_type} models take images only; give the frames as images.")
        if processor is None:
            raise ValueError(f"The grid of {self.model_type} models follows the processor's settings; give processor=.")
        items = [self.item(processor, width, height) for width, height in image_sizes]
        return place(inputs["input_ids"], {self.image_token_id: items})

    def item(self, processor: Any, width: int, height: int) -> Item:
        """The tokens of an image of ``width`` x ``height`` pixels."""
        raise NotImplementedError


def _join(slots: np.ndarray, items: Sequence[Item]) -> TokenGrid:
    if not items:
        empty = np.zeros(0, np.int64)
        return TokenGrid(empty, empty, empty.astype(np.int8), empty, np.zeros((0, 4)))
    return TokenGrid(
        slots.astype(np.int64),
        np.repeat(np.arange(len(items)), [len(item.view) for item in items]),
        np.concatenate([item.view for item in items]),
        np.concatenate([item.frame for item in items]),
        np.concatenate([item.boxes for item in items]),
    )
