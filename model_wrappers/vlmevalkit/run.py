"""`sparsemm-lmms vlmeval ...`: VLMEvalKit's `run.py` with our models among its own."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from sparsemm_lmms.families import FAMILIES
from sparsemm_lmms.model_wrappers.vlmevalkit.listing import listing
from sparsemm_lmms.model_wrappers.vlmevalkit.names import hash_scores, is_ours, nearest, parse_name

INSTALL = (
    "VLMEvalKit is not installed here; in an environment of its own (its requirements clash with lmms-eval's) run "
    "`git clone https://github.com/open-compass/VLMEvalKit && pip install -e VLMEvalKit && pip install loguru typer "
    "rouge_score`, add this package with `pip install --no-deps`, or name a clone's run.py with --run-py."
)

app = typer.Typer()


@app.callback()
def _group() -> None: ...


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def vlmeval(
    context: typer.Context,
    run_py: Annotated[
        Path | None, typer.Option(help="VLMEvalKit's run.py; default: the one beside the installed vlmeval.")
    ] = None,
    head_scores: Annotated[
        list[Path] | None, typer.Option(help="Score file that a name refers to by hs-<hash>; may be repeated.")
    ] = None,
    names: Annotated[bool, typer.Option("--list", help="Print the names of our models and end.")] = False,
    family: Annotated[str | None, typer.Option(help="With --list: those of this family only.")] = None,
) -> None:
    """Run VLMEvalKit's run.py with our models among its own; all other arguments are run.py's. --list prints names.

    Models are named CHECKPOINT_METHOD_bBUDGET, then a word for each setting that is not the default, for example
    LLaVA-NeXT-Vicuna-7B_sparsemm_b64, Qwen2VL-7B-Instruct_snapkv_b128_w16 or LLaVA-NeXT-Demo_fullkv.

    Example: sparsemm-lmms vlmeval --data MMBench_DEV_EN --model LLaVA-NeXT-Vicuna-7B_sparsemm_b256 --reuse
    """
    if family is not None and not names:
        raise ValueError(f"--family {family} chooses what --list prints; add --list, or leave it out.")
    if names:
        print(listing(family))
    else:
        launch(context.args, run_py, head_scores or [])


def launch(arguments: list[str], run_py: Path | None = None, head_scores: Iterable[Path] = ()) -> None:
    """Register our models and run the host's `main` with these arguments.

    Raises:
        FileNotFoundError, ValueError: one sentence if the host or its run.py is missing, or a model name is wrong.
    """
    path = find_run_py(run_py)
    names, config = asked_models(arguments)
    files = hash_scores(head_scores)
    for name in filter(is_ours, names):  # a mistyped name is told before the host's long import
        parse_name(name, files)
    host = load_run_py(path, arguments)  # first: it hides the GPUs of other processes before anything looks for GPUs
    add_models(names, config, files)
    try:
        host.load_env()
        host.main()
    except (ValueError, FileNotFoundError):  # not a mistake in our arguments: let the host's traceback be seen
        traceback.print_exc()
        raise SystemExit(1) from None


def find_run_py(given: Path | None) -> Path:
    """The host's run.py: the given one, else the one beside the package `vlmeval` of an editable install."""
    if given is not None:
        if not given.is_file():
            raise FileNotFoundError(f"--run-py {given} does not exist; give the run.py of a clone of VLMEvalKit.")
        return given.resolve()
    spec = importlib.util.find_spec("vlmeval")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(INSTALL)
    path = Path(spec.origin).resolve().parent.parent / "run.py"
    if not path.is_file():
        raise FileNotFoundError(
            f"VLMEvalKit is installed at {path.parent} without its run.py; give that of its clone with --run-py."
        )
    return path


def load_run_py(path: Path, arguments: list[str]) -> ModuleType:
    """Execute run.py up to its `main`, with `sys.argv` and `sys.path` as `python run.py` would have them."""
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    # a name in the host's tree, or its logger stands outside and its messages and result tables are lost
    spec = importlib.util.spec_from_file_location("vlmeval.run", path)
    assert spec is not None and spec.loader is not None  # a file that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its worker processes find its functions there
    spec.loader.exec_module(module)
    for name in ("load_env", "main"):
        if not hasattr(module, name):
            raise ValueError(f"--run-py {path} has no function {name}(); is it VLMEvalKit's run.py, of 2024 or later?")
    return module


def asked_models(arguments: list[str]) -> tuple[list[str], Path | None]:
    """The model names and the `--config` file in the arguments of run.py."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--model", nargs="+", default=[])
    parser.add_argument("--config", type=Path)
    parser.add_argument("--base-url")
    given, _ = parser.parse_known_args(arguments)
    return ([] if given.base_url else given.model), given.config  # with --base-url: names of a server's models


def add_models(names: list[str], config: Path | None, score_files: Mapping[str, str]) -> None:
    """Register these names and those of the `--config` file in the host, whose own names may be among them."""
    from vlmeval.config import supported_VLM

    from sparsemm_lmms.model_wrappers.vlmevalkit.model import register

    names = names + (check_config(config) if config else [])
    register([name for name in names if is_ours(name) and name not in supported_VLM], score_files)
    for name in names:
        if name not in supported_VLM:
            raise ValueError(
                f"Model {name!r} is neither one of this VLMEvalKit nor CHECKPOINT_METHOD_bBUDGET with a checkpoint of "
                f"ours (`sparsemm-lmms vlmeval --list`).{nearest(name, supported_VLM)}"
            )


def check_config(path: Path) -> list[str]:
    """Names of the models in a `--config` file that `supported_VLM` must resolve, its other entries checked.

    An entry with one of our classes brings its settings itself; its name must tell them, because outputs are kept by
    name and `--reuse` compares nothing else.
    """
    from vlmeval.smp import load

    from sparsemm_lmms.model_wrappers.vlmevalkit.model import model_class

    if not path.is_file():
        raise FileNotFoundError(f"--config {path} does not exist.")
    models: dict[str, dict[str, Any]] = load(str(path)).get("model", {})
    families = {
        adapter.name: name
        for name, family in FAMILIES.items()
        for adapter in (family.vlmevalkit.adapters if family.vlmevalkit else ())
    }
    names = []
    for name, entry in models.items():
        given = dict(entry)
        cls = given.pop("class", "")
        if cls in families:
            suffix = model_class(families[cls], cls).name_suffix(given.pop("method", "sparsemm"), given)
            if not name.endswith(f"_{suffix}"):
                raise ValueError(
                    f"--config {path}: the model name {name!r} does not tell its settings, by which the host keeps "
                    f"outputs; let it end in _{suffix}."
                )
        elif "class" not in entry:
            if given and is_ours(name):
                raise ValueError(
                    f"--config {path}: {name!r} is resolved by its name alone; state {', '.join(given)} in the name."
                )
            names.append(name)
    return names
