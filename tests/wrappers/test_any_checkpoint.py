"""`vlm_<method>`: the family is that of the checkpoint, or transformers' own class for its type, or a clear refusal."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lmms_eval.models import get_model
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from sparsemm_lmms.families import FAMILIES, GENERIC, family_of
from sparsemm_lmms.model_wrappers.arguments import RunOptions
from sparsemm_lmms.model_wrappers.engine import Engine
from sparsemm_lmms.model_wrappers.lmms_eval.manifest import stock_id
from sparsemm_lmms.model_wrappers.loading import _name_image_token, find_family

from . import tiny
from .conftest import conversation, png, request
from .test_evaluate import GREEDY, SIZES, evaluate, load, replies

WEIGHTS = "sparsemm_lmms.model_wrappers.compressed.load_checkpoint"
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": tiny.LAYERS, "num_attention_heads": 4}
CHAT = tiny.TURNS.replace("VIDEO", "")


def vipllava(folder: Path) -> Path:
    """CLIP tower, 9 tokens an image."""
    torch.manual_seed(0)
    tokenizer = tiny.tokenizer(["<image>"])
    config = VipLlavaConfig(
        text_config=LlamaConfig(
            **TEXT, num_key_value_heads=2, vocab_size=len(tokenizer), initializer_range=0.4, **tiny.ends(tokenizer)
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=42,
            patch_size=14,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layers=[-1, -1],
        image_seq_length=9,
    )  # fmt: skip
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )
    return tiny.save(VipLlavaForConditionalGeneration(config), processor, folder)


def answers(model: Any, count: int = 3) -> list[str]:
    requests = [request(model, conversation(i, images=1 + (i == 1)), i, GREEDY) for i in range(count)]
    return [result.text for result in model.generate_until(requests)]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose type has no family."""
    assert "vipllava" not in FAMILIES
    return vipllava(tmp_path_factory.mktemp("vipllava"))


def given(folder: Path, **more: Any) -> str:
    arguments = {"pretrained": folder, "window_size": 8, "budget": 20, "device": "cpu"} | more
    return ",".join(f"{name}={value}" for name, value in arguments.items())


