"""Conversations in, answers out: one batch through the processor, the model and the compressed cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, StoppingCriteriaList

from ..session import CompressionSession
from .generation import GenerationSettings, StepClock
from .loading import Checkpoint

Conversation = list[dict[str, Any]]
"""Messages as lmms-eval's tasks make them: `{"role": ..., "content": [{"type": "image", "url": ...}, ...]}`."""


@dataclass(frozen=True)
class Answer:
    """One answer and what its cache held.

    Attributes:
        text: cut at the first stop string.
        output_tokens: generated tokens, the end token included, padding not.
        prompt_tokens: tokens of the prompt, image tokens included, padding not.
        kept_tokens: mean over layers and kv heads of the tokens kept after prefill.
    """

    text: str
    output_tokens: int
    prompt_tokens: int
    kept_tokens: float


@dataclass(frozen=True)
class Batch:
    """The answers of one batch, and what can only be measured for the batch as a whole.

    Attributes:
        prompts: the prompts as text, in the order of the answers.
        elapsed, ttft, tpot: seconds (see `StepClock`).
        kv_bytes, kv_bytes_used, kv_bytes_full: allocated store, its used part, and what a full cache would use at the
            end of generation; of the whole batch.
        nominal_budget: tokens per head that were asked for, or None for fullkv.
    """

    answers: list[Answer]
    prompts: list[str]
    elapsed: float
    ttft: float
    tpot: float | None
    kv_bytes: int
    kv_bytes_used: int
    kv_bytes_full: int
    nominal_budget: int | None


ROOM = 128
"""New tokens that a fresh cache has room for. Tasks often allow 1024 and get 10; a longer answer doubles the room."""


class Engine:
    """Generates batches with one checkpoint. The compression is chosen by the session that is passed in.

    Args:
        checkpoint: model and processor.
        system_prompt: put in front of conversations that bring none, or None.
        strip_answers: remove white space around answers.
    """

    def __init__(self, checkpoint: Checkpoint, system_prompt: str | None = None, strip_answers: bool = False) -> None:
        self.model: Any = checkpoint.model  # `generate` comes from a mixin that type checkers do not see
        self.processor = checkpoint.processor
        self.system_prompt, self.strip_answers = system_prompt, strip_answers
        tokenizer = self.processor.tokenizer
        stock = self.model.generation_config.eos_token_id
        ends = stock if isinstance(stock, list) else [stock]
        self.eos = sorted({token for token in [*ends, tokenizer.eos_token_id] if token is not None})
        self.pad = tokenizer.pad_token_id

    def prompt(self, conversation: Conversation) -> tuple[str, list[Any]]:
        """The conversation as the text the model reads, and its images in order.

        Raises:
            NotImplementedError: for video or audio.
        """
        from lmms_eval.protocol import ChatMessages  # the other host brings prompts of its own

        messages = [dict(message) for message in conversation]
        if self.system_prompt and (not messages or messages[0]["role"] != "system"):
            content = [{"type": "text", "text": self.system_prompt}]
            messages.insert(0, {"role": "system", "content": content})
        chat = ChatMessages(messages=messages)
        images, videos, audios = chat.extract_media()
        if videos or audios:
            raise NotImplementedError("These models read text and images only; this task sends video or audio.")
        return self.processor.apply_chat_template(
            chat.to_hf_messages(), tokenize=False, add_generation_prompt=True
        ), images

    def inputs(self, prompts: Sequence[str], images: Sequence[Any]) -> BatchFeature:
        """Model inputs of a left-padded batch, on the model's device and in its dtype."""
        features = self.processor(text=list(prompts), images=list(images) or None, padding=True, return_tensors="pt")
        return features.to(self.model.device, self.model.dtype)

    def generate(
        self, session: CompressionSession, conversations: Sequence[Conversation], settings: GenerationSettings
    ) -> Batch:
        """Answer the conversations in one batch on a fresh cache of `session`, which must be entered."""
        prompts, images = zip(*(self.prompt(conversation) for conversation in conversations), strict=True)
        return self.answer(session, prompts, self.inputs(prompts, [i for group in images for i in group]), settings)

    def answer(
        self, session: CompressionSession, prompts: Sequence[str], inputs: BatchFeature, settings: GenerationSettings
    ) -> Batch:
        """The same for prompts that are already text and model inputs."""
        cache = session.new_cache(min(settings.max_new_tokens, ROOM))
        clock = StepClock(self.model.device)
        sequences = self.model.generate(
            **inputs,
            **settings.for_generate(),
            past_key_values=cache,
            eos_token_id=self.eos,
            pad_token_id=self.pad,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        clock.stop()
        cache.check_overflow()
        report = cache.report()
        generated = sequences[:, inputs["input_ids"].shape[1] :].cpu()
        kept = report["kept_per_head"].double().mean(dim=(0, 2)).tolist()[:: settings.num_beams]
        return Batch(
            answers=self._answers(generated, inputs["attention_mask"].sum(1).tolist(), kept, settings),
            prompts=list(prompts),
            elapsed=clock.elapsed,
            ttft=clock.ttft,
            tpot=clock.tpot,
            kv_bytes=report["kv_bytes_allocated"],
            kv_bytes_used=report["kv_bytes_used"],
            kv_bytes_full=report["kv_bytes_full"],
            nominal_budget=report["nominal_budget"],
        )

    def _answers(
        self, generated: Tensor, prompt_tokens: list[int], kept: list[float], settings: GenerationSettings
    ) -> list[Answer]:
        ends = torch.isin(generated, torch.tensor(self.eos))
        lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, generated.shape[1]).tolist()
        texts = self.processor.tokenizer.batch_decode(
            [row[:length] for row, length in zip(generated, lengths, strict=True)],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        texts = [settings.cut(text) for text in texts]
        if self.strip_answers:
            texts = [text.strip() for text in texts]
        rows = zip(texts, lengths, prompt_tokens, kept, strict=True)
        return [Answer(*row) for row in rows]
