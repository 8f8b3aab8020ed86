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
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from sparsemm_lmms.scoring.samples import PAPER_PROMPT, Box, CalibrationSample, Page, Readings, Skipped, ask

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
        return {"source": "folder", "folder": str(self.folder), "readings": self.readings, "prompt": self.prompt}


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
        return {**facts, "readings": self.readings, "prompt": self.prompt}

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
    try:
        facts = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        lines = facts["lines"] if "lines" in facts else [[word] for word in facts["boxes"]]
        boxes = tuple(tuple(_folder_box(word) for word in line) for line in lines)
    except FileNotFoundError:
        return Skipped(file.name, f"has no text boxes: {file.stem}.json is missing.")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        return Skipped(file.name, f"{file.stem}.json is not in the known format ({type(error).__name__}: {error}).")
    image = _open(file, file.name)
    return image if isinstance(image, Skipped) else Page(image, boxes, name=file.name)


def _folder_box(word: dict[str, Any]) -> Box:
    left, top, right, bottom = (float(value) for value in word["box"])
    return Box(str(word["text"]), (left, top, right, bottom))


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
    xs, ys = zip(*points, strict=True)
    return Box(chunk["chunk"], (min(xs), min(ys), max(xs), max(ys)))
