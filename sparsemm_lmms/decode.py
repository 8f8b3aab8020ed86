"""Decoding on a ragged cache with static buffers, as a `custom_generate` of transformers' own `generate`.

transformers prepares prompts, processors and stopping criteria as always; this module replaces its token loop, whose
tensors grow at every step. Here a step (embedding to next token) works at fixed addresses, so that it can be one CUDA
graph, and the host does not wait for the device to know whether all sequences have ended. The tokens are those of the
stock loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria, StopStringCriteria
from transformers.generation import logits_process as processors
from transformers.generation.utils import GENERATION_MODES_MAPPING
from transformers.utils import ModelOutput

from sparsemm_lmms.attention import PREFIX
from sparsemm_lmms.cache import CACHE_NAME, RaggedCache
from sparsemm_lmms.decode_graph import CudaGraph, Graph, Replay, check_mode, say_once, uncapturable

CHECK_EVERY = 8  # steps between two looks at "all ended" on CUDA; up to 15 steps too many are rolled back
STATIC_PROCESSORS = (  # functions of the scores alone, in device code alone: they may be part of the graph
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.MinPLogitsWarper,
    processors.LogitNormalization,
)
KINDS = ("token_type_ids", "mm_token_type_ids")
EXTRAS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def generate(model: Any, *, cuda_graph: str = "auto", **kwargs: Any) -> Any:
    """`model.generate(**kwargs)` with the loop of this module.

    Args:
        cuda_graph: `auto` captures decode steps where that is possible, `on` insists on it, `off` is the stock loop.

    Raises:
        ValueError: for an unknown `cuda_graph`, or `on` without CUDA.
    """
    check_mode(cuda_graph, model.device)
    reason = _stock_only(model, kwargs)
    if cuda_graph == "off" or reason is not None:
        if reason is not None:
            _refuse_or_say(cuda_graph, reason)
        watch = FiniteWatch()
        kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or ()), watch])
        made = model.generate(**kwargs)
        watch.check(model)
        return made
    if kwargs.get("stop_strings") is not None:  # transformers does not hand the tokenizer on to a custom_generate
        ends = StopStringCriteria(stop_strings=kwargs.pop("stop_strings"), tokenizer=kwargs.pop("tokenizer", None))
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), ends])
    return model.generate(**kwargs, custom_generate=Decoder(cuda_graph, kwargs.get("streamer")))


def _stock_only(model: Any, kwargs: dict[str, Any]) -> str | None:
    """What in the arguments of `generate` a custom_generate does not get to see."""
    configs = [kwargs, vars(kwargs.get("generation_config") or GenerationConfig()), vars(model.generation_config)]
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
        if any(config.get(name) is not None for config in configs):
            return f"{name} asks for assisted decoding"
    if any(config.get("stop_strings") is not None for config in configs[1:]):
        return "stop_strings stand in the generation config; pass them to generate itself"
    return "custom_generate was given" if kwargs.get("custom_generate") is not None else None


def _refuse_or_say(cuda_graph: str, reason: str) -> None:
    if cuda_graph == "on":
        raise ValueError(f"cuda_graph=on, but {reason}; use cuda_graph=auto.")
    say_once(f"Decoding with the loop of transformers: {reason}.")


class FiniteWatch(LogitsProcessor):
    """Notes, on the device, whether any step had scores that are not finite; `check` reads the note, at the end.

    NaN, +inf, or no token left: the maximum is not finite exactly then (-inf elsewhere is a processor's mask).
    """

    def __init__(self) -> None:
        self.broken: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        found = ~scores.amax(-1).isfinite().all()
        if self.broken is None:
            self.broken = found
        else:
            self.broken |= found
        return scores

    def check(self, model: Any) -> None:
        """Raise ValueError if anything was noted."""
        if self.broken is not None and bool(self.broken):
            raise ValueError(
                f"{type(model).__name__} gave logits with NaN or infinity, so its tokens mean nothing; try "
                "dtype=float32 or bfloat16, and check the weights."
            )


@dataclass
class Decoder:
    """The callable for `model.generate(custom_generate=...)`.

    Attributes:
        cuda_graph: `auto` or `on`.
        streamer: transformers does not hand it on to a custom_generate.
        check_every: steps between two looks at whether all sequences have ended; None: by the device.
        graph: what captures steps; None: a CUDA graph on CUDA, nothing elsewhere.
    """

    cuda_graph: str = "auto"
    streamer: Any = None
    check_every: int | None = None
    graph: Graph | None = None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        name = GENERATION_MODES_MAPPING[generation_config.get_generation_mode()]
        reason = _static_loop_cannot(name, model, input_ids, stopping_criteria, generation_config)
        if reason is not None:
            _refuse_or_say(self.cuda_graph, reason)
            watch = FiniteWatch()
            made = getattr(type(model), name)(
                model,
                input_ids,
                logits_processor=LogitsProcessorList([*logits_processor, watch]),
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **({"streamer": self.streamer} if name == "_sample" else {}),
                **model_kwargs,
            )
            watch.check(model)
            return made
        outputs = model._prefill(input_ids, generation_config, model_kwargs)  # type: ignore[operator]
        loop = DecodeLoop(self, model, outputs, input_ids, logits_processor, stopping_criteria, generation_config)
        logits = outputs.logits[:, -1].to(torch.float32, copy=True)
        inputs = loop.prepare(outputs, model_kwargs)
        del outputs  # its logits may be large
        sequences = loop.run(logits, inputs)
        if self.streamer is not None:
            self.streamer.end()
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE_NAME: loop.cache})  # type: ignore[arg-type]


def _static_loop_cannot(
    name: str, model: Any, input_ids: Tensor, criteria: StoppingCriteriaList, config: GenerationConfig
) -> str | None:
    """Why the static loop cannot serve this call of generate."""
    if not model.config.get_text_config(decoder=True)._attn_implementation.startswith(PREFIX):
        return "the model is not under sparsemm_lmms.compress"
    if name != "_sample":
        return f"{config.get_generation_mode().value} needs it"
    if config.return_dict_in_generate and (asked := [extra for extra in EXTRAS if getattr(config, extra)]):
        return f"{', '.join(asked)} keep tensors of every step"
    if criteria.max_length is None:
        return "there is no maximum length"
    if input_ids.device != model.device:
        return f"input_ids are on {input_ids.device}, the model is on {model.device}"
    return None


class DecodeLoop:
    """One call of generate after its prefill: static buffers, one `step`, and the host's part of the loop.

    Everything a step changes lies in these tensors and in the cache:
        ids: int64 `[batch, max_length]`, prompt and new tokens; `cursor` `[1]` is the column of the next one.
        token `[batch, 1]`, position `[..., batch, 1]`: inputs of the next step (3D and text positions for M-RoPE).
        finished: bool `[batch]`; live: int64 `[1]`, steps that began with an unfinished sequence.
        watch: a bool `[]`, whether any step had logits that are not finite; read once, at the end.
    """

    def __init__(
        self,
        decoder: Decoder,
        model: Any,
        outputs: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: StoppingCriteriaList,
        config: Any,
    ) -> None:
        self.decoder, self.model, self.do_sample = decoder, model, config.do_sample
        self.cache: RaggedCache = getattr(outputs, CACHE_NAME)
        self.processors = logits_processor
        criteria = [c for c in stopping_criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)]
        self.batch, self.columns = input_ids.shape
        self.length = self.columns  # columns of `ids` that are filled, as the host counts
        self.max_length = stopping_criteria.max_length or 0
        device = input_ids.device
        ends = [c.eos_token_id.to(device).view(-1) for c in stopping_criteria if type(c) is EosTokenCriteria]
        self.eos = torch.cat(ends) if ends else None
        pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self.pad = config._pad_token_tensor.to(device) if pads else None
        self.ids = input_ids.new_zeros(self.batch, max(self.max_length, self.columns + 1))
        self.ids[:, : self.columns] = input_ids
        self.cursor = torch.tensor([self.columns], device=device)
        self.token = input_ids.new_zeros(self.batch, 1)
        self.position = self.token  # `prepare` finds the real ones
        self.finished = torch.zeros(self.batch, dtype=torch.bool, device=device)
        self.watch = FiniteWatch()
        self.watch.broken = torch.zeros((), dtype=torch.bool, device=device)  # at a fixed address
        self.live = torch.zeros(1, dtype=torch.int64, device=device)
        # A criterion that only looks on (a clock) does not care about steps that are rolled back.
        self.onlookers = [c for c in criteria if getattr(c, "only_looks_on", False)]
        watching = self.watching = [c for c in criteria if c not in self.onlookers]
        moving = [p for p in self.processors if type(p) not in STATIC_PROCESSORS]
        self.whole = not moving and not watching and decoder.streamer is None
        if not self.whole and device.type == "cuda":
            names = sorted({type(x).__name__ for x in (*moving, *watching, decoder.streamer) if x is not None})
            say_once(f"The choice of the next token runs outside the CUDA graph, step by step, for {', '.join(names)}.")
        every = decoder.check_every or (CHECK_EVERY if device.type == "cuda" else 1)
        # a state of linear attention cannot take steps back
        self.check = EndCheck(self.finished, every if self.whole and not self.cache.has_states else 1)
        self.can_end = self.eos is not None or bool(watching)

    def prepare(self, outputs: ModelOutput, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of a decode step, with `token` and `position` as static buffers.

        transformers prepares them for the first two steps; what differs between the two must be known to us.

        Raises:
            NotImplementedError: if something else changes from step to step.
        """
        model = self.model
        ids = self.ids[:, : self.columns + 1]
        kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        later = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)
        position, next_position = inputs.get("position_ids"), later.get("position_ids")
        moved = [key for key in inputs.keys() | later.keys() if not _same(inputs.get(key), later.get(key))]
        unknown = set(moved) - {"input_ids", "attention_mask", "position_ids", *KINDS}
        if position is None or unknown or not torch.equal(position + 1, next_position):
            raise NotImplementedError(
                f"{type(model).__name__} changes {', '.join(sorted(unknown)) or 'position_ids'} from step to step in a "
                "way that the static decode loop does not know; use cuda_graph=off."
            )
        self.position = position.clone() - 1  # choosing the first token moves it
        # A segment holds exactly what may be attended to, so a decode step needs no mask.
        # Every new token is of the kind of the last; some versions of transformers hand on the kinds of all tokens.
        inputs |= {key: inputs[key][..., -1:] for key in KINDS if inputs.get(key) is not None}
        return {**inputs, "input_ids": self.token, "position_ids": self.position, "attention_mask": None}

    def run(self, logits: Tensor, inputs: dict[str, Any]) -> Tensor:
        """From the prefill's logits `[batch, vocabulary]` to all tokens `[batch, prompt + new]`."""

        def forward() -> Tensor:
            return self.model(**inputs, return_dict=True).logits[:, -1].to(torch.float32, copy=True)

        static: dict[str, Tensor] = {}

        @torch.inference_mode()  # every operator costs less; nothing that a step makes outlives it but its logits
        def step() -> None:
            static["logits"] = forward()
            if self.whole:
                self.choose(static["logits"])

        replay = Replay(step, self.cache, self._graph(), must=self.decoder.cuda_graph == "on")
        self.choose(logits)
        self._look()
        while self.length < self.max_length and not (self.can_end and self.check()):
            if self.cache.headroom_left < 1:
                if self.can_end and bool(self.finished.all()):
                    break  # the steps behind the end are taken back, which a compaction cannot be
                self.cache.reserve(1)
                replay.look_again()
            replay()
            if not self.whole:
                self.choose(static["logits"].clone())  # a processor may keep what it gets; a replay overwrites
            self._look()
        return self._finish()

    def choose(self, logits: Tensor) -> None:
        """The next token of every sequence, float32 `[batch, vocabulary]` -> all buffers; no host synchronisation."""
        scores = self.processors(self.ids if self.whole else self._seen(), logits)
        self.watch(self.ids, scores)
        if self.do_sample:
            # What torch.multinomial does for one sample, bit by bit, without its check, which waits for the device.
            weights = torch.softmax(scores, dim=-1)
            token = (weights / torch.empty_like(weights).exponential_(1)).argmax(-1)
        else:
            token = scores.argmax(-1)
        if self.can_end:
            self.live += ~self.finished.all()
        if self.pad is not None:
            token = torch.where(self.finished, self.pad, token)
        if self.eos is not None:
            self.finished |= (token[:, None] == self.eos).any(1)
        self.ids.index_copy_(1, self.cursor, token[:, None])
        self.token.copy_(token[:, None])
        self.position += 1
        self.cursor += 1

    def _look(self) -> None:
        """After a step: what users attach to it, streamers and stopping criteria."""
        self.length += 1
        if self.decoder.streamer is not None:
            self.decoder.streamer.put(self.token[:, 0].cpu())
        for onlooker in self.onlookers:
            onlooker(self.ids[:, : self.length], None)
        if self.watching:
            ids = self._seen()
            for criterion in self.watching:
                self.finished |= criterion(ids, None)

    def _seen(self) -> Tensor:
        """Tokens so far as transformers hands them to processors and criteria: `[batch, length]`, contiguous."""
        return self.ids[:, : self.length].contiguous()

    def _graph(self) -> Graph | None:
        if self.decoder.graph is not None or self.token.device.type != "cuda":
            return self.decoder.graph
        reason = uncapturable(self.model, self.cache)
        if reason is None:
            return CudaGraph(self.token.device)
        if self.decoder.cuda_graph == "on":
            raise ValueError(f"cuda_graph=on, but {reason}; use cuda_graph=auto.")
        say_once(f"Decoding without a CUDA graph: {reason}.")
        return None

    def _finish(self) -> Tensor:
        """Take back what ran after the last sequence had ended.

        Raises:
            ValueError: if the logits of a step were not finite.
        """
        self.cache.check_overflow()
        self.watch.check(self.model)
        length = self.columns + int(self.live) if self.can_end else self.length
        if length < self.length:
            self.cache.rollback(self.length - length)
        return self.ids[:, :length].clone()


class EndCheck:
    """Whether all sequences have ended, asked once a step.

    Every `every` steps the flag starts its way to the host, and is read when the next one starts: the device never runs
    dry. With `every` 1 it is read at once.
    """

    def __init__(self, finished: Tensor, every: int) -> None:
        self.finished, self.every, self.steps = finished, every, 0
        on_cuda = finished.device.type == "cuda"
        self.flag = torch.zeros((), dtype=torch.bool, pin_memory=on_cuda)
        self.copied = torch.cuda.Event() if on_cuda else None
        self.under_way = False

    def __call__(self) -> bool:
        if self.every == 1:
            return bool(self.finished.all())
        self.steps += 1
        if self.steps % self.every:
            return False
        if self.under_way:
            if self.copied is not None:
                self.copied.synchronize()
            if bool(self.flag):
                return True
        self.flag.copy_(self.finished.all(), non_blocking=True)
        if self.copied is not None:
            self.copied.record()
        self.under_way = True
        return False


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    return a is b or (isinstance(a, (bool, int, float, str)) and a == b)
