"""Three decisions that lmms-eval makes by `--model` and `--model_args` alone, made by our models' full settings.

* Prompts are looked up by the literal model name: ours get those of the stock id of their family.
* The response cache is keyed by the text of the arguments: what `auto` became, the content of a score file, the
  checkpoint and the versions are added, so that answers made under other settings are not used.
* Results, samples and submission files lie in a folder named after the checkpoint only: ours get a folder that no run
  with other settings shares, and results and samples carry a record of how they were made.

lmms-eval has no hooks for any of this. `install` wraps one function for each; runs of other models pass through.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lmms_eval.evaluator
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.evaluator_utils import get_task_list
from lmms_eval.loggers.evaluation_tracker import EvaluationTracker
from lmms_eval.models.model_utils.gen_metrics import reset_logged_metrics

from .names import stock_id
from .records import command_line, environment, fingerprint, run_name, settings_of_evaluation
from .results import KEY
from .statistics import RunStatistics, gather


def install(kind: type) -> None:
    """Wrap the three functions of the host, once a process. `kind` is the class of our models."""
    if hasattr(lmms_eval.evaluator.evaluate, KEY):
        return
    wrap(ConfigurableTask, "_prepare_model_specific_config", _with_stock_prompts)
    wrap(EvaluationTracker, "save_results_aggregated", _in_a_folder_of_its_own)
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


def _in_a_folder_of_its_own(original: Callable[..., Any], tracker: Any, results: dict, *rest: Any, **named: Any) -> Any:
    if KEY in results:
        tracker.general_config_tracker.model_name_sanitized = results[KEY]["run"]
    return original(tracker, results, *rest, **named)


def _recorded(kind: type, original: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any] | None:
    """`lmms_eval.evaluator.evaluate` of one of our models, with a record in its results."""
    given = inspect.signature(original).bind(*args, **kwargs)
    given.apply_defaults()
    call = given.arguments
    if not isinstance(call["lm"], kind):
        return original(*args, **kwargs)
    model: Any = call["lm"]
    cli_args, cache = call["cli_args"], call["response_cache"]

    settings = {**model.settings(), "system_prompt": model.system_prompt, "device": model.device.type}  # of all ranks
    where = environment(model)
    identity = {"settings": settings, "environment": {key: value for key, value in where.items() if key != "gpu"}}
    if cache is not None:
        _set_apart(cache, fingerprint(identity))
    host = {name: call[name] for name in ("limit", "offset", "system_instruction", "apply_chat_template")}
    tasks = {output.task_name: output.task.dump_config() for output in get_task_list(call["task_dict"])}
    evaluation = settings_of_evaluation({**host, **vars(cli_args)} if cli_args else host, tasks)
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
