"""Conversations in, answers out: one batch through the processor, the model and the compressed cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, StoppingCriteriaList

from sparsemm_lmms import decode
from sparsemm_lmms.cache import CACHE_NAME, RaggedCache
from sparsemm_lmms.decode_graph import check_mode
from sparsemm_lmms.model_wrappers.generation import GenerationSettings, StepClock
from sparsemm_lmms.model_wrappers.loading import Checkpoint
from sparsemm_lmms.model_wrappers.media import FrameSampling, Video, read_video
from sparsemm_lmms.model_wrappers.prefill import cut, heeds_gaps, question_starts, run
from sparsemm_lmms.session import CompressionSession

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


HEADROOM = 128
"""New tokens that a fresh cache has room for. Tasks often allow 1024 and get 10; a longer answer doubles the room."""


class Prompt(NamedTuple):
    """A prompt as the model reads it: `text` with one placeholder for each image and video."""

    text: str
    images: list[Any]
    videos: Sequence[Video] = ()


class Engine:
    """Generates batches with one checkpoint. The compression is chosen by the session that is passed in.

    Args:
        checkpoint: model and processor.
        system_prompt: put in front of conversations that bring none, or None.
        strip_answers: remove white space around answers.
        compress_before_question: compress what ends with the last image before the question is seen, and append the
            question uncompressed.
        sampling: which frames of a video are shown.
        cuda_graph: `auto`, `on` or `off`, see `sparsemm_lmms.decode.generate`.
        enable_thinking: told to the chat template, or None to tell nothing; where true, thoughts are cut from answers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        system_prompt: str | None = None,
        strip_answers: bool = False,
        compress_before_question: bool = False,
        sampling: FrameSampling | None = None,
        cuda_graph: str = "auto",
        enable_thinking: bool | None = None,
    ) -> None:
        self.model: Any = checkpoint.model  # `generate` comes from a mixin that type checkers do not see
        self.processor: Any = checkpoint.processor  # families bring more than the mixin declares
        self.cuda_graph = cuda_graph
        check_mode(cuda_graph, self.model.device)
        self.system_prompt, self.strip_answers = system_prompt, strip_answers
        self.thinks = bool(enable_thinking)
        self.template = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.compress_before_question, self.sampling = compress_before_question, sampling or FrameSampling()
        tokenizer = self.processor.tokenizer
        stock = self.model.generation_config.eos_token_id
        ends = stock if isinstance(stock, list) else [stock]
        self.eos = sorted({token for token in [*ends, tokenizer.eos_token_id] if token is not None})
        self.pad = tokenizer.pad_token_id

    def prompt(self, conversation: Conversation, answered: bool = False) -> Prompt:
        """The conversation as the text the model reads, its images in order and the sampled frames of its videos.

        Args:
            conversation: ends with a question, or with its answer where `answered`.

        Raises:
            NotImplementedError: for video that the family does not read, or audio.
        """
        from lmms_eval.protocol import ChatMessages  # the other host brings prompts of its own

        messages = [dict(message) for message in conversation]
        if self.system_prompt and (not messages or messages[0]["role"] != "system"):
            content = [{"type": "text", "text": self.system_prompt}]
            messages.insert(0, {"role": "system", "content": content})
        chat = ChatMessages(messages=messages)
        text = self.processor.apply_chat_template(
            chat.to_hf_messages(), tokenize=False, add_generation_prompt=not answered, **self.template
        )
        parts = [part for message in chat.messages for part in message.content]
        images = [part.url for part in parts if part.type == "image"]
        videos = [part for part in parts if part.type == "video"]
        family = self.model.config.model_type
        if any(part.type == "audio" for part in parts):
            raise NotImplementedError(f"{family} models hear nothing: this task sends audio.")
        if videos:
            self.require_video()
        if videos and text.count(self.processor.video_token) != len(videos):
            raise ValueError(f"The chat template of this {family} checkpoint has no place for videos.")
        frames = [read_video(part.url, self.sampling, part.start_time, part.end_time) for part in videos]
        return Prompt(text, images, frames)

    def size(self, prompt: Prompt) -> int:
        """Tokens of a prompt, those of its images and videos included; processed only where that is not foretold.

        Marks that a processor writes between the tokens of an image are not foretold: then it is a little less.
        """
        foretold = hasattr(self.processor, "_get_num_multimodal_tokens")
        if len(prompt.images) > 1 and "batch_num_images" in self.processor.image_processor.model_input_names:
            foretold = False  # several images of a prompt have other sizes there than each of them alone
        if not foretold or (prompt.videos and self.sampling.size is not None):  # time stamps are tokens, too
            return int(self.batch_inputs([prompt])["attention_mask"].sum())
        sizes: dict[str, Any] = {"image_sizes": [im.size[::-1] for im in prompt.images if isinstance(im, Image.Image)]}
        if prompt.videos:
            sizes["video_sizes"] = [video.frames.shape[:3] for video in prompt.videos]
        media = self.processor._get_num_multimodal_tokens(**sizes)
        vision = [n for kind in ("num_image_tokens", "num_video_tokens") for n in media[kind] or ()]
        return len(self.processor.tokenizer(prompt.text)["input_ids"]) - len(vision) + int(sum(vision))

    def require_video(self) -> None:
        """Raise NotImplementedError where the family reads no video."""
        if getattr(self.processor, "video_processor", None) is None:
            family = self.model.config.model_type
            raise NotImplementedError(f"{family} models read text and images only: this task sends video.")

    def inputs(self, prompts: Sequence[str], images: Sequence[Any], videos: Sequence[Any] = ()) -> BatchFeature:
        """Model inputs of a left-padded batch, on the model's device and in its dtype."""
        moving: dict[str, Any] = {}
        if len(videos):
            read = [video for video in videos if isinstance(video, Video)]  # others are frames alone
            told = {"video_metadata": [video.metadata for video in read]} if read else {}
            moving["videos"] = [video.frames for video in read] or list(videos)
            moving["videos_kwargs"] = {"do_sample_frames": False, **told}
            if self.sampling.size is not None:
                moving["videos_kwargs"]["do_resize"] = False
        features = self.processor(
            text=list(prompts), images=list(images) or None, padding=True, return_tensors="pt", **moving
        )
        return features.to(self.model.device, self.model.dtype)

    def batch_inputs(self, prompts: Sequence[Prompt]) -> BatchFeature:
        """`inputs` of whole prompts."""
        images = [prompt.images for prompt in prompts]  # a list a prompt, as transformers' own chat template has them
        videos = [video for prompt in prompts for video in prompt.videos]
        return self.inputs([prompt.text for prompt in prompts], images if any(images) else [], videos)

    def generate(
        self, session: CompressionSession, conversations: Sequence[Conversation], settings: GenerationSettings
    ) -> Batch:
        """Answer the conversations in one batch on a fresh cache of `session`, which must be entered."""
        return self.answer(session, [self.prompt(conversation) for conversation in conversations], settings)

    def answer(
        self,
        session: CompressionSession,
        prompts: Sequence[Prompt],
        settings: GenerationSettings,
        inputs: BatchFeature | None = None,
    ) -> Batch:
        """The same for prompts that are already text; `inputs` are theirs for the model where they are at hand."""
        inputs = self.batch_inputs(prompts) if inputs is None else inputs
        room = min(settings.max_new_tokens, HEADROOM)
        clock = StepClock(self.model.device)
        if self.splits(session):
            first = question_starts(self.model, inputs["input_ids"])
            parts = cut(self.model, inputs, [first, torch.full_like(first, inputs["input_ids"].shape[1])])
            cache = session.new_cache(room + parts.ends[1] - parts.ends[0])
            run(self.model, cache, parts, 1)
            if settings.num_beams > 1:
                cache.batch_repeat_interleave(settings.num_beams)
            return self.complete(cache, parts.for_generate(), settings, prompts, clock)
        return self.complete(session.new_cache(room), inputs, settings, prompts, clock)

    def splits(self, session: CompressionSession) -> bool:
        """Whether prompts are compressed before their question is seen."""
        return self.compress_before_question and session.method.compresses

    def at_once(self, session: CompressionSession, batch_size: int, likelihood: bool = False) -> int:
        """How many prompts may share a batch: one, where they come in parts and padding between those is heeded."""
        return 1 if (likelihood or self.splits(session)) and heeds_gaps(self.model) else batch_size

    def complete(
        self,
        cache: RaggedCache,
        inputs: Mapping[str, Any],
        settings: GenerationSettings,
        prompts: Sequence[Prompt],
        clock: StepClock,
    ) -> Batch:
        """Generate from `inputs`, of which `cache` may hold the first columns; `clock` runs since the batch began."""
        sequences = decode.generate(
            self.model,
            cuda_graph=self.cuda_graph,
            **inputs,
            **settings.for_generate(),
            **{CACHE_NAME: cache},
            eos_token_id=self.eos,
            pad_token_id=self.pad,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        clock.stop()
        generated = sequences[:, inputs["input_ids"].shape[1] :].cpu()
        tokens = inputs["attention_mask"].sum(1).tolist()
        answers = self._answers(generated, tokens, kept_tokens(cache, tokens, settings.num_beams), settings)
        return measured(cache, answers, [prompt.text for prompt in prompts], clock)

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
        if self.thinks:
            texts = [text.partition("</think>")[2].strip() for text in texts]
        texts = [settings.cut(text) for text in texts]
        if self.strip_answers:
            texts = [text.strip() for text in texts]
        rows = zip(texts, lengths, prompt_tokens, kept, strict=True)
        return [Answer(*row) for row in rows]


def kept_tokens(cache: RaggedCache, prompt_tokens: Sequence[int], num_beams: int = 1) -> list[float]:
    """Mean over layers and kv heads of what each sequence kept of its prompt, its uncompressed end included."""
    kept = cache.kept_per_head().double().mean(dim=(0, 2)).tolist()[::num_beams]
    compressed = cache.prompt_lengths[::num_beams]
    return [k + n - seen for k, n, seen in zip(kept, prompt_tokens, compressed, strict=True)]


def measured(cache: RaggedCache, answers: list[Answer], prompts: list[str], clock: StepClock) -> Batch:
    """The answers with what the stopped clock and the cache tell of their batch."""
    cache.check_overflow()
    report = cache.report()
    return Batch(
        answers=answers,
        prompts=prompts,
        elapsed=clock.elapsed,
        ttft=clock.ttft,
        tpot=clock.tpot,
        kv_bytes=report["kv_bytes_allocated"],
        kv_bytes_used=report["kv_bytes_used"],
        kv_bytes_full=report["kv_bytes_full"],
        nominal_budget=report["nominal_budget"],
    )
