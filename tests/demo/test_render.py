"""Images are the same bytes everywhere, and the processors pass their pixels on unchanged."""

import hashlib

import numpy as np
import pytest
import torch

from sparsemm_lmms.demo import FAMILIES
from sparsemm_lmms.demo.align import random_tiles, tile_features
from sparsemm_lmms.demo.architecture import SQUARE, TILE, build_model, build_processor
from sparsemm_lmms.demo.data import sample, samples, stream
from sparsemm_lmms.demo.forward import image_features
from sparsemm_lmms.demo.glyphs import CELL
from sparsemm_lmms.demo.pages import FORMS, GRIDS, SYMBOLS, sample_page
from sparsemm_lmms.demo.questions import KINDS, KINDS_OF_FORM, answers
from sparsemm_lmms.demo.render import render


def test_images_are_seeded():
    digest = hashlib.sha256(render(stream(0, "heldout", 0), np.arange(42).reshape(6, 7)).tobytes()).hexdigest()
    again = render(stream(0, "heldout", 0), np.arange(42).reshape(6, 7))
    assert hashlib.sha256(again.tobytes()).hexdigest() == digest
    assert not np.array_equal(again, render(stream(0, "train", 0), np.arange(42).reshape(6, 7)))


@pytest.mark.parametrize("grid", GRIDS)
def test_high_resolution_tiles_are_the_image(grid):
    """LLaVA-NeXT's tiles after the overview are the image, centred on black up to its pinpoint."""
    image = sample("all", 0, "heldout", 0, grid).image
    pixels = build_processor("llava_next").image_processor(images=[image], return_tensors="pt")["pixel_values"][0, 1:]
    down = pixels.shape[0] // 3
    side = TILE * CELL
    canvas = pixels.view(down, 3, 3, side, side).permute(2, 0, 3, 1, 4).reshape(3, down * side, 3 * side)
    top = (canvas.shape[1] - grid[0] * CELL) // 2
    want = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(canvas[:, top : top + grid[0] * CELL], want, rtol=0, atol=1e-5)
    assert torch.all(canvas[:, :top] == -1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_alignment_tiles_are_seen_as_in_a_prompt(family):
    torch.set_num_threads(1)
    model = build_model(family).eval()
    tiles, _ = random_tiles(np.random.default_rng(0), 2, SQUARE if family == "internvl" else TILE)
    got = tile_features(model, tiles)
    images = [np.repeat(t[..., None], 3, -1) for t in tiles]
    if family == "llava_next":  # an image of one tile is no pinpoint: compare with the tower on normalised pixels
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        want = model.model.multi_modal_projector(hidden)
    else:
        inputs = build_processor(family).image_processor(images=images, return_tensors="pt")
        want = image_features(model, inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_hold_the_answer(kind):
    for s in samples(kind, 6, 3):
        image, question, answer, words = s
        assert image.size == (s.page.cols * CELL, s.page.rows * CELL) and question and answer
        grid = s.page.cells
        for word in words + s.characters:
            x0, y0, x1, y1 = (v // CELL for v in word["box"])
            assert y1 == y0 + 1 and "".join(SYMBOLS[i] for i in grid[y0, x0:x1]) == word["text"]
        assert set(answer) - set(" \n") <= set("".join(w["text"] for w in words))


def test_every_form_answers_its_kinds():
    for form in FORMS:
        page = sample_page(np.random.default_rng(0), form, 24, 24)
        for kind in KINDS_OF_FORM[form]:
            assert all(answer for _, answer in answers(page, kind))
    with pytest.raises(ValueError, match="too small"):
        sample_page(np.random.default_rng(0), "page", 8, 8)
    with pytest.raises(ValueError, match="unknown split"):
        stream(0, "nowhere", 0)
