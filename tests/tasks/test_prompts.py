"""Under our names every task asks what it asks the stock model of the family: prompt, images, generation settings."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmms_eval.tasks
import pytest
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.evaluator_utils import get_task_list
from lmms_eval.models import AVAILABLE_CHAT_TEMPLATE_MODELS
from lmms_eval.tasks import TaskManager, get_task_dict
from lmms_eval.utils import load_yaml_config

from sparsemm_lmms.families import FAMILIES, LmmsEvalDefaults
from sparsemm_lmms.model_wrappers.lmms_eval import manifest
from sparsemm_lmms.presets import METHODS

from .documents import COUNT

GROUPS = ("sparsemm_paper", "sparsemm_paper_lite")
STOCK = {
    "gemma3": "gemma3",
    "gemma4": "gemma4",
    "glm4v": "glm4v",
    "internvl": "internvl_hf",
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "mistral3": "mistral3_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_vl": "qwen2_vl",
    "qwen3_5": "qwen3_5",
    "qwen3_vl": "qwen3_vl",
    "smolvlm": "huggingface",
}
"""Family -> id of the host's own model."""
KEYED = ("qwen3_vl", "qwen2_5_vl", "llava", "llava_onevision")  # ids with keys of their own in the host's files
HOST_TASKS = Path(lmms_eval.tasks.__file__).parent


def plain(messages: list[dict[str, Any]]) -> list[Any]:
    """Messages with images as bytes, so that they can be compared."""
    return [
        (m["role"], [(p["type"], p["url"].tobytes() if p["type"] == "image" else p["text"]) for p in m["content"]])
        for m in messages
    ]


def asked(manager: TaskManager, group: str, name: str, kind: str) -> dict[str, list[Any]]:
    """Task -> what is sent for each document, with the host's own task code for a `chat` or a `simple` model."""
    manager.model_name = name
    found: dict[str, list[Any]] = {}
    for output in get_task_list(get_task_dict([group], manager, kind)):
        task = output.task
        for doc in task.eval_docs:
            if kind == "chat":
                sent = plain(task.doc_to_messages(doc))
            else:  # what all of the host's simple models here make of a request: the images, then the text
                images = [("image", image.tobytes()) for image in task.doc_to_visual(doc)]
                sent = [("user", [*images, ("text", task.doc_to_text(doc))])]
            found.setdefault(output.task_name, []).append((sent, dict(task.config.generation_kwargs)))
    return found


@pytest.mark.parametrize("group", GROUPS)
def test_every_task_asks_what_the_stock_model_is_asked(group: str, manager: TaskManager, in_hub: None) -> None:
    assert set(STOCK) == set(FAMILIES)
    for stock in sorted(set(STOCK.values())):
        wanted = asked(manager, group, stock, "chat" if stock in AVAILABLE_CHAT_TEMPLATE_MODELS else "simple")
        assert len(wanted) == 8 and all(len(documents) == COUNT for documents in wanted.values())
        for family in (family for family, host in STOCK.items() if host == stock):
            assert asked(manager, group, f"{family}_sparsemm", "chat") == wanted


@pytest.mark.parametrize("group", GROUPS)
def test_the_groups_are_the_hosts_tasks_made_greedy(group: str, manager: TaskManager, in_hub: None) -> None:
    for name, documents in asked(manager, group, "llava_next_sparsemm", "chat").items():
        theirs = load_yaml_config(manager.task_index[name]["yaml_path"])["generation_kwargs"]
        used = documents[0][1]
        assert {key: used[key] for key in theirs} == theirs
        assert used["temperature"] == 0 and used["do_sample"] is False and used.get("num_beams", 1) == 1


def host_configs() -> list[dict[str, Any]]:
    """Every task file of the host that chooses something by the name of the model."""
    keys = ("lmms_eval_specific_kwargs", "model_specific_target_kwargs", "model_specific_generation_kwargs")
    found = []
    for path in sorted(HOST_TASKS.rglob("*.yaml")):
        if not any(name in path.read_text(encoding="utf-8", errors="ignore") for name in ("specific", "include:")):
            continue
        try:
            config = load_yaml_config(str(path), mode="simple")
        except Exception:  # a file that the host itself cannot load without its optional packages
            continue
        if isinstance(config, dict) and any(isinstance(config.get(key), dict) for key in keys):
            found.append({"path": path.relative_to(HOST_TASKS), **{key: config.get(key) for key in keys}})
    return found


def chosen(config: dict[str, Any], model_name: str) -> tuple[Any, ...]:
    """What the host's own code picks out of a task file for this model."""
    task = SimpleNamespace(model_name=model_name, config=SimpleNamespace(generation_kwargs={}, **copy.deepcopy(config)))
    ConfigurableTask._prepare_model_specific_config(task)
    return task.lmms_eval_specific_kwargs, task.model_specific_target_kwargs, task.config.generation_kwargs


def test_families_with_keys_of_their_own_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = host_configs()
    assert len(configs) > 300
    for family in KEYED:
        defaults = LmmsEvalDefaults(prompts_of=family, max_new_tokens=1)
        monkeypatch.setitem(FAMILIES, family, replace(FAMILIES["qwen2_vl"], model_type=family, lmms_eval=defaults))
        monkeypatch.setitem(manifest.MODELS, f"{family}_sparsemm", (family, "sparsemm"))
    affected = set()
    for config in configs:
        for family, host in (STOCK | {name: name for name in KEYED}).items():
            ours = f"{family}_sparsemm"
            stock = chosen(config, host)
            assert chosen(config, ours) == stock, f"{config['path']}: {ours}"
            if stock != chosen(config, "some_other_model"):
                affected.add((host, str(config["path"])))
    assert {"qwen3_vl", "qwen2_5_vl", "llava"} <= {host for host, _ in affected}  # the comparison was not empty


def test_stock_ids() -> None:
    for family, stock in STOCK.items():
        assert {manifest.stock_id(f"{family}_{method}") for method in METHODS} == {stock}
    for name in ("qwen2_vl", "sparsemm", "gpt_random"):  # none of ours
        assert manifest.stock_id(name) == name
