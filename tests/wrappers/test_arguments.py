"""--model_args: what is accepted, what it becomes, and the sentences for the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lmms_eval.models import get_model

from sparsemm_lmms import CompressionConfig
from sparsemm_lmms.families import FAMILIES
from sparsemm_lmms.methods import METHODS
from sparsemm_lmms.model_wrappers import loading
from sparsemm_lmms.model_wrappers.arguments import (
    RunOptions,
    known_settings,
    parse_arguments,
    split_arguments,
    unused_settings,
)
from sparsemm_lmms.model_wrappers.lmms_eval.model import LlavaNextSnapkv
from sparsemm_lmms.model_wrappers.loading import check_possible, load_checkpoint, read_device_map, resolve_device

LLAVA, QWEN = FAMILIES["llava_next"], FAMILIES["qwen2_vl"]


def test_strings_become_values() -> None:
    given = {
        "pretrained": "p",
        "budget": "64",
        "redistribute": "true",
        "ratio": "0.2",
        "batch_size": "4",
        "revision": 7,
    }
    options, config = split_arguments(LLAVA, "sparsemm", given)
    assert (options.batch_size, options.revision) == (4, "7")
    assert (config.budget, config.redistribute, config.ratio, config.method) == (64, True, 0.2, "sparsemm")


def test_none_means_not_given() -> None:
    given = {"budget": "None", "dtype": None, "device_map": "None", "revision": "none", "max_pixels": "None"}
    assert split_arguments(QWEN, "snapkv", given) == split_arguments(QWEN, "snapkv", {})


def test_defaults_are_those_of_the_stock_models() -> None:
    llava, _ = split_arguments(LLAVA, "fullkv", {})
    qwen, _ = split_arguments(QWEN, "fullkv", {})
    assert (llava.pretrained, llava.system_prompt) == ("llava-hf/llava-v1.6-vicuna-7b-hf", None)
    assert (qwen.pretrained, qwen.system_prompt) == ("Qwen/Qwen2-VL-7B-Instruct", "You are a helpful assistant.")
    assert (qwen.min_pixels, qwen.max_pixels) == (3136, 602112)
    assert (llava.min_pixels, llava.max_pixels, llava.trust_remote_code) == (None, None, False)


def test_the_demo_keeps_its_own_prompt_and_image_sizes() -> None:
    options, _ = split_arguments(QWEN, "fullkv", {"pretrained": "demo"})
    assert (options.system_prompt, options.min_pixels, options.max_pixels) == (None, None, None)


def test_a_system_prompt_can_be_switched_off() -> None:
    assert split_arguments(QWEN, "fullkv", {"system_prompt": "None"})[0].system_prompt is None


@pytest.mark.parametrize(
    ("family", "method", "given", "sentence"),
    [
        (LLAVA, "sparsemm", {"budgte": 64}, r"budgte.*known: .*budget.*Did you mean 'budget'"),
        (LLAVA, "sparsemm", {"max_pixels": 1}, "only .*qwen2_vl"),
        (LLAVA, "snapkv", {"beta": 20}, "it belongs to pyramidkv"),
        (QWEN, "snapkv", {"ratio": 0.1}, "it belongs to sparsemm, .*random"),
        (QWEN, "adakv", {"head_scores": "auto"}, "it belongs to sparsemm, .*mask, mask_random"),
        (QWEN, "sparsemm", {"floor_ratio": 0.2}, "it belongs to adakv"),
        (QWEN, "snapkv", {"budget": 0}, "budget=0 must be at least 1"),
        (QWEN, "snapkv", {"budget": -1}, "budget=-1"),
        (QWEN, "snapkv", {"budget": "abc"}, "budget='abc' is not a whole number"),
        (QWEN, "snapkv", {"budget": 16}, "must be larger than window_size=32"),
        (QWEN, "snapkv", {"budget": 1.5}, "whole number"),
        (QWEN, "snapkv", {"kernel_size": 4}, "odd"),
        (QWEN, "snapkv", {"batch_size": "auto"}, "batch_size='auto' is not a whole number"),
        (QWEN, "snapkv", {"batch_size": 0}, "at least 1"),
        (QWEN, "snapkv", {"dtype": "fp16"}, "dtype 'fp16'; known: .*Did you mean 'float16'"),
        (QWEN, "snapkv", {"attn_implementation": "flash"}, "known: sdpa"),
        (QWEN, "snapkv", {"min_pixels": 700000}, "must not exceed max_pixels=602112"),
        (QWEN, "snapkv", {"trust_remote_code": "maybe"}, "true or false"),
        (QWEN, "snapkv", {"compress_before_question": "perhaps"}, "compress_before_question='perhaps' is not true or"),
        (QWEN, "snapkv", {"rounds": "appended"}, "rounds 'appended'; known: .*Did you mean 'append'"),
        (QWEN, "snapkv", {"max_num_frames": 1}, "max_num_frames=1 must be at least 2"),
        (QWEN, "snapkv", {"fps": 0}, "fps=0.0 must be larger than 0"),
        (LLAVA, "snapkv", {"fps": 2}, "only .*qwen2_vl, .*models read video"),
        (QWEN, "snapkv", {"fps": "inf"}, "fps='inf' is not a finite number"),
        (QWEN, "snapkv", {"max_pixels": ""}, "max_pixels= is empty"),
        (QWEN, "sparsemm", {"head_scores": " "}, "head_scores= is empty"),
        (QWEN, "fullkv", {"budget": -5}, "budget=-5 must be at least 1"),
        (QWEN, "random", {"ratio": "1" + "0" * 400}, "is not a finite number"),
        (QWEN, "snapkv", {"self": 1}, "Unknown argument of qwen2_vl_snapkv 'self'"),
    ],
)
def test_wrong_arguments_are_one_sentence(family, method, given, sentence) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        split_arguments(family, method, given)
    assert "\n" not in str(caught.value)


def test_every_method_takes_the_shared_settings() -> None:
    for method in METHODS:
        options, _ = split_arguments(QWEN, method, {"compress_before_question": "true", "rounds": "recompress"})
        assert options.compress_before_question and options.rounds == "recompress"
        assert {"budget", "window_size", "seed", "redistribute", "kernel_backend"} <= known_settings(method)


def test_settings_without_effect_are_known_as_such() -> None:
    pooled = ("kernel_size", "pooling", "gqa_func")
    compression = ("budget", "window_size", "redistribute", "max_cache", "compact_by", "compress_before_question")
    assert set(unused_settings("fullkv")) == {*compression, *pooled, "seed"}
    assert set(unused_settings("local_window")) == {*pooled, "seed"}
    assert unused_settings("snapkv") == ("seed",)
    assert unused_settings("random") == unused_settings("sparsemm") == ()


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("pretrained=demo,budget=64", {"pretrained": "demo", "budget": "64"}),
        (" pretrained = demo , budget = 64 ,", {"pretrained": "demo", "budget": "64"}),
        ("system_prompt=Don't guess,budget=64", {"system_prompt": "Don't guess", "budget": "64"}),
        ('system_prompt=5" or [6,budget=64', {"system_prompt": '5" or [6', "budget": "64"}),
        ("system_prompt=Look, then answer,budget=64", {"system_prompt": "Look, then answer", "budget": "64"}),
        ('device_map={"a": 0, "b": 1},budget=64', {"device_map": '{"a": 0, "b": 1}', "budget": "64"}),
        ("system_prompt=a=b, 2+2=4,seed=1", {"system_prompt": "a=b, 2+2=4", "seed": "1"}),
        ("revision=0123456", {"revision": "0123456"}),
        ("revision=1e10,pretrained=007", {"revision": "1e10", "pretrained": "007"}),
        ("trust_remote_code=True,system_prompt=None", {"trust_remote_code": "True", "system_prompt": "None"}),
    ],
)
def test_the_command_line_is_read_as_it_was_given(text, values) -> None:
    assert parse_arguments(text) == values


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("demo", "--model_args 'demo' is not of the form name=value"),
        ("=demo", "is not of the form"),
        ("demo,budget=64", "is not of the form"),
        ("pretrained=demo,budget=", "budget= is empty: give a value"),
        ("pretrained=,budget=64", "pretrained= is empty"),
        ("budget=,", "budget= is empty"),
        ("budget=64,budget=128", r"gives budget twice \(budget=64 and budget=128\)"),
        ("budget=64,pretrained=demo,budget=64", "gives budget twice"),
        ("self=1", r"cannot set 'self' \(self=1\); leave it out"),
        ("pretrained=demo,checkpoint=x", "cannot set 'checkpoint'"),
        ("max_batch_size=7", "cannot set 'max_batch_size'"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(text, sentence) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        LlavaNextSnapkv.create_from_arg_string(text, {"batch_size": 1})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"device": "mps"}, "device=mps is no device that this machine"),
        ({"device": "xpu"}, "device=xpu is no device that this machine"),
        ({"device": "meta"}, "device=meta is no device that this machine"),
        ({"device": "cuda:9"}, "device=cuda:9 was asked for, but the last device here is cuda:1"),
        ({"device_map": "meta"}, "device_map=meta is no device that this machine"),
        ({"device_map": "cuda:9"}, "device_map=cuda:9 was asked for, but the last device here is cuda:1"),
        ({"device_map": "2"}, "device_map=cuda:2 was asked for"),
        ({"device_map": "evenly"}, "device_map='evenly' is no torch device"),
        ({"device_map": '{"a": 0'}, 'device_map={"a": 0 is no JSON object'),
        ({"device_map": '{"a": 0, "b": 9}'}, "device_map=cuda:9 was asked for"),
        ({"device_map": '{"a": null}'}, "names None, which is no device"),
    ],
)
def test_absent_devices(monkeypatch: pytest.MonkeyPatch, given, sentence) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    with pytest.raises(ValueError) as caught:
        resolve_device(RunOptions("p", **given))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_device_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    wanted = {None: None, "auto": "auto", "cpu": "cpu", "1": "cuda:1", '{"a": 0, "b": "cpu"}': {"a": 0, "b": "cpu"}}
    assert {given: read_device_map(RunOptions("p", device_map=given)) for given in wanted} == wanted


def test_flash_attention_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    options = RunOptions("p", attn_implementation="flash_attention_2")
    monkeypatch.setattr(loading, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ValueError, match="attn_implementation=flash_attention_2 needs the flash-attn package"):
        check_possible(options, CompressionConfig(), torch.device("cuda"))
    monkeypatch.setattr(loading, "is_flash_attn_2_available", lambda: True)
    check_possible(options, CompressionConfig(), torch.device("cuda"))
    with pytest.raises(ValueError, match="runs on CUDA only, not on cpu"):
        check_possible(options, CompressionConfig(), torch.device("cpu"))


def test_triton_needs_cuda_or_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CompressionConfig(kernel_backend="triton")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check_possible(RunOptions("p"), config, torch.device("cuda"))
    with pytest.raises(ValueError, match="kernel_backend=triton runs on CUDA only, not on cpu"):
        check_possible(RunOptions("p"), config, torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_possible(RunOptions("p"), config, torch.device("cpu"))
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the triton package"):
        check_possible(RunOptions("p"), config, torch.device("cuda"))


@pytest.mark.parametrize("name", ["llava_next_mask_random", "qwen2_vl_mask_random"])
def test_a_mask_that_leaves_too_few_heads(name: str) -> None:
    with pytest.raises(ValueError, match=r"mask_ratio=0.51 leaves too few heads for mask_random.*at most 0.5"):
        get_model(name).create_from_arg_string("pretrained=demo,device=cpu,mask_ratio=0.51")
    for method, ratio in (("mask_random", 0.5), ("mask", 1.0)):
        check_possible(RunOptions("p"), CompressionConfig(method, mask_ratio=ratio), torch.device("cpu"))


def test_pixel_limits_that_contradict_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch, checkpoints: dict[str, Path]
) -> None:
    folder = checkpoints["qwen2_vl"]
    own = load_checkpoint(QWEN, RunOptions(str(folder)), torch.device("cpu")).processor.image_processor.size
    least, most = own["shortest_edge"], own["longest_edge"]

    def read_weights(*args, **kwargs):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(loading.transformers, QWEN.architecture, type("Model", (), {"from_pretrained": read_weights}))
    for given, sentence in (
        ({"max_pixels": 1}, f"max_pixels=1 is below the min_pixels={least} of"),
        ({"min_pixels": most + 1}, f"min_pixels={most + 1} is above the max_pixels={most} of"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load_checkpoint(QWEN, RunOptions(str(folder), **given), torch.device("cpu"))


def test_max_cache_needs_a_prompt_that_is_read_at_once() -> None:
    given = {"budget": 64, "max_cache": 128}
    assert split_arguments(FAMILIES["qwen2_vl"], "snapkv", given)[1].chunk == 64
    with pytest.raises(ValueError, match="max_cache=128 compacts .* compress_before_question=true does not"):
        split_arguments(FAMILIES["qwen2_vl"], "snapkv", given | {"compress_before_question": True})
