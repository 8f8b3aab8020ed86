"""What lmms-eval decides for our models, and how it ends when one of them fails.

Three decisions that it makes by `--model` and `--model_args` alone are made by our models' full settings:

* Prompts are looked up by the literal model name: ours get those of the stock id of their family.
* The response cache is keyed by the text of the arguments: what `auto` became, the content of a score file, the
  checkpoint and the versions are added, so that answers made under other settings are not used.
* Results, samples and submission files lie in a folder named after the checkpoint only: ours get a folder that no run
  with other settings shares, and results and samples carry a record of how they were made.

Its command line passes over every exception, prints a traceback and ends with status 0, and so it does when results
could not be written. A failed run of ours ends the command instead (`ends_the_command`), and what was not written is
written or rescued (`_saved`).

lmms-eval has no hooks for any of this. `install` wraps one function for each; runs of other models pass through.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmms_eval.evaluator
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.evaluator_utils import get_task_list
from lmms_eval.loggers.evaluation_tracker import EvaluationTracker
from lmms_eval.models.model_utils.gen_metrics import reset_logged_metrics

from sparsemm_lmms.failures import report
from sparsemm_lmms.model_wrappers.lmms_eval.manifest import stock_id
from sparsemm_lmms.model_wrappers.lmms_eval.records import (
    command_line,
    environment,
    fingerprint,
    run_name,
    settings_of_evaluation,
)
from sparsemm_lmms.model_wrappers.lmms_eval.statistics import RunStatistics, gather
from sparsemm_lmms.reports.results import KEY


def install(kind: type) -> None:
    """Wrap the functions of the host, once a process. `kind` is the class of our models."""
    if hasattr(lmms_eval.evaluator.evaluate, KEY):
        return
    wrap(ConfigurableTask, "_prepare_model_specific_config", _with_stock_prompts)
    wrap(EvaluationTracker, "save_results_aggregated", _saved_results)
    wrap(EvaluationTracker, "save_results_samples", _saved_samples)
    wrap(lmms_eval.evaluator, "evaluate", functools.partial(_recorded, kind))


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace `owner.name` by `around(original, *args, **kwargs)`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(wrapped, KEY, True)
    setattr(owner, name, wrapped)


def _with_stock_prompts(original: Callable[..., Any], task: Any) -> None:
    if isinstance(task.model_name, str):
        task.model_name = stock_id(task.model_name)
    original(task)


class Ended(SystemExit):
    """A run of ours that failed under lmms-eval's command line; `error` is why."""

    def __init__(self, sentence: str, error: Exception) -> None:
        super().__init__(sentence)
        self.error = error


@contextmanager
def ends_the_command() -> Iterator[None]:
    """Let an exception end lmms-eval's command line with status 1; in Python, `simple_evaluate` raises it as it is.

    The command catches every `Exception` of a run and goes on to the end with status 0; a `SystemExit` gets through.
    """
    try:
        yield
    except Exception as error:
        if not _under_the_command():
            raise
        raise Ended(report(error), error) from error


def _under_the_command() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "cli_evaluate_single" and "evaluation_tracker" in frame.f_code.co_varnames:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def check_output(folder: str | None) -> None:
    """Refuse, before the first document, a folder that results cannot be written to.

    Raises:
        ValueError: with the reason.
    """
    if folder is None or int(os.environ.get("RANK", "0")):
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        raise ValueError(
            f"--output_path={folder} cannot be written to ({error.strerror}); name a folder that can."
        ) from error


def _saved_results(
    original: Callable[..., Any], tracker: Any, results: dict, samples: Any = None, datetime_str: str = "", **named: Any
) -> Any:
    """Save into a folder of this run's own, and look whether everything is there: the host only logs that it is not."""
    if KEY not in results:
        return original(tracker, results, samples, datetime_str, **named)
    setattr(tracker, KEY, True)
    tracker.general_config_tracker.model_name_sanitized = results[KEY]["run"]
    saved = original(tracker, results, samples, datetime_str, **named)
    if tracker.output_path:
        file = _folder(tracker) / f"{datetime_str.replace(':', '-')}_results.json"
        tracker.date_id = datetime_str.replace(":", "-")  # the host sets it only if it gets that far
        with ends_the_command():
            if not _is_json(file):
                _write(file, json.dumps(results, indent=2, default=str, ensure_ascii=False))
    return saved


def _saved_samples(original: Callable[..., Any], tracker: Any, task_name: str, samples: list[dict]) -> Any:
    if not getattr(tracker, KEY, False) or not tracker.output_path:
        return original(tracker, task_name, samples)
    file = _folder(tracker) / f"{tracker.date_id}_samples_{task_name}.jsonl"
    before = _whole_lines(file)
    saved = original(tracker, task_name, samples)
    with ends_the_command():
        if _whole_lines(file) != before + len(samples):  # the host's own form of a sample lacks these two
            rows = ({key: value for key, value in row.items() if key not in ("arguments", "doc")} for row in samples)
            _write(file, "".join(json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in rows))
    return saved


