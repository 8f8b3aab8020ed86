"""What is run: cells, names, ablations, and the sentence for each mistake on the command line."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from sparsemm_lmms import HeadScores
from sparsemm_lmms.model_wrappers.sweeps.cells import (
    RATIOS,
    Cell,
    SweptModel,
    ablation_cells,
    main_cells,
    parse_methods,
)
from sparsemm_lmms.model_wrappers.sweeps.plan import Plan, make_plan, open_sweep
from sparsemm_lmms.model_wrappers.sweeps.runner import failed
from sparsemm_lmms.reports.store import read_cells, write_cell

DEMO = SweptModel("llava_next", {"pretrained": "demo"})
SCORED = SweptModel("qwen2_vl", {"pretrained": "demo", "head_scores": "mine.json", "ratio": 0.2, "beta": 10})


def test_fullkv_and_masks_run_once_and_all_others_for_every_budget() -> None:
    cells = list(main_cells(DEMO, ["snapkv", "fullkv", "mask", "random#2"], [96, 64]))
    rows = [("fullkv", None), ("snapkv", 96), ("snapkv", 64), ("mask", None), ("random#2", 96), ("random#2", 64)]
    assert [(cell.method, cell.budget) for cell in cells] == rows
    assert cells[-1].name == "llava_next_demo__random_2__b64"


def test_each_method_gets_the_arguments_that_it_knows() -> None:
    def given(method: str) -> dict[str, Any]:
        return Cell(SCORED, method, 64).arguments(seed=5, batch_size=2)

    shared = {"pretrained": "demo", "batch_size": 2, "budget": 64}
    assert given("snapkv") == shared
    assert given("pyramidkv") == {**shared, "beta": 10}
    assert given("sparsemm") == {**shared, "ratio": 0.2, "head_scores": "mine.json"}
    assert given("permuted#3") == {**shared, "ratio": 0.2, "head_scores": "permuted:mine.json", "seed": 8}
    assert given("layer_mean") == {**shared, "ratio": 0.2, "head_scores": "layer_mean:mine.json"}
    assert given("uniform") == {**shared, "ratio": 0.2, "head_scores": "uniform"}
    assert given("random") == {**shared, "ratio": 0.2, "seed": 5}
    scored = {**shared, "ratio": 0.2, "head_scores": "permuted:mine.json"}
    assert given("sparsemm_bacon@permuted#3") == {**scored, "seed": 8}
    assert given("sparsemm_bacon@random") == {**scored, "head_scores": "random", "seed": 5}
    pair = {"scorer": "keydiff", "allocator": "head_scores"}
    assert given("keydiff+head_scores") == {**scored, **pair, "head_scores": "mine.json"}
    assert given("keydiff+head_scores@layer_mean") == {**scored, **pair, "head_scores": "layer_mean:mine.json"}
    assert Cell(DEMO, "permuted", 64).arguments(0, 1)["head_scores"] == "permuted"


def test_one_row_has_one_name() -> None:
    names = "sparsemm@permuted,permuted, sparsemm_bacon@permuted#2,bacon+waterfill,sparsemm@random#1"
    assert parse_methods(names) == ["permuted", "sparsemm_bacon@permuted#2", "bacon+waterfill", "random#1"]


def test_ablations() -> None:
    ratio = ablation_cells(DEMO, "ratio", [96, 64])
    assert [cell.arguments(0, 1)["ratio"] for cell in ratio] == 2 * list(RATIOS)
    components = [(cell.method, cell.budget) for cell in ablation_cells(DEMO, "components", [64])]
    assert components == [("local_window", 64), ("snapkv", 64), ("sparsemm", 64)]
    heads = [cell for cell in ablation_cells(DEMO, "heads", [96, 64]) if cell.variant["mask_ratio"] == 0.1]
    assert [(cell.method, cell.budget) for cell in heads] == [
        ("mask", None),
        *((f"mask_random#{draw}", None) for draw in range(5)),
    ]
    scores = [cell.method for cell in ablation_cells(DEMO, "scores", [64])]
    assert scores[:3] == ["sparsemm", "layer_mean", "uniform"]
    assert [scores.count(f"{name}#{draw}") for name in ("permuted", "random") for draw in range(10)] == 20 * [1]


def test_names_tell_all_cells_of_a_sweep_apart() -> None:
    plan = make_plan(
        families="llava_next,qwen2_vl",
        model_args="pretrained=demo",
        methods="sparsemm,random",
        ablations="ratio,components,heads,scores",
    )
    names = [cell.name for cell in plan.cells]
    assert len(set(names)) == len(names) == len({str(cell) for cell in plan.cells}) > 300
    assert plan.tasks == ("sparsemm_demo_ocr", "sparsemm_demo_vqa")
    assert [model.label for model in plan.models] == ["llava_next demo", "qwen2_vl demo"]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"families": "llava_nex"}, "Unknown --model 'llava_nex'; known: .*qwen2_vl.* Did you mean 'llava_next'"),
        ({"families": "llava"}, "demo family 'llava'; known: llava_next, qwen2_vl"),
        ({"families": ","}, "--model names no family"),
        ({"methods": "snapkw"}, "Unknown method 'snapkw'; known: .* Did you mean 'snapkv'"),
        ({"methods": "snapkv#2"}, "draws are whole numbers of random"),
        ({"methods": "layer_mean#2"}, "draws are whole numbers of random"),
        ({"methods": "snapkv@permuted"}, "snapkv@permuted: controls are METHOD@random, .* such as sparsemm, waterfill"),
        ({"methods": "sparsemm_bacon@permutd"}, "controls are METHOD@random, @permuted"),
        ({"methods": "keydiff+waterfall"}, "Unknown allocator 'waterfall'.*Did you mean 'waterfill'"),
        ({"methods": "random#x"}, "draws are whole numbers of random"),
        ({"budgets": "64,many"}, "--budgets '64,many' must be whole numbers"),
        ({"budgets": "16"}, "budget=16 must be larger than window_size=32"),
        ({"ablations": "ratios"}, "Unknown --ablation 'ratios'; known: ratio, .* Did you mean 'ratio'"),
        ({"limit": 0}, "--limit 0 must be larger than 0"),
        ({"model_args": "pretrained=demo,budget=64"}, "budget in --model_args belongs to --budgets"),
        ({"model_args": "pretrained=demo,bata=2"}, "Unknown argument in --model_args for llava_next 'bata'.*'beta'"),
        ({"model_args": "pretrained=demo,dtype=int8"}, "Unknown dtype 'int8'"),
        ({"model_args": "pretrained"}, "is not of the form name=value"),
        ({"model_args": "pretrained=/nowhere", "tasks": "ocrbench"}, "pretrained=/nowhere is no local folder"),
        ({"model_args": "", "tasks": ""}, "--tasks is missing"),
    ],
)
def test_mistakes_are_one_sentence(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_plan(**{"model_args": "pretrained=demo", **wrong})


def test_a_replaced_score_file_is_another_sweep(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    arguments = {"model_args": f"pretrained=demo,head_scores={file}", "methods": "sparsemm", "budgets": "64"}
    HeadScores.random(4, 8, 0).save(file)
    open_sweep(tmp_path / "run", make_plan(**arguments))
    open_sweep(tmp_path / "run", make_plan(**arguments))
    HeadScores.random(4, 8, 1).save(file)
    with pytest.raises(ValueError, match="head_scores_sha256 .* there"):
        open_sweep(tmp_path / "run", make_plan(**arguments))
    file.unlink()
    with pytest.raises(FileNotFoundError, match="scores.json does not exist"):
        open_sweep(tmp_path / "other", make_plan(**arguments))
    assert not (tmp_path / "other").exists()


def test_a_sweep_whose_cells_all_failed_begins_anew(tmp_path: Path) -> None:
    def plan(tasks: str) -> Plan:
        return make_plan(model_args="pretrained=demo", methods="snapkv", budgets="64", tasks=tasks)

    wrong = plan("sparsemm_demo_ocrr")
    open_sweep(tmp_path, wrong)
    with pytest.raises(ValueError, match="other settings"):  # a process may be about to write its first record
        open_sweep(tmp_path, plan("sparsemm_demo_ocr"))
    for cell in wrong.cells:
        write_cell(tmp_path, failed(cell, ValueError("Unknown task")))
    (tmp_path / ".locks").mkdir()
    with (tmp_path / ".locks" / "a.lock").open("w") as held:  # by another process, as far as FileLock can tell
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="other settings"):
            open_sweep(tmp_path, plan("sparsemm_demo_ocr"))
    open_sweep(tmp_path, plan("sparsemm_demo_ocr"))
    assert list(read_cells(tmp_path)) == []
    assert json.loads((tmp_path / "sweep.json").read_text())["settings"]["tasks"] == ["sparsemm_demo_ocr"]


def test_arguments_of_a_sweep_are_read_as_those_of_a_model() -> None:
    plan = make_plan(model_args="pretrained=demo,device=cpu,system_prompt=Don't guess,ratio=0.3", budgets="64")
    assert plan.models[0].arguments == {
        "pretrained": "demo",
        "device": "cpu",
        "system_prompt": "Don't guess",
        "ratio": "0.3",
    }
    with pytest.raises(ValueError, match="ratio= is empty"):
        make_plan(model_args="pretrained=demo,ratio=")


def test_a_sweep_that_holds_numbers_goes_on(tmp_path: Path) -> None:
    plan = make_plan(model_args="pretrained=demo,device=cpu,ratio=0.3", budgets="64")
    open_sweep(tmp_path, plan)
    file = tmp_path / "sweep.json"
    old = json.loads(file.read_text())
    (label,) = old["models"]
    old["models"][label]["model_args"]["ratio"] = 0.3  # as 0.2.0 wrote it
    file.write_text(json.dumps(old))
    open_sweep(tmp_path, plan)
    with pytest.raises(ValueError, match="other settings"):
        open_sweep(tmp_path, make_plan(model_args="pretrained=demo,device=cpu,ratio=0.2", budgets="64"))
