"""Likelihood on the compressed cache: stock losses with everything kept, step-by-step decoding with little kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, Features, Image, Sequence, Value
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.protocol import ChatMessages
from lmms_eval.tasks import TaskManager

from sparsemm_lmms import CompressionConfig, HeadScores, compress
from sparsemm_lmms.cache import CACHE_NAME
from sparsemm_lmms.methods import METHODS
from sparsemm_lmms.model_wrappers.engine import Engine
from sparsemm_lmms.model_wrappers.likelihood import Likelihood, read_document, score

from . import tiny
from .conftest import conversation, png
from .test_engine import MIXED

ANSWERS = [[" A", " seven apples", " no", " A"], [" left", " right\nand left"], [" yes"], [" Paris", " B", " Q"]]
DOCUMENTS = list(zip(MIXED, ANSWERS, strict=True))


def likelihoods(engine: Engine, size: int, **config: Any) -> list[list[Likelihood]]:
    scores = HeadScores.random(3, 4, seed=1) if METHODS[config["method"]].needs_head_scores else None
    documents = [read_document(engine, messages, answers) for messages, answers in DOCUMENTS]
    with compress(engine.model, CompressionConfig(**config), scores) as session:
        batches = [documents[i : i + size] for i in range(0, len(documents), size)]
        return [row for batch in batches for row in score(engine, session, batch)[0]]


@torch.no_grad()
def stock(engine: Engine, messages: list[Any], answer: str) -> tuple[float, bool]:
    """What the host's `llava_hf` computes, with the image's tokens counted to the context and the shift put right."""
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    texts = [
        engine.processor.apply_chat_template(
            ChatMessages(messages=given).to_hf_messages(), tokenize=False, add_generation_prompt=asking
        )
        for given, asking in ((messages, True), ([*messages, turn], False))
    ]
    images = ChatMessages(messages=messages).extract_media()[0]
    context, whole = (engine.processor(text=[t], images=images or None, return_tensors="pt") for t in texts)
    labels = whole["input_ids"].clone()
    begin = context["input_ids"].shape[1]
    labels[:, :begin] = -100
    out = engine.model(**whole, labels=labels)
    greedy = (out.logits[:, begin - 1 : -1].argmax(-1) == whole["input_ids"][:, begin:]).all()
    return out.loss.item(), bool(greedy)


def test_everything_kept_is_the_stock_loss(engine: Engine) -> None:
    wanted = [[stock(engine, messages, answer) for answer in answers] for messages, answers in DOCUMENTS]
    for method in METHODS:
        if method in ("mask", "mask_random"):  # they change the model
            continue
        for (_, answers), row, stocks in zip(
            DOCUMENTS, likelihoods(engine, 4, method=method, budget=4096, window_size=8), wanted, strict=True
        ):
            assert [x.loss for x in row] == pytest.approx([loss for loss, _ in stocks], abs=1e-4)
            assert [x.is_greedy for x in row] == [greedy for _, greedy in stocks]
            assert [x.tokens for x in row] == list(map(len, answers))  # one a character, the space before included


@pytest.mark.parametrize(("engine", "method"), tiny.BY_TURNS, indirect=["engine"])
def test_little_kept_is_decoding_step_by_step(engine: Engine, method: str) -> None:
    scores = HeadScores.random(3, 4, seed=1) if METHODS[method].needs_head_scores else None
    documents = [read_document(engine, messages, answers[-2:]) for messages, answers in DOCUMENTS]
    with compress(engine.model, CompressionConfig(method=method, budget=24, window_size=8), scores) as session:
        together = score(engine, session, documents)[0]
        for document, row in zip(documents, together, strict=True):
            steps = [_step_by_step(engine, session, document, answer) for answer in document.answers]
            assert [x.loss for x in row] == pytest.approx([loss for loss, _ in steps], abs=1e-4)
            assert [x.is_greedy for x in row] == [greedy for _, greedy in steps]
    with compress(engine.model, CompressionConfig(method="fullkv")) as session:
        full = score(engine, session, documents)[0]
    pairs = [(a, b) for x, y in zip(full, together, strict=True) for a, b in zip(x, y, strict=True)]
    assert any(abs(a.loss - b.loss) > 1e-2 for a, b in pairs) == (method != "fullkv")


@pytest.mark.parametrize("method", ["sparsemm", "adakv"])
def test_the_question_unseen_and_documents_alone(engine: Engine, method: str) -> None:
    told = Engine.__new__(Engine)
    told.__dict__ |= {**vars(engine), "compress_before_question": True}
    scores = HeadScores.random(3, 4, seed=1) if METHODS[method].needs_head_scores else None
    documents = [read_document(told, messages, answers) for messages, answers in DOCUMENTS]
    with compress(engine.model, CompressionConfig(method=method, budget=24, window_size=8), scores) as session:
        together, seen = score(told, session, documents)[0], score(engine, session, documents)[0]
        for document, row in zip(documents, together, strict=True):
            alone, batch = score(told, session, [document])
            assert [x.loss for x in alone[0]] == pytest.approx([x.loss for x in row], abs=1e-4)
            assert batch.answers[0].output_tokens == sum(x.tokens for x in row)
    assert any(abs(a.loss - b.loss) > 1e-2 for a, b in zip(together[1], seen[1], strict=True))
    with compress(engine.model, CompressionConfig(method=method, budget=4096), scores) as session:
        found = score(told, session, documents)[0]
    with compress(engine.model, CompressionConfig(method="fullkv")) as session:
        full = score(engine, session, documents)[0]
    for row, wanted in zip(found, full, strict=True):
        assert [x.loss for x in row] == pytest.approx([x.loss for x in wanted], abs=1e-4)


@torch.no_grad()
def _step_by_step(engine: Engine, session: Any, document: Any, answer: list[int]) -> tuple[float, bool]:
    """A fresh prefill without our positions, then one token at a time."""
    engine.model.model.rope_deltas = None  # transformers keeps those of the prompt before when a prompt has no image
    inputs = engine.batch_inputs([document.prompt])
    out = engine.model(**inputs, **{CACHE_NAME: session.new_cache(4)})
    cache, losses, greedy = out[CACHE_NAME], [], True
    for token in answer:
        logits = out.logits[0, -1].log_softmax(-1)
        losses.append(-logits[token].item())
        greedy &= int(logits.argmax()) == token
        out = engine.model(input_ids=torch.tensor([[token]]), **{CACHE_NAME: cache})
    return sum(losses) / len(losses), greedy


def test_the_cache_is_as_before_after_each_answer(engine: Engine) -> None:
    document = read_document(engine, *DOCUMENTS[1])
    with compress(engine.model, CompressionConfig(method="adakv", budget=24, window_size=8)) as session:
        score(engine, session, [document])
        layers = session.cache.layers
        assert [layer.appended for layer in layers] == [0] * 3
        assert all((layer.length.numpy() == layer.kept).all() for layer in layers)
        assert session.cache.get_seq_length() == engine.batch_inputs([document.prompt])["input_ids"].shape[1]


def test_what_greedy_decoding_writes_is_greedy(engine: Engine) -> None:
    """The answer that the model gives itself."""
    from sparsemm_lmms.model_wrappers.generation import GenerationSettings

    with compress(engine.model, CompressionConfig(method="snapkv", budget=24, window_size=8)) as session:
        own = engine.generate(session, [MIXED[0]], GenerationSettings(4)).answers[0].text
        first, second = score(engine, session, [read_document(engine, MIXED[0], [own, "never that"])])[0][0]
    assert (first.is_greedy, second.is_greedy) == (True, False)
    assert 0 < first.loss < second.loss


def test_a_token_across_the_border_is_scored_as_stock_does(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """When an answer's first characters merge with the end of the prompt, the context ends before the merged token."""
    document = read_document(engine, MIXED[0], [" A", " B"])
    prompt_end = engine.processor.tokenizer(document.prompt.text)["input_ids"][-1]
    moved = type(document)(document.prompt, 1, [[prompt_end, *answer] for answer in document.answers])
    with compress(engine.model, CompressionConfig(method="fullkv")) as session:
        plain, merged = score(engine, session, [document])[0][0], score(engine, session, [moved])[0][0]
    assert [x.loss for x in merged] == pytest.approx([x.loss for x in plain], abs=1e-5)
    assert [x.tokens for x in merged] == [x.tokens for x in plain]


