"""Prompts that the host's stock classes write while they answer: run up to where they ask processor or model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NoReturn

from transformers.image_utils import load_image

from sparsemm_lmms.model_wrappers.engine import Prompt

MARK = "<image>"
"""How texts of the host mark an image where they do not use the processor's own token."""


def bare(stock: type, attributes: Mapping[str, Any]) -> Any:
    """An object of a stock class whose constructor, which loads the model, was not run."""
    made: Any = object.__new__(stock)
    unloaded: dict[str, Any] = {
        "dump_image_func": None,
        "device": "cpu",
        "use_vllm": False,
        "kwargs": {},
        "tokenizer": None,
    }
    vars(made).update(unloaded | dict(attributes))
    return made


def written_prompt(
    stock: Any, processor: Any, message: list[dict[str, Any]], dataset: str | None, system_prompt: str | None
) -> Prompt:
    """The prompt that `stock.generate_inner` would answer.

    Args:
        stock: as `bare` makes it.
        processor: of the checkpoint; its chat template is used where the stock class uses one.
        message: the host's parts (`type`, `value`).
        system_prompt: in place of the stock class's own, or None to leave that.

    Raises:
        ValueError: if the stock class answers without asking.
    """
    stock.processor = stock.model = _Recorder(processor, message, system_prompt)
    try:
        stock.generate_inner(message, dataset)
    except _Asked as asked:
        return asked.prompt
    raise ValueError(f"{type(stock).__name__} of this VLMEvalKit asks no processor, so its prompts cannot be read.")


def extracted(method: Any, answer: str, dataset: str | None) -> str:
    """What a method of a stock class finds in an answer; some need the dataset."""
    named = {"dataset": dataset} if "dataset" in inspect.signature(method).parameters else {}
    return method(answer, **named)


class _Asked(BaseException):
    """Leaves `generate_inner` with the prompt. Not an Exception: some stock classes answer those with a text."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt


class _Recorder:
    """Stands for processor and model: renders chat templates, and raises `_Asked` where a prompt is complete."""

    def __init__(self, processor: Any, message: list[dict[str, Any]], system_prompt: str | None) -> None:
        self._processor, self._message, self._system_prompt = processor, message, system_prompt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, text: str, images: list[Any] | None = None, **_: Any) -> NoReturn:
        raise _Asked(Prompt(text, list(images or ())))

    def apply_chat_template(self, conversation: list[dict[str, Any]], tokenize: bool = False, **given: Any) -> str:
        for name in ("return_dict", "return_tensors"):
            given.pop(name, None)
        if self._system_prompt is not None:
            content = [{"type": "text", "text": self._system_prompt}]
            others = [turn for turn in conversation if turn["role"] != "system"]
            conversation = [{"role": "system", "content": content}, *others]
        text = self._processor.apply_chat_template(conversation, tokenize=False, **given)
        if tokenize:
            parts = [part for turn in conversation for part in turn["content"] if part["type"] == "image"]
            raise _Asked(Prompt(text, [load_image(part.get("image", part.get("url"))) for part in parts]))
        return text

    def chat(self, _: Any, question: str, **__: Any) -> NoReturn:
        """Of models whose code lies in their repository: their `chat` puts a question into the model's template."""
        images = [load_image(part["value"]) for part in self._message if part["type"] == "image"]
        if images and MARK not in question:
            question = f"{MARK}\n{question}"
        content = [{"type": "text", "text": question.replace(MARK, self._processor.image_token)}]
        turns = [{"role": "user", "content": content}]
        text = self.apply_chat_template(turns, add_generation_prompt=True)
        raise _Asked(Prompt(text, images))
