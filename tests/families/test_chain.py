"""Families of unlike kinds through the whole chain: a question that comes later, the commands of head scores, masks."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sparsemm_lmms import CompressionConfig, HeadScores, compress
from sparsemm_lmms.cache import CACHE_NAME
from sparsemm_lmms.cli import app
from sparsemm_lmms.head_scores import provenance_path
from sparsemm_lmms.model_wrappers.engine import Conversation, Engine, Prompt
from sparsemm_lmms.model_wrappers.matrix.checks import Tiny
from sparsemm_lmms.model_wrappers.matrix.tiny import conversation
from sparsemm_lmms.model_wrappers.prefill import KINDS, Parts, cut, heeds_gaps, question_starts, run
from sparsemm_lmms.session import attention_shape

NEW, WINDOW = 4, 4
UNLIKE = ("gemma3", "internvl", "qwen2_5_vl", "qwen3_5")
"""Sliding layers and images that see themselves, tiles, rotary positions of three axes, linear attention."""


@pytest.fixture(scope="module", params=UNLIKE)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(request.param, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(tiny: Tiny) -> Engine:
    return tiny.engine


def asked() -> list[Conversation]:
    return [
        conversation(0, "Nothing to see?", 0),
        conversation(1),
        conversation(2, "Which one?", 3, size=(56, 84)),
        conversation(3, "Are they the same one?", 2, size=(120, 30)),
    ]


def logits(engine: Engine, inputs: Any) -> torch.Tensor:
    """Of the new tokens, `[batch, new, vocabulary]`."""
    told = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    made = engine.model.generate(**inputs, **told, output_logits=True, return_dict_in_generate=True)
    return torch.stack(made.logits, 1)


@pytest.mark.parametrize("together", [True, False])
def test_a_question_that_comes_later(engine: Engine, together: bool) -> None:
    """Full budget: the logits of stock. Small budget: what stays of the images is as if no question followed."""
    prompts, model = [engine.prompt(messages) for messages in asked()], engine.model
    if together and heeds_gaps(model):
        with pytest.raises(
            ValueError, match=f"^{type(model).__name__} has layers whose windows or states .*batch_size=1"
        ):
            divided(engine, prompts)
        return
    for group in [prompts] if together else [[prompt] for prompt in prompts]:
        inputs, parts = divided(engine, group)
        wanted = logits(engine, inputs)
        near = {"atol": 1e-4 * float(wanted.std()), "rtol": 1e-4}
        with compress(model, CompressionConfig("snapkv", budget=1024, window_size=WINDOW)) as session:
            torch.testing.assert_close(run(model, session.new_cache(), parts, 2), wanted[:, 0], **near)
            cache = session.new_cache()
            run(model, cache, parts, 1)
            torch.testing.assert_close(logits(engine, {**parts.for_generate(), CACHE_NAME: cache}), wanted, **near)
        with compress(model, CompressionConfig("snapkv", budget=12, window_size=WINDOW)) as session:
            cache = session.new_cache()
            run(model, cache, parts, 2)
            found = [cache.kept_positions(layer) for layer in range(len(cache.full_layers))]
            for row, prompt in enumerate(group):
                alone = engine.batch_inputs([prompt])
                end = int(question_starts(model, alone["input_ids"]))
                columns = ("input_ids", "attention_mask", *KINDS)
                model.generate(**{k: v[:, :end] if k in columns else v for k, v in alone.items()}, max_new_tokens=1)
                for layer, kept in enumerate(found):
                    for head, as_alone in zip(kept[row], session.cache.kept_positions(layer)[0], strict=True):
                        assert head.tolist() == as_alone.tolist()


def divided(engine: Engine, prompts: list[Prompt]) -> tuple[Any, Parts]:
    """Inputs, and the same cut behind their last image."""
    inputs = engine.batch_inputs(prompts)
    starts = question_starts(engine.model, inputs["input_ids"])
    return inputs, cut(engine.model, inputs, [starts, torch.full_like(starts, inputs["input_ids"].shape[1])])


def invoke(*arguments: Any) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_head_scores_from_the_command_line(tiny: Tiny, tmp_path: Path) -> None:
    """`chase` -> `budgets` -> `show`; `chase` in batches of another order of padding finds the same."""
    scores, other = tmp_path / "scores.json", tmp_path / "other.json"
    named = ["--model", tiny.family.model_type, "--pretrained", tiny.checkpoint, "--device", "cpu"]
    mode = ["--mode", "teacher", "--readings", "mixture", "--images", 8]
    told = invoke("chase", *named, *mode, "--batch-size", 4, "--output", scores)
    assert f"head_scores={scores}" in told
    invoke("chase", *named, *mode, "--output", other)
    found = HeadScores.load(scores)
    np.testing.assert_allclose(found.values, HeadScores.load(other).values, atol=1e-9)
    shape = attention_shape(tiny.engine.model.config)
    assert found.values.shape == (shape.num_layers, shape.q_heads) and found.values.sum() > 0
    facts = json.loads(provenance_path(scores).read_text())
    assert (facts["layers"], facts["kv_heads"]) == (shape.num_layers, shape.kv_heads)
    assert facts["model_type"] == tiny.engine.model.config.model_type
    told = invoke("budgets", scores, "--budget", 64)
    assert f"of nominal {64 * shape.num_layers * shape.kv_heads}" in told.replace(",", "")
    show = ["--image", "demo:3", "--question", "What?", "--heads", 1, "--tokens", 1, "--plot", tmp_path / "v.png"]
    assert "Answer:" in invoke("show", *named, *show, "--head-scores", scores) and (tmp_path / "v.png").is_file()


def test_masked_heads_are_silent(engine: Engine) -> None:
    """As when the projection behind the attention gets zeros from them; heads are numbered among full layers."""
    text, model = engine.model.config.get_text_config(), engine.model
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    full = [layer for layer, kind in zip(model.get_decoder().layers, kinds, strict=True) if kind == "full_attention"]
    scores = HeadScores.random(len(full), text.num_attention_heads, 1)
    inputs = engine.batch_inputs([engine.prompt(messages) for messages in asked()[1:3]])
    stock_logits = logits(engine, inputs)
    for method in ("mask", "mask_random"):
        with compress(model, CompressionConfig(method, mask_ratio=0.4), scores) as session:
            found = logits(engine, inputs)
            masked = [layer.masked for layer in session.cache.full_layers]
        count = round(0.4 * scores.values.size)
        assert sum(int(heads.sum()) for heads in masked if heads is not None) == count
        if method == "mask":
            best = np.sort(scores.values, axis=None)[-count:].min()
            assert torch.equal(
                torch.stack(masked).reshape(scores.values.shape), torch.from_numpy(scores.values >= best)
            )
        hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(partial(silenced, heads))
            for layer, heads in zip(full, masked, strict=True)
            if heads is not None
        ]
        wanted = logits(engine, inputs)
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(found, wanted, atol=1e-4 * float(wanted.std()), rtol=1e-4)
        assert (found - stock_logits).abs().max() > 0.01


def silenced(heads: torch.Tensor, module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    (values,) = args
    return (values.unflatten(-1, (len(heads.view(-1)), -1)).masked_fill(heads.view(-1, 1), 0).flatten(-2),)
