"""`bench decode`, `prefill`, `compression`, `kernels` and `memory` on the tiny presets."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from sparsemm_lmms.bench import compression, generation, kernels, memory, scorers, speed
from sparsemm_lmms.bench.measure import Spread, rotated, streamed_bytes, write_row
from sparsemm_lmms.bench.presets import PRESETS, build, config_of, prompt
from sparsemm_lmms.bench.runs import Variant, generate
from sparsemm_lmms.cache import CACHE_NAME
from sparsemm_lmms.registry import scorer_names
from sparsemm_lmms.session import attention_shape

from ..core import test_hybrid

TINY = ["tiny-llava-next", "tiny-qwen2-vl"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny():
    return {name: build(name, CPU, torch.float32) for name in TINY}


@pytest.mark.parametrize("name", TINY)
def test_order_does_not_matter_and_tokens_are_those_of_stock(tiny, name):
    """FullKV before and after SnapKV: the same tokens and bytes; equal to transformers alone."""
    model = tiny[name]
    inputs = prompt(name, model, 300, 2)
    assert inputs["input_ids"].shape == (2, 300)
    runs = {}
    for turn, variant in enumerate(["fullkv", "snapkv", "stock", "stock-static", "fullkv-eager", "fullkv"]):
        run = generate(model, inputs, Variant(variant), 64, 12)
        runs[turn] = (run.tokens.tolist(), run.kv_allocated, run.kv_used)
        assert run.tokens.shape == (2, 12) and run.ttft > 0 and run.tpot > 0
    assert runs[0] == runs[5] == runs[4]
    assert runs[0][0] == runs[2][0] == runs[3][0] != runs[1][0]
    assert runs[0][2] == runs[2][2]  # 300 + 11 tokens of every head, whoever stores them
    assert runs[1][1] < runs[0][1] / 3
    assert not model._forward_pre_hooks and model.config.get_text_config()._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5_text", "gemma3n_text"])
def test_bytes_of_models_with_other_layers(kind):
    """All layers count: the full ones grow, a window of 16 holds 15 tokens, a state what it holds."""
    model, new = test_hybrid.build(kind), 12
    inputs = test_hybrid.prompt(model, (45, 45))
    runs = {name: generate(model, inputs, Variant(name), 40, new) for name in ("fullkv", "stock", "snapkv")}
    shape = attention_shape(model.config)
    layers, row = shape.num_layers, 2 * 2 * shape.kv_heads * 8 * 4  # keys and values, two sequences, float32
    states = [
        x.numel() * x.element_size()
        for layer in model.generate(**inputs, max_new_tokens=new, return_dict_in_generate=True)[CACHE_NAME].layers
        for held in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {}))
        for x in held.values()
    ]
    windows = {"gemma3": 2, "gemma3n_text": 2, "qwen3_5_text": 0}[kind]
    others = row * windows * 15 + sum(states)
    assert bool(states) == (kind == "qwen3_5_text")
    used, ideal = (layers * row * tokens + others for tokens in (45 + new - 1, 45 + new))
    assert runs["fullkv"].kv_used == runs["stock"].kv_used == used
    assert runs["fullkv"].kv_ideal == runs["stock"].kv_ideal == ideal
    assert runs["snapkv"].kv_used == layers * row * (40 + new - 1) + others
    assert torch.equal(runs["fullkv"].tokens, runs["stock"].tokens)


def test_decode_rows(tmp_path, capsys):
    """The command as a user gives it: a line for every row, a plot, and numbers that agree with each other."""
    output = tmp_path / "results" / "decode.jsonl"
    speed.decode(
        preset="tiny-llava-next", context="160,224", batch="1,2", budget=64, methods="stock,fullkv,sparsemm",
        new_tokens=6, repeats=2, device="cpu", dtype="", compiled=False, output=output,
    )  # fmt: skip
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["context"], r["batch"], r["method"]) for r in rows[:4]] == [
        (160, 1, "stock"), (160, 1, "fullkv"), (160, 1, "sparsemm"), (160, 2, "stock"),
    ]  # fmt: skip
    assert len(rows) == 12
    for row in rows:
        spent = row["ms_per_token"]
        assert spent["least"] <= spent["median"] <= spent["most"] and row["error"] is None
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / spent["median"], rel=1e-3)
        assert row["over_limit"] == pytest.approx(spent["median"] / row["limit_ms"], rel=1e-3)
        assert row["kv_bytes_used"] <= row["kv_bytes_allocated"] <= 1.05 * row["kv_bytes_ideal"]
        assert row["circumstances"]["torch"] == torch.__version__ and row["peak_memory"] > 0
        assert (row["compression_ms"] is None) == (row["method"] == "stock")
    # 4 layers x 4 heads x (160 + 5) rows of K and V with 32 numbers of 4 bytes
    assert rows[0]["kv_bytes_used"] == rows[1]["kv_bytes_used"] == 4 * 4 * 165 * 2 * 32 * 4
    assert (tmp_path / "results" / "decode.png").stat().st_size > 10_000
    assert "sparsemm" in capsys.readouterr().out


def test_prefill_rows(tmp_path):
    rows = generation.measure(
        "prefill", "tiny-qwen2-vl", [200], [1], 64, ["stock", "snapkv"], 1, 2, "cpu", "", False, tmp_path / "p.jsonl"
    )
    assert rows[0].ms_per_token is None and rows[0].compression_ms is None
    assert 0 < rows[1].compression_ms < rows[1].prefill_ms.most
    assert rows[1].kv_bytes_allocated < rows[0].kv_bytes_allocated


def test_out_of_memory_is_a_row_and_not_a_number(tiny, monkeypatch):
    def fail(model, inputs, variant, *rest):
        if variant.name == "stock":
            raise torch.OutOfMemoryError("Tried to allocate 40 GiB.")
        return generate(model, inputs, variant, *rest)

    monkeypatch.setattr(generation, "generate", fail)
    rows = generation.measure(
        "decode", "tiny-qwen2-vl", [120], [1], 64, ["stock", "fullkv"], 4, 1, "cpu", "", False, None
    )
    assert rows[0].error == "out of memory: Tried to allocate 40 GiB." and rows[0].ms_per_token is None
    assert rows[1].error is None and rows[1].ms_per_token.median > 0


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_have_the_real_shapes(name):
    with torch.device("meta"):
        config = config_of(name)
    text = config.get_text_config()
    expected = {
        "llava-next-vicuna-7b": (32, 32, 32, 128, 32064),
        "llava-next-mistral-7b": (32, 32, 8, 128, 32064),
        "qwen2-vl-7b": (28, 28, 4, 128, 152064),
        "tiny-llava-next": (4, 4, 4, 32, 512),
        "tiny-qwen2-vl": (4, 4, 2, 32, 512),
    }[name]
    dim = text.hidden_size // text.num_attention_heads
    assert (
        text.num_hidden_layers,
        text.num_attention_heads,
        text.num_key_value_heads,
        dim,
        text.vocab_size,
    ) == expected
    model = types.SimpleNamespace(device=CPU, dtype=torch.float32)
    inputs = prompt(name, model, 2048, 1)
    image = getattr(config, "image_token_id", None) or config.image_token_index
    share = (inputs["input_ids"] == image).double().mean()
    assert inputs["input_ids"].shape == (1, 2048) and 0.4 < share < 0.9


def test_streamed_bytes(tiny):
    text = tiny["tiny-llava-next"].model.language_model
    every = sum(x.numel() for x in text.parameters()) - text.embed_tokens.weight.numel() + 512 * 128
    assert streamed_bytes(tiny["tiny-llava-next"]) == 4 * every


def test_compression_keeps_what_the_research_code_keeps(tmp_path):
    """The comparison checks on every call that both keep the same tokens; here, that the check can fail."""
    row = compression.measure(4, 300, 16, 64, 2, "cpu", "", tmp_path / "c.jsonl")
    assert row.ours_ms.median > 0 and row.research_ms.median > 0 and row.kept_tokens > 32
    assert json.loads((tmp_path / "c.jsonl").read_text())["ratio"] == pytest.approx(row.ratio, rel=1e-3)
    layer = types.SimpleNamespace(
        kept=torch.tensor([[2]]).numpy(), start=torch.tensor([[0]]), keys=torch.ones(4, 8), values=torch.ones(4, 8)
    )
    with pytest.raises(RuntimeError, match="keep different tokens"):
        compression.check_same_tokens(layer, torch.zeros(2, 8), torch.ones(2, 8), torch.tensor([0, 2]))


def test_every_scorer_is_timed_beside_snapkv(tmp_path, capsys):
    rows = scorers.measure(4, 300, 16, 64, 2, "cpu", "", tmp_path / "s.jsonl")
    assert [row.scorer for row in rows[:-1]] == sorted(scorer_names(), key=lambda name: name != "window_attention")
    printed = capsys.readouterr().out
    assert all(row.ms.median > 0 and row.peak_bytes > 0 and row.scorer in printed for row in rows)
    by_name = {row.scorer: row for row in rows}
    assert by_name["window_attention"].ratio == by_name["window_attention"].ratio_of_bytes == 1
    assert by_name["recency"].peak_bytes <= by_name["window_attention"].peak_bytes
    assert by_name["window_attention"].peak_bytes < by_name["expected_attention"].peak_bytes  # covariances
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == len(rows)


def test_kernels_run_on_a_cpu(tmp_path, capsys):
    kernels.measure("cpu", 1, tmp_path / "k.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines()]
    assert {row["kernel"] for row in rows} == {
        "ragged_decode", "append", "window_score", "evict", "sdpa prefill of the layer",
    }  # fmt: skip


@pytest.mark.parametrize("method", ["sparsemm", "fullkv"])
def test_memory_does_not_grow(method, capsys):
    """The short form of 500 prompts: 24 of them; the process is measured by the command."""
    assert memory.measure("tiny-qwen2-vl", 24, method, 64, "cpu", "", None)


def test_memory_that_grows_is_seen(monkeypatch, capsys):
    kept = []

    def leak(*args):
        kept.append(torch.zeros(1000))
        return generate(*args)

    monkeypatch.setattr(memory, "generate", leak)
    assert not memory.measure("tiny-qwen2-vl", 8, "snapkv", 64, "cpu", "", None)
    assert "GREW" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(preset="llava-7b"), "preset='llava-7b' is unknown; known: llava-next-vicuna-7b"),
        (dict(context="2k"), "context='2k' must be positive numbers"),
        (dict(context="40"), "context=40 is too short for this preset: one image takes 52 tokens"),
        (dict(methods="snapkw"), "snapkv"),
        (dict(methods="stock-eager"), "stock-eager"),
        (dict(methods=" "), "names none"),
        (dict(dtype="int8"), "dtype='int8' is unknown"),
        (dict(device="cuda"), "torch sees no GPU here"),
    ],
)
def test_mistakes_are_one_sentence(change, message):
    if change == dict(device="cuda") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    common = dict(
        preset="tiny-llava-next", context="160", batch="1", budget=64, methods="stock", new_tokens=4, repeats=1
    )
    with pytest.raises(ValueError, match=message):
        speed.decode(**{**common, "device": "cpu", "dtype": "", "compiled": False, "output": None, **change})


def test_order_changes_from_turn_to_turn():
    names = ["a", "b", "c"]
    assert {rotated(names, turn)[0] for turn in range(6)} == set(names)
    assert all(sorted(rotated(names, turn)) == names for turn in range(6))
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


def test_rows_are_appended(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    for number in (1, 2):
        write_row(path, {"number": number, "ms": 1 / 3})
    assert path.read_text() == '{"number": 1, "ms": 0.33333}\n{"number": 2, "ms": 0.33333}\n'


def test_the_command_line_imports_torch_only_on_use():
    code = "import sys, sparsemm_lmms.bench.speed; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "set()", done.stderr
