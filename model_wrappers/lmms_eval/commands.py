"""`sparsemm-lmms eval` and `rerun`: lmms-eval's own command line with this package's tasks, and runs from records."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from datasets.exceptions import DatasetNotFoundError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsemm_lmms.cli import tasks_folder
from sparsemm_lmms.failures import cause, is_refusal, sentence
from sparsemm_lmms.json_files import one_line
from sparsemm_lmms.model_wrappers.lmms_eval.manifest import MODELS
from sparsemm_lmms.reports.results import KEY, read_results
from sparsemm_lmms.settings import unknown_name

app = typer.Typer()
OURS = list(MODELS)
REPEATED: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("model", "tasks", "model_args", "device", "verbosity", "log_samples_suffix", "timezone"), (str,)),
    **dict.fromkeys(("system_instruction", "gen_kwargs", "reasoning_tags", "agentic_trace_mode"), (str,)),
    **dict.fromkeys(("batch_size", "max_batch_size"), (int, str)),
    **dict.fromkeys(("num_fewshot", "offset", "repeats", "max_tokens", "process_docs_parallel"), (int,)),
    **dict.fromkeys(("log_samples", "apply_chat_template", "fewshot_as_multiturn", "predict_only"), (bool,)),
    **dict.fromkeys(("process_with_media", "force_simple"), (bool,)),
    "limit": (int, float),
    "seed": (list,),
}
"""What a rerun takes from a record, and its types. All else is lmms-eval's default: it reuses and publishes nothing."""


@app.command(
    name="eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def evaluate(context: typer.Context) -> None:
    """lmms-eval with this package's tasks (`sparsemm_paper`, ...); all arguments are lmms-eval's."""
    sys.argv = ["lmms-eval", *context.args]
    run_host()


@app.command()
def rerun(
    results: Annotated[Path, typer.Argument(help="A *_results.json of one of this package's models.")],
    output_path: Annotated[
        Path | None, typer.Option("--output-path", "--output_path", help="Where the new results go; default: nowhere.")
    ] = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Load the task files, local checkpoint, adapter and remote code of the record."),
    ] = False,
) -> None:
    """Repeat a run from its record and say whether the metrics are equal (exit status 1 if not)."""
    old = read_results(results)
    arguments = repeated(results, old["config"].get("resolved_cli_args"), trust)
    arguments["output_path"] = None if output_path is None else str(output_path)
    if output_path is None:
        arguments["log_samples"] = False
    sys.argv = ["lmms-eval"]
    found = run_host(argparse.Namespace(**arguments))
    if not found:  # not the first process
        return
    new = json.loads(json.dumps(found[0], default=str))
    for line in differences(old[KEY], new[KEY]):
        print(line)
    if not print_comparison(metrics(old), metrics(new)):
        raise SystemExit(f"sparsemm-lmms: The metrics differ from those in {results}.")
    print(f"All metrics equal those in {results}.")


def repeated(results: Path, recorded: Any, trust: bool) -> dict[str, Any]:
    """The arguments of lmms-eval that a rerun takes from a record: nothing that loads or runs what the record brings.

    Raises:
        ValueError: for a record without them or with others' models; and without `trust`, if it names files or code.
    """
    from sparsemm_lmms.model_wrappers.arguments import parse_arguments

    if not recorded:
        raise ValueError(f"{results} was made from Python, not by lmms-eval's command line, so it cannot be repeated.")
    if not isinstance(recorded, dict):
        raise ValueError(f"{results}: config.resolved_cli_args is a {type(recorded).__name__}, not a mapping.")
    taken = {name: recorded[name] for name in REPEATED if recorded.get(name) is not None}
    for name, value in taken.items():
        if not isinstance(value, REPEATED[name]) or (isinstance(value, bool) and bool not in REPEATED[name]):
            raise ValueError(f"{results}: config.resolved_cli_args.{name}={value!r} is a {type(value).__name__}.")
    for name in ("model", "tasks"):
        if not taken.get(name):
            raise ValueError(f"{results}: config.resolved_cli_args has no {name}.")
    if taken["model"] not in OURS:
        raise ValueError(f"{results}: " + unknown_name("model", taken["model"], OURS))
    if len(seeds := taken.get("seed", [0] * 4)) != 4 or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"{results}: config.resolved_cli_args.seed={seeds!r} are not four whole numbers.")
    given = parse_arguments(taken.get("model_args", ""))
    files = [f"task file {name}" for name in {taken["tasks"], *taken["tasks"].split(",")} if Path(name).exists()]
    if recorded.get("include_path"):
        files.append(f"include_path={recorded['include_path']}")
        taken["include_path"] = recorded["include_path"]
    for name in ("pretrained", "peft"):
        if name in given and Path(given[name]).exists():
            files.append(f"{name}={given[name]}")
    if given.get("trust_remote_code", "false").lower() not in ("false", "0", "no"):
        files.append(f"trust_remote_code={given['trust_remote_code']}")
    if files and not trust:
        raise ValueError(
            f"{results} names files or code of its own ({', '.join(sorted(files))}), which a rerun would load and run; "
            "read them, then give --trust."
        )
    return taken


