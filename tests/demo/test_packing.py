"""Packed training batches give the logits of the real model on the real processor's output."""

import numpy as np
import pytest
import torch

from sparsemm_lmms.demo import FAMILIES
from sparsemm_lmms.demo.architecture import build_model, build_processor
from sparsemm_lmms.demo.data import sample
from sparsemm_lmms.demo.forward import ATTENTION, embed, image_features, logits
from sparsemm_lmms.demo.glyphs import CELL
from sparsemm_lmms.demo.packing import Packer, collate, frame, image_items
from sparsemm_lmms.demo.pages import GRIDS
from sparsemm_lmms.demo.questions import KINDS
from sparsemm_lmms.visual_heads.token_grid import grid_for


@pytest.fixture(scope="module", params=FAMILIES)
def setup(request):
    torch.set_num_threads(1)
    processor = build_processor(request.param)
    packer = Packer(request.param, lambda text: processor.tokenizer(text, add_special_tokens=False).input_ids)
    return request.param, build_model(request.param).eval(), processor, packer


def real_logits(family, model, processor, message, answer):
    """Logits and labels of the answer from the plain model on one prompt."""
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    images = {"images": [message["image"]]} if "image" in message else {}
    inputs = processor(text=[text + answer + frame(family)[3]], return_tensors="pt", **images)
    count = len(processor.tokenizer(answer).input_ids) + 1
    model.set_attn_implementation("sdpa")
    return model(**inputs).logits[0, -count - 1 : -1], inputs["input_ids"][0, -count:]


@torch.inference_mode()
def test_packing_equals_the_real_forward(setup):
    family, model, processor, packer = setup
    samples = [sample(KINDS[i], 7, "heldout", i, grid) for i, grid in enumerate(GRIDS)]
    exercise = ("Copy this text: AB 7", "AB 7")
    packed = [packer.pack(s.page, {"short": [(s.question, s.answer)] * 2}, [exercise]) for s in samples]
    arrays, layout = collate(packed)
    batch = {name: torch.from_numpy(value) for name, value in arrays.items()}
    pixels = [processor.image_processor(images=[s.image], return_tensors="pt") for s in samples]
    features = [image_features(model, p) for p in pixels]
    features = torch.nn.utils.rnn.pad_sequence([f[0] for f in features], batch_first=True)
    model.set_attn_implementation({"text_config": ATTENTION, "vision_config": "sdpa"})
    got, labels = logits(model, batch, layout, embed(model, batch, features))
    at = 0
    for s in samples:
        content = [{"type": "image"}, {"type": "text", "text": s.question}]
        message = {"role": "user", "content": content, "image": s.image}
        want, wanted = real_logits(family, model, processor, message, s.answer)
        for _ in range(2):  # both copies of the question, which must not see each other
            torch.testing.assert_close(got[at : at + len(want)], want, rtol=1e-4, atol=1e-5)
            assert torch.equal(labels[at : at + len(want)], wanted)
            at += len(want)
        message = {"role": "user", "content": [{"type": "text", "text": exercise[0]}]}
        want, wanted = real_logits(family, model, processor, message, exercise[1])
        torch.testing.assert_close(got[at : at + len(want)], want, rtol=1e-4, atol=1e-5)
        assert torch.equal(labels[at : at + len(want)], wanted)
        at += len(want)
    assert at == len(got)


def test_dropping_blanks_moves_nothing(setup):
    _, _, _, packer = setup
    s = sample("all", 7, "heldout", 1)
    full = packer.pack(s.page, {"short": [("Hi", "A")]})
    part = packer.pack(s.page, {"short": [("Hi", "A")]}, (), np.random.default_rng(0), 0.1)
    places = dict(zip(full.index[full.image].tolist(), full.positions[:, full.image].T.tolist(), strict=True))
    kept = part.index[part.image].tolist()
    assert len(kept) < len(places) / 2
    assert [places[i] for i in kept] == part.positions[:, part.image].T.tolist()
    assert part.turns[0].start == full.turns[0].start
    items = image_items(packer.family, s.page.rows, s.page.cols)
    assert set(np.flatnonzero(s.page.cells.ravel())) <= set(items[kept])


@pytest.mark.parametrize("grid", GRIDS)
def test_packing_and_the_token_grid_name_the_same_cells(setup, grid):
    """What training calls the token of a cell is what `chase` counts as the token of the character there."""
    family, model, processor, _ = setup
    s = sample("all", 7, "heldout", 1, grid)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": s.question}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    inputs = processor(images=[s.image], text=[text], return_tensors="pt")
    [tokens] = grid_for(model.config).grids(inputs, [s.image.size], processor=processor)
    items = image_items(family, *grid)
    assert len(items) == len(tokens.positions)
    for character in s.characters:
        column, row = (v // CELL for v in character["box"][:2])
        [place] = tokens.inside(character["box"])
        assert items[np.searchsorted(tokens.positions, place)] == row * s.page.cols + column