@pytest.fixture
def keyed(task: Callable[..., Path]) -> Path:
    """The tiny task, which asks every id of lmms-eval in its own words."""
    folder = task([png(i, size) for i, size in enumerate(SIZES)])
    words = {name: {"words": f"as {name}"} for name in ("default", "llava_hf", "qwen2_vl", "huggingface")}
    with (folder / "tiny_images.yaml").open("a") as file:
        file.write(f"lmms_eval_specific_kwargs: {json.dumps(words)}\n")
    utils = folder / "utils.py"
    utils.write_text(
        utils.read_text().replace('doc["question"]', 'doc["question"] + lmms_eval_specific_kwargs["words"]')
    )
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every prompt that an engine makes."""
    found: list[str] = []
    make = Engine.prompt

    def prompt(*args: Any) -> Any:
        made = make(*args)
        found.append(made.text)
        return made

    monkeypatch.setattr(Engine, "prompt", prompt)
    return found


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
def test_a_known_type_is_its_family(family: str, arguments: Callable[..., str], keyed: Path, asked: list[str]) -> None:
    folder = keyed
    named = evaluate(f"{family}_snapkv", arguments(f"{family}_snapkv"), folder)
    found = evaluate("vlm_snapkv", arguments(f"{family}_snapkv"), folder)
    assert replies(found) == replies(named)
    told, wanted = found["sparsemm_lmms"]["settings"], named["sparsemm_lmms"]["settings"]
    assert told == {**wanted, "model": "vlm_snapkv", "family": family, "model_type": family}
    assert stock_id("vlm_snapkv") == stock_id(f"{family}_snapkv")
    assert len(asked) == 2 * len(SIZES) and asked[: len(SIZES)] == asked[len(SIZES) :]
    assert all(f"as {FAMILIES[family].lmms_eval.prompts_of}" in text for text in asked)


def test_prompts_are_those_of_the_family(arguments: Callable[..., str]) -> None:
    text = arguments("llava_next_snapkv")
    named, found = load("llava_next_snapkv", text), load("vlm_snapkv", text)
    assert found.family is FAMILIES["llava_next"] and stock_id("vlm_snapkv") == "llava_hf"
    texts = [model.engine.prompt(conversation(1, images=2)).text for model in (named, found)]
    assert texts[0] == texts[1] and texts[0].count("<image>") == 2
    assert answers(named) == answers(found)


def test_a_type_without_family_runs_as_transformers_class(other: Path, keyed: Path, asked: list[str]) -> None:
    results = evaluate("vlm_snapkv", given(other), keyed)
    assert len(asked) == len(SIZES) and all("as huggingface" in text for text in asked)
    assert len(replies(results)) == len(SIZES) and stock_id("vlm_snapkv") == "huggingface"
    told = results["sparsemm_lmms"]["settings"]
    assert (told["model"], told["family"], told["model_type"]) == ("vlm_snapkv", "generic", "vipllava")
    assert results["throughput"]["avg_kept_tokens"] <= 20 < results["throughput"]["avg_prompt_tokens"]


@pytest.mark.parametrize("method", ["fullkv", "snapkv"])
def test_its_full_budget_is_the_stock_model(other: Path, method: str) -> None:
    ours = load(f"vlm_{method}", given(other, budget=500, batch_size=2))
    processor = AutoProcessor.from_pretrained(other)
    stock = AutoModelForImageTextToText.from_pretrained(other, dtype=torch.float32).eval()
    wanted = []
    for i in range(3):
        messages = conversation(i, images=1 + (i == 1))
        images = [part["url"] for part in messages[0]["content"] if part["type"] == "image"]
        inputs = processor(
            text=processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
            images=images,
            return_tensors="pt",
        )
        tokens = stock.generate(**inputs, max_new_tokens=GREEDY["max_new_tokens"], do_sample=False)
        wanted.append(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert answers(ours) == wanted
    assert ours._generation(request(ours, conversation(0), 0, {})).max_new_tokens == GENERIC.max_new_tokens


def test_the_question_is_told_from_the_image(other: Path) -> None:
    """Image tokens are those of the config."""
    whole = load("vlm_snapkv", given(other, budget=500))
    parts = load("vlm_snapkv", given(other, budget=500, compress_before_question="true"))
    assert answers(parts) == answers(whole)


def test_a_processor_that_foretells_no_sizes(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("vlm_snapkv", given(other))
    prompt = model.engine.prompt(conversation(0))
    foretold = model.engine.size(prompt)
    monkeypatch.delattr(LlavaProcessor, "_get_num_multimodal_tokens")
    assert model.engine.size(prompt) == foretold


def test_the_image_token_of_the_processor(other: Path) -> None:
    """Where the config names none; where nothing does, that is said."""
    family, options = find_family("vlm_snapkv", {"pretrained": str(other)}), RunOptions(str(other))
    config, processor = SimpleNamespace(), AutoProcessor.from_pretrained(other)
    _name_image_token(config, family, processor, options)
    assert config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>")
    with pytest.raises(ValueError, match="neither its config nor its processor names the token"):
        _name_image_token(SimpleNamespace(), family, SimpleNamespace(tokenizer=object()), options)


def test_scores_need_a_grid_or_a_file(other: Path, scores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("vlm_sparsemm", given(other, head_scores=scores))
    assert model.settings()["head_scores"]["source"] == str(scores) and len(answers(model, 1)) == 1
    assert load("vlm_sparsemm", given(other, head_scores="uniform")).head_scores is not None
    monkeypatch.setattr(WEIGHTS, None)
    for word in ("auto", "layer_mean", "permuted"):
        with pytest.raises(
            ValueError, match=f"head_scores={word} .* no token grid .* 'vipllava'.*PATH.*snapkv"
        ) as told:
            load("vlm_sparsemm", given(other, head_scores=word))
        assert "\n" not in str(told.value)


def test_scores_beside_the_weights(other: Path, scores: Path, tmp_path: Path) -> None:
    shutil.copytree(other, tmp_path / "copy")
    shutil.copy(scores, tmp_path / "copy" / "head_scores.json")
    assert load("vlm_sparsemm", given(tmp_path / "copy")).head_scores is not None


REFUSED = {
    "cross-attention": ({"model_type": "mllama"}, "cross-attention layers"),
    "latent attention": ({"model_type": "kimi_k25"}, r"latent attention \(kv_lora_rank\)"),
    "latent text model": (
        {"model_type": "llava", "image_token_index": 3, "text_config": {"model_type": "deepseek_v3"}},
        r"latent attention \(kv_lora_rank\)",
    ),
    "encoder-decoder": ({"model_type": "florence2"}, "it is an encoder-decoder"),
    "no kv heads": ({"model_type": "fuyu"}, "names no num_key_value_heads"),
    "no layers": ({"model_type": "pi0"}, "names no num_hidden_layers"),
    "strange layers": ({"model_type": "unlimited_ocr"}, "no cache for its layers"),
    "remote code": (
        {"model_type": "internvl_chat", "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}},
        r"'internvl_chat' model, whose attention is code of its repository \(remote code\)",
    ),
    "remote code of a known type": (
        {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}},
        r"\(remote code\)",
    ),
    "text only": ({"model_type": "llama"}, "text-only 'llama' checkpoint, which reads no images"),
    "audio": (
        {"model_type": "whisper"},
        "no class that reads images and writes text for 'whisper', a model with audio",
    ),
    "audio tower": ({"model_type": "qwen2_audio"}, "'qwen2_audio', a model with audio"),
    "soft-capped text model": (
        {"model_type": "paligemma", "text_config": {"model_type": "gemma2"}},
        "'gemma2' text model, .*; use attn_implementation=eager",
    ),
    "text model with sinks": (
        {"model_type": "internvl", "text_config": {"model_type": "gpt_oss"}},
        "'gpt_oss' text model, .*; use attn_implementation=eager",
    ),
    "no object": (["llava"], "config.json that is no JSON object"),
    "a number": (3, "config.json that is no JSON object"),
    "no answers": ({"model_type": "clip"}, "no class that reads images and writes text for its model type 'clip'"),
    "unknown": ({"model_type": "of_tomorrow"}, "knows no model type 'of_tomorrow'"),
    "no type": ({"hidden_size": 3}, "knows no model type ''"),
    "odd text model": (
        {"model_type": "vipllava", "text_config": {"model_type": "of_tomorrow"}},
        "config.json that transformers .* cannot read: .*of_tomorrow",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("trust", [False, True])
def test_refused_before_weights(name: str, trust: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WEIGHTS, None)
    config, sentence = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^pretrained={tmp_path} .*{sentence}") as told:
        load("vlm_snapkv", given(tmp_path, trust_remote_code=trust))
    assert "\n" not in str(told.value) and str(told.value).endswith(".")


def test_a_named_family_is_refused_by_its_config_as_well(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WEIGHTS, None)
    config = json.loads((checkpoints["llava_next"] / "config.json").read_text())
    config["text_config"] = {"model_type": "deepseek_v3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("llava_next_snapkv", "vlm_snapkv"):
        with pytest.raises(ValueError, match=r"\(LlavaNextForConditionalGeneration\) cannot be compressed: its latent"):
            load(name, given(tmp_path))


WRONG = {
    "another family": ({"model_type": "qwen2_vl"}, "it belongs to the qwen2_vl_* models: use qwen2_vl_sparsemm"),
    "a variant of another": ({"model_type": "qwen3_vl_moe"}, "the qwen3_vl_* models: use qwen3_vl_sparsemm"),
    "no family": ({"model_type": "vipllava"}, "try vlm_* models, which run any checkpoint: vlm_sparsemm"),
    "text only": ({"model_type": "llama"}, "it is a text-only 'llama' checkpoint, which reads no images"),
    "remote code": (
        {"model_type": "internvl_chat", "auto_map": {"AutoModel": "m.M"}},
        "(remote code); use a checkpoint",
    ),
    "audio": ({"model_type": "qwen2_audio"}, "'qwen2_audio', a model with audio"),
    "no type": ({"hidden_size": 3}, "knows no model type ''"),
    "a list of types": ({"model_type": ["llava"]}, "knows no model type"),
    "cross-attention": (
        {"model_type": "mllama"},
        "(MllamaForConditionalGeneration) cannot be compressed: it has cross",
    ),
    "encoder-decoder": ({"model_type": "florence2"}, "cannot be compressed: it is an encoder-decoder"),
    "latent attention": ({"model_type": "kimi_k25"}, "cannot be compressed: its latent attention"),
}


@pytest.mark.parametrize("family", ["llava_next", "gemma3"])
@pytest.mark.parametrize("name", WRONG)
def test_the_wrong_family_is_told_the_way(
    name: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WEIGHTS, None)
    config, sentence = WRONG[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^pretrained={tmp_path} .*{re.escape(sentence)}") as told:
        load(f"{family}_sparsemm", given(tmp_path))
    assert "\n" not in str(told.value) and str(told.value).endswith(".")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("budget=64", "vlm_snapkv needs pretrained=ORG/NAME, or a folder"),
        ("pretrained=None,budget=64", "vlm_snapkv needs pretrained=ORG/NAME, or a folder"),
        ("pretrained=demo,budget=64", "use --model llava_next_snapkv or qwen2_vl_snapkv"),
        ("pretrained=nobody/nothing", "pretrained=nobody/nothing is no local folder .*pretrained=FOLDER|demo"),
    ],
)
def test_the_checkpoint_must_be_given(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as told:
        load("vlm_snapkv", text)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ({"max_pixels": 99}, "^vlm_snapkv has no argument 'max_pixels': only .*pixel limits"),
        ({"fps": 2}, "^vlm_snapkv has no argument 'fps': only .* read video"),
        ({"budgte": 64}, "^Unknown argument of vlm_snapkv 'budgte'.*Did you mean 'budget'"),
    ],
)
def test_wrong_arguments_name_the_model(other: Path, argument: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load("vlm_snapkv", given(other, **argument))


def test_audio_is_refused(other: Path) -> None:
    model = load("vlm_snapkv", given(other))
    messages = [{"role": "user", "content": [{"type": "audio", "url": "noise.wav"}, {"type": "text", "text": "?"}]}]
    with pytest.raises(NotImplementedError, match="vipllava models hear nothing"):
        model.engine.prompt(messages)


def test_the_name_is_ours() -> None:
    assert family_of("vlm_local_window") == "vlm" and get_model("vlm_local_window").method == "local_window"
