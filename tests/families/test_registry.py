"""The families that are here: what each states, and that nothing else names one."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import sparsemm_lmms
from sparsemm_lmms import _source_tree
from sparsemm_lmms.families import FAMILIES, Family, LmmsEvalDefaults, VLMEvalKit, family_for, family_of
from sparsemm_lmms.model_wrappers.matrix import makers
from sparsemm_lmms.visual_heads.token_grid import GRIDS

ROOT = Path(sparsemm_lmms.__file__).resolve().parent
OWN = ROOT / "families"
EXEMPT = {ROOT / "demo", ROOT / "visual_heads" / "grids", Path(makers.__file__).resolve()}
"""The packaged models are of two families: how they are built, trained and rendered is about just those. A kind of grid
calls the code of transformers that cuts images so, which is named after its models. A maker builds a tiny checkpoint of
one model type."""


def sources() -> list[Path]:
    files = {file for folder in (ROOT, *_source_tree.FOLDERS.values()) for file in folder.rglob("*.py")}
    return sorted(file for file in files if not EXEMPT & {file, *file.parents})


@functools.cache
def texts(file: Path) -> list[tuple[int, str]]:
    """(line, text) of every name and string in code; docstrings may have examples."""
    return list(named(ast.parse(file.read_text(encoding="utf-8"))))


def named(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None  # a docstring: nothing reads it
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(
            node, (ast.Name, ast.Attribute, ast.alias, ast.FunctionDef, ast.ClassDef, ast.arg, ast.keyword)
        ):
            name = next(getattr(node, key) for key in ("id", "attr", "name", "arg") if hasattr(node, key))
            yield node.lineno, name or ""
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""


def naming(family: Family) -> re.Pattern[str]:
    """`llava_next` in any spelling, or `LlavaNext` with whatever stands behind; no longer name of another family."""
    model_type = "[_ -]?".join(re.escape(part) for part in re.split("[_-]", family.model_type))
    stem = f"{family.model_type}_"
    tails = "|".join(re.escape(name.removeprefix(stem)) for name in FAMILIES if name.startswith(stem)) or "(?!)"
    spelled = rf"(?i:(?<![a-z0-9]){model_type}(?![a-z0-9])(?![_ -]?(?:{tails})))"
    return re.compile(rf"{spelled}|{re.escape(family.class_word)}(?!(?i:{tails})|[a-z])")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_no_family_is_named_outside_its_file(family: Family) -> None:
    pattern = naming(family)
    assert OWN / f"{family.model_type}.py" in sources()
    found = [
        f"{file.relative_to(ROOT.parent)}:{line}: {text[:80]!r}"
        for file in sources()
        if file.parent != OWN or file.stem not in FAMILIES  # checkpoints may be called after an older family
        for line, text in texts(file)
        if pattern.search(text)
    ]
    assert found == []


def test_the_search_finds_every_spelling() -> None:
    pattern = naming(FAMILIES["llava_next"])
    for text in (
        "llava_next",
        "llava-next-vicuna-7b",
        "LLaVA-NeXT",
        "LlavaNextConfig",
        "the llava_next models",
        "llavanext",
    ):
        assert pattern.search(text), text
    for text in ("llava_nextgen", "llava", "next", "LlavaNextual", "my_llava"):
        assert not pattern.search(text), text


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_family_is_what_transformers_has(family: Family) -> None:
    for model_type, architecture in family.architectures.items():
        config = CONFIG_MAPPING[model_type]()
        assert getattr(transformers, architecture).config_class is type(config)
        assert len(set(family.vision_ids(config))) == len(family.vision_tokens)
        assert family_for(model_type) is family
    assert family.grid in GRIDS
    assert len(family.vision_tokens) == 1 + family.reads_video
    assert "torch" not in (OWN / f"{family.model_type}.py").read_text(encoding="utf-8")


def test_the_longest_family_is_that_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "llava", FAMILIES["llava_next"])
    assert family_of("llava_next_snapkv") == "llava_next"
    assert family_of("llava_snapkv") == "llava"
    assert family_of("gpt_snapkv") is None


def test_no_model_type_is_of_two_families() -> None:
    kinds = [kind for family in FAMILIES.values() for kind in family.architectures]
    assert len(set(kinds)) == len(kinds)


def test_a_family_that_no_host_could_name_is_refused() -> None:
    facts = {
        "model_type": "mine",
        "architecture": "MineForConditionalGeneration",
        "pretrained": "me/mine",
        "vision_tokens": ("image_token_id",),
        "grid": None,
        "lmms_eval": LmmsEvalDefaults("mine", 16),
    }
    assert Family(**facts).class_name("local_window") == "MineLocalWindow"
    for wrong, sentence in (
        ({"model_type": ""}, "model_type is empty"),
        ({"architecture": "my-model"}, "architecture='my-model' is no class"),
        ({"also": {"mine_moe": "my-model"}}, "architecture='my-model' is no class"),
        ({"vision_tokens": ()}, "vision_tokens=.* is no tuple of fields"),
        ({"vision_tokens": "image_token_id"}, "vision_tokens='image_token_id' is no tuple"),
        ({"lmms_eval": "mine"}, "lmms_eval='mine' is no LmmsEvalDefaults"),
        ({"vlmevalkit": "Stock"}, "vlmevalkit='Stock' is neither"),
        ({"vlmevalkit": VLMEvalKit("Stock", "Ours", {"My_Model": "x"})}, "checkpoint 'My_Model' must be a word"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Family(**facts | wrong)


def test_the_guide_shows_a_whole_family() -> None:
    guide = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert (OWN / "qwen3_5.py").read_text(encoding="utf-8") in guide
    assert inspect.getsource(makers.qwen3_5) in guide