def test_an_answer_without_tokens_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.processor, "chat_template", "{% for m in messages %}{{ m.content[0].text }}{% endfor %}")
    with pytest.raises(ValueError, match="The answer '' has no tokens"):
        read_document(engine, [{"role": "user", "content": [{"type": "text", "text": "abc"}]}], ["d", ""])


CHOICES = """\
task: tiny_choices
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {parquet}
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A multiple-choice task on the tiny pictures, in the host's format; the folder for --include_path."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "choices"
    folder.mkdir()
    rows = {
        "image": [{"bytes": png(i, size), "path": None} for i, size in enumerate([(84, 56), (28, 56), (56, 84)])],
        "question": ["What is it?", "Which of these, then?", "And now?"],
        "choices": [["a cat", "seven dogs", "no"], ["up", "down"], ["left", "right", "straight on", "x"]],
        "answer": ["no", "up", "x"],
    }
    features = Features(
        {"image": Image(), "question": Value("string"), "choices": Sequence(Value("string")), "answer": Value("string")}
    )
    Dataset.from_dict(rows, features=features).to_parquet(folder / "test.parquet")
    (folder / "tiny_choices.yaml").write_text(CHOICES.format(parquet=folder / "test.parquet"))
    (folder / "utils.py").write_text("def visual(doc):\n    return [doc['image'].convert('RGB')]\n")
    return folder


def run(
    name: str, model_args: str, folder: Path, batch_size: int = 2, **more: Any
) -> tuple[list[list[Any]], dict[str, Any]]:
    manager = TaskManager(include_path=str(folder), include_defaults=False, model_name=name)
    results = simple_evaluate(
        name, model_args, tasks=["tiny_choices"], task_manager=manager, bootstrap_iters=0, batch_size=batch_size, **more
    )
    return [sample["filtered_resps"] for sample in results["samples"]["tiny_choices"]], results


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
def test_a_multiple_choice_task_of_the_host(family: str, arguments: Callable[..., str], choices: Path) -> None:
    full, record = run(f"{family}_fullkv", arguments(f"{family}_fullkv"), choices)
    assert [len(row) for row in full] == [3, 2, 4]
    flat = [loss for row in full for loss, _ in row]
    covered, _ = run(f"{family}_sparsemm", arguments(f"{family}_sparsemm", budget=4096), choices, batch_size=1)
    assert [loss for row in covered for loss, _ in row] == pytest.approx(flat, abs=1e-4)
    small, small_record = run(f"{family}_sparsemm", arguments(f"{family}_sparsemm", budget=12), choices)
    assert max(abs(loss - other) for loss, other in zip([x for row in small for x, _ in row], flat, strict=True)) > 0.05
    best = [min(range(len(row)), key=lambda i: row[i][0]) for row in full]
    gold = [2, 0, 3]
    right = sum(a == b for a, b in zip(best, gold, strict=True)) / 3
    assert record["results"]["tiny_choices"]["acc,none"] == pytest.approx(right)
    assert small_record["throughput"]["avg_kept_tokens"] < record["throughput"]["avg_kept_tokens"]


def test_the_response_cache_gives_likelihoods_back(
    arguments: Callable[..., str], choices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = "llava_next_snapkv", arguments("llava_next_snapkv"), choices
    first, record = run(*given, use_cache=str(tmp_path / "cache"))
    monkeypatch.setattr("sparsemm_lmms.model_wrappers.lmms_eval.model.score", None)  # the second run must not score
    second, again = run(*given, use_cache=str(tmp_path / "cache"))
    assert [[tuple(pair) for pair in row] for row in second] == [[tuple(pair) for pair in row] for row in first]
    assert again["results"] == record["results"]


def test_likelihood_requests_come_back_in_their_order(arguments: Callable[..., str]) -> None:
    from lmms_eval.api.instance import Instance
    from lmms_eval.models import get_model

    model = get_model("qwen2_vl_snapkv").create_from_arg_string(arguments("qwen2_vl_snapkv"), {"batch_size": 2})
    model.task_dict["t"] = {"test": {0: "A", 1: "B"}}

    def ask(doc: int, context: str, answer: Any) -> Instance:
        arguments = (context, answer, lambda _: None, doc, "t", "test")
        return Instance("loglikelihood", arguments, 0, {"task": "t", "doc_id": doc, "repeats": 1})

    requests = [ask(0, "long question?", " yes"), ask(1, "q?", " no"), ask(0, "long question?", " no way")]
    requests += [ask(1, "q?", lambda doc: f" {doc}"), ask(1, "another?", " no")]
    together = model.loglikelihood(requests)
    apart = [model.loglikelihood([one])[0] for one in requests]
    assert [loss for loss, _ in together] == pytest.approx([loss for loss, _ in apart], abs=1e-5)
    assert len({round(loss, 4) for loss, _ in together}) == 5


def test_the_prompt_of_a_likelihood_task_is_that_of_a_generation_task(engine: Engine) -> None:
    from lmms_eval.api.task import ConfigurableMessagesTask

    built = ConfigurableMessagesTask._build_user_turn([conversation(1)[0]["content"][0]["url"]], "What is it?")
    assert engine.prompt(built).text == engine.prompt(conversation(1)).text
