"""`compress`: switch a transformers model to per-head compressed KV caches, and back."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from sparsemm_lmms import decode
from sparsemm_lmms.attention import PREFIX, register
from sparsemm_lmms.cache import CACHE_NAME, OLD_CACHE_NAME, RaggedCache, is_full
from sparsemm_lmms.config import CompressionConfig
from sparsemm_lmms.head_scores import HeadScores
from sparsemm_lmms.methods import Model, find_method
from sparsemm_lmms.selection import build_method

# Caches of layers that are no full attention, and attend as in the stock model.
STAY = frozenset({"DynamicSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer"})

PEFT = (0, 21)
"""The first version of peft whose models run the hooks of the model inside."""


class CompressionSession:
    """A model under compression. `cache` is the cache of the newest batch.

    Attributes:
        model: the model.
        config: the settings.
        method: the method object (shape of the model, head scores, allocation).
        cache: the newest `RaggedCache`, None before the first prompt.
    """

    def __init__(self, model: PreTrainedModel, config: CompressionConfig, head_scores: HeadScores | None) -> None:
        self.model, self.config = model, config
        scores = _scores(config, head_scores, model.config.model_type)
        values, retention = (None, None) if scores is None else (scores.values, scores.retention)
        self.method = build_method(config, model_shape(model), values, retention)
        self.cache: RaggedCache | None = None
        self._seen: weakref.WeakSet[RaggedCache] = weakref.WeakSet()
        self._signature = inspect.signature(model.forward)
        rest = [p.name for p in self._signature.parameters.values() if p.kind is p.VAR_KEYWORD]
        self._rest = rest[0] if rest else ""
        self._vision_ids = vision_ids(model)
        check_vision(config.method, model)
        decoder = model.get_decoder()
        self._rotary_embedding: Any = getattr(decoder, "rotary_emb", None)
        forward = inspect.signature(getattr(self._rotary_embedding, "forward", len))
        self._rotary_by_layer_type = "layer_type" in forward.parameters

    def new_cache(self, max_new_tokens: int | None = None) -> RaggedCache:
        """An empty cache for one batch, with room for `max_new_tokens` more tokens (128 when None, then it grows)."""
        stock = DynamicCache(config=self.model.config).layers
        self.cache = RaggedCache(
            self.method, max_new_tokens, stock, shares_keys(self.model), chunked_layers(self.model.config)
        )
        self.cache.rotary = self._rotary if self._rotary_embedding is not None else None
        return self.cache

    def generate(self, inputs: Tensor | None = None, *, cuda_graph: str = "auto", **kwargs: Any) -> Any:
        """`model.generate(inputs, **kwargs)`, the same tokens sooner: see `sparsemm_lmms.decode`.

        Args:
            cuda_graph: `auto` captures decode steps on CUDA where possible, `on` insists, `off` is the stock loop.
        """
        given = {} if inputs is None else {"inputs": inputs}
        return decode.generate(self.model, cuda_graph=cuda_graph, **given, **kwargs)

    def _adopt(self, cache: Any) -> RaggedCache:
        """Make the caller's own empty DynamicCache (of a hand-written loop, or of generate) the compressed one.

        It stays the same object, so whoever holds it for the next turn holds what this one left in it.
        """
        if type(cache) is not DynamicCache or cache.offloading:
            kind = (
                f"an offloaded {type(cache).__name__}" if getattr(cache, "offloading", False) else type(cache).__name__
            )
            raise ValueError(
                f"{CACHE_NAME} is {kind}, which cannot be compressed; leave {CACHE_NAME} and cache_implementation out, "
                "or pass session.new_cache() or an empty DynamicCache."
            )
        if cache.get_seq_length() > 0:
            raise ValueError(
                f"{CACHE_NAME} is a DynamicCache with {cache.get_seq_length()} tokens from outside of this "
                "sparsemm_lmms.compress block; pass an empty one, or session.new_cache(), and the whole prompt."
            )
        fresh = self.new_cache()
        cache.__class__ = RaggedCache  # type: ignore[assignment]
        vars(cache).update(vars(fresh))
        return cast(RaggedCache, cache)

    def _vision(self, ids: Tensor) -> Tensor:
        """bool `[batch, tokens]`: image and video tokens."""
        return torch.isin(ids, torch.tensor(self._vision_ids, dtype=ids.dtype, device=ids.device))

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the decoder's rotary embedding at these positions `[..., batch, n]`, float32."""
        embedding = self._rotary_embedding
        assert embedding is not None
        kind = {"layer_type": "full_attention"} if self._rotary_by_layer_type else {}
        return embedding(torch.zeros(1, dtype=torch.float32, device=positions.device), positions, **kind)

    def after_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], turn: Any) -> None:
        """Forward hook of the rotary embedding: the prompt under way learns how its queries are turned, and where."""
        step = self.cache.step if self.cache is not None else None
        if step is None or step.prompt.turn is not None or (step.tokens == 1 and not step.compress):
            return  # nothing is chosen in this pass, or a scorer asks for positions to come
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        if given.get("layer_type") in (None, "full_attention"):
            step.prompt.turn, step.prompt.position = turn, given["position_ids"][..., -1]

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Forward pre-hook: every pass runs on a RaggedCache that knows which of the new columns are padding."""
        if OLD_CACHE_NAME in kwargs and CACHE_NAME not in kwargs:
            kwargs = {CACHE_NAME if key == OLD_CACHE_NAME else key: value for key, value in kwargs.items()}
        cache, ids = kwargs.get(CACHE_NAME), kwargs.get("input_ids")
        if ids is not None and ids.shape[1] == 1 and isinstance(cache, RaggedCache) and cache is self.cache:
            if cache.seen and cache.method is self.method and kwargs.get("use_cache", True):
                cache.begin(1, ids.shape[0], None, ids.device)  # a decode step: nothing to look up
                return args, kwargs
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given.update(given.pop(self._rest, {}))
        cache = given.get(CACHE_NAME)
        if given.get("use_cache") is False:
            raise ValueError("A model under sparsemm_lmms.compress needs use_cache=True.")
        if given.get("output_attentions"):
            raise ValueError(
                "output_attentions=True cannot be served under sparsemm_lmms.compress: evicted tokens have no weights; "
                "leave it out, or read the attention of the stock model."
            )
        if cache is None:
            cache = self.new_cache()
        elif not isinstance(cache, RaggedCache):
            cache = self._adopt(cache)
        elif cache.method is not self.method:
            raise ValueError(f"{CACHE_NAME} belongs to another compression session; call session.new_cache().")
        self.cache = cache
        self._seen.add(cache)
        inputs = given["inputs_embeds"] if given.get("inputs_embeds") is not None else given.get("input_ids")
        if inputs is None:
            raise ValueError("The forward pass has neither input_ids nor inputs_embeds.")
        known = self._vision_ids and given.get("input_ids") is not None
        if self._vision_ids and not known and self.method.parts.reads_vision and not cache.get_seq_length():
            raise ValueError(
                f"method={self.config.method!r} tells image tokens apart, which inputs_embeds do not show; pass "
                "input_ids."
            )
        vision = self._vision(given["input_ids"]) if known else None
        cache.begin(inputs.shape[1], inputs.shape[0], given.get("attention_mask"), inputs.device, vision)
        position = list(self._signature.parameters).index(CACHE_NAME)
        if CACHE_NAME in kwargs or len(args) <= position:
            return args, {**kwargs, CACHE_NAME: cache}
        return (*args[:position], cache, *args[position + 1 :]), kwargs


@contextmanager
def compress(
    model: PreTrainedModel,
    config: CompressionConfig,
    head_scores: HeadScores | str | None = None,
) -> Iterator[CompressionSession]:
    """Run `model` with compressed KV caches inside the `with` block; afterwards it is the stock model again.

    Every prompt that goes through `model.generate` or `model(...)` is compressed layer by layer during its prefill.

    Args:
        model: a transformers model whose attention follows the AttentionInterface, or a PeftModel of one.
        config: the settings.
        head_scores: measured scores (or the path of their file) for `method="sparsemm"`.

    Raises:
        ValueError: for settings or scores that do not fit the model, or a model that is already compressed.

    Example:
        >>> with compress(model, CompressionConfig(method="snapkv", budget=128)) as session:
        ...     tokens = model.generate(**inputs, max_new_tokens=64)
        ...     print(session.cache.report()["kept_tokens"])
    """
    model = _inside_adapters(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"compress() was given a {type(model).__name__}, which wraps a model or is none; pass the transformers "
            "model itself (of a compiled or parallel wrapper the module inside)."
        )
    check_architecture(model.config, type(model).__name__)
    text = model.config.get_text_config(decoder=True)
    before = text._attn_implementation
    if before.startswith(PREFIX):
        raise ValueError("This model is already under sparsemm_lmms.compress; leave the first `with` block before.")
    scores = HeadScores.load(head_scores) if isinstance(head_scores, str) else head_scores
    session = CompressionSession(model, config, scores)
    key = next((key for key in model.config.sub_configs if getattr(model.config, key) is text), None)
    name = register(before)
    model.set_attn_implementation({key: name} if key else name)
    hooks = [model.register_forward_pre_hook(session.before_forward, with_kwargs=True)]
    if session.method.scorer is not None and session.method.scorer.reads_turn and session._rotary_embedding is not None:
        hooks.append(session._rotary_embedding.register_forward_hook(session.after_rotary, with_kwargs=True))
    prepare: Any = model._prepare_cache_for_generation
    model._prepare_cache_for_generation = partial(_prepare_cache, prepare)  # type: ignore[assignment]
    try:
        if text._attn_implementation != name:
            raise ValueError(f"{type(model).__name__} does not let its attention be replaced: it cannot be compressed.")
        yield session
    finally:
        for cache in session._seen:
            cache.close()
        for hook in hooks:
            hook.remove()
        del model._prepare_cache_for_generation
        model.set_attn_implementation({key: before} if key else before)


def _inside_adapters(model: Any) -> Any:
    """The transformers model inside a PeftModel, of which adapters are layers; any other model as it is.

    Raises:
        ValueError: for adapters that are no layers, and for a peft that calls the model past its hooks.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return model
    adapter = model.active_peft_config
    if adapter.is_prompt_learning or adapter.is_adaption_prompt:
        raise ValueError(
            f"compress() was given a {adapter.peft_type.value} model, whose prefix is in the cache but in no prompt; "
            "use an adapter of layers, for example LoRA."
        )
    if tuple(map(int, peft.__version__.split(".")[:2])) < PEFT:
        raise ValueError(
            f"compress() was given a PeftModel of peft {peft.__version__}, which calls the model past its hooks; "
            f"install peft>={PEFT[0]}.{PEFT[1]}, or pass model.merge_and_unload()."
        )
    return model.get_base_model()


