"""What lmms-eval's own model of each family asks for: messages, system prompt, lengths, limits, default checkpoint."""

from __future__ import annotations

import base64
import importlib
import inspect
import io
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import CacheHook
from lmms_eval.models import MODEL_REGISTRY_V2
from PIL import Image

from sparsemm_lmms.families import FAMILIES, Family
from sparsemm_lmms.model_wrappers.arguments import split_arguments
from sparsemm_lmms.model_wrappers.engine import Engine
from sparsemm_lmms.model_wrappers.generation import GenerationSettings

from ..wrappers import tiny

QUESTION = "What is written here?"
OTHERS_CHECKPOINT = {
    "llava_next": "llava_hf's is LLaVA-1.5",
    "llava_onevision": "llava_hf's is LLaVA-1.5",
    "smolvlm": "huggingface's is Qwen2.5-VL",
    "mistral3": "mistral3_vl's is a base model without a chat template",
}


class Stop(BaseException):
    """`generate` was called; stock classes catch exceptions."""


class Inputs(dict):
    def to(self, *_: Any, **__: Any) -> Inputs:
        return self


class Processor:
    """Notes the messages of the chat template and the options of its own call."""

    chat_template, image_token, eos_token_id, pad_token_id = "yes", "[IMG]", 2, 0
    image_processor = video_processor = SimpleNamespace()

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.template: dict[str, Any] = {}
        self.texts: Any = None
        self.tokenizer = SimpleNamespace(
            eos_token_id=2, pad_token_id=0, encode=lambda text, **_: list(text), decode=str
        )

    def apply_chat_template(self, messages: list[Any], **told: Any) -> Any:
        self.messages = messages[0] if isinstance(messages[0], list) else messages
        self.template = {name: told[name] for name in told if name == "enable_thinking"}
        return Inputs(input_ids=torch.zeros(1, 1)) if told.get("tokenize") else "text"

    def __call__(self, *_: Any, **told: Any) -> Inputs:
        self.texts = told.get("text")
        return Inputs(input_ids=torch.zeros(1, 1))


def defaults(stock: type) -> dict[str, Any]:
    """Arguments of the constructor, those of the classes above included."""
    found: dict[str, Any] = {}
    for cls in reversed(stock.__mro__):
        if "__init__" in vars(cls):
            parameters = inspect.signature(cls.__init__).parameters.values()
            found |= {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return found


def stock_class(family: Family, monkeypatch: pytest.MonkeyPatch) -> type:
    decord = ModuleType("decord")  # for videos
    decord.VideoReader = decord.cpu = None  # type: ignore[attr-defined]
    entry = MODEL_REGISTRY_V2.get_manifest(family.lmms_eval.prompts_of)
    module, _, name = (entry.chat_class_path or entry.simple_class_path).rpartition(".")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "decord", decord)
        return getattr(importlib.import_module(module), name)


def asked_of_stock(stock: type, seen: dict[str, Any], processor: Any, **more: Any) -> dict[str, Any]:
    """The arguments of `generate` for a question about an image or a video; `more` are arguments of the constructor."""
    told: dict[str, Any] = {}

    def generate(**arguments: Any) -> None:
        told.update(arguments)
        raise Stop

    model = SimpleNamespace(generate=generate, device="cpu", dtype=torch.float32)
    accelerator = SimpleNamespace(is_main_process=False, unwrap_model=lambda given: given)
    self = object.__new__(stock)
    inner = dict.fromkeys(("processor", "_processor", "_image_processor"), processor)
    inner |= {"_model": model, "_tokenizer": processor.tokenizer, "accelerator": accelerator}
    inner |= {"_device": "cpu", "batch_size_per_gpu": 1, "_rank": 0, "_world_size": 1, "cache_hook": CacheHook(None)}
    for name, value in {
        **defaults(stock),
        **inner,
        "device_map": "cpu",
        "task_dict": {"t": {"s": [0]}},
        **more,
    }.items():
        if not isinstance(getattr(stock, name, None), property):
            setattr(self, name, value)
    content = [seen, {"type": "text", "text": QUESTION}]
    if stock.is_simple:
        arguments = (QUESTION, {}, lambda _: [seen["url"]], 0, "t", "s")
    else:
        arguments = (QUESTION, lambda _: [{"role": "user", "content": content}], {}, 0, "t", "s")
    with pytest.raises(Stop):
        self.generate_until([Instance("generate_until", arguments, 0, {"task": "t", "doc_id": 0, "repeats": 1})])
    return told


def plain(messages: list[dict[str, Any]]) -> list[Any]:
    """(role, [text or picture]); text alone stands for a list with it."""
    found = []
    for message in messages:
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        found.append((message["role"], [part["text"] if part["type"] == "text" else picture(part) for part in parts]))
    return found


def picture(part: dict[str, Any]) -> Any:
    given = part.get("image", part.get("url"))
    if isinstance(given, str):  # a JPEG, in which pixels change
        head, _, data = given.partition(",")
        assert head.startswith("data:image/jpeg")
        given = Image.open(io.BytesIO(base64.b64decode(data)))
    return given.size


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_it_asks_what_the_stock_model_asks(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tiny.picture(0, (60, 40))
    stock = stock_class(family, monkeypatch)
    seen, processor = {"type": "image", "url": image}, Processor()
    told = asked_of_stock(stock, seen, processor)
    options, _ = split_arguments(family, "fullkv", {"pretrained": "x"})
    ours = Processor()
    model = SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=2),
        config=SimpleNamespace(model_type=family.model_type),
        device=torch.device("cpu"),
    )
    engine = Engine(
        SimpleNamespace(model=model, processor=ours), options.system_prompt, enable_thinking=options.enable_thinking
    )
    engine.prompt([{"role": "user", "content": [seen, {"type": "text", "text": QUESTION}]}])
    if family.lmms_eval.prompts_of == "mistral3_vl":  # writes the text without the template, image first
        assert processor.texts == f"<s>[INST][IMG]\n{QUESTION}[/INST]"
        assert plain(ours.messages) == [("user", [(60, 40), QUESTION])]
    else:
        assert plain(processor.messages) == plain(ours.messages)
        assert processor.template == ours.template
    settings = GenerationSettings.from_host({}, family.lmms_eval.max_new_tokens)
    assert told["max_new_tokens"] == settings.max_new_tokens
    known = defaults(stock)
    if "patches" == family.grid and "min_pixels" in known:
        assert (known["min_pixels"], known["max_pixels"]) == (options.min_pixels, options.max_pixels)
    else:
        assert family.lmms_eval.pixel_limits is None


@pytest.mark.parametrize(("thinking", "answer"), [(True, "7"), (False, "I think"), (None, "I think")])
def test_thoughts_are_no_answer(thinking: bool | None, answer: str) -> None:
    processor = Processor()
    processor.tokenizer.batch_decode = lambda *_, **__: ["I think\n6 or</think>\n\n7\nor 8"]
    config = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=2), device=torch.device("cpu"))
    engine = Engine(SimpleNamespace(model=config, processor=processor), enable_thinking=thinking)
    settings = GenerationSettings(4, until=("\n",))
    assert engine._answers(torch.zeros(1, 4), [1], [1.0], settings)[0].text == answer
    assert engine.template == ({} if thinking is None else {"enable_thinking": thinking})


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_its_default_checkpoint_is_the_stock_models(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    default = defaults(stock_class(family, monkeypatch))["pretrained"]
    assert (default != family.pretrained) == (family.model_type in OTHERS_CHECKPOINT)
