"""Quantised weights and LoRA adapters: stock answers at full budget; what does not fit is refused before loading."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from sparsemm_lmms import CompressionConfig, compress
from sparsemm_lmms.families import FAMILIES
from sparsemm_lmms.model_wrappers import loading, quantization
from sparsemm_lmms.model_wrappers.adapters import adapter_sha256
from sparsemm_lmms.model_wrappers.arguments import QUANTIZATIONS, RunOptions
from sparsemm_lmms.model_wrappers.compressed import CompressedModel
from sparsemm_lmms.model_wrappers.engine import Engine
from sparsemm_lmms.model_wrappers.lmms_eval.commands import repeated
from sparsemm_lmms.model_wrappers.loading import load_checkpoint
from sparsemm_lmms.model_wrappers.sweeps.cells import SweptModel
from sparsemm_lmms.model_wrappers.vlmevalkit.names import name_suffix

from . import tiny
from .conftest import conversation

CPU = torch.device("cpu")
GREEDY = {"max_new_tokens": 8, "do_sample": False}
SMALL = CompressionConfig(method="snapkv", budget=12, window_size=8)
FULL = CompressionConfig(method="snapkv", budget=4096, window_size=8)
PIXELS = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 30}


def lora(checkpoint: Path, family: str, folder: Path, targets: list[str], **settings: Any) -> Path:
    """An adapter that changes answers, as peft writes it."""
    model = _class(family).from_pretrained(checkpoint)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, **settings))
    torch.manual_seed(3)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(str(folder))
    return folder


def _class(family: str) -> Any:
    return getattr(transformers, FAMILIES[family].architecture)


@pytest.fixture(scope="module")
def adapters(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        family: lora(path, family, root / family, ["q_proj", "v_proj", "fc1"]) for family, path in checkpoints.items()
    }


def options(family: str, checkpoint: Path, **more: Any) -> RunOptions:
    return RunOptions(str(checkpoint), **(PIXELS if family == "qwen2_vl" else {}), **more)


def batches(engine: Engine) -> list[Any]:
    """Inputs of one prompt, and of two of which one is padded."""
    asked = [conversation(1), conversation(2, "Which letters are these?")]
    return [engine.batch_inputs([engine.prompt(one) for one in some]) for some in (asked[:1], asked)]


def check_stock_at_full_budget(model: Any, inside: Any, inputs: Any) -> torch.Tensor:
    """Both loops write what the stock model writes; a small budget is in force. Returns the stock answer."""
    stock = model.generate(**inputs, **GREEDY)
    with compress(model, FULL) as session:
        assert torch.equal(model.generate(**inputs, **GREEDY), stock)
        assert torch.equal(session.generate(**inputs, **GREEDY), stock)
        assert session.model is inside
    with compress(model, SMALL) as session:
        model.generate(**inputs, **GREEDY)
        assert session.cache.report()["kept_tokens"] <= 12
    return stock


def need(word: str) -> None:
    package = QUANTIZATIONS[word]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"quantization={word} needs the {package} package")


def wide(folder: Path) -> Path:
    """A checkpoint whose layers have rows in 32s and columns in 64s."""
    path = tiny.qwen2_vl(folder)
    config = transformers.AutoConfig.from_pretrained(path)
    config.text_config.intermediate_size, config.text_config.hidden_size = 128, 64
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 8, 4
    config.vision_config.embed_dim, config.vision_config.hidden_size = 64, 64
    torch.manual_seed(0)
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("word", QUANTIZATIONS)
def test_quantised_weights_answer_as_stock(word: str, tmp_path: Path) -> None:
    need(word)
    path = wide(tmp_path)
    engine = Engine(load_checkpoint(FAMILIES["qwen2_vl"], options("qwen2_vl", path, quantization=word), CPU))
    layer = engine.model.get_decoder().layers[0].mlp.up_proj
    kinds = {type(layer).__name__, type(layer.weight).__name__}
    assert kinds & {"Linear4bit", "Linear8bitLt", "Int8Tensor", "Float8Tensor"}
    for inputs in batches(engine):
        check_stock_at_full_budget(engine.model, engine.model, inputs)
    adapter = lora(path, "qwen2_vl", tmp_path / "adapter", ["q_proj", "v_proj"])
    both = options("qwen2_vl", path, quantization=word, peft=str(adapter))
    adapted = load_checkpoint(FAMILIES["qwen2_vl"], both, CPU).model
    assert isinstance(adapted.get_decoder().layers[0].self_attn.q_proj, peft.tuners.lora.LoraLayer)
    fresh = load_checkpoint(FAMILIES["qwen2_vl"], options("qwen2_vl", path, quantization=word), CPU).model
    live = peft.PeftModel.from_pretrained(fresh, str(adapter))
    for inputs in batches(engine):
        expected = live.generate(**inputs, **GREEDY)
        assert torch.equal(check_stock_at_full_budget(adapted, adapted, inputs), expected)


def test_a_checkpoint_of_compressed_tensors_loads_by_its_own_config(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs the compressed-tensors package")
    path = wide(tmp_path)
    config = json.loads((path / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*visual.*"],
    }
    _pack(path, config)
    engine = Engine(load_checkpoint(FAMILIES["qwen2_vl"], options("qwen2_vl", path), CPU))
    assert engine.model.get_decoder().layers[0].mlp.up_proj.quantization_scheme.weights.num_bits == 8
    for inputs in batches(engine):
        check_stock_at_full_budget(engine.model, engine.model, inputs)
    with pytest.raises(ValueError, match="quantised already \\(compressed-tensors\\); leave quantization out"):
        load_checkpoint(FAMILIES["qwen2_vl"], options("qwen2_vl", path, quantization="torchao-int8wo"), CPU)


def _pack(path: Path, config: dict[str, Any]) -> None:
    """Write the text layers' weights as 8-bit integers with one scale a row, four to a word."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if "layers." in name and name.endswith("proj.weight")]:
        weight = tensors.pop(name)
        scale = weight.abs().amax(1, keepdim=True) / 127
        integers = (weight / scale).round().clamp(-128, 127).to(torch.int32) + 128
        words = (integers.view(len(weight), -1, 4) << torch.tensor([0, 8, 16, 24])).sum(-1).to(torch.int32)
        tensors[f"{name}_packed"], tensors[f"{name}_scale"] = words, scale
        tensors[f"{name}_shape"] = torch.tensor(weight.shape)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", tiny.MAKERS)
