"""Annotated images from elsewhere: SynthDoG with detection, and a plain folder.

**SynthDoG with detection** (the paper's data, ``nnethercott/synthdog-en-detection``): rows with ``image`` and
``2_coord``, a list of ``{"chunk": text, "coord": [[x0, y0], [x1, y1], ...]}``. ``where`` is a hub id, a folder or file
of parquet, or the folder of a saved dataset; it goes through ``datasets``, in streaming mode for the hub, so that
``--images 1000`` does not download the rest.

**Folder**: ``NAME.png`` (or jpg, jpeg, webp, bmp, tif, tiff) beside ``NAME.json``::

    {"lines": [[{"text": "Total", "box": [12, 30, 80, 52]}, {"text": "42.00", "box": [90, 30, 150, 52]}], ...]}

one list of words a line, boxes ``[left, top, right, bottom]`` in pixels; ``{"boxes": [...]}`` with one flat list is
read as one word a line. Images are taken in the order of their names.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import GenericAlias
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from sparsemm_lmms.json_files import checked, read_json
from sparsemm_lmms.visual_heads.identity import file_sha256, files_sha256, visible_files
from sparsemm_lmms.visual_heads.samples import PAPER_PROMPT, Box, CalibrationSample, Page, Readings, Skipped, ask

_WORDS = GenericAlias(list, ({"text": str, "box": list[float]},))
_LINES = GenericAlias(list, (_WORDS,))
BOXES_MEND = "write it as sparsemm_lmms.visual_heads.sources says"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class FolderPages:
    """A folder of images, each with a JSON file of the same name (module docstring)."""

    folder: str | Path
    readings: Readings = "transcribe"
    prompt: str = PAPER_PROMPT
    seed: int = 0

    def __len__(self) -> int:
        return len(self._files())

    def _files(self) -> list[Path]:
        folder = Path(self.folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"Folder of calibration images {folder} does not exist.")
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if not files:
            raise FileNotFoundError(f"Folder {folder} holds no images ({', '.join(sorted(SUFFIXES))}).")
        return files

    def __iter__(self) -> Iterator[CalibrationSample | Skipped]:
        for file in self._files():
            page = _folder_page(file)
            if isinstance(page, Skipped):
                yield page
            else:
                yield from ask(page, self.readings, self.seed, self.prompt)

    def describe(self) -> dict[str, object]:
        images = self._files()
        files = [*images, *(image.with_suffix(".json") for image in images)]
        facts = {"source": "folder", "folder": str(self.folder), "readings": self.readings, "prompt": self.prompt}
        content = files_sha256(Path(self.folder), {file for file in files if file.is_file()})
        return {**facts, "seed": self.seed, "sha256": content}


@dataclass(frozen=True)
class SynthDogPages:
    """Rows of a SynthDoG-with-detection dataset; each chunk is one line of one box."""

    where: str
    split: str = "train"
    readings: Readings = "transcribe"
    prompt: str = PAPER_PROMPT
    seed: int = 0

    def __iter__(self) -> Iterator[CalibrationSample | Skipped]:
        for index, row in enumerate(self._rows()):
            page = _synthdog_page(row, f"{self.where}[{index}]")
            if isinstance(page, Skipped):
                yield page
            else:
                yield from ask(page, self.readings, self.seed, self.prompt)

    def describe(self) -> dict[str, object]:
        facts = {"source": "synthdog", "where": self.where, "split": self.split}
        path = Path(self.where)
        content = None  # what the hub has can't be told without reading it
        if path.is_dir():
            content = files_sha256(path, visible_files(path))
        elif path.is_file():
            content = file_sha256(path)
        return {**facts, "readings": self.readings, "prompt": self.prompt, "seed": self.seed, "sha256": content}

    def _rows(self) -> Any:
        import datasets

        path = Path(self.where)
        if not path.exists():
            rows = datasets.load_dataset(self.where, split=self.split, streaming=True)
        elif path.is_dir() and (path / "state.json").is_file():
            rows = datasets.load_from_disk(str(path))
        else:
            files = [str(path)] if path.is_file() else sorted(str(file) for file in path.rglob("*.parquet"))
            if not files:
                raise FileNotFoundError(f"{path} holds no parquet files; give the folder that has the dataset's data.")
            rows = datasets.load_dataset("parquet", data_files={self.split: files}, split=self.split, streaming=True)
        for column in ("image", "2_coord"):
            if rows.column_names is not None and column not in rows.column_names:
                raise ValueError(f"{self.where} has no column {column!r}; found {', '.join(rows.column_names)}.")
        # Decoding is ours, so that one broken image is one skipped row and not the end of the run.
        return rows.cast_column("image", datasets.Image(decode=False))


def open_image(path: Path) -> Image.Image:
    """One picture as RGB, or a sentence on why not."""
    if not path.is_file():
        raise FileNotFoundError(f"Image {path} does not exist.")
    image = _open(path, str(path))
    if isinstance(image, Skipped):
        raise ValueError(f"{path} {image.reason}")
    return image


def _open(source: Any, name: str) -> Image.Image | Skipped:
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        return Skipped(name, f"is not a readable image ({source} is no regular file).")
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False  # lmms-eval's tasks set it
    try:
        with Image.open(source) as image:
            return _as_rgb(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return Skipped(name, f"is not a readable image ({error}).")
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _as_rgb(image: Image.Image) -> Image.Image:
    """The picture as a viewer shows it: turned by its EXIF tag, 16 bits scaled to 8, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        low, high = (0.0, 65535.0) if image.mode.startswith("I") else (0.0, 1.0)
        if values.min() < low or values.max() > high:
            raise ValueError(f"mode {image.mode} with values outside {low:g} to {high:g}")
        image = Image.fromarray(np.rint((values - low) * 255 / (high - low)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _folder_page(file: Path) -> Page | Skipped:
    beside = file.with_suffix(".json")
    try:
        boxes = _folder_boxes(read_json(beside, "its file of boxes", BOXES_MEND), f"its file of boxes {beside}")
    except FileNotFoundError:
        return Skipped(file.name, f"has no text boxes: {beside.name} is missing.")
    except ValueError as error:
        return Skipped(file.name, str(error))
    image = _open(file, file.name)
    return image if isinstance(image, Skipped) else Page(image, boxes, name=file.name)


def _folder_boxes(facts: Any, where: str) -> tuple[tuple[Box, ...], ...]:
    """Lines of boxes of one image's JSON; every defect is a ValueError that names the place."""
    if isinstance(facts, dict) and "lines" in facts:
        lines = checked(facts, {"lines": _LINES}, where, BOXES_MEND)["lines"]
    else:
        lines = [[word] for word in checked(facts, {"boxes": _WORDS}, where, BOXES_MEND)["boxes"]]
    return tuple(tuple(_folder_box(word, where) for word in line) for line in lines)


def _folder_box(word: dict[str, Any], where: str) -> Box:
    if len(word["box"]) != 4:
        raise ValueError(f"{where} has {len(word['box'])} numbers for the box of {word['text']!r}; {BOXES_MEND}.")
    left, top, right, bottom = (float(value) for value in word["box"])
    return Box(word["text"], (left, top, right, bottom))


def _synthdog_page(row: dict[str, Any], name: str) -> Page | Skipped:
    stored = row["image"]
    if not stored or (stored.get("bytes") is None and not stored.get("path")):
        return Skipped(name, "has no image.")
    image = _open(io.BytesIO(stored["bytes"]) if stored.get("bytes") is not None else stored["path"], name)
    if isinstance(image, Skipped):
        return image
    try:
        lines = tuple((_synthdog_box(chunk),) for chunk in row["2_coord"] or ())
    except (KeyError, TypeError, ValueError, IndexError) as error:
        return Skipped(name, f"has boxes that can't be read ({type(error).__name__}: {error}).")
    return Page(image, lines, name=name)


def _synthdog_box(chunk: dict[str, Any]) -> Box:
    """Bounds of all given points; the paper's code takes the first two as opposite corners."""
    points = [(float(point[0]), float(point[1])) for point in chunk["coord"]]
    if not isinstance(chunk["chunk"], str):
        raise TypeError(f"chunk is {chunk['chunk']!r}, not text")
    xs, ys = zip(*points, strict=True)
    return Box(chunk["chunk"], (min(xs), min(ys), max(xs), max(ys)))
