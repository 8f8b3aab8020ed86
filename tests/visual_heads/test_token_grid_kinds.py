"""The kinds of grid beside anyres and patches, against the models' own features of an image that carries positions."""

from __future__ import annotations

from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sparsemm_lmms.visual_heads.inputs import make_batch, with_answers
from sparsemm_lmms.visual_heads.samples import Box, CalibrationSample
from sparsemm_lmms.visual_heads.token_grid import BASE, GRIDS, HIGH, NEWLINE

from . import kinds, tiny
from .test_token_grid import SIZES, check_light, check_positions, position_image

PAN_AND_SCAN = dict(do_pan_and_scan=True, pan_and_scan_min_crop_size=20)
KINDS = {
    "LLaVA-1.5, cropped": kinds.llava_cropped,
    "LLaVA-1.5, with its class token": kinds.llava_with_class_token,
    "LLaVA-1.5, a crop beyond the image": kinds.llava_crop_beyond,
    "LLaVA-1.5, padded to a square": kinds.llava_padded,
    "LLaVA-1.5, stretched": kinds.llava_stretched,
    "PaliGemma": kinds.paligemma,
    "Mistral 3": kinds.mistral3,
    "Pixtral": kinds.pixtral,
    "InternVL": kinds.internvl,
    "InternVL, six tiles": partial(kinds.internvl, min_patches=2, max_patches=6),
    "InternVL, one tile": partial(kinds.internvl, max_patches=1),
    "Idefics3": kinds.idefics3,
    "Idefics3, sides that are no whole tiles": partial(kinds.idefics3, 200),
    "Idefics3, whole": partial(kinds.idefics3, do_image_splitting=False),
    "SmolVLM": kinds.smolvlm,
    "Qwen3-VL": partial(kinds.qwen3, "Qwen3VL"),
    "Qwen3.5": kinds.qwen3_5,
    "GLM-4.1V": partial(kinds.glm, "Glm4v"),
    "GLM-4.6V": partial(kinds.glm, "Glm46V"),
    "Gemma 4": kinds.gemma4,
    "Gemma 3": kinds.gemma3,
    "Gemma 3, pan and scan": partial(kinds.gemma3, **PAN_AND_SCAN),
    "LLaVA-OneVision": kinds.llava_onevision,
    "LLaVA-OneVision, all tokens": partial(kinds.llava_onevision, 16),
}
ANY = [name for name in KINDS if not name.startswith(("Mistral 3", "Pixtral", "Qwen3", "GLM"))]
"""Those whose processors take an image of any shape: others refuse slivers."""


@cache
def kind(name: str) -> kinds.Kind:
    torch.manual_seed(0)
    return KINDS[name]()


def check(name: str, size: tuple[int, int]) -> None:
    this = kind(name)
    inputs, features = this.read([position_image(*size)])
    features = features.numpy()
    (grid,) = this.grid.grids(inputs, [size], processor=this.processor)
    assert np.array_equal(grid.positions, np.flatnonzero(inputs["input_ids"][0].numpy() == kinds.IMAGE))
    assert len(grid.positions) == len(features)
    blank = (features[:, 0] == -5.0) | (features[:, 0] == 7.0)
    assert np.array_equal(grid.view == NEWLINE, blank) and not grid.boxes[blank].any()
    assert (grid.boxes[:, :2] >= 0).all() and (grid.boxes[:, 2:] <= size).all()
    if min(size) <= 8:  # a handful of pixels, enlarged, are no position scale
        return
    empty = (grid.boxes[:, 2:] - grid.boxes[:, :2]).min(1) <= 0
    assert (features[empty & ~blank, 2] < 0.02).all()  # what shows no pixel is padding
    for view in (BASE, HIGH):
        chosen = (grid.view == view) & ~empty
        if (features[chosen, 2] > 0.3).any():
            check_positions(features[chosen], grid.boxes[chosen], *size)
    if "padded" in name or "beyond" in name:  # how much of a patch is image follows from the box as well
        share = np.prod(grid.boxes[:, 2:] - grid.boxes[:, :2], axis=1)
        cell = this.grid.patch * this.grid.patch * (max(size) / 56 if "padded" in name else min(size) / 42) ** 2
        np.testing.assert_allclose(features[~blank, 2], share[~blank] / cell, atol=0.08)