def test_an_adapter_is_merged(family: str, checkpoints: dict[str, Path], adapters: dict[str, Path]) -> None:
    told = options(family, checkpoints[family], peft=str(adapters[family]))
    engine = Engine(load_checkpoint(FAMILIES[family], told, CPU))
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in engine.model.modules())
    plain = _class(family).from_pretrained(checkpoints[family], attn_implementation="sdpa")
    inputs = batches(engine)
    before = [plain.generate(**some, **GREEDY) for some in inputs]
    live = peft.PeftModel.from_pretrained(plain, str(adapters[family]))
    for some, unadapted in zip(inputs, before, strict=True):
        stock = check_stock_at_full_budget(engine.model, engine.model, some)
        assert torch.equal(live.generate(**some, **GREEDY), stock)
        assert not torch.equal(stock, unadapted)


def test_a_peft_model_from_python(checkpoints: dict[str, Path], adapters: dict[str, Path]) -> None:
    """Its adapters stay live layers; generate and forward of the wrapper both run on the compressed cache."""
    engine = Engine(load_checkpoint(FAMILIES["qwen2_vl"], options("qwen2_vl", checkpoints["qwen2_vl"]), CPU))
    for task in (None, "CAUSAL_LM"):
        plain = _class("qwen2_vl").from_pretrained(checkpoints["qwen2_vl"], attn_implementation="sdpa")
        config = peft.PeftConfig.from_pretrained(str(adapters["qwen2_vl"]))
        config.task_type = task
        live = peft.get_peft_model(plain, config).eval()
        live.load_adapter(str(adapters["qwen2_vl"]), "default")
        for inputs in batches(engine):
            check_stock_at_full_budget(live, plain, inputs)
            with compress(live, SMALL) as session, torch.no_grad():
                assert live(**inputs).past_key_values is session.cache
                assert session.cache.report()["kept_tokens"] <= 12
                with live.disable_adapter():
                    unadapted = session.generate(**inputs, **GREEDY)
                assert not torch.equal(session.generate(**inputs, **GREEDY), unadapted)


