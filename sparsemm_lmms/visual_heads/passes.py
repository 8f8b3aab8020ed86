"""The two ways to watch a batch being read: free running (the paper's) and teacher forcing.

Each returns, per sample, float64 tables ``[layers, q_heads]``: the score (published rule: a head whose largest weight
falls on an image token of the word being written earns 1 / number of the word's image tokens) and the attention mass
on the word, both summed over the tokens that counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from sparsemm_lmms.visual_heads.attention import Watcher, watch
from sparsemm_lmms.visual_heads.inputs import Batch, with_answers
from sparsemm_lmms.visual_heads.matching import TokenTexts, matcher_of

HELD = 64  # tokens of free running that are credited together
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": 1.0,
}
"""For `generate`: plain greedy decoding, whatever the checkpoint's generation config says."""


@dataclass
class Tally:
    """score, mass: float64 ``[batch, layers, q_heads]``. tokens: written; counted: matched to a visible word."""

    score: torch.Tensor
    mass: torch.Tensor
    tokens: list[int]
    counted: list[int]

    @classmethod
    def empty(cls, batch: int, layers: int, heads: int, device: torch.device) -> Tally:
        zeros = torch.zeros(batch, layers, heads, dtype=torch.float64, device=device)
        return cls(zeros, zeros.clone(), [0] * batch, [0] * batch)

    def add(self, batch: Batch, argmax: torch.Tensor, mass: torch.Tensor, targets: torch.Tensor) -> None:
        """Credit the watched rows. argmax: int64 ``[layers, batch, q_heads, rows]``; mass: float32, as long, on the
        word that the row wrote; targets: int64 ``[batch, rows]``, that word, -1 for none."""
        valid = targets >= 0
        index = targets.clamp(min=0)
        shown = batch.words.gather(1, index.unsqueeze(-1).expand(-1, -1, batch.prompt))  # [batch, rows, prompt]
        _, size, _, rows = argmax.shape
        every = (torch.arange(size, device=argmax.device)[:, None, None], torch.arange(rows, device=argmax.device))
        hit = shown[every[0], every[1], argmax.clamp(max=batch.prompt - 1)] & (argmax < batch.prompt)
        worth = torch.where(valid, 1.0 / batch.sizes.gather(1, index).clamp(min=1).double(), 0.0)
        self.score += (hit * worth[None, :, None]).sum(dim=-1).transpose(0, 1)
        self.mass += mass.double().masked_fill(~valid[None, :, None], 0.0).sum(dim=-1).transpose(0, 1)


def _visible(word: int, sizes: Sequence[int]) -> int:
    """A word that no image token shows (an empty one, or in a view that does not count) can't be hit: -1."""
    return word if word >= 0 and sizes[word] else -1


def teacher_forced(model: Any, batch: Batch, texts: TokenTexts, pad: int, shape: tuple[int, int]) -> Tally:
    """One forward over prompt and known answer."""
    answers = [texts.tokenizer(sample.answer, add_special_tokens=False)["input_ids"] for sample in batch.samples]
    tally = Tally.empty(len(answers), *shape, model.device)
    tally.tokens = [len(answer) for answer in answers]
    if not any(tally.tokens):
        return tally
    matchers = [matcher_of(sample) for sample in batch.samples]
    written = [[match(texts(t)) for t in answer] for match, answer in zip(matchers, answers, strict=True)]
    words = [[_visible(word, sizes) for word in row] for row, sizes in zip(written, batch.sizes.tolist(), strict=True)]
    tally.counted = [sum(word >= 0 for word in row) for row in words]
    rows = max(tally.tokens) + 1  # from the prompt's last position, which predicts token 0, to the last token
    targets = torch.full((len(answers), rows), -1)
    for row, found in enumerate(words):
        targets[row, : len(found)] = torch.tensor(found, dtype=torch.long)
    targets = targets.to(model.device)
    inputs = with_answers(batch, answers, pad, model)
    with torch.no_grad(), watch(model, Watcher(batch.words, rows, targets)) as watcher:
        model(**inputs, use_cache=False, logits_to_keep=1)
    tally.add(batch, *watcher.seen(), targets)
    return tally


class _Listener(StoppingCriteria):
    """Hears each token right after the pass that chose it, and keeps what the pass saw; never stops anything."""

    def __init__(self, batch: Batch, texts: TokenTexts, watcher: Watcher, tally: Tally, ends: set[int]) -> None:
        self.batch, self.texts, self.watcher, self.tally, self.ends = batch, texts, watcher, tally, ends
        self.matchers = [matcher_of(sample) for sample in batch.samples]
        self.sizes = batch.sizes.tolist()
        self.done = [False] * len(batch.samples)
        self.argmax: list[torch.Tensor] = []
        self.mass: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        found = []
        for i, token in enumerate(input_ids[:, -1].tolist()):
            self.done[i] = self.done[i] or token in self.ends
            word = -1 if self.done[i] else _visible(self.matchers[i](self.texts(token)), self.sizes[i])
            self.tally.tokens[i] += not self.done[i]
            self.tally.counted[i] += word >= 0
            found.append(word)
        if max(found) >= 0:
            targets = torch.tensor(found, device=input_ids.device)
            argmax, mass = self.watcher.seen()  # mass on every word: only now it is known which one is written
            chosen = targets.clamp(min=0)[None, :, None, None, None].expand(*mass.shape[:-1], 1)
            self.argmax.append(argmax)
            self.mass.append(mass.gather(-1, chosen).squeeze(-1))
            self.targets.append(targets)
            if len(self.targets) == HELD:
                self.credit()
        self.watcher.clear()
        return torch.zeros(len(found), dtype=torch.bool, device=input_ids.device)

    def credit(self) -> None:
        """Move what was kept into the tally: together, which costs less than token by token."""
        if self.targets:
            targets = torch.stack(self.targets, dim=1)
            self.tally.add(self.batch, torch.cat(self.argmax, dim=-1), torch.cat(self.mass, dim=-1), targets)
        for kept in (self.argmax, self.mass, self.targets):
            kept.clear()


def free_running(
    model: Any, batch: Batch, texts: TokenTexts, pad: int, shape: tuple[int, int], max_new_tokens: int
) -> Tally:
    """Greedy decoding, as in the paper; every new token is judged by the row that predicted it."""
    tally = Tally.empty(len(batch.samples), *shape, model.device)
    with torch.no_grad(), watch(model, Watcher(batch.words)) as watcher:
        listener = _Listener(batch, texts, watcher, tally, end_tokens(model, texts.tokenizer))
        model.generate(
            **batch.inputs,
            **GREEDY,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([listener]),
        )
    listener.credit()
    return tally


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end an answer: the generation config's and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return {int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None}


def pad_token(tokenizer: Any) -> int:
    """Id to fill with; masked, so any will do where the tokenizer names none."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
