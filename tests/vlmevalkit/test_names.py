"""Names state every setting that changes answers, read back what they state, and never trigger the host's rules."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sparsemm_lmms import CompressionConfig, HeadScores
from sparsemm_lmms.families import FAMILIES
from sparsemm_lmms.methods import METHODS, all_settings
from sparsemm_lmms.model_wrappers.arguments import RunOptions
from sparsemm_lmms.model_wrappers.vlmevalkit.model import (
    NOT_TOLD,
    TOLD,
    CompressedVLM,
    HostOptions,
)
from sparsemm_lmms.model_wrappers.vlmevalkit.names import (
    BASES,
    CONTROLS,
    hash_scores,
    is_ours,
    listed_names,
    name_suffix,
    parse_name,
    vocabulary,
)
from sparsemm_lmms.settings import declared

HOST_RULES = (
    "Llama-4",  # run.py's inference, inference_mt, inference_video: `use_vllm=` in the constructor
    "Qwen2-VL",
    "Qwen2.5-VL",
    "Qwen2.5-Omni",
    "llava_onevision",  # inference_video: no videos
    "GPT4",  # DUDE, SlideVQA, MMLongBench: page layouts of single models
    "XComposer",
    "MiniCPM",
    "InternVL-Chat-V1-5",
)
NUMBERS, FLAGS = vocabulary()
EXAMPLES: dict[str, Any] = {
    "b": 96,
    "w": 16,
    "k": 7,
    "r": 0.25,
    "f": 0.3,
    "skip": 2,
    "beta": 10,
    "m": 0.05,
    "gamma": 50.0,
    "ent": 1.6,
    "var": 0.4,
    "hss": 0.3,
    "s": 3,
    "minp": 3136,
    "maxp": 1003520,
    "new": 32,
    "cap": 512,
}
METHOD_OF = {"r": "sparsemm", "f": "adakv", "skip": "adakv", "beta": "pyramidkv", "m": "mask", "s": "random"}
METHOD_OF |= {"hss": "waterfill"} | dict.fromkeys(("gamma", "ent", "var"), "cake")


class LlavaNext(CompressedVLM):
    family = FAMILIES["llava_next"]
    adapter = family.vlmevalkit


class Qwen2VL(CompressedVLM):
    family = FAMILIES["qwen2_vl"]
    adapter = family.vlmevalkit


def suffix(method: str, **settings: Any) -> str:
    return Qwen2VL.name_suffix(method, {"pretrained": "somewhere", **settings})


def test_no_name_triggers_a_rule_of_the_host() -> None:
    names = listed_names() + [f"{base}_{name_suffix('sparsemm', {'budget': 64, 'ratio': 0.2})}" for base in BASES]
    assert [name for name in names if any(rule in name for rule in HOST_RULES)] == []
    assert len(set(names)) == len(names)


def test_listed_names_are_read_back() -> None:
    for name in listed_names():
        base, method, settings = parse_name(name, {})
        assert BASES[name.split("_")[0]] == base and name.endswith(name_suffix(method, settings))
        assert is_ours(name)


@pytest.mark.parametrize("word", list(NUMBERS))
def test_every_number_goes_into_the_name_and_back(word: str) -> None:
    setting, value = NUMBERS[word][0], EXAMPLES[word]
    method = METHOD_OF.get(word, "snapkv")
    name = "Qwen2VL-Demo_" + suffix(method, **{setting: value})
    assert f"_{word}{value}" in name
    _, found, settings = parse_name(name, {})
    assert (found, settings[setting]) == (method, value) and suffix(found, **settings) in name


@pytest.mark.parametrize("word", list(FLAGS))
def test_every_word_goes_into_the_name_and_back(word: str) -> None:
    setting, value = FLAGS[word]
    method = "adakv" if setting == "normalize" else "snapkv"
    name = "Qwen2VL-Demo_" + suffix(method, **{setting: value})
    assert name.endswith(f"_{word}")
    assert parse_name(name, {})[2] == {setting: value, "budget": 256}


def test_no_setting_is_left_without_a_word() -> None:
    """A new setting must get a word here, or two runs that differ in it would share their outputs."""
    words = {setting for setting, _ in (*NUMBERS.values(), *FLAGS.values())} | {
        "head_scores",
        "system_prompt",
        "peft",
        "h",
    }
    assert {*all_settings(), *declared(CompressionConfig)} - {"method"} <= words
    assert {field.name for field in dataclasses.fields(HostOptions)} <= words
    assert set(TOLD) <= words
    every = {"dtype": "float16", "attn_implementation": "eager", "kernel_backend": "torch", "pooling": "maxpool"}
    assert suffix("snapkv", **every) == "snapkv_b256_maxpool_fp16_eager_torch"


def test_other_options_of_lmms_eval_are_refused() -> None:
    others = {field.name for field in dataclasses.fields(RunOptions)} - {*TOLD, *NOT_TOLD, "min_pixels", "max_pixels"}
    assert {"batch_size", "max_num_frames"} <= others
    for name in others:
        with pytest.raises(ValueError, match=f"'{name}' in VLMEvalKit"):
            suffix("snapkv", **{name: 4})


def test_defaults_are_not_told_and_strings_count_as_their_value() -> None:
    assert suffix("sparsemm", budget="64", window_size="32", ratio="0.1", dtype="auto") == "sparsemm_b64"
    assert suffix("fullkv", budget=64, window_size=16) == "fullkv"  # without effect: no difference to tell
    assert LlavaNext.name_suffix("mask_random", {"seed": 1}) == "mask_random_s1"


def test_head_scores_are_told_by_content(tmp_path: Path) -> None:
    scores = HeadScores.random(3, 4, seed=1)
    one, two = scores.save(tmp_path / "one.json"), HeadScores.random(3, 4, seed=2).save(tmp_path / "two.json")
    files = hash_scores([one, two])
    word = f"hs-{scores.content_hash[:8]}"
    assert suffix("sparsemm", budget=64, head_scores=str(one)) == f"sparsemm_b64_{word}"
    assert suffix("mask", head_scores=f"layer_mean:{one}") == f"mask_hs-layermean-{word[3:]}"
    assert parse_name(f"Qwen2VL-Demo_sparsemm_b64_{word}", files)[2]["head_scores"] == str(one)
    spec = parse_name(f"Qwen2VL-Demo_sparsemm_b64_hs-permuted-{word[3:]}_s2", files)[2]
    assert (spec["head_scores"], spec["seed"]) == (f"permuted:{one}", 2)
    for control, value in CONTROLS.items():
        name = f"Qwen2VL-Demo_sparsemm_b64_hs-{control}"
        assert parse_name(name, {})[2]["head_scores"] == value
        assert name.endswith(suffix("sparsemm", budget=64, head_scores=value))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Qwen2VL-7B_fullkv", "Unknown checkpoint 'Qwen2VL-7B'"),
        ("Qwen2VL-Demo_sparsem_b64", "Did you mean 'sparsemm'"),
        ("Qwen2VL-Demo_snapkv", "call it Qwen2VL-Demo_snapkv_b256"),
        ("Qwen2VL-Demo_snapkv_b64_b32", "states budget twice"),
        ("Qwen2VL-Demo_snapkv_b64_fp16_bf16", "states dtype twice"),
        ("Qwen2VL-Demo_snapkv_b64_r0.2", "'r0.2' .ratio. has no effect on snapkv"),
        ("Qwen2VL-Demo_fullkv_b64", "'b64' .budget. has no effect on fullkv"),
        ("Qwen2VL-Demo_snapkv_b64_hs-uniform", "has no effect on snapkv"),
        ("Qwen2VL-Demo_snapkv_b6.5", "budget='6.5' is not a whole number"),
        ("Qwen2VL-Demo_snapkv_b64_x9", "'x9' is no setting; known: b<budget>"),
        ("Qwen2VL-Demo_snapkv_b64_", "'' is no setting"),
        ("Qwen2VL-Demo_sparsemm_b64_hs-0123abcd", "give their file with --head-scores"),
        ("Qwen2VL-Demo_sparsemm_b64_hs-mean-0123abcd", "Unknown head scores 'mean'"),
    ],
)
def test_a_wrong_name_is_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        parse_name(name, {})
    assert "\n" not in str(error.value)


def test_free_combinations_have_names_too() -> None:
    assert suffix("keydiff+pyramid", budget=64, beta=10) == "keydiff+pyramid_b64_beta10"
    _, method, settings = parse_name("Qwen2VL-Demo_window_attention+uniform_b64_k7", {})
    assert (method, settings) == ("window_attention+uniform", {"budget": 64, "kernel_size": 7})
    assert is_ours("Anything_keydiff+uniform_b64")
    with pytest.raises(ValueError, match="allocator=adakv holds the scores of heads against each other"):
        parse_name("Qwen2VL-Demo_keydiff+adakv_b64", {})


def test_methods_are_told_apart_from_longer_ones() -> None:
    assert parse_name("Qwen2VL-Demo_mask_random_m0.2", {})[1] == "mask_random"
    assert parse_name("Qwen2VL-Demo_local_window_b64", {})[1] == "local_window"
    assert all(not cls.compresses or f"Qwen2VL-Demo_{name}_b64" in listed_names() for name, cls in METHODS.items())
