"""Checkpoints that cannot be loaded: one clear sentence, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from sparsemm_lmms.families import FAMILIES
from sparsemm_lmms.model_wrappers import loading
from sparsemm_lmms.model_wrappers.arguments import RunOptions
from sparsemm_lmms.model_wrappers.loading import load_checkpoint, read_config, resolve_device, resolve_dtype

LLAVA, QWEN = FAMILIES["llava_next"], FAMILIES["qwen2_vl"]
CPU = torch.device("cpu")


class OneProcess:
    num_processes, device = 1, CPU


def test_without_network_the_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.\nCheck your connection.")

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", offline)
    with pytest.raises(
        ValueError,
        match=r"a/b is no local folder .*`hf download a/b --local-dir checkpoints/b`.*=demo",
    ) as caught:
        read_config(LLAVA, RunOptions("a/b"))
    assert "\n" not in str(caught.value)


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is no local folder; give the folder of the checkpoint"):
        read_config(LLAVA, RunOptions(str(tmp_path / "nowhere")))


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no complete Hugging Face checkpoint.*config.json"):
        read_config(LLAVA, RunOptions(str(tmp_path)))


def test_a_folder_without_weights(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    for file in checkpoints["qwen2_vl"].iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="no complete Hugging Face checkpoint.*safetensors"):
        load_checkpoint(QWEN, RunOptions(str(tmp_path)), CPU)


def test_a_text_only_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="is a 'llama' checkpoint, but qwen2_vl_.* need a 'qwen2_vl' one"):
        read_config(QWEN, RunOptions(str(tmp_path)))


def test_the_other_family(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="is a 'qwen2_vl' checkpoint.*it belongs to the qwen2_vl_\\* models"):
        read_config(LLAVA, RunOptions(str(checkpoints["qwen2_vl"])))


def test_a_checkpoint_without_chat_template(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    for file in checkpoints["llava_next"].iterdir():
        if not file.name.startswith("chat_template"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="no chat template"):
        load_checkpoint(LLAVA, RunOptions(str(tmp_path)), CPU)


def test_pixel_limits_reach_the_image_processor(checkpoints: dict[str, Path]) -> None:
    path = str(checkpoints["qwen2_vl"])
    own = load_checkpoint(QWEN, RunOptions(path), CPU).processor.image_processor.size
    both = load_checkpoint(QWEN, RunOptions(path, min_pixels=3136, max_pixels=602112), CPU)
    one = load_checkpoint(QWEN, RunOptions(path, max_pixels=7840), CPU)
    sizes = [
        (p.processor.image_processor.size["shortest_edge"], p.processor.image_processor.size["longest_edge"])
        for p in (both, one)
    ]
    assert sizes == [(3136, 602112), (own["shortest_edge"], 7840)]
    from PIL import Image

    grid = one.processor.image_processor(Image.new("RGB", (280, 280)), return_tensors="pt")["image_grid_thw"]
    assert grid.prod().item() * 14 * 14 <= 7840


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(RunOptions("p"), OneProcess()) == CPU
    with pytest.raises(ValueError, match="torch sees no GPU"):
        resolve_device(RunOptions("p", device="cuda"), OneProcess())
    with pytest.raises(ValueError, match="no torch device"):
        resolve_device(RunOptions("p", device="gpu"), OneProcess())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device(RunOptions("p"), OneProcess()) == torch.device("cuda")


def test_several_processes_take_accelerates_device() -> None:
    class Two:
        num_processes, device = 2, torch.device("cuda:1")

    assert resolve_device(RunOptions("p", device="cuda:0"), Two()) == torch.device("cuda:1")
    with pytest.raises(ValueError, match="set only one"):
        resolve_device(RunOptions("p", device="cpu"), Two())
    with pytest.raises(ValueError, match="device_map"):
        resolve_device(RunOptions("p", device_map="auto"), Two())


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert resolve_dtype(RunOptions("p"), CPU) == torch.float32
    assert resolve_dtype(RunOptions("p"), cuda) == torch.bfloat16
    assert resolve_dtype(RunOptions("demo"), cuda) == torch.float32
    assert resolve_dtype(RunOptions("p", dtype="float16"), cuda) == torch.float16


def test_demo_is_the_packaged_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import sparsemm_lmms.demo

    monkeypatch.setattr(sparsemm_lmms.demo, "model_path", lambda family: Path("/packaged") / family, raising=False)
    assert loading.checkpoint_path(QWEN, RunOptions("demo")) == "/packaged/qwen2_vl"
