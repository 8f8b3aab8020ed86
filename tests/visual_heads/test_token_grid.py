"""The token grid against the models' own packing: patches carry their position, the model carries the patches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from sparsemm_lmms.visual_heads.token_grid import BASE, HIGH, NEWLINE, grid_for

from . import tiny

SIZES = [(56, 56), (112, 112), (300, 100), (100, 300), (33, 47), (640, 480), (481, 640), (1000, 90), (90, 1000)]
SIZES += [(57, 56), (113, 111), (700, 3), (5, 400), (168, 56), (169, 57), (2, 2), (250, 251), (400, 201)]
RAW = dict(do_rescale=True, do_normalize=False)


class PatchMeans(nn.Module):
    """A vision tower whose feature of a patch is the patch's mean colour (and a class token in front)."""

    def forward(self, pixel_values, **_):
        means = nn.functional.avg_pool2d(pixel_values, 14).flatten(2).transpose(1, 2)
        tokens = torch.cat([torch.full_like(means[:, :1], 7.0), means], dim=1)
        return SimpleNamespace(hidden_states=[tokens], last_hidden_state=tokens, pooler_output=None)


@pytest.fixture(scope="module")
def llava():
    model = tiny.llava_next()
    model.model.vision_tower = PatchMeans()
    model.model.multi_modal_projector = nn.Identity()
    model.model.image_newline = nn.Parameter(torch.full((3,), -5.0))
    return model


@pytest.fixture(scope="module")
def llava_processor():
    return tiny.llava_processor(**RAW)


@pytest.fixture(scope="module")
def qwen():
    model = tiny.qwen2_vl()
    visual = model.model.visual
    visual.blocks = nn.ModuleList()
    # Conv3d input order in a patch: channel, time, height, width
    visual.patch_embed = Means(lambda x: x.view(len(x), 3, -1).mean(-1))
    visual.merger = Means(lambda x: x.view(-1, 4, 3).mean(1))
    return model


class Means(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.anything = nn.Parameter(torch.zeros(()))  # the tower's dtype is its parameters'

    def forward(self, x, *_, **__):
        return self.function(x)


@pytest.fixture(scope="module")
def qwen_processor():
    return tiny.qwen_processor(**RAW)


def position_image(width, height):
    """Red grows with x, green with y (pixel centres), blue is one: blue tells how much of a patch is image."""
    x = (np.arange(width) + 0.5) / width * 255
    y = (np.arange(height) + 0.5) / height * 255
    pixels = np.zeros((height, width, 3))
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = x[None, :], y[:, None], 255
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def llava_features(model, processor, images):
    inputs = processor(text=["".join("<image>" for _ in images) + "hi"], images=images, return_tensors="pt")
    with torch.no_grad():
        features = model.model.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], vision_feature_layer=-1, return_dict=True
        ).pooler_output
    return inputs, [feature.numpy() for feature in features]


def qwen_features(model, inputs, video=False):
    with torch.no_grad():
        if video:
            output = model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        else:
            output = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    features = getattr(output, "pooler_output", output)
    return torch.cat(list(features)).numpy() if not isinstance(features, torch.Tensor) else features.numpy()


def check_positions(features, boxes, width, height, slack=0.16):
    """The colour read back from each token is the centre of the pixels that the grid says it shows."""
    seen = features[:, 2] > 0.3  # at least a third of the patch is image
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    read = features[:, :2] / np.maximum(features[:, 2:], 1e-9) * [width, height]
    cell = np.maximum((boxes[:, 2:] - boxes[:, :2]).max(0), 1)
    error = np.abs(read - centre)[seen] / cell
    assert error.max() < slack, (width, height, error.max())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_llava_next_matches_the_models_own_packing(llava, llava_processor, size):
    width, height = size
    inputs, (features,) = llava_features(llava, llava_processor, [position_image(width, height)])
    (grid,) = grid_for(llava.config).grids(inputs, [size])
    assert len(grid.positions) == len(features) == int((inputs["input_ids"] == 3).sum())
    assert np.array_equal(grid.positions, np.flatnonzero(inputs["input_ids"][0].numpy() == 3))
    newline = features[:, 0] == -5.0
    assert np.array_equal(grid.view == NEWLINE, newline)
    assert (grid.view[:16] == BASE).all() and (grid.view[16:] != BASE).all()
    assert not grid.boxes[newline].any()
    for view in (BASE, HIGH) if min(size) > 8 else ():  # a handful of pixels, enlarged, are no position scale
        chosen = grid.view == view
        check_positions(features[chosen], grid.boxes[chosen], width, height)
    # How much of each high-resolution patch is image, not padding, follows from the box as well.
    high = grid.view == HIGH
    if min(size) > 8:  # thinner ones are stretched by rounding, so that a patch is no square of the original
        sides = grid.boxes[high, 2:] - grid.boxes[high, :2]
        np.testing.assert_allclose(features[high, 2], np.prod(sides, axis=1) / sides.max() ** 2, atol=0.08)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 900), height=st.integers(1, 900))