def run_host(arguments: argparse.Namespace | None = None) -> list[dict[str, Any]]:
    """Run lmms-eval's command line in this process, with our folder beside the user's `--include_path`.

    Args:
        arguments: stand in place of those in `sys.argv`.

    Returns:
        the results of each run that this process has (the first process has them all).

    Raises:
        ValueError, OSError, ImportError: the first mistake in a run; lmms-eval itself goes on and reports success.
        SystemExit: any other failure, whose traceback stands above.
    """
    from lmms_eval import __main__ as host

    from sparsemm_lmms.model_wrappers.lmms_eval.endings import Ended
    from sparsemm_lmms.model_wrappers.lmms_eval.patches import the_command
    from sparsemm_lmms.model_wrappers.lmms_eval.saving import check_output

    if not sys.argv[1:] and arguments is None:
        raise ValueError(f"eval needs lmms-eval's arguments, for example --model {OURS[0]} --tasks ocrbench.")
    found: list[dict[str, Any]] = []
    failures: list[Exception] = []
    tasks: list[str] = []
    single, manager = host.cli_evaluate_single, host.TaskManager

    def remembering(args: argparse.Namespace) -> Any:
        try:
            check_output(args.output_path)
            results, samples = single(args)
        except Ended as ended:  # reported; with an exception the host goes on to the next run of a --config
            failures.append(ended.error)
            raise ended.error from None
        except Exception as error:
            if not is_refusal(error):
                traceback.print_exc()
            failures.append(error)
            raise
        found.extend([results] if results is not None else [])
        return results, samples

    def with_our_tasks(*args: Any, include_path: str | list[str] | None = None, **named: Any) -> Any:
        theirs = [include_path] if isinstance(include_path, str) else list(include_path or [])
        made = manager(*args, include_path=[*theirs, str(tasks_folder())], **named)
        tasks[:] = made.all_tasks
        return made

    _check_model(arguments or host.parse_eval_args()[1])
    with the_command(host, remembering, with_our_tasks):
        try:
            host.cli_evaluate(arguments)
        except Exception as error:  # as the host does with --verbosity=DEBUG
            if not any(error is failure for failure in failures):
                raise
    if failures:
        _raise(failures[0], tasks)
    return found


def _check_model(arguments: argparse.Namespace) -> None:
    """Refuse a misspelled `--model` before anything is loaded; names in a `--config` file are lmms-eval's to check."""
    from lmms_eval.models import list_available_models

    known = list_available_models(include_aliases=True)
    if not getattr(arguments, "config", None) and arguments.tasks and arguments.model not in known:
        raise ValueError(unknown_name("--model", arguments.model, OURS) + " lmms-eval's own: `lmms-eval models`.")


def _raise(error: Exception, tasks: list[str]) -> None:
    """What lmms-eval has passed over, as the end of this process."""
    if not is_refusal(error):
        raise SystemExit(sentence(error)) from error
    missing = re.match(r"Tasks not found: ([^,. ]+)", str(error))
    nearest = difflib.get_close_matches(missing[1], tasks, n=1) if missing else []
    if missing:
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"Unknown task {missing[1]!r} in --tasks; `lmms-eval tasks list` prints all.{hint}")
    raise _without_data(cause(error))


def _without_data(error: BaseException) -> BaseException:
    """The error; where a task's documents could be found nowhere, with what brings them."""
    name = re.search(r"'([\w.-]+/[\w.-]+)'", str(error))
    if name is None or not isinstance(error, (ConnectionError, DatasetNotFoundError)):
        return error
    return FileNotFoundError(
        f"The task's data set {name[1]} is neither in this folder nor in the cache, and cannot be downloaded "
        f"({str(error).rstrip('.')}); bring it from elsewhere (`hf download {name[1]} --repo-type dataset --local-dir "
        f"{name[1]}`) and run in the folder that holds {name[1]}."
    )


def metrics(results: dict[str, Any]) -> dict[tuple[str, str], float]:
    """(task, metric) -> value, standard errors left out."""
    return {
        (task, name): float(value)
        for task, values in results["results"].items()
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "_stderr" not in name
    }


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """One line for each setting, version or machine that is not the recorded one."""
    parts = ("settings", "environment", "evaluation") if not path else sorted({*old, *new})
    for name in parts:
        before, after = old.get(name), new.get(name)
        where = f"{path}.{name}" if path else name
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, where)
        elif before != after:
            yield one_line(f"{where}: {before} in the record, {after} now")


def print_comparison(old: dict[tuple[str, str], float], new: dict[tuple[str, str], float]) -> bool:
    """Print recorded and new metrics side by side; True if all are equal."""
    table = Table("Task", "Metric", "Record", "Now", "")
    same = True
    for task, name in sorted({*old, *new}):
        before, after = old.get((task, name), math.nan), new.get((task, name), math.nan)
        equal = before == after or (math.isnan(before) and math.isnan(after) and {(task, name)} <= {*old} & {*new})
        same &= equal
        table.add_row(Text(task), Text(name), f"{before:.6g}", f"{after:.6g}", "equal" if equal else "differs")
    Console().print(table)
    return same
