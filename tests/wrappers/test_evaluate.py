"""Through lmms-eval's own evaluator: answers, order, statistics, and failures that stay failures."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import dispatch_model
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.models.model_utils import gen_metrics
from lmms_eval.tasks import TaskManager
from loguru import logger

from sparsemm_lmms import HeadScores
from sparsemm_lmms.methods import METHODS

from . import tiny
from .conftest import conversation, png, request

SIZES = [(84, 56), (56, 84), (28, 56), (84, 56), (112, 56)]
GREEDY = {"max_new_tokens": 6, "temperature": 0}


def evaluate(name: str, model_args: str, folder: Path, **more: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False, model_name=name)
    return simple_evaluate(
        name, model_args, tasks=["tiny_images"], task_manager=manager, bootstrap_iters=0, **{"batch_size": 2, **more}
    )


def load(name: str, model_args: str, **host: Any) -> Any:
    return get_model(name).create_from_arg_string(model_args, host)


def replies(results: dict[str, Any]) -> list[str]:
    return [sample["filtered_resps"][0] for sample in results["samples"]["tiny_images"]]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_name_evaluates_a_local_task(name: str, arguments: Callable[..., str], task: Callable[..., Path]) -> None:
    results = evaluate(name, arguments(name), task([png(i, size) for i, size in enumerate(SIZES)]))
    samples = results["samples"]["tiny_images"]
    assert [sample["doc_id"] for sample in samples] == list(range(len(SIZES)))
    assert results["results"]["tiny_images"]["letters,none"] == sum(len(r.strip()) for r in replies(results)) / len(
        SIZES
    )
    throughput = results["throughput"]
    method = METHODS[name.removeprefix("llava_next_").removeprefix("qwen2_vl_")]
    compressed = method.compresses
    assert throughput["avg_kept_tokens"] <= (20 + 0.5 if compressed else math.inf)  # rounding of the published rules
    assert compressed == (throughput["avg_kept_tokens"] < throughput["avg_prompt_tokens"])
    assert compressed == (throughput["avg_kv_bytes_used"] < throughput["avg_kv_bytes_full"])
    assert ("avg_nominal_budget" in throughput) == compressed
    assert throughput["avg_ttft_ms"] > 0 and throughput["avg_tpot_ms"] > 0 and throughput["avg_peak_memory"] > 0
    record = results["sparsemm_lmms"]
    assert record["settings"].get("budget") == (20 if compressed else None)  # nothing that had no effect is recorded
    assert record["settings"].get("beta") == (20 if name.endswith("pyramidkv") else None)
    assert record["settings"].get("max_pixels") == (23520 if name.startswith("qwen2_vl") else None)
    assert (record["settings"]["head_scores"] is not None) == method.needs_head_scores
    counts = [sample["token_counts"][0] for sample in samples]
    assert throughput["total_gen_tokens"] == sum(count["output_tokens"] for count in counts)
    assert throughput["avg_kept_tokens"] == pytest.approx(sum(c["kept_tokens"] for c in counts) / len(counts), abs=1e-3)
    assert throughput["avg_prompt_tokens"] == sum(count["input_tokens"] for count in counts) / len(counts)


def test_batch_size_does_not_change_answers(arguments: Callable[..., str], task: Callable[..., Path]) -> None:
    folder = task([png(i, size) for i, size in enumerate(SIZES)])
    name = "llava_next_sparsemm"
    assert replies(evaluate(name, arguments(name), folder, batch_size=1)) == replies(
        evaluate(name, arguments(name), folder, batch_size=4)
    )


def test_generation_arguments_reach_the_model(arguments: Callable[..., str], task: Callable[..., Path]) -> None:
    name = "qwen2_vl_fullkv"
    folder = task([png(0)])
    long = replies(evaluate(name, arguments(name), folder, gen_kwargs="max_new_tokens=12"))[0]
    stop = next(c for c in long.strip()[1:] if c != long[0])
    cut = replies(evaluate(name, arguments(name), folder, gen_kwargs=f"max_new_tokens=12,until={stop}"))[0]
    assert cut == long[: long.index(stop)].strip() != long


def test_an_unreadable_image_aborts(arguments: Callable[..., str], task: Callable[..., Path]) -> None:
    name = "llava_next_snapkv"
    told = r"^Document 1 of task tiny_images \(test\) cannot be read: UnidentifiedImageError: cannot identify"
    with pytest.raises(ValueError, match=told):
        evaluate(name, arguments(name), task([png(0), b"this is no image"]))


def test_an_exception_in_generation_aborts(arguments: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("llava_next_snapkv", arguments("llava_next_snapkv"))

    def fail(**kwargs: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(model.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.generate_until([request(model, conversation(0), 0, GREEDY)])
    assert model.model.config.get_text_config()._attn_implementation == "sdpa"  # stock again after the failure


def test_results_come_in_the_order_of_the_requests(arguments: Callable[..., str]) -> None:
    model = load("llava_next_snapkv", arguments("llava_next_snapkv"), batch_size=2)
    settings = [{"max_new_tokens": 3}, {"max_new_tokens": 9}, {"max_new_tokens": 3}, {"max_new_tokens": 9}]
    requests = [request(model, conversation(i), i, given) for i, given in enumerate(settings)]
    together = [result.text for result in model.generate_until(requests)]
    apart = [model.generate_until([one])[0].text for one in requests]
    assert together == apart
    assert len(set(together)) == 4


def test_padding_copies_are_answered_but_not_counted(arguments: Callable[..., str]) -> None:
    model = load("qwen2_vl_snapkv", arguments("qwen2_vl_snapkv"), batch_size=2)
    requests = [request(model, conversation(i), i, GREEDY) for i in range(2)]
    copies = [request(model, conversation(1), 1, GREEDY, __padding_only__=True) for _ in range(3)]
    gen_metrics.reset_logged_metrics()
    alone = model.generate_until(requests)
    padded = model.generate_until(requests + copies)
    first, second = gen_metrics.get_logged_metrics_history()
    assert [result.text for result in padded] == [*(result.text for result in alone), *[alone[1].text] * 3]
    assert second["num_requests"] == first["num_requests"] == 2
    assert second["total_gen_tokens"] == first["total_gen_tokens"]
    assert second["prompt_tokens"] == first["prompt_tokens"]
    gen_metrics.reset_logged_metrics()
    model.generate_until(copies)
    assert gen_metrics.get_logged_metrics_history() == []


def test_fullkv_after_snapkv_is_fullkv(arguments: Callable[..., str]) -> None:
    full, snap = (load(f"llava_next_{m}", arguments(f"llava_next_{m}")) for m in ("fullkv", "snapkv"))
    ask = request(full, conversation(3), 0, {"max_new_tokens": 16})
    snap.task_dict = full.task_dict
    before = full.generate_until([ask])[0].text
    assert snap.generate_until([ask])[0].text != before
    assert full.generate_until([ask])[0].text == before


def test_the_settings_are_logged_resolved(arguments: Callable[..., str]) -> None:
    lines: list[str] = []
    sink = logger.add(lines.append, level="INFO", format="{message}")
    try:
        model = load("qwen2_vl_sparsemm", arguments("qwen2_vl_sparsemm", seed=7), batch_size=1)
        full = load("qwen2_vl_fullkv", arguments("qwen2_vl_fullkv"))
    finally:
        logger.remove(sink)
    settings = json.loads(next(line for line in lines if line.startswith("Settings: ")).removeprefix("Settings: "))
    assert settings == model.settings()
    assert (settings["budget"], settings["seed"], settings["dtype"], settings["max_pixels"]) == (
        20,
        7,
        "float32",
        23520,
    )
    assert settings["head_scores"]["sha256"] == model.head_scores.content_hash
    assert settings["system_prompt"] == "You are a helpful assistant."
    assert full.head_scores is None
    assert any("budget, window_size" in line and "without effect" in line for line in lines)


def test_arguments_are_refused_before_loading(arguments: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsemm_lmms.model_wrappers.compressed.load_checkpoint", None)
    with pytest.raises(ValueError, match="Did you mean 'budget'"):
        load("llava_next_snapkv", arguments("llava_next_snapkv", budgett=3))
    with pytest.raises(ValueError, match="not of the form name=value"):
        load("llava_next_snapkv", "budget")
    with pytest.raises(ValueError, match="batch_size=4 in --model_args contradicts --batch_size 2"):
        load("llava_next_snapkv", arguments("llava_next_snapkv", batch_size=4), batch_size=2)


def test_batch_size_in_model_args(arguments: Callable[..., str]) -> None:
    assert load("llava_next_snapkv", arguments("llava_next_snapkv", batch_size=4), batch_size=1).batch_size == 4


def test_head_scores_of_another_shape(arguments: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"0-0": [1.0], "0-1": [2.0]}))
    with pytest.raises(ValueError, match="1 layers x 2 heads"):
        load("llava_next_sparsemm", arguments("llava_next_sparsemm", head_scores=path))


def test_head_scores_by_word_and_by_file(
    arguments: Callable[..., str], checkpoints: dict[str, Path], scores: Path, tmp_path: Path
) -> None:
    table = HeadScores.load(scores)
    packaged = tmp_path / "checkpoint"
    shutil.copytree(checkpoints["llava_next"], packaged)
    shutil.copy(scores, packaged / "head_scores.json")

    def read(spec: object, **more: object) -> HeadScores:
        given = arguments("llava_next_sparsemm", head_scores=spec, pretrained=packaged, **more)
        return load("llava_next_sparsemm", given).head_scores

    assert read(scores).content_hash == read("auto").content_hash == table.content_hash
    assert read("layer_mean").content_hash == table.layer_mean().content_hash
    assert read("permuted", seed=3).content_hash == table.permuted(3).content_hash
    assert read("random", seed=3).content_hash == HeadScores.random(3, 4, 3).content_hash
    assert read("uniform").content_hash == HeadScores.uniform(3, 4).content_hash


@pytest.mark.parametrize("text", ["no json", "[1, 2]", '{"0-0": [NaN]}'])
def test_bad_score_files_stop_before_loading(
    arguments: Callable[..., str], tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsemm_lmms.model_wrappers.compressed.load_checkpoint", None)
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)):
        load("qwen2_vl_sparsemm", arguments("qwen2_vl_sparsemm", head_scores=path))
    with pytest.raises(FileNotFoundError, match="neither a file nor one of auto, uniform"):
        load("qwen2_vl_sparsemm", arguments("qwen2_vl_sparsemm", head_scores=tmp_path / "nowhere.json"))


def test_a_model_placed_by_a_device_map(arguments: Callable[..., str], tmp_path: Path) -> None:
    """accelerate's hooks around the modules, one layer fetched from disk: all that one device can show of a split."""
    name = "llava_next_sparsemm"
    plain, spread = load(name, arguments(name)), load(name, arguments(name, device_map="auto", device="auto"))
    assert spread.settings()["device_map"] == "auto"
    requests = [request(plain, conversation(i), i, GREEDY) for i in range(2)]
    spread.task_dict = plain.task_dict
    expected = [result.text for result in plain.generate_until(requests)]
    assert [result.text for result in spread.generate_until(requests)] == expected
    last = f"model.language_model.layers.{tiny.LAYERS - 1}"
    places = {name.rpartition(".")[0]: "cpu" for name, _ in spread.model.named_parameters() if last not in name}
    places.pop("model")
    places |= {"model.image_newline": "cpu", last: "disk"}  # the first is a parameter of no submodule
    dispatch_model(spread.model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert next(spread.model.get_submodule(last).parameters()).is_meta  # its weights come when it is called
    assert [result.text for result in spread.generate_until(requests)] == expected


def test_clean_releases_the_model(arguments: Callable[..., str]) -> None:
    import gc
    import weakref

    model = load("llava_next_fullkv", arguments("llava_next_fullkv"))
    model.generate_until([request(model, conversation(0), 0, GREEDY)])
    weights = weakref.ref(model.model)
    model.clean()
    gc.collect()
    assert weights() is None
    with pytest.raises(RuntimeError, match="cleaned away"):
        model.generate_until([])