@pytest.mark.parametrize("name", KINDS)
def test_features_lie_where_the_grid_says(name: str) -> None:
    for size in SIZES:
        if name in ANY or min(size) > 8:
            check(name, size)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=12, deadline=None)
@given(width=st.integers(30, 500), height=st.integers(30, 500))
def test_any_size(name: str, width: int, height: int) -> None:
    check(name, (width, height))


@pytest.mark.parametrize("name", KINDS)
def test_several_images_and_left_padding(name: str) -> None:
    this = kind(name)
    sizes = [(300, 100), (60, 200), (112, 112)]
    images = [position_image(*size) for size in sizes]
    nested = [images[:2], images[2:]]
    text = [f"{this.mark}and {this.mark}", f"a much longer question about {this.mark} that makes padding"]
    inputs, features = this.read(nested, text)
    grids = this.grid.grids(inputs, sizes, processor=this.processor)
    start = 0
    for row, (grid, mine) in enumerate(zip(grids, ([0, 1], [2]), strict=True)):
        assert (inputs["input_ids"][row, grid.positions] == kinds.IMAGE).all()
        assert sorted(set(grid.item.tolist())) == list(range(len(mine)))
        for item, image in enumerate(mine):
            boxes, view = grid.boxes[grid.item == item], grid.view[grid.item == item]
            own = features[start : start + len(boxes)].numpy()
            start += len(boxes)
            for which in (BASE, HIGH):
                chosen = (view == which) & ((boxes[:, 2:] - boxes[:, :2]).min(1) > 0)
                if chosen.any():
                    check_positions(own[chosen], boxes[chosen], *sizes[image])
    assert start == len(features)


@pytest.mark.parametrize("name", [name for name in KINDS if "whole" not in name and "one tile" not in name])
def test_a_coloured_box_lights_up_the_tokens_the_grid_names(name: str) -> None:
    this, box = kind(name), (60, 70, 130, 110)
    image = Image.new("RGB", (200, 180))
    image.paste((255, 255, 255), box)
    inputs, features = this.read([image])
    (grid,) = this.grid.grids(inputs, [image.size], processor=this.processor)
    light = features.numpy()
    light = np.where((light == -5.0) | (light == 7.0), 0, light)
    if "LLaVA-OneVision" == name:  # pooling reads a few of a part's patches, so that edges are none
        return
    check_light(grid, light, box, views="all")


@pytest.mark.parametrize("name", KINDS)
def test_a_word_in_a_batch(name: str) -> None:
    this = kind(name)
    if this.processor.chat_template is None:
        this.processor.chat_template = tiny.LLAVA_TEMPLATE.replace("<image>", this.mark)
    pictures = [position_image(300, 100), position_image(112, 112)]
    samples = []
    for index, picture in enumerate(pictures):
        x, y = picture.width / 2, picture.height / 2
        boxes = (Box("it", (x - 15, y - 15, x + 15, y + 15)),)
        samples.append(CalibrationSample(picture, "Read" + "!" * 9 * index, "it", boxes))
    batch = make_batch(samples, this.processor, this.grid, "high", this.model)
    assert (batch.sizes > 0).all()
    ids = batch.inputs["input_ids"]
    assert (ids[:, None].expand_as(batch.words)[batch.words] == kinds.IMAGE).all()