def _prepare_cache(stock: Callable[..., None], generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> None:
    """`model._prepare_cache_for_generation`, after a look at what only generate knows of a call."""
    for name, fine in (("prefill_chunk_size", (None,)), ("cache_implementation", (None, "dynamic"))):
        value = getattr(generation_config, name, None)
        if value not in fine:
            raise ValueError(
                f"{name}={value!r} cannot be served under sparsemm_lmms.compress, where heads choose what to keep once "
                "they have seen the whole prompt, in a cache of its own; leave it out."
            )
    stock(generation_config, *args, **kwargs)


def vision_ids(model: PreTrainedModel) -> list[int]:
    """Tokens that stand for pieces of images and videos, by the names that configurations of transformers have."""
    names = (f"{kind}_token_{end}" for kind in ("image", "video") for end in ("id", "index"))
    found = (getattr(model.config, name, None) for name in names)
    return sorted({value for value in found if isinstance(value, int)})


def check_vision(method: str, model: PreTrainedModel) -> None:
    """Refuse a method that tells image tokens apart on a model whose configuration does not name them.

    A model of text alone has none, and each of its prompts is one without images.

    Raises:
        ValueError: if they are not known.
    """
    reads_images = model.config.get_text_config(decoder=True) is not model.config
    if find_method(method).reads_vision and reads_images and not vision_ids(model):
        raise ValueError(
            f"method={method!r} tells image tokens apart, but the configuration of {type(model).__name__} names no "
            "image_token_id; use a method that does not, for example snapkv."
        )


def attention_shape(config: Any) -> Model:
    """Layers of full attention, their query heads and their kv heads, in the text decoder of a model.

    Args:
        config: the model's configuration.

    Raises:
        ValueError: if there are none, or they differ in their heads.
    """
    text = config.get_text_config(decoder=True)
    full = [i for i, layer in enumerate(DynamicCache(config=config).layers) if is_full(layer)]
    layers = getattr(text, "per_layer_config", None) or [text] * (max(full, default=-1) + 1)
    heads = {(layers[i].num_attention_heads, layers[i].num_key_value_heads) for i in full}
    if len(heads) != 1:
        raise ValueError(
            f"{type(text).__name__} has {len(full)} layers of full attention, whose (query heads, kv heads) are "
            f"{sorted(heads)}; there must be one such pair."
        )
    return Model(len(full), *heads.pop())


def model_shape(model: PreTrainedModel) -> Model:
    """`attention_shape` of a model."""
    return attention_shape(model.config)


def shares_keys(model: PreTrainedModel) -> bool:
    """Whether layers of the model's decoder read the keys and values of others."""
    return "reuse" in (getattr(model.config.get_text_config(decoder=True), "kv_sharing_modes", None) or ())


def chunked_layers(config: Any) -> set[int]:
    """Layers with chunks, for which transformers has the cache of sliding windows."""
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    return {i for i, kind in enumerate(kinds) if kind == "chunked_attention"}


def _scores(config: CompressionConfig, head_scores: HeadScores | None, model_type: str) -> HeadScores | None:
    """The head scores, where the method needs them."""
    if find_method(config.method).needs_head_scores:
        if head_scores is None:
            raise ValueError(
                f"method={config.method!r} needs head_scores: pass HeadScores.load(path); `sparsemm-lmms chase` makes "
                "such a file."
            )
        there = head_scores.provenance.get("model_type")
        if there not in (None, model_type):
            raise ValueError(
                f"head_scores were found on a {there} model, and this is a {model_type} one; make scores for it with "
                "`sparsemm-lmms chase`, or pass HeadScores(head_scores.values) to use these all the same."
            )
        return head_scores
    return None


def check_architecture(config: Any, name: str) -> None:
    """Refuse, by class and reason, what the decode step cannot compute as the stock model does.

    Args:
        config: the model's configuration; its weights are not needed.
        name: what the sentence calls the model.

    Raises:
        ValueError: if it cannot be compressed.
    """
    text = config.get_text_config(decoder=True)
    why = None
    if getattr(config, "is_encoder_decoder", False):
        why = "it is an encoder-decoder, whose cross-attention has a cache of its own"
    elif not hasattr(text, "num_hidden_layers"):
        why = f"its {type(text).__name__} names no num_hidden_layers"
    elif any(getattr(layer, "kv_lora_rank", None) for layer in getattr(text, "per_layer_config", None) or [text]):
        why = "its latent attention (kv_lora_rank) caches no keys and values per kv head"
    elif getattr(text, "cross_attention_layers", None):
        why = "it has cross-attention layers, whose keys are no part of the prompt"
    else:
        why = _why_not_layers(config)
    if why is not None:
        raise ValueError(f"{name} cannot be compressed: {why}.")


def _why_not_layers(config: Any) -> str | None:
    """What of the layers' caches is neither full attention nor can stay as it is."""
    text = config.get_text_config(decoder=True)
    try:
        layers = DynamicCache(config=config).layers
    except KeyError as error:
        return f"transformers has no cache for its layers of type {error}"
    strange = {type(layer).__name__ for layer in layers if not is_full(layer)} - STAY
    if strange:
        return f"it has layers whose cache is a {' or a '.join(sorted(strange))}, not one of plain keys and values"
    full = [i for i, layer in enumerate(layers) if is_full(layer)]
    if not full:
        return "none of its layers has full attention, so there is nothing to compress"
    per_layer = getattr(text, "per_layer_config", None)
    if not getattr(per_layer[full[0]] if per_layer else text, "num_key_value_heads", None):
        return f"its {type(text).__name__} names no num_key_value_heads"
    return None