def test_llava_next_number_and_newlines_for_any_size(llava, llava_processor, width, height):
    inputs = llava_processor(text=["<image>"], images=[Image.new("RGB", (width, height))], return_tensors="pt")
    (grid,) = grid_for(llava.config).grids(inputs, [(width, height)])
    image = torch.zeros(inputs["pixel_values"].shape[1], 16, 3)
    packed, _ = llava.model.pack_image_features([image], inputs["image_sizes"], "default", torch.full((3,), -5.0))
    assert np.array_equal(packed[0][:, 0].numpy() == -5.0, grid.view == NEWLINE)


def test_llava_next_several_images_and_left_padding(llava, llava_processor):
    sizes = [(300, 100), (60, 200), (112, 112)]
    images = [position_image(*size) for size in sizes]
    text = ["<image>and <image>", "a much longer question about <image> that makes padding"]
    inputs = llava_processor(text=text, images=images, padding=True, return_tensors="pt")
    first, second = grid_for(llava.config).grids(inputs, sizes)
    _, features = llava_features(llava, llava_processor, images)
    for row, (grid, mine) in enumerate([(first, [0, 1]), (second, [2])]):
        assert (inputs["input_ids"][row, grid.positions] == 3).all()
        assert grid.item.tolist() == sum([[item] * len(features[image]) for item, image in enumerate(mine)], [])
        for item, image in enumerate(mine):
            chosen = (grid.item == item) & (grid.view == HIGH)
            high = features[image][16:]
            check_positions(high[high[:, 0] != -5.0], grid.boxes[chosen], *sizes[image])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_coloured_box_lights_up_the_tokens_the_grid_names(llava, llava_processor, qwen, qwen_processor, data):
    width, height = data.draw(st.integers(60, 500)), data.draw(st.integers(60, 500))
    left, top = data.draw(st.integers(0, width - 20)), data.draw(st.integers(0, height - 20))
    box = (left, top, data.draw(st.integers(left + 15, width)), data.draw(st.integers(top + 15, height)))
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), box)
    inputs, (features,) = llava_features(llava, llava_processor, [image])
    (grid,) = grid_for(llava.config).grids(inputs, [(width, height)])
    check_light(grid, np.where(features == -5.0, 0, features), box, views="all")
    inputs = qwen_processor(text=["<image>"], images=[image], return_tensors="pt")
    (grid,) = grid_for(qwen.config).grids(inputs, [(width, height)])
    check_light(grid, qwen_features(qwen, inputs), box, views="high")


def check_light(grid, features, box, views):
    light = features.max(1)
    named = np.isin(grid.positions, grid.inside(box, views=views))
    cells = grid.boxes
    overlap = np.prod(
        np.maximum(np.minimum(cells[:, 2:], box[2:]) - np.maximum(cells[:, :2], box[:2]), 0), axis=1
    ) / np.maximum(np.prod(cells[:, 2:] - cells[:, :2], axis=1), 1e-9)
    assert named.sum() > 0 and not named[overlap == 0].any() and named[overlap > 0].all()
    # Brightness is the covered share; a bicubic edge that rings or smears moves it by less than 0.2 of a patch,
    # except in patches that are mostly padding (their covered share is of the image part only).
    whole = np.prod(cells[:, 2:] - cells[:, :2], axis=1)
    full = whole > 0.98 * np.array([whole[grid.view == view].max() for view in grid.view])
    full &= grid.view != NEWLINE
    np.testing.assert_allclose(light[full], overlap[full], atol=0.2)


