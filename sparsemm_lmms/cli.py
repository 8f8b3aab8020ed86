"""`sparsemm-lmms`: the folder of the tasks, the version, and where all other commands live.

torch, lmms-eval and matplotlib are imported by the commands that use them: `sparsemm-lmms tasks` stands inside other
commands and must answer at once.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sparsemm_lmms._version import __version__
from sparsemm_lmms.failures import report

ELSEWHERE = {
    "bench": "bench.commands",
    "chase": "visual_heads.commands",
    "heads": "visual_heads.commands",
    "budgets": "visual_heads.commands",
    "show": "visual_heads.commands",
    "eval": "model_wrappers.lmms_eval.commands",
    "families": "model_wrappers.matrix.commands",
    "methods": "catalog",
    "rerun": "model_wrappers.lmms_eval.commands",
    "card": "reports.card",
    "demo": "model_wrappers.sweeps.commands",
    "sweep": "model_wrappers.sweeps.commands",
    "vlmeval": "model_wrappers.vlmevalkit.run",
}
"""Commands by the module whose Typer `app` holds them. It is imported when the command is asked for."""


class LazyGroup(TyperGroup):
    """The commands of this file, and those of `ELSEWHERE`."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *ELSEWHERE]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        module = importlib.import_module(f"sparsemm_lmms.{ELSEWHERE[cmd_name]}")
        return typer.main.get_group(module.app).commands[cmd_name]


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    help="Compressed KV caches for vision-language models.",
)


def _show_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None: ...


@app.command()
def tasks() -> None:
    """Print the folder of this package's tasks, for lmms-eval's --include_path."""
    print(tasks_folder())


def tasks_folder() -> Path:
    """The folder of this package's tasks, found without importing anything: it is mapped in from `task_overrides/`."""
    spec = importlib.util.find_spec("sparsemm_lmms.task_overrides")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The tasks are not installed; reinstall sparsemm-lmms.")
    return Path(next(iter(spec.submodule_search_locations))).resolve()


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """Entry point. A mistake of the user ends in one sentence, anything else in a traceback and a sentence."""
    try:
        app()
    except Exception as error:
        raise SystemExit(report(error)) from error
