"""What `show` draws: attention of single heads against the eager matrices, kept tokens against the cache's rule."""

import numpy as np
import pytest
import torch
from PIL import Image

from sparsemm_lmms.config import CompressionConfig
from sparsemm_lmms.head_scores import HeadScores
from sparsemm_lmms.visual_heads import plots
from sparsemm_lmms.visual_heads.inputs import chat_messages
from sparsemm_lmms.visual_heads.plots import plot_view
from sparsemm_lmms.visual_heads.samples import CalibrationSample
from sparsemm_lmms.visual_heads.show import choose_heads, paint, view_heads
from sparsemm_lmms.visual_heads.token_grid import HIGH, TokenGrid

from . import tiny

SCORES = HeadScores(np.arange(1.0, 13).reshape(3, 4)[::-1] ** 2)
COMPRESSION = CompressionConfig(method="sparsemm", budget=24, window_size=8)


def picture(width=150, height=100):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_heads_are_the_best_and_some_of_the_lower_half():
    heads = choose_heads(SCORES, 3, seed=1)
    assert heads[:3] == [(0, 3), (0, 2), (0, 1)]
    assert len(set(heads)) == 6 and all(SCORES.values[head] <= np.median(SCORES.values) for head in heads[3:])
    assert choose_heads(SCORES, 3, seed=1) == heads
    with pytest.raises(ValueError, match="heads=7 must lie between 1 and 6"):
        choose_heads(SCORES, 7)


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_attention_and_kept_tokens(family):
    model = tiny.llava_next("mistral") if family == "llava" else tiny.qwen2_vl()
    processor = tiny.llava_processor() if family == "llava" else tiny.qwen_processor()
    view = view_heads(model, processor, picture(), "Read it", SCORES, count=2, max_tokens=4, compression=COMPRESSION)
    assert 1 <= len(view.tokens) <= 4 and view.attention.shape == (4, len(view.tokens), len(view.grid.positions))
    sample = CalibrationSample(picture(), "Read it", "")
    text = processor.apply_chat_template(chat_messages(sample), tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[picture()], return_tensors="pt", add_special_tokens=False)
    prompt = inputs["input_ids"].shape[1]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        rows = torch.stack(model(**inputs, output_attentions=True).attentions)[:, 0, :, -1].numpy()
    model.set_attn_implementation("sdpa")
    for row, (layer, head) in enumerate(view.heads):
        np.testing.assert_allclose(view.attention[row, 0], rows[layer, head, view.grid.positions], rtol=1e-3, atol=1e-5)
    for row, (layer, head) in enumerate(view.heads):
        capacity = COMPRESSION.window_size + _capacities()[layer, head // 2]
        outside = view.grid.positions < prompt - COMPRESSION.window_size
        assert view.kept[row].sum() <= min(capacity, prompt)
        assert view.kept[row][~outside].all()  # the window is always kept


def _capacities():
    from sparsemm_lmms.selection import head_budgets

    return head_budgets(SCORES.values, kv_heads=2, budget=24, window_size=8).numpy()


def test_paint_fills_the_boxes_of_the_high_resolution_tokens():
    boxes = np.array([[0, 0, 9, 9], [0, 0, 4, 3], [4, 0, 8, 3]], dtype=float)
    view = np.array([0, HIGH, HIGH], dtype=np.int8)
    zero = np.zeros(3, dtype=np.int64)
    canvas = paint(TokenGrid(np.arange(3), zero, view, zero, boxes), np.array([9.0, 1.0, 2.0]), 9, 9)
    assert canvas.sum() == 12 * 1 + 12 * 2 and canvas[0, 0] == 1 and canvas[2, 7] == 2 and canvas[3, 0] == 0


def test_picture(tmp_path, monkeypatch):
    drawn = []
    stock = plots._figure
    monkeypatch.setattr(plots, "_figure", lambda *size: drawn.append(stock(*size)) or drawn[-1])
    model, processor = tiny.llava_next(), tiny.llava_processor()
    view = view_heads(model, processor, picture(), "Read", SCORES, count=1, max_tokens=2, compression=COMPRESSION)
    path = plot_view(view, tmp_path / "view.png", "Read")
    with Image.open(path) as image:
        assert image.format == "PNG"
    axes = drawn[0].axes
    assert len(axes) == 2 * (len(view.tokens) + 1)
    assert "visual" in axes[0].get_ylabel() and "layer 0, head 3" in axes[0].get_ylabel()
    assert axes[len(view.tokens)].get_title() == f"keeps {view.kept[0].sum()} of {len(view.grid.positions)}"
    covered = axes[len(view.tokens)].images[1].get_array()[..., 3]  # what the cache dropped is covered, the rest is not
    held = paint(view.grid, view.kept[0].astype(float), *view.image.size)
    assert np.array_equal(covered == 0, held == 1) and 0 < (covered > 0).mean() < 1
    bare = view_heads(model, processor, picture(), "Read", SCORES, count=1, max_tokens=1)
    assert bare.kept is None and plot_view(bare, tmp_path / "bare.svg").exists()
    with pytest.raises(ValueError, match="3 layers x 4 heads"):
        view_heads(model, processor, picture(), "Read", HeadScores.uniform(2, 2), count=1)
