"""Calibration images without a download: rendered text with known word boxes, seeded and reproducible.

Page k of seed s is the same everywhere that Pillow and the fonts are: sizes, fonts (matplotlib's DejaVu, Pillow's own),
contrast in both polarities, background (plain, gradient, noise), one to three columns and a small rotation are drawn
from ``random.Random(f"{s}:{k}")``. Words mix common English words, numbers and codes, so that their tokens can't be
guessed without looking.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sparsemm_lmms.visual_heads.samples import PAPER_PROMPT, Box, CalibrationSample, Page, Readings, Skipped, ask

SIZES = [(336, 336), (448, 336), (336, 448), (672, 336), (504, 672), (672, 504), (640, 640), (800, 600), (600, 800)]
WORDS = """about above account across action address after again agree airport amount animal answer apple april area
arrive august autumn balance bank basket beach become begin behind better bicycle bird board border bottle bread bridge
bright broken brother brown budget build button camera cancel candle carbon castle center change cheese choose church
circle city clean clear clock cloud coast coffee color common copper corner cotton country cousin credit cross current
daily danger daughter december degree deliver demand desert dinner direct doctor dollar double dream driver early earth
eastern effort eight electric eleven energy engine enough entry equal evening exact example exit express fabric family
farmer father february fellow fifteen figure final finger fire flight floor flower follow forest forward fresh friday
garden gentle glass golden grain green ground group guide hammer handle harbor heart heavy height history holiday honest
hotel hour hundred ice improve inside invoice iron island january jacket journey june keep kitchen ladder language large
later leader letter level library light limit listen little local lucky lunch machine magic manner march market master
meadow measure medal member metal middle million minute mirror modern monday money month morning mother motion mountain
music narrow nation nature needle nickel nine north notice november number object ocean october office open orange order
ounce oxygen paper parcel partner pencil people pepper phone piano picture planet plastic pocket police pound power
price product public purple quarter queen question quick quiet radio railway reason receipt record red region repair
report return ribbon river rocket round safety salt saturday school science season second secret seven shadow shoulder
signal silver simple sister sixteen smooth snow social south special spring square station steel street student sugar
summer sunday supply table target taxi teacher tender theater thirty thunder thursday ticket timber today tomorrow
total tower travel tree tuesday twelve under union update useful valley vehicle version village violet visit voice
volume wagon water weather wednesday weight western wheel white window winter wonder wood world yellow yesterday
zero""".split()


@dataclass(frozen=True)
class GeneratedPages:
    """``count`` rendered pages as an iterable of samples; ``describe()`` goes into the provenance.

    >>> len(list(GeneratedPages(count=3, seed=0)))
    3
    """

    count: int
    seed: int = 0
    readings: Readings = "transcribe"
    prompt: str = PAPER_PROMPT

    def __iter__(self) -> Iterator[CalibrationSample | Skipped]:
        for index in range(self.count):
            yield from ask(render_page(index, self.seed), self.readings, self.seed, self.prompt)

    def __len__(self) -> int:
        return self.count

    def describe(self) -> dict[str, object]:
        return {"source": "generated", "seed": self.seed, "readings": self.readings, "prompt": self.prompt}


@lru_cache(maxsize=1)
def font_files() -> tuple[str, ...]:
    """Matplotlib's DejaVu fonts, which every installation of it carries; "" stands for Pillow's own font."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono"]
    return (*(str(folder / f"{name}.ttf") for name in names if (folder / f"{name}.ttf").is_file()), "")


@lru_cache(maxsize=256)
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(file, size) if file else ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("This Pillow was built without FreeType, which drawing calibration pages needs.")
    return font


def render_page(index: int, seed: int = 0) -> Page:
    """Page ``index`` of ``seed``: an RGB image and its lines of word boxes (axis-aligned, also after rotation)."""
    draw = random.Random(f"{seed}:{index}")
    width, height = draw.choice(SIZES)
    background, ink = _colours(draw)
    image = _paper(draw, width, height, background)
    font = _font(draw.choice(font_files()), draw.randint(16, 34))
    angle = draw.choice([0.0, 0.0, draw.uniform(-4, 4)])
    layer = Image.new("L", (width, height))
    lines = _write(draw, ImageDraw.Draw(layer), font, width, height)
    if angle:
        layer = layer.rotate(angle, resample=Image.Resampling.BICUBIC)
    image.paste(Image.new("RGB", (width, height), ink), mask=layer)
    turned = tuple(
        tuple(Box(box.text, _turn(box.xyxy, angle, width, height)) for box in line) for line in lines if line
    )
    return Page(image, turned, name=f"generated-{seed}-{index}")


