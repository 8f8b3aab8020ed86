"""Conversations of many rounds on one compressed cache: a later prompt attends to what was kept plus itself."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import torch
from transformers import BatchFeature

from sparsemm_lmms.cache import RaggedCache
from sparsemm_lmms.model_wrappers.engine import Batch, Conversation, Engine, Prompt
from sparsemm_lmms.model_wrappers.generation import GenerationSettings, StepClock
from sparsemm_lmms.model_wrappers.media import read_video
from sparsemm_lmms.model_wrappers.prefill import (
    Parts,
    check_causal,
    newest_vision,
    placeholders,
    question_starts,
    run,
    shared_prefix,
    token_positions,
)
from sparsemm_lmms.session import CompressionSession


class Dialogue:
    """One conversation. Its text at every round is what the chat template writes for all of it.

    The cache is filled by the first prompt and compressed; a later round appends what is new, the last answer as the
    template writes it included. With everything kept, each answer is that of a model that reads the whole conversation
    afresh.

    Args:
        engine, session: model and compression; the session must be entered.
        recompress: compress the cache again after each later prompt, judged by that prompt's last tokens (or, with
            `compress_before_question`, by those that end with its last image).
    """

    def __init__(self, engine: Engine, session: CompressionSession, recompress: bool = False) -> None:
        self.engine, self.session, self.recompress = engine, session, recompress
        self.messages: Conversation = []
        self.cache: RaggedCache | None = None
        self.ids: list[int] = []  # the newest prompt
        self.images = self.videos = 0  # in that prompt

    def ask(self, messages: Conversation, settings: GenerationSettings) -> Batch:
        """Add the messages of a round and answer them."""
        if settings.num_beams > 1:
            raise ValueError(f"num_beams={settings.num_beams}: rounds on one cache are decoded with one beam.")
        self.messages += [self._with_frames(message) for message in messages]
        prompt = self.engine.prompt(self.messages)
        inputs = self.engine.batch_inputs([prompt])
        ids = inputs["input_ids"][0].tolist()
        if self.cache is None:
            batch = self.engine.answer(self.session, [prompt], settings, inputs)
            self.cache = self.session.cache
        else:
            batch = self._continue(self.cache, prompt, inputs, ids, settings)
        self.ids, self.images, self.videos = ids, len(prompt.images), len(prompt.videos)
        answer = {"role": "assistant", "content": [{"type": "text", "text": batch.answers[0].text}]}
        self.messages.append(answer)
        return batch

    def _continue(
        self, cache: RaggedCache, prompt: Prompt, inputs: BatchFeature, ids: list[int], settings: GenerationSettings
    ) -> Batch:
        model = self.engine.model
        clock = StepClock(model.device)
        kept = min(shared_prefix(ids, self.ids), len(ids) - 1)
        check_causal(model, inputs, torch.tensor([kept], device=model.device))
        self._return_to(cache, kept)
        parts = Parts(
            ids=inputs["input_ids"],
            mask=inputs["attention_mask"],
            positions=token_positions(model, inputs),
            ends=(int(question_starts(model, inputs["input_ids"])), len(ids)),
            vision=newest_vision(inputs, self.images, self.videos),
        )
        if (len(prompt.images), len(prompt.videos)) != (self.images, self.videos) and not parts.vision:
            raise ValueError(
                "A later round brings images, whose pixels cannot be told from those before in "
                f"{model.config.model_type} models; use rounds=independent."
            )
        if not self.engine.splits(self.session):
            cache.compress_next = self.recompress
        elif parts.vision:
            cache.compress_next = self.recompress
            run(model, cache, parts, 1)
            return self.engine.complete(cache, parts.for_generate(), settings, [prompt], clock)
        return self.engine.complete(cache, {**parts.for_generate(), **parts.vision}, settings, [prompt], clock)

    def _return_to(self, cache: RaggedCache, tokens: int) -> None:
        """Forget all but the first `tokens` tokens: the last answer comes again as the template writes it."""
        changed = set(self.ids[tokens:]) & placeholders(self.engine.model)
        try:
            cache.rollback(cache.get_seq_length() - tokens)
        except ValueError:
            changed.add(-1)
        if changed:
            raise ValueError(
                "The chat template rewrites earlier rounds of a conversation, so they cannot stay in the cache; use "
                "rounds=independent."
            )

    def _with_frames(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with its videos decoded, so that later rounds need not do it again."""
        return {**message, "content": [self._decoded(part) for part in message["content"]]}

    def _decoded(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "video":
            return part
        self.engine.require_video()
        times = part.get("start_time"), part.get("end_time")
        return {"type": "video", "url": read_video(part["url"], self.engine.sampling, *times)}


def converse(
    engine: Engine,
    session: CompressionSession,
    talk: Generator[Conversation, str, None],
    settings: GenerationSettings,
    mode: str,
) -> Iterator[Batch]:
    """Answer the rounds of `talk`, which gets each answer sent before it gives the next messages.

    Args:
        mode: `append`, `recompress` or `independent` (see `RunOptions.rounds`).
    """
    if session.config.chunk and mode != "independent":
        raise ValueError(
            f"max_cache={session.config.max_cache} compacts the cache of one prompt, which rounds={mode} goes on with; "
            "use rounds=independent, or max_cache=0."
        )
    dialogue = Dialogue(engine, session, recompress=mode == "recompress")
    messages = next(talk)
    while True:
        alone = mode == "independent"
        batch = engine.generate(session, [messages], settings) if alone else dialogue.ask(messages, settings)
        yield batch
        try:
            messages = talk.send(batch.answers[0].text)
        except StopIteration:
            return
