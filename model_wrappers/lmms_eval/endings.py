"""How a run of ours ends that failed: lmms-eval's command line passes over every exception and reports success."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sparsemm_lmms.failures import report


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