def _folder(tracker: Any) -> Path:
    return Path(tracker.output_path) / tracker.general_config_tracker.model_name_sanitized


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return True


def _whole_lines(file: Path) -> int:
    try:
        return file.read_bytes().count(b"\n")
    except OSError:
        return 0


def _write(file: Path, text: str) -> None:
    """Write what the host did not; if that fails too, put it where it can be written.

    Raises:
        OSError: with the reason and where it lies now.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        rescued = Path(tempfile.mkdtemp(prefix="sparsemm_lmms_")) / file.name
        rescued.write_text(text, encoding="utf-8")
        raise OSError(
            f"{file} could not be written ({error.strerror}); what belongs there is in {rescued}: move it, and name "
            "another --output_path."
        ) from error


def _recorded(kind: type, original: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any] | None:
    """`lmms_eval.evaluator.evaluate` of one of our models, with a record in its results."""
    given = inspect.signature(original).bind(*args, **kwargs)
    given.apply_defaults()
    call = given.arguments
    if not isinstance(call["lm"], kind):
        return original(*args, **kwargs)
    with ends_the_command():
        return _evaluated(original, call)


def _evaluated(original: Callable[..., Any], call: dict[str, Any]) -> dict[str, Any] | None:
    model: Any = call["lm"]
    cli_args, cache = call["cli_args"], call["response_cache"]
    if cli_args is not None:
        check_output(cli_args.output_path)

    settings = {**model.settings(), "system_prompt": model.system_prompt, "device": model.device.type}  # of all ranks
    where = environment(model)
    identity = {"settings": settings, "environment": {key: value for key, value in where.items() if key != "gpu"}}
    host = {name: call[name] for name in ("limit", "offset", "system_instruction", "apply_chat_template")}
    tasks = {output.task_name: vars(output.task.config) for output in get_task_list(call["task_dict"])}
    evaluation = settings_of_evaluation({**host, **vars(cli_args)} if cli_args else host, tasks)
    if cache is not None:
        _set_apart(cache, fingerprint(identity, evaluation["tasks"], evaluation["task_code"]))
    del identity["environment"]["git_commit"]  # in the key of cached answers, but no setting
    digest = fingerprint(identity, evaluation)
    name = run_name(model, digest)

    _start_from_zero(output.task for output in get_task_list(call["task_dict"]))
    model.statistics = []
    shown = cli_args or argparse.Namespace(output_path=None, process_with_media=True)  # as `evaluate` reads None
    output_path, shown.output_path = shown.output_path, str(Path(shown.output_path or ".") / name)
    try:
        results = original(**{**call, "cli_args": shown})
    finally:
        shown.output_path = output_path

    statistics = RunStatistics.merged(model.device, model.statistics).gathered()
    hits = sum(gather(0 if cache is None else cache.get_stats()["hits"]))
    if results is None:  # not the first process
        return None
    reset_logged_metrics()
    statistics.log()
    measured = {**statistics.metrics(), "output_tokens": statistics.output_tokens, "elapsed_s": statistics.elapsed}
    results[KEY] = {
        "run": name,
        "fingerprint": digest,
        "settings": settings,
        "evaluation": evaluation,
        "environment": {**where, "num_processes": model.world_size},
        "measured": measured,
        "responses_from_cache": hits,
        "command": command_line(),
    }
    _mark_samples(results, settings, where)
    return results


def _start_from_zero(tasks: Iterable[Any]) -> None:
    """OCRBench adds up in a global of its file, so a second evaluation of the same task would begin at the first's."""
    for task in tasks:
        for aggregate in task.aggregation().values():
            counts = getattr(aggregate, "__globals__", {}).get("OCRBench_score", {})
            counts.update(dict.fromkeys(counts, 0))


def _set_apart(cache: Any, identity: str) -> None:
    """Give the response cache keys of its own for these settings."""
    cache.model_fingerprint = f"{cache.model_fingerprint}|{identity}"
    cache._model_fingerprint_hash = hashlib.sha256(cache.model_fingerprint.encode()).hexdigest()[:16]


def _mark_samples(results: dict[str, Any], settings: dict[str, Any], where: dict[str, Any]) -> None:
    """Put the settings into each line of the sample log; the rest of the record is in the results of that run."""
    mark = {**settings, "kernel_backend": where["kernel_backend"], "run": results[KEY]["run"]}
    for samples in results.get("samples", {}).values():
        for sample in samples:
            sample[KEY] = mark
