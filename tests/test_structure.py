"""The structure that CONTRIBUTING describes, over the real folders: no import runs upward, and there is no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import sparsemm_lmms
from sparsemm_lmms import _source_tree

ROOT = Path(sparsemm_lmms.__file__).resolve().parent
FOLDERS = {"sparsemm_lmms": ROOT, **_source_tree.FOLDERS}
ROOMS = [  # from the ground up: a module imports from its own room and from those before it
    {"_version", "_source_tree", "settings", "failures", "json_files", "source_commit", "step_clock"},
    {"presets", "families", "kernels", "cpu_kernels", "budgets", "head_scores", "head_statistics", "retention"},
    {"scorers"},
    {"allocators"},
    {"registry", "methods", "config"},
    {"selection", "handoff"},
    {"sliding"},
    {"cache"},
    {"attention", "decode_graph"},
    {"decode", "session", ""},
    {"catalog", "cli"},
    {"demo"},
    {"visual_heads"},
    {"reports", "bench", "task_overrides"},
    {"model_wrappers"},
    {"model_wrappers.lmms_eval", "model_wrappers.vlmevalkit"},
    {"model_wrappers.sweeps", "model_wrappers.matrix"},
    {"__main__"},
]


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [part for part in file.relative_to(folder).with_suffix("").parts if part != "__init__"]
            found[".".join([package, *parts])] = file
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """Names of imported modules and members, function bodies included; not those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node)


def graph() -> dict[str, set[str]]:
    known = modules()
    links = {}
    for name, file in known.items():
        wanted = set()
        for full in imports(ast.parse(file.read_text(encoding="utf-8"))):
            found = next((part for part in (full, full.rpartition(".")[0]) if part in known), None)
            wanted |= {found} if found else set()
        links[name] = wanted - {name}
    return links


def room(module: str) -> int:
    inside = module.partition(".")[2]
    names = [".".join(inside.split(".")[:length]) for length in (2, 1)]
    return next(i for name in names for i, room in enumerate(ROOMS) if name in room)


def test_there_is_no_circle() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_no_import_runs_upward() -> None:
    upward = [f"{a} imports {b}" for a, wanted in graph().items() for b in wanted if room(b) > room(a)]
    assert not upward, "\n".join(sorted(upward))


def test_contributing_shows_the_real_files() -> None:
    text = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    files = ("scorers/keydiff.py", "allocators/pyramid.py")
    assert shown[: len(files)] == [(ROOT / file).read_text(encoding="utf-8") for file in files]
    assert len((ROOT / files[0]).read_text(encoding="utf-8").splitlines()) < 40
