"""What lmms-eval hands to a chat model: how its requests are read, ordered and grouped."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.task import ConfigurableMessagesTask
from loguru import logger
from PIL import ImageFile

from sparsemm_lmms.model_wrappers.engine import Conversation
from sparsemm_lmms.model_wrappers.memory import is_out_of_memory

LIKELIHOOD_TASKS = ("loglikelihood", "multiple_choice")


def document_of(request: Instance) -> tuple[Any, str, str]:
    """(document id, task, split) of any request."""
    doc_id, task, split = request.args[-3:]
    return doc_id, task, split


def describe(request: Instance) -> str:
    """Names the document in a sentence."""
    doc_id, task, split = document_of(request)
    return f"Document {doc_id} of task {task} ({split})"


@contextmanager
def naming(requests: Sequence[Instance], what: str = "cannot be read") -> Iterator[None]:
    """Whatever fails inside names these documents, and broken images are refused although the host lets them pass.

    Raises:
        ValueError: for any fault of a document, in one sentence. Errors of the machine (memory, CUDA) and what a model
            cannot do keep their type; the log names the documents.
    """
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False  # lmms-eval's tasks set it
    names = ", ".join(map(describe, requests))
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):  # MemoryGuard speaks of those
            logger.error(f"{names} {what}.")  # the cause follows
        raise
    except Exception as error:
        if hasattr(error, "document"):  # named further inside
            raise
        cause = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        named = ValueError(f"{names} {what}: {cause}")
        named.document = names  # type: ignore[attr-defined]
        raise named from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def read(request: Instance, documents: dict[str, Any], build: Callable[[Any], Any]) -> Any:
    """`build(document)`, with the document named where that fails."""
    doc_id, task, split = document_of(request)
    with naming([request]):
        return build(documents[task][split][doc_id])


def conversation(request: Instance, documents: dict[str, Any]) -> Conversation:
    """The messages of a generation request: (ctx, doc_to_messages, gen_kwargs, doc_id, task, split)."""
    return read(request, documents, request.args[1])


def choice(request: Instance, documents: dict[str, Any]) -> tuple[Conversation, str]:
    """Context and answer of a likelihood request: (ctx, answer or function, doc_to_visual, doc_id, task, split)."""
    context, answer, doc_to_visual = request.args[:3]

    def build(document: Any) -> tuple[Conversation, str]:
        messages = ConfigurableMessagesTask._build_user_turn(doc_to_visual(document) or [], context)
        return messages, answer if isinstance(answer, str) else str(answer(document))

    return read(request, documents, build)


def rounds(request: Instance, documents: dict[str, Any]) -> Generator[Conversation, str, None]:
    """The messages of each round; send the answer of the one before. The task decides when it is over."""
    answers: list[str] = []
    information = None
    messages = conversation(request, documents)
    while messages is not None:
        answers.append((yield messages))
        later = functools.partial(
            request.args[1],
            round_idx=len(answers),
            previous_output=list(answers),
            previous_round_info=information,
        )
        payload = read(request, documents, later)
        if not (isinstance(payload, tuple) and len(payload) == 4):  # a task of one round, as stock models see it
            return
        messages, finished, _, information = payload
        if finished:
            return


def by_context(requests: Sequence[Instance]) -> list[list[int]]:
    """Indices of likelihood requests with the same context, which share its prefill; padding copies apart."""
    groups: dict[tuple, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault((*document_of(request), str(request.args[0]), is_padding(request)), []).append(i)
    return list(groups.values())


def by_settings(requests: Sequence[Instance]) -> list[list[int]]:
    """Indices of generation requests with the same generation arguments."""
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(i)
    return list(groups.values())


def is_padding(request: Instance) -> bool:
    """Whether this is a copy that only fills up a rank."""
    return bool((request.metadata or {}).get("__padding_only__"))


def by_size(
    indices: Sequence[int], load: Callable[[int], Any], size: Callable[[int, Any], int], batch_size: int, ahead: int = 8
) -> Iterator[list[tuple[int, Any]]]:
    """Batches of (index, loaded item) with items of similar size together, large ones first.

    Only `ahead` batches are loaded at a time: images are large. With one item a batch nothing is padded, and the
    order stays.
    """
    window = batch_size * ahead if batch_size > 1 else 1
    for start in range(0, len(indices), window):
        items = [(i, load(i)) for i in indices[start : start + window]]
        if batch_size > 1:
            items.sort(key=lambda item: -size(*item))
        for first in range(0, len(items), batch_size):
            yield items[first : first + batch_size]
