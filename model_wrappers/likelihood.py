"""Likelihood of given answers on the compressed cache: the context is prefilled once and shared by its answers.

Conventions of lmms-eval's stock wrappers (`llava_hf`, `llava`): the answer stands in the assistant's turn of the chat
template; its tokens are all that the template writes behind the generation prompt, the end of the turn included; the
result is their mean negative log-likelihood, so `multiple_choice` takes the smallest. Deviation: `is_greedy` compares
each token with the prediction for its place; the stock wrappers compare with the next place's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import BatchFeature

from sparsemm_lmms.cache import CACHE_NAME
from sparsemm_lmms.model_wrappers.engine import Answer, Batch, Conversation, Engine, Prompt, kept_tokens, measured
from sparsemm_lmms.model_wrappers.generation import StepClock
from sparsemm_lmms.model_wrappers.prefill import (
    Parts,
    check_gaps,
    cut,
    placeholders,
    question_starts,
    run,
    shared_prefix,
)
from sparsemm_lmms.session import CompressionSession


@dataclass(frozen=True)
class Likelihood:
    """Of one answer.

    Attributes:
        loss: mean negative log-likelihood of its tokens, natural logarithm.
        is_greedy: whether greedy decoding would write it.
        tokens: how many were scored.
    """

    loss: float
    is_greedy: bool
    tokens: int


@dataclass(frozen=True)
class Document:
    """A context with the tokens of its possible answers.

    Attributes:
        prompt: the context.
        dropped: tokens at the end of the context that some answer's tokens replace (a token across the border).
        answers: tokens behind the rest of the context, one list an answer.
    """

    prompt: Prompt
    dropped: int
    answers: list[list[int]]


def read_document(engine: Engine, conversation: Conversation, answers: Sequence[str]) -> Document:
    """Tokenize a conversation and its answers, each as one text, as the stock wrappers do.

    Raises:
        ValueError: for an answer without tokens, or a template that writes the context differently for each answer.
    """
    prompt = engine.prompt(conversation)
    turns = [{"role": "assistant", "content": [{"type": "text", "text": answer}]} for answer in answers]
    tokenize = engine.processor.tokenizer
    context = tokenize(prompt.text)["input_ids"]  # an image is one placeholder here
    whole = [tokenize(engine.prompt([*conversation, turn], answered=True).text)["input_ids"] for turn in turns]
    common = min(shared_prefix(context, tokens) for tokens in whole)
    media = [i for i, token in enumerate(context) if token in placeholders(engine.model)]
    if common == 0 or (media and common <= media[-1]):
        raise ValueError("This chat template writes the question differently once it is answered: no likelihood.")
    for answer, tokens in zip(answers, whole, strict=True):
        if len(tokens) <= len(context):
            raise ValueError(f"The answer {answer!r} has no tokens behind its context, so it has no likelihood.")
    return Document(prompt, len(context) - common, [tokens[common:] for tokens in whole])


def score(
    engine: Engine, session: CompressionSession, documents: Sequence[Document], inputs: BatchFeature | None = None
) -> tuple[list[list[Likelihood]], Batch]:
    """Likelihoods of all answers of some documents, one prefill for all and one pass for the n-th answers of each.

    `inputs` are those of the documents' prompts where they are at hand.
    """
    if session.config.chunk:
        raise ValueError(
            f"max_cache={session.config.max_cache} compacts a cache while tokens are written one by one, and a "
            "likelihood writes none; use max_cache=0."
        )
    prompts = [document.prompt for document in documents]
    inputs = engine.batch_inputs(prompts) if inputs is None else inputs
    dropped = torch.tensor([document.dropped for document in documents], device=inputs["input_ids"].device)
    end = inputs["input_ids"].shape[1] - dropped
    ends = [end]
    if engine.splits(session):
        ends.insert(0, torch.minimum(question_starts(engine.model, inputs["input_ids"]), end - 1))
    clock = StepClock(engine.model.device)
    parts = cut(engine.model, inputs, ends)
    longest = max(len(answer) for document in documents for answer in document.answers)
    cache = session.new_cache(longest + parts.ends[-1] - parts.ends[0])
    logits = run(engine.model, cache, parts, len(parts.ends))
    clock(parts.ids, None)
    most = max(len(document.answers) for document in documents)
    columns = []
    for n in range(most):  # a document with fewer answers repeats its first, and the result is dropped
        rows = [d.answers[n] if n < len(d.answers) else d.answers[0] for d in documents]
        columns.append(_score_rows(engine, session, parts, logits, rows, dropped))
    clock.stop()
    results = [[column[b] for column in columns[: len(d.answers)]] for b, d in enumerate(documents)]
    tokens = parts.mask.sum(1).tolist()
    scored = [sum(choice.tokens for choice in row) for row in results]
    answers = [Answer("", *row) for row in zip(scored, tokens, kept_tokens(cache, tokens), strict=True)]
    return results, measured(cache, answers, [prompt.text for prompt in prompts], clock)


@torch.no_grad()
def _score_rows(
    engine: Engine, session: CompressionSession, parts: Parts, logits: Tensor, rows: list[list[int]], dropped: Tensor
) -> list[Likelihood]:
    """One answer of each document: appended in one pass, scored, and rolled back from the cache.

    Args:
        logits: `[batch, vocabulary]` behind the context.
        dropped: int64 `[batch]`: the first tokens of a row stand for tokens of the context and are not scored.
    """
    cache, device = session.cache, parts.ids.device
    assert cache is not None  # the context is in it
    width = max(map(len, rows))
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int32, device=device)
    padding = width - counts.long()
    ids = torch.tensor([[engine.pad] * (width - len(row)) + row for row in rows], device=device)
    columns = torch.arange(width, device=device)
    real = columns >= padding[:, None]
    positions = parts.positions[..., -1:] + (columns - padding[:, None]).clamp(min=0) + 1
    mask = torch.cat([parts.mask, real.long()], 1)
    check_gaps(engine.model, mask)
    out = engine.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        **{CACHE_NAME: cache},
    )
    cache.rollback(width, counts)
    before = out.logits.roll(1, dims=1)  # the logits that predict each column
    before[torch.arange(len(rows), device=device), padding] = logits
    before = before.float()
    scored = real & (columns >= (padding + dropped)[:, None])
    losses = torch.nn.functional.cross_entropy(before.transpose(1, 2), ids, reduction="none")
    loss = (losses * scored).sum(1) / scored.sum(1)
    if not bool(loss.isfinite().all()):  # the losses go to the host here anyway
        raise ValueError(
            f"{type(engine.model).__name__} gave logits with NaN or infinity, so its likelihoods mean nothing; try "
            "dtype=float32 or bfloat16, and check the weights."
        )
    greedy = ((before.argmax(-1) == ids) | ~scored).all(1)
    found = zip(loss.tolist(), greedy.tolist(), scored.sum(1).tolist(), strict=True)
    return [Likelihood(*values) for values in found]
