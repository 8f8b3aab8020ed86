"""Glyphs of the page symbols in several fonts, as coverage masks of one cell."""

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sparsemm_lmms.demo.pages import SYMBOLS

CELL = 14  # pixels a side: one high-resolution patch of LLaVA-NeXT, one merged token of Qwen2-VL
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "STIXGeneral", "STIXGeneralBol", "pillow",
)  # fmt: skip
SHIFTS = (-0.75, 0.0, 0.75)  # sub-pixel jitter of a glyph in x and in y
STORED = "models/glyphs.npz"
_SCALE, _CAP = 8, 10.5  # supersampling; height of a capital letter in pixels


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    if name == "pillow":
        return ImageFont.load_default(size)
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def _glyph(font: ImageFont.FreeTypeFont, text: str, dx: float, dy: float, base: float) -> np.ndarray:
    """Coverage [CELL, CELL] in 0..255: centred in x, standing on the common base line, wide letters narrowed."""
    side = CELL * _SCALE
    left, _, right, _ = font.getbbox(text, anchor="ls")
    wide = Image.new("L", (max(side, right - left + 2 * _SCALE), side))
    place = ((wide.width - left - right) / 2, base * _SCALE)
    ImageDraw.Draw(wide).text(place, text, fill=255, font=font, anchor="ls")
    if right - left > 0.86 * side:
        width = round(wide.width * 0.86 * side / (right - left))
        narrow = wide.resize((width, side), Image.Resampling.LANCZOS)
        wide = Image.new("L", (max(side, width), side))
        wide.paste(narrow, ((wide.width - width) // 2, 0))
    offset = (wide.width - side) / 2
    move = (1, 0, offset - dx * _SCALE, 0, 1, -dy * _SCALE)
    placed = wide.transform((side, side), Image.Transform.AFFINE, move, Image.Resampling.BILINEAR)
    return np.asarray(placed.resize((CELL, CELL), Image.Resampling.BOX))


def draw_atlas() -> np.ndarray:
    """Coverage masks, uint8 [fonts, 9 shifts, symbols, CELL, CELL], from the fonts on this machine."""
    out = np.zeros((len(FONTS), len(SHIFTS) ** 2, len(SYMBOLS), CELL, CELL), np.uint8)
    for f, name in enumerate(FONTS):
        _, top, _, _ = _font(name, 100 * _SCALE).getbbox("H", anchor="ls")
        font = _font(name, max(1, round(100 * _SCALE * _CAP * _SCALE / -top)))
        base = (CELL + _CAP) / 2
        for j, (dy, dx) in enumerate((y, x) for y in SHIFTS for x in SHIFTS):
            for s, symbol in enumerate(SYMBOLS):
                if symbol != " ":
                    out[f, j, s] = _glyph(font, symbol, dx, dy, base)
    return out


@cache
def atlas() -> np.ndarray:
    """The stored coverage masks, uint8 [fonts, 9 shifts, symbols, CELL, CELL].

    They are stored, so that an image is the same bytes whatever versions of Pillow and matplotlib are installed.
    """
    with np.load(Path(__file__).parent / STORED) as file:
        return file["masks"]


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / STORED, masks=draw_atlas())