def _colour(draw: random.Random) -> tuple[int, int, int]:
    return draw.randint(0, 255), draw.randint(0, 255), draw.randint(0, 255)


def _colours(draw: random.Random) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Paper and ink whose luminance differs by at least 90 of 255, either way round."""
    while True:
        paper, ink = (_colour(draw), _colour(draw))
        difference = (p - i for p, i in zip(paper, ink, strict=True))
        if abs(sum(d * weight for d, weight in zip(difference, (0.3, 0.59, 0.11), strict=True))) >= 90:
            return paper, ink


def _paper(draw: random.Random, width: int, height: int, colour: tuple[int, int, int]) -> Image.Image:
    pixels = np.broadcast_to(np.array(colour, np.float32), (height, width, 3)).copy()
    kind = draw.choice(["plain", "gradient", "noise"])
    if kind == "gradient":
        pixels += np.linspace(-20, 20, width, dtype=np.float32)[None, :, None] * draw.choice([-1, 1])
    elif kind == "noise":
        noise = np.random.default_rng(draw.randrange(2**32))
        pixels += noise.normal(0, 8, pixels.shape).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _word(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.7:
        word = draw.choice(WORDS)
        return draw.choice([word, word, word.capitalize(), word.upper()])
    if kind < 0.9:
        return "".join(draw.choice(string.digits) for _ in range(draw.randint(2, 6)))
    return "".join(draw.choice(string.ascii_uppercase + string.digits) for _ in range(draw.randint(3, 6)))


def _write(
    draw: random.Random, canvas: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, width: int, height: int
) -> list[list[Box]]:
    """Fill the columns with lines of words; boxes are what the glyphs really cover."""
    columns = draw.choice([1, 1, 2, 3]) if width >= 600 else draw.choice([1, 1, 2])
    margin = max(12, width // 20)
    step = int(font.size * draw.uniform(1.4, 2.2))
    space = font.size * draw.uniform(0.4, 0.7)
    column_width = (width - margin * (columns + 1)) / columns
    lines: list[list[Box]] = []
    for column in range(columns):
        left = margin + column * (column_width + margin)
        rows = max(1, min(draw.randint(2, 12), (height - 2 * margin) // step))
        first = draw.randint(margin, max(margin, height - margin - rows * step))
        for top in range(first, first + rows * step, step):
            line, x = [], left
            for _ in range(draw.randint(1, 5)):
                text = _word(draw)
                if x + canvas.textlength(text, font=font) > left + column_width:
                    break
                canvas.text((x, top), text, fill=255, font=font)
                line.append(Box(text, _edges(canvas, x, top, text, font)))
                x += canvas.textlength(text, font=font) + space
            lines.append(line)
    if not any(lines):  # a narrow column and long words: at least one short number
        canvas.text((margin, margin), "2026", fill=255, font=font)
        lines = [[Box("2026", _edges(canvas, margin, margin, "2026", font))]]
    return lines


def _turn(
    xyxy: tuple[float, float, float, float], angle: float, width: int, height: int
) -> tuple[float, float, float, float]:
    """Axis-aligned bounds of a box after PIL's counter-clockwise rotation about the centre, clipped to the image."""
    left, top, right, bottom = xyxy
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    points = [(x - width / 2, y - height / 2) for x in (left, right) for y in (top, bottom)]
    xs = [x * cos + y * sin + width / 2 for x, y in points]
    ys = [y * cos - x * sin + height / 2 for x, y in points]
    return max(min(xs), 0.0), max(min(ys), 0.0), min(max(xs), float(width)), min(max(ys), float(height))


def _edges(
    canvas: ImageDraw.ImageDraw, x: float, y: float, text: str, font: ImageFont.FreeTypeFont
) -> tuple[float, float, float, float]:
    left, top, right, bottom = canvas.textbbox((x, y), text, font=font)
    return float(left), float(top), float(right), float(bottom)
