"""An evaluation of one of our models, with a record of how it was made in its results, samples and cached answers."""

from __future__ import annotations

import argparse
import hashlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lmms_eval.evaluator_utils import get_task_list
from lmms_eval.models.model_utils.gen_metrics import reset_logged_metrics

from sparsemm_lmms.model_wrappers.lmms_eval.endings import ends_the_command
from sparsemm_lmms.model_wrappers.lmms_eval.records import (
    command_line,
    environment,
    fingerprint,
    run_name,
    settings_of_evaluation,
)
from sparsemm_lmms.model_wrappers.lmms_eval.saving import check_output
from sparsemm_lmms.model_wrappers.lmms_eval.statistics import RunStatistics, gather
from sparsemm_lmms.reports.results import KEY


def recorded(kind: type, original: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any] | None:
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
