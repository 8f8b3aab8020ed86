"""Likelihoods against one stock pass over the whole text: merged tokens, cut prompts, and which answers are greedy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Regex, models, pre_tokenizers

from sparsemm_lmms import CompressionConfig, compress
from sparsemm_lmms.model_wrappers.engine import Engine
from sparsemm_lmms.model_wrappers.generation import GenerationSettings
from sparsemm_lmms.model_wrappers.likelihood import read_document, score

from .conftest import conversation
from .test_likelihood import stock

TEXT_ONLY = [{"role": "user", "content": [{"type": "text", "text": "No image."}]}]
# ": B" is one token, so an answer that begins with B takes the prompt's last two tokens with it
DOCUMENTS = [
    (conversation(1, "What is it?"), ["seven", "B or C", "A"]),
    (conversation(2, "Which of these, please?", images=2, size=(28, 56)), ["B two", "left"]),
    (TEXT_ONLY, ["B cd", "BBBB"]),
    (conversation(3, "And now?", size=(56, 84)), ["no", "right"]),
]
DROPPED = [2, 2, 2, 0]


@pytest.fixture
def merging(engine: Engine) -> Iterator[Engine]:
    """The engine with a tokenizer that knows one word of three characters."""
    core = engine.processor.tokenizer.backend_tokenizer
    model, split = core.model, core.pre_tokenizer
    vocabulary = core.get_vocab(with_added_tokens=False)
    vocabulary[": B"] = vocabulary.pop("Z")
    core.model = models.WordLevel(vocabulary, unk_token="<unk>")
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r": B|[\s\S]"), "isolated")
    yield engine
    core.model, core.pre_tokenizer = model, split


def asking(engine: Engine, split: bool) -> Engine:
    told = Engine.__new__(Engine)
    told.__dict__ |= {**vars(engine), "compress_before_question": split}
    return told


def tokens(engine: Engine, messages: list[Any], *answer: str) -> list[int]:
    turns = [{"role": "assistant", "content": [{"type": "text", "text": text}]} for text in answer]
    return engine.processor.tokenizer(engine.prompt([*messages, *turns], bool(answer)).text)["input_ids"]


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "reversed"])
def test_the_context_ends_where_any_answer_changes_it(merging: Engine, order: int) -> None:
    for (messages, answers), dropped in zip(DOCUMENTS, DROPPED, strict=True):
        document = read_document(merging, messages, answers[::order])
        context = tokens(merging, messages)
        assert document.dropped == dropped
        for answer, found in zip(answers[::order], document.answers, strict=True):
            assert context[: len(context) - dropped] + found == tokens(merging, messages, answer)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "question unseen"])
@pytest.mark.parametrize("method", ["fullkv", "snapkv"])
def test_losses_of_merged_tokens_are_stocks(merging: Engine, method: str, split: bool) -> None:
    told = asking(merging, split)
    wanted = [[stock(merging, messages, answer) for answer in answers] for messages, answers in DOCUMENTS]
    documents = [read_document(told, *pair) for pair in DOCUMENTS]
    with compress(merging.model, CompressionConfig(method=method, budget=4096, window_size=8)) as session:
        found, batch = score(told, session, documents)
    for (messages, answers), row, stocks in zip(DOCUMENTS, found, wanted, strict=True):
        assert [x.loss for x in row] == pytest.approx([loss for loss, _ in stocks], abs=1e-4)
        assert [x.is_greedy for x in row] == [greedy for _, greedy in stocks]
        scored = [len(tokens(merging, messages, a)) - len(tokens(merging, messages)) for a in answers]
        assert [x.tokens for x in row] == scored
    lengths = [merging.batch_inputs([d.prompt])["input_ids"].shape[1] - d.dropped for d in documents]
    assert [a.prompt_tokens for a in batch.answers] == lengths  # of the context that was read
    assert [a.kept_tokens for a in batch.answers] == lengths
    assert [a.output_tokens for a in batch.answers] == [sum(x.tokens for x in row) for row in found]
    assert batch.prompts == [d.prompt.text for d in documents]


def test_little_kept_of_a_cut_context(merging: Engine) -> None:
    documents = [read_document(merging, *pair) for pair in DOCUMENTS]
    config = CompressionConfig(method="snapkv", budget=20, window_size=8)
    with compress(merging.model, config) as session:
        found, batch = score(merging, session, documents)
        assert [a.kept_tokens for a in batch.answers] == [20.0] * 4
        for document, row in zip(documents, found, strict=True):
            alone = score(merging, session, [document])[0][0]
            assert [x.loss for x in row] == pytest.approx([x.loss for x in alone], abs=1e-4)
            assert [(x.is_greedy, x.tokens) for x in row] == [(x.is_greedy, x.tokens) for x in alone]
            for n, answer in enumerate(document.answers):  # one answer is scored as if it were the only one
                single = copy.copy(document)
                object.__setattr__(single, "answers", [answer])
                assert score(merging, session, [single])[0][0][0].loss == pytest.approx(row[n].loss, abs=1e-4)


def test_one_wrong_token_anywhere_is_not_greedy(engine: Engine) -> None:
    """The first as well as the last, beside longer and shorter answers."""
    settings = GenerationSettings(max_new_tokens=5)
    for messages in (TEXT_ONLY, conversation(1, "What is it?")):
        with compress(engine.model, CompressionConfig(method="fullkv")) as session:
            ids = engine.batch_inputs([engine.prompt(messages)])
            made = engine.model.generate(**ids, max_new_tokens=5, do_sample=False, eos_token_id=10_000)
            own = engine.processor.tokenizer.decode(made[0, ids["input_ids"].shape[1] :])
            if len(own) != 5 or len(tokens(engine, messages, own)) != len(tokens(engine, messages)) + 5:
                pytest.skip("this model writes tokens that are no characters")
            assert engine.generate(session, [messages], settings).answers[0].text == own
            wrong = [own[:i] + ("q" if own[i] != "q" else "r") + own[i + 1 :] for i in range(5)]
            answers = [own, own[:2], *wrong, own + "?", "never"]
            [row], _ = score(engine, session, [read_document(engine, messages, answers)])
        wanted = [stock(engine, messages, answer) for answer in answers]
        assert [x.is_greedy for x in row[:7]] == [True, True, *[False] * 5]
        assert [x.is_greedy for x in row] == [greedy for _, greedy in wanted]
        assert [x.loss for x in row] == pytest.approx([loss for loss, _ in wanted], abs=1e-4)


def test_tokens_of_the_context_decide_on_no_answer(merging: Engine) -> None:
    """They come again with every answer once another answer changes them; the model need not predict them."""
    messages = conversation(1, "What is it?")
    with compress(merging.model, CompressionConfig(method="fullkv")) as session:
        ids = merging.batch_inputs([merging.prompt(messages)])
        made = merging.model.generate(**ids, max_new_tokens=4, do_sample=False, eos_token_id=10_000)
        own = merging.processor.tokenizer.decode(made[0, ids["input_ids"].shape[1] :])
        document = read_document(merging, messages, [own, "B or C"])
        [row], _ = score(merging, session, [document])
    assert document.dropped == 2 and [x.is_greedy for x in row] == [True, False]
    assert row[0].tokens == 4 and stock(merging, messages, own) == (pytest.approx(row[0].loss, abs=1e-4), True)


def test_an_answer_inside_the_context_is_refused(merging: Engine) -> None:
    """ ": B" has no token behind the two that it replaces."""
    with pytest.raises(ValueError, match="The answer 'B' has no tokens"):
        read_document(merging, TEXT_ONLY, ["A", "B"])
