"""Every built-in family on a tiny random checkpoint: full budget is stock, a small one keeps what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsemm_lmms import CompressionConfig, compress
from sparsemm_lmms.families import FAMILIES
from sparsemm_lmms.model_wrappers.arguments import RunOptions
from sparsemm_lmms.model_wrappers.engine import Engine
from sparsemm_lmms.model_wrappers.loading import load_checkpoint, read_config

from ..wrappers.conftest import conversation, png, task  # noqa: F401  (a fixture)
from ..wrappers.test_evaluate import evaluate
from . import makers

BUDGET, WINDOW, NEW = 20, 8, 6


def limits(family: str) -> dict[str, int]:
    return {"min_pixels": 4 * 32**2, "max_pixels": 30 * 32**2} if FAMILIES[family].lmms_eval.pixel_limits else {}


@pytest.fixture(scope="module", params=sorted(makers.MAKERS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return makers.MAKERS[family](tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def engine(family: str, checkpoint: Path) -> Engine:
    options = RunOptions(str(checkpoint), **limits(family))
    assert read_config(FAMILIES[family], options)["model_type"] == family
    return Engine(load_checkpoint(FAMILIES[family], options, torch.device("cpu")))


def test_every_family_is_here() -> None:
    assert set(makers.MAKERS) == set(FAMILIES)


@pytest.mark.parametrize("rows", [1, 2])
def test_full_budget_is_stock_and_a_small_one_keeps_what_it_says(engine: Engine, family: str, rows: int) -> None:
    talks = [conversation(1), conversation(2, "Which of the two is it, please?", size=(56, 84))][:rows]
    inputs = engine.batch_inputs([engine.prompt(talk) for talk in talks])
    ids = list(FAMILIES[family].vision_ids(engine.model.config))
    assert torch.isin(inputs["input_ids"], torch.tensor(ids)).any(1).all()  # each prompt has an image
    told = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    told |= {"output_logits": True, "return_dict_in_generate": True}
    stock = engine.model.generate(**inputs, **told)
    logits = torch.stack(stock.logits)
    assert logits.isfinite().all()
    for config in (CompressionConfig("fullkv"), CompressionConfig("snapkv", budget=1024, window_size=WINDOW)):
        with compress(engine.model, config):
            found = engine.model.generate(**inputs, **told)
        assert torch.equal(found.sequences, stock.sequences)
        torch.testing.assert_close(torch.stack(found.logits), logits, atol=1e-4 * float(logits.std()), rtol=1e-4)
    with compress(engine.model, CompressionConfig("snapkv", budget=BUDGET, window_size=WINDOW)) as session:
        engine.model.generate(**inputs, **told)
        assert (session.cache.kept_per_head() == BUDGET).all()


def test_lmms_eval_runs_it(family: str, checkpoint: Path, task: Callable[..., Path]) -> None:  # noqa: F811
    given = {"pretrained": checkpoint, "budget": BUDGET, "window_size": WINDOW, "device": "cpu", **limits(family)}
    name = f"{family}_snapkv"
    results = evaluate(name, ",".join(f"{key}={value}" for key, value in given.items()), task([png(0)]))
    assert results["sparsemm_lmms"]["settings"]["model"] == name
    assert results["throughput"]["avg_kept_tokens"] == BUDGET < results["throughput"]["avg_prompt_tokens"]