@pytest.mark.parametrize("name", KINDS)
def test_answers_get_the_scores_that_generation_gave_them(name: str) -> None:
    this = kind(name)
    this.processor.chat_template = tiny.LLAVA_TEMPLATE.replace("<image>", this.mark)
    torch.manual_seed(0)
    model = type(this.model)(this.model.config).eval()
    model.resize_token_embeddings(len(this.processor.tokenizer))
    model.generation_config.eos_token_id = None
    pictures = [position_image(200, 100), position_image(112, 112)]
    samples = [
        CalibrationSample(picture, "Read" + "!" * 9 * index, "it", (Box("it", (40, 40, 70, 70)),))
        for index, picture in enumerate(pictures)
    ]
    batch = make_batch(samples, this.processor, this.grid, "high", model)
    told = model.generate(
        **batch.inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    answers = told.sequences[:, batch.prompt :].tolist()
    with torch.no_grad():
        logits = model(**with_answers(batch, answers, 0, model), use_cache=False).logits
    expected = torch.stack(told.logits, dim=1)
    torch.testing.assert_close(logits[:, batch.prompt - 1 : -1], expected, atol=2e-4 * float(expected.std()), rtol=1e-3)


def test_tiles_are_high_and_the_whole_is_base() -> None:
    for name, last in (("InternVL", True), ("Idefics3", True), ("SmolVLM", True), ("Gemma 3, pan and scan", False)):
        this = kind(name)
        inputs, _ = this.read([position_image(300, 100)])
        (grid,) = this.grid.grids(inputs, [(300, 100)], processor=this.processor)
        whole = slice(-4, None) if last else slice(None, 4)
        assert (grid.view[whole] == BASE).all() and (grid.view == BASE).sum() == 4
        assert set(grid.view.tolist()) == {BASE, HIGH}
        assert len(grid.inside((0, 0, 300, 100))) == len(grid.view) - 4
        if not name.startswith("Gemma"):
            continue
        inputs, _ = this.read([position_image(110, 100)])
        (grid,) = this.grid.grids(inputs, [(110, 100)], processor=this.processor)
        assert (grid.view == HIGH).all() and len(grid.view) == 4


def test_what_the_crop_cuts_away_is_shown_by_no_token() -> None:
    this = kind("LLaVA-1.5, cropped")
    inputs, _ = this.read([position_image(300, 100)])
    (grid,) = this.grid.grids(inputs, [(300, 100)], processor=this.processor)
    assert len(grid.inside((0, 0, 99, 100))) == 0 and len(grid.inside((100, 0, 200, 100))) == 16
    np.testing.assert_allclose(grid.boxes[0], [100, 0, 125, 25], atol=0.1)


def test_disagreements_are_errors() -> None:
    for name in ("LLaVA-1.5, cropped", "InternVL", "Mistral 3", "LLaVA-OneVision"):
        this = kind(name)
        inputs, _ = this.read([position_image(300, 100)])
        with pytest.raises(ValueError, match="give the frames as images"):
            this.grid.grids(inputs, [], [(8, 8)], processor=this.processor)
    for name in ("LLaVA-1.5, cropped", "InternVL"):
        this = kind(name)
        inputs, _ = this.read([position_image(300, 100)])
        with pytest.raises(ValueError, match="follows the processor's settings; give processor="):
            this.grid.grids(inputs, [(300, 100)])
        with pytest.raises(ValueError, match="have no tokens in the prompts"):
            this.grid.grids(inputs, [(300, 100)] * 2, processor=this.processor)
        with pytest.raises(ValueError, match="more image tokens"):
            this.grid.grids(inputs, [], processor=this.processor)
    inputs, _ = kind("InternVL").read([position_image(300, 100)])
    with pytest.raises(ValueError, match="needs .* tokens, but the prompt has|more image tokens"):
        kind("InternVL").grid.grids(inputs, [(400, 400)], processor=kind("InternVL").processor)
    inputs, _ = kind("Mistral 3").read([position_image(300, 100)])
    with pytest.raises(ValueError, match="1 images in the inputs but 2 image sizes"):
        kind("Mistral 3").grid.grids(inputs, [(300, 100)] * 2)


def test_unknown_processors_are_errors() -> None:
    config = kind("InternVL").model.config
    strange = SimpleNamespace(image_processor=SimpleNamespace(), image_seq_length=4)
    with pytest.raises(ValueError, match="No token grid for SimpleNamespace: how it cuts images"):
        GRIDS["tiles"](config, [3]).grids({"input_ids": [[3] * 4]}, [(8, 8)], processor=strange)
    strange.image_seq_length = 5
    with pytest.raises(ValueError, match="pictures have 5 tokens, which is no square"):
        GRIDS["tiles"](config, [3]).grids({"input_ids": [[3] * 4]}, [(8, 8)], processor=strange)
    options = SimpleNamespace(do_resize=True, size={"longest_edge": 56})
    with pytest.raises(ValueError, match="size={'longest_edge': 56}; height and width, or shortest_edge"):
        GRIDS["fixed"](kind("PaliGemma").model.config, [3]).grids(
            {"input_ids": [[3] * 4]}, [(8, 8)], processor=SimpleNamespace(image_processor=options)
        )
