"""How a command ends when something fails: in one sentence, after a traceback only where the mistake may be ours."""

from __future__ import annotations

import traceback

REFUSALS = (ValueError, OSError, ImportError)  # of the user's input, of the machine, of what is installed


def cause(error: BaseException) -> BaseException:
    """What went wrong: the error itself, or the last one of what was tried several times (tenacity's RetryError)."""
    last = getattr(error, "last_attempt", None)
    found = last.exception() if last is not None and last.failed else None
    return error if found is None else cause(found)


def is_refusal(error: BaseException) -> bool:
    """Whether the message alone tells the user what to mend."""
    return isinstance(cause(error), REFUSALS)


def sentence(error: BaseException) -> str:
    """The last line of a command that failed."""
    found = cause(error)
    text = str(found).strip() or repr(found)
    return f"sparsemm-lmms: {text}" if isinstance(found, REFUSALS) else f"sparsemm-lmms: {type(found).__name__}: {text}"


def report(error: BaseException) -> str:
    """Print the traceback of what is no refusal, and return the sentence to end with."""
    if not is_refusal(error):
        traceback.print_exception(error)
    return sentence(error)