def test_a_peft_model_that_is_refused(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _class("qwen2_vl").from_pretrained(checkpoints["qwen2_vl"])
    live = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["q_proj"]))
    monkeypatch.setattr(peft, "__version__", "0.20.0")
    with pytest.raises(ValueError, match="peft 0.20.0, which calls the model past its hooks; install peft>=0.21"):
        with compress(live, SMALL):
            pass
    monkeypatch.undo()
    text = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, hidden_size=64, num_hidden_layers=1))
    prefix = peft.get_peft_model(text, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PREFIX_TUNING model, whose prefix is in the cache but in no prompt"):
        with compress(prefix, SMALL):
            pass


def _refuse_loading(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr(_class(family), "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))


def test_refused_quantisations(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse_loading(monkeypatch, "qwen2_vl")

    def refused(path: Path, word: str | None, sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence) as caught:
            load_checkpoint(FAMILIES["qwen2_vl"], options("qwen2_vl", path, quantization=word), CPU)
        assert "\n" not in str(caught.value)

    with pytest.raises(ValueError, match="quantization.*'bnb-4bti'.*bnb-4bit"):
        RunOptions("p", quantization="bnb-4bti")
    path = shutil.copytree(checkpoints["qwen2_vl"], tmp_path / "copy")
    config = json.loads((path / "config.json").read_text())
    for stored, name in (({"quant_method": "gptq", "bits": 4}, "gptq"), ({"load_in_8bit": True}, "bitsandbytes")):
        (path / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
        refused(path, "bnb-8bit", f"quantised already \\({name}\\); leave quantization out")
    stored = {"quant_method": "gptq", "bits": 4}
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    refused(path, None, "quantised with gptq, which cannot be read here: .*[Gg][Pp][Tt][Qq]")
    found = importlib.util.find_spec
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda n: None if n in ("torchao",) else found(n))
    refused(checkpoints["qwen2_vl"], "torchao-int8wo", "needs the torchao package; `pip install torchao`")


def test_refused_bitsandbytes(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    need("bnb-4bit")
    import bitsandbytes

    _refuse_loading(monkeypatch, "qwen2_vl")
    told = options("qwen2_vl", checkpoints["qwen2_vl"], quantization="bnb-4bit")
    monkeypatch.setattr(bitsandbytes.functional, "has_avx512bf16", lambda: True)
    with pytest.raises(
        ValueError, match="32 rows by 64 columns and .*visual.* has 48 by 16; use quantization=bnb-8bit"
    ):
        load_checkpoint(FAMILIES["qwen2_vl"], told, CPU)
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    with pytest.raises(ValueError, match="cannot run on cpu: bitsandbytes .* runs on cuda"):
        load_checkpoint(FAMILIES["qwen2_vl"], told, CPU)


def test_refused_adapters(
    checkpoints: dict[str, Path], adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoints["qwen2_vl"]
    gpt = lora(path, "qwen2_vl", tmp_path / "gpt", ["q_proj"])
    facts = json.loads((gpt / "adapter_config.json").read_text())
    (gpt / "adapter_config.json").write_text(json.dumps({**facts, "target_modules": ["c_attn"]}))
    more = lora(path, "qwen2_vl", tmp_path / "more", ["q_proj", "v_proj"])
    facts = json.loads((more / "adapter_config.json").read_text())
    (more / "adapter_config.json").write_text(json.dumps({**facts, "target_modules": ["q_proj"]}))
    broken = shutil.copytree(adapters["qwen2_vl"], tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    unread = shutil.copytree(adapters["qwen2_vl"], tmp_path / "unread")
    (unread / "adapter_config.json").write_text("{}")
    bare = shutil.copytree(adapters["qwen2_vl"], tmp_path / "bare")
    (bare / "adapter_model.safetensors").unlink()
    _refuse_loading(monkeypatch, "qwen2_vl")
    for adapter, sentence in {
        tmp_path / "nowhere": "no local folder",
        bare: r"holds no adapter_model\.\*; give the folder",
        unread: "adapter_config.json cannot be read",
        gpt: f"adapts the modules c_attn, of which Qwen2VL.* has none .it was made for {path}",
        more: r"has weights for \d+ modules, .*v_proj",
        broken: "does not fit pretrained=.*(header|HeaderTooSmall)",
        adapters["llava_next"]: r"v_proj.* is \[32, 4\] in it and \[16, 4\] here",
    }.items():
        with pytest.raises(ValueError, match=sentence) as caught:
            load_checkpoint(FAMILIES["qwen2_vl"], options("qwen2_vl", path, peft=str(adapter)), CPU)
        assert "\n" not in str(caught.value) and f"peft={adapter}" in str(caught.value)
    found = importlib.util.find_spec
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(ValueError, match="needs the peft package; `pip install peft`"):
        load_checkpoint(FAMILIES["qwen2_vl"], options("qwen2_vl", path, peft=str(adapters["qwen2_vl"])), CPU)


def test_an_adapter_is_told_wherever_runs_are_named(adapters: dict[str, Path], tmp_path: Path) -> None:
    adapter, digest = str(adapters["qwen2_vl"]), adapter_sha256(str(adapters["qwen2_vl"]))
    assert adapter_sha256(str(shutil.copytree(adapter, tmp_path / "moved"))) == digest
    assert adapter_sha256(str(adapters["llava_next"])) != digest
    given = {"budget": 20, "quantization": "bnb-4bit", "peft": adapter}
    assert name_suffix("snapkv", given) == f"snapkv_b20_bnb4bit_peft-{digest[:8]}"
    assert SweptModel("qwen2_vl", {"pretrained": "a/b", "peft": adapter}).identity["peft_sha256"] == digest
    recorded = {"model": "qwen2_vl_snapkv", "tasks": "ocrbench", "model_args": f"pretrained=a/b,peft={adapter}"}
    with pytest.raises(ValueError, match=f"names files or code of its own .peft={adapter}.*give --trust"):
        repeated(tmp_path / "record.json", recorded, trust=False)
    assert repeated(tmp_path / "record.json", recorded, trust=True) == recorded


class Model(CompressedModel):
    family, method = FAMILIES["qwen2_vl"], "sparsemm"

    def __init__(self, **given: Any) -> None:
        self.configure({"budget": 20, "window_size": 8, **PIXELS, **given})
        self.load(CPU, progress=False)


def test_head_scores_know_the_adapter(
    checkpoints: dict[str, Path], adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsemm_lmms.visual_heads import resolve

    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    path, adapter = str(checkpoints["qwen2_vl"]), str(adapters["qwen2_vl"])
    made = []

    def score_heads(model, processor, samples, output, settings, **named):
        made.append(named["changes"])
        layers, heads = tiny.LAYERS, tiny.Q_HEADS
        facts = {"kind": "chase", "model": named["model_id"], "model_type": "qwen2_vl", "revision": "main"}
        told = {**facts, "checkpoint": resolve.checkpoint_version(path, "main", None), **vars(named["changes"])}
        resolve.HeadScores(torch.rand(layers, heads).numpy(), None, told).save(output)

    monkeypatch.setattr(resolve, "score_heads", score_heads)
    plain, adapted = Model(pretrained=path), Model(pretrained=path, peft=adapter)
    moved = Model(pretrained=path, peft=str(shutil.copytree(adapter, tmp_path / "moved")))
    assert [change.adapter for change in made] == [None, adapted.changes.adapter]  # the moved one is the same
    assert "peft" not in plain.settings() and "quantization" not in plain.settings()
    assert adapted.settings()["peft"] == {"source": adapter, "sha256": moved.settings()["peft"]["sha256"]}
    assert adapted.head_scores.content_hash != plain.head_scores.content_hash
    of_plain, of_adapted = (model.head_scores.provenance["path"] for model in (plain, adapted))
    with pytest.raises(ValueError, match="were found on .* and the model is .* with the adapter .*foreign_head_scores"):
        Model(pretrained=path, peft=adapter, head_scores=of_plain)
    with pytest.raises(ValueError, match="were found on .* with the adapter .*, and the model is"):
        Model(pretrained=path, head_scores=of_adapted)
    Model(pretrained=path, peft=adapter, head_scores=of_adapted)
    Model(pretrained=path, peft=adapter, head_scores=of_plain, foreign_head_scores=True)