@pytest.mark.parametrize("size", [s for s in SIZES if min(s) > 8], ids=str)
def test_qwen2_vl_images(qwen, qwen_processor, size):
    inputs = qwen_processor(text=["see <image>"], images=[position_image(*size)], return_tensors="pt")
    (grid,) = grid_for(qwen.config).grids(inputs, [size])
    features = qwen_features(qwen, inputs)
    assert len(grid.positions) == len(features)
    assert np.array_equal(grid.positions, np.flatnonzero(inputs["input_ids"][0].numpy() == 3))
    check_positions(features, grid.boxes, *size)


def test_qwen2_vl_several_images_and_a_video(qwen, qwen_processor):
    sizes, clip = [(300, 100), (60, 200)], (120, 90)
    images = [position_image(*size) for size in sizes]
    frames = [Image.eval(position_image(*clip), lambda v, k=k: v if k < 2 else v // 2) for k in range(4)]
    video = np.stack([np.asarray(frame) for frame in frames])
    text = ["one <image> then <video> and <image>", "nothing here"]
    inputs = qwen_processor(text=text, images=images, videos=[video], padding=True, return_tensors="pt")
    grid, empty = grid_for(qwen.config).grids(inputs, sizes, [clip])
    assert len(empty.positions) == 0 and len(empty.inside((0, 0, 9, 9))) == 0
    assert sorted(set(grid.item.tolist())) == [0, 1, 2]
    still, moving = qwen_features(qwen, inputs), qwen_features(qwen, inputs, video=True)
    check_positions(still[: (grid.item == 0).sum()], grid.boxes[grid.item == 0], *sizes[0])
    check_positions(still[(grid.item == 0).sum() :], grid.boxes[grid.item == 2], *sizes[1])
    check_positions(moving, grid.boxes[grid.item == 1], *clip)
    assert (inputs["input_ids"][0, grid.positions[grid.item == 1]] == 4).all()
    frame = grid.frame[grid.item == 1]
    assert np.allclose(moving[:, 2] > 0.7, frame == 0) and set(frame.tolist()) == {0, 1}
    early = grid.inside((0, 0, 10, 10), item=1, frame=0)
    assert len(early) == 1 and len(grid.inside((0, 0, 10, 10), item=1)) == 2


def test_views_is_a_choice(llava, llava_processor):
    inputs = llava_processor(text=["<image>"], images=[Image.new("RGB", (112, 112))], return_tensors="pt")
    (grid,) = grid_for(llava.config).grids(inputs, [(112, 112)])
    everything = (0, 0, 112, 112)
    assert len(grid.inside(everything)) == 64  # 8 x 8 tiles' patches, no newline
    assert len(grid.inside(everything, views="all")) == 64 + 16
    assert len(grid.inside((14, 14, 28, 28))) == 1  # touching an edge is not overlapping


def test_disagreements_are_errors(llava, llava_processor, qwen):
    inputs = llava_processor(text=["<image>"], images=[Image.new("RGB", (112, 112))], return_tensors="pt")
    grids = grid_for(llava.config).grids
    with pytest.raises(ValueError, match="needs .* tokens, but the prompt has|more image tokens"):
        grids(inputs, [(200, 56)])
    with pytest.raises(ValueError, match="more image tokens"):
        grids(inputs, [])
    with pytest.raises(ValueError, match="1 images or videos have no tokens"):
        grids(inputs, [(112, 112)] * 2)
    with pytest.raises(ValueError, match="images only"):
        grids(inputs, [], [(8, 8)])
    with pytest.raises(ValueError, match="0 image grids but 1 image sizes"):
        grid_for(qwen.config).grids(inputs, [(112, 112)])
    known = "No token grid for model type 'bert'.*use head_scores=PATH.*; known are .*llava_next, .*qwen2_vl"
    with pytest.raises(ValueError, match=known):
        grid_for(SimpleNamespace(model_type="bert"))
