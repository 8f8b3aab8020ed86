"""Pages as pixels: fonts, contrast, both polarities, jitter and speckle, in sixteen grey levels."""

import numpy as np

from sparsemm_lmms.demo.glyphs import CELL, atlas

LEVELS = 16


def render(rng: np.random.Generator, cells: np.ndarray) -> np.ndarray:
    """Grey image, uint8 [rows * CELL, cols * CELL], of symbol indices [rows, cols].

    One font, ink and paper an image; every glyph has its own sub-pixel shift; one pixel in fifty is a speckle.
    """
    masks = atlas()
    font = int(rng.integers(len(masks)))
    shift = rng.integers(masks.shape[1], size=cells.shape)
    cover = masks[font, shift, cells].astype(np.float32) / 255  # [rows, cols, CELL, CELL]
    contrast = rng.uniform(0.45, 0.95)
    low = rng.uniform(0.0, 1.0 - contrast)
    paper, ink = (low + contrast, low) if rng.random() < 0.5 else (low, low + contrast)
    image = (paper + (ink - paper) * cover).transpose(0, 2, 1, 3).reshape(cells.shape[0] * CELL, -1)
    speckles = rng.random(image.shape) < 0.02
    image[speckles] += rng.uniform(-0.25, 0.25, int(speckles.sum()))
    steps = np.clip(np.rint(image * (LEVELS - 1)), 0, LEVELS - 1)
    return (steps * (255 // (LEVELS - 1))).astype(np.uint8)
