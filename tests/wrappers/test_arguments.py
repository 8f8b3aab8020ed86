"""--model_args: what is accepted, what it becomes, and the sentences for the rest."""

from __future__ import annotations

import pytest

from sparsemm_lmms.methods import METHODS
from sparsemm_lmms.model_wrappers.arguments import known_settings, split_arguments, unused_settings
from sparsemm_lmms.model_wrappers.llava_next import LlavaNext
from sparsemm_lmms.model_wrappers.qwen2_vl import Qwen2VL

LLAVA, QWEN = LlavaNext.family, Qwen2VL.family


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
    given = {"budget": "None", "dtype": None, "device_map": "None", "revision": "none", "max_pixels": ""}
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
        (LLAVA, "sparsemm", {"max_pixels": 1}, "only qwen2_vl models"),
        (LLAVA, "snapkv", {"beta": 20}, "it belongs to pyramidkv"),
        (QWEN, "snapkv", {"ratio": 0.1}, "it belongs to sparsemm, random"),
        (QWEN, "adakv", {"head_scores": "auto"}, "it belongs to sparsemm, mask, mask_random"),
        (QWEN, "sparsemm", {"floor_ratio": 0.2}, "it belongs to adakv"),
        (QWEN, "snapkv", {"budget": 0}, "budget=0 must be larger than window_size=32"),
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
        (LLAVA, "snapkv", {"fps": 2}, "only qwen2_vl models read video"),
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
    compression = ("budget", "window_size", "redistribute", "compress_before_question")
    assert unused_settings("fullkv") == (*compression, *pooled, "seed")
    assert unused_settings("local_window") == (*pooled, "seed")
    assert unused_settings("snapkv") == ("seed",)
    assert unused_settings("random") == unused_settings("sparsemm") == ()
