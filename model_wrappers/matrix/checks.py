"""The cells of the matrix: what a tiny random checkpoint of a model type is put through.

A check returns nothing, or in a few words why it does not apply, by what the family states; all else is an exception.
"""

from __future__ import annotations

import base64
import csv
import functools
import importlib.util
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from sparsemm_lmms import CompressionConfig, HeadScores, compress
from sparsemm_lmms.cli import tasks_folder
from sparsemm_lmms.decode import Decoder
from sparsemm_lmms.failures import cause
from sparsemm_lmms.families import Family, family_for
from sparsemm_lmms.kernels.backend import interpreted
from sparsemm_lmms.model_wrappers.arguments import split_arguments
from sparsemm_lmms.model_wrappers.engine import Conversation, Engine
from sparsemm_lmms.model_wrappers.loading import load_checkpoint
from sparsemm_lmms.model_wrappers.matrix.makers import MAKERS
from sparsemm_lmms.model_wrappers.matrix.tape import TapeGraph, emulations
from sparsemm_lmms.model_wrappers.matrix.tiny import conversation, picture
from sparsemm_lmms.model_wrappers.media import sampling_of
from sparsemm_lmms.session import attention_shape

PASSED, FAILED = "yes", "failed: "
NEW, BUDGET, WINDOW = 6, 20, 8
SIZES = [(84, 56), (56, 84), (40, 40), (120, 30)]
FRAMES = 6
FULL = (CompressionConfig("fullkv"), CompressionConfig("snapkv", budget=2048, window_size=WINDOW))
SMALL = CompressionConfig("snapkv", budget=BUDGET, window_size=WINDOW)


@dataclass(frozen=True)
class Tiny:
    """A tiny checkpoint.

    Attributes:
        kind: key of `MAKERS`.
        folder: where the checkpoint is, with room for files beside it.
        device: on which it runs.
    """

    kind: str
    folder: Path
    device: str = "cpu"

    @property
    def family(self) -> Family:
        found = family_for(self.kind.partition(",")[0])
        assert found is not None  # makers are of families
        return found

    @functools.cached_property
    def checkpoint(self) -> Path:
        return MAKERS[self.kind](self.folder / "checkpoint")

    @property
    def pixels(self) -> dict[str, int]:
        """Small images, where the family has limits."""
        limited = self.family.lmms_eval.pixel_limits is not None
        return {"min_pixels": 4 * 32**2, "max_pixels": 30 * 32**2} if limited else {}

    @functools.cached_property
    def engine(self) -> Engine:
        """As the family's models of lmms-eval make it."""
        given = {"pretrained": str(self.checkpoint), **self.pixels}
        given |= {"max_num_frames": FRAMES} if self.family.reads_video else {}
        options, _ = split_arguments(self.family, "fullkv", given)
        loaded = load_checkpoint(self.family, options, torch.device(self.device))
        return Engine(
            loaded,
            options.system_prompt,
            sampling=sampling_of(self.family, options, loaded.processor),
            enable_thinking=options.enable_thinking,
        )

    def inputs(self, talks: Sequence[Conversation]) -> Any:
        """Model inputs of a left-padded batch."""
        return self.engine.batch_inputs([self.engine.prompt(talk) for talk in talks])

    def generate(self, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[batch, prompt + new]` and the logits of the new ones, float32 `[batch, new, vocabulary]`."""
        made = self.engine.model.generate(
            **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        logits = torch.stack(made.logits, 1).float()
        _expect(bool(logits.isfinite().all()), "logits are not finite")
        return made.sequences, logits


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def _equal_stock(tiny: Tiny, talks: Sequence[Conversation]) -> None:
    inputs = tiny.inputs(talks)
    tokens, logits = tiny.generate(inputs)
    for config in FULL:
        with compress(tiny.engine.model, config):
            ours, our_logits = tiny.generate(inputs)
        _expect(torch.equal(ours, tokens), f"{config.method} with room for all writes other tokens than stock")
        _near(our_logits, logits)


def _near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise AssertionError if logits differ by more than rounding."""
    torch.testing.assert_close(found, wanted, atol=1e-4 * float(wanted.std()), rtol=1e-4)


def _two() -> list[Conversation]:
    return [conversation(1), conversation(2, "Which of the two is it, please?", size=(56, 84))]


def alone(tiny: Tiny) -> None:
    """A prompt with an image: full budget is stock."""
    _equal_stock(tiny, _two()[:1])


def padded(tiny: Tiny) -> None:
    """Two of them, left-padded."""
    _equal_stock(tiny, _two())


def small(tiny: Tiny) -> None:
    """Every head keeps its budget, the window among it, and in a padded batch what it keeps of the prompt alone."""
    model, kept = tiny.engine.model, []
    talks = _two()
    for rows in (talks, talks[:1], talks[1:]):
        inputs = tiny.inputs(rows)
        with compress(model, SMALL) as session:
            model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
            cache: Any = session.cache
            _expect(bool((cache.kept_per_head() == BUDGET).all()), f"heads keep {cache.kept_per_head().unique()}")
            heads = [cache.kept_positions(layer) for layer in range(len(cache.full_layers))]
        for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
            found = [[head.tolist() for head in layer[row]] for layer in heads]
            recent = list(range(length - WINDOW, length))
            _expect(all(head[-WINDOW:] == recent for layer in found for head in layer), "the window is not kept")
            kept.append(found)
    _expect(kept[:2] == kept[2:], "a padded batch keeps other positions than its prompts alone")


def several(tiny: Tiny) -> None:
    """No image, one and three, padded: each is as transformers' processor and the stock model have it alone."""
    engine = tiny.engine
    talks = [
        [{"role": "user", "content": [*_pictures(images), {"type": "text", "text": question}]}]
        for images, question in ((0, "Nothing to see?"), (1, "What is it?"), (3, "Which one?"))
    ]
    wanted = torch.cat([tiny.generate(_by_transformers(engine, talk))[1] for talk in talks])
    with compress(engine.model, FULL[0]):
        for rows in ([0, 1, 2], [2]):
            _near(tiny.generate(tiny.inputs([talks[row] for row in rows]))[1], wanted[rows])


def _pictures(count: int) -> list[dict[str, Any]]:
    return [{"type": "image", "url": picture(i + count, SIZES[(i + count) % 4])} for i in range(count)]


def _by_transformers(engine: Engine, talk: Conversation) -> Any:
    """The inputs that transformers' chat template makes of a conversation."""
    messages = [
        {**turn, "content": [{"image" if k == "url" else k: v for k, v in part.items()} for part in turn["content"]]}
        for turn in talk
    ]
    if engine.system_prompt:
        content = [{"type": "text", "text": engine.system_prompt}]
        messages.insert(0, {"role": "system", "content": content})
    made = engine.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **engine.template
    )
    return made.to(engine.model.device, engine.model.dtype)


def video(tiny: Tiny) -> str | None:
    """A film alone, and two beside an image in a padded batch: full budget is stock, a small one keeps its number."""
    if not tiny.family.reads_video:
        return "no video: images only"
    frames = np.stack([np.asarray(picture(i, (160, 96))) for i in range(FRAMES)])
    films = [
        [{"role": "user", "content": [{"type": "video", "url": frames[:count]}, {"type": "text", "text": question}]}]
        for count, question in ((FRAMES, "What is it?"), (4, "And then, at its end?"))
    ]
    token = tiny.family.vision_ids(tiny.engine.model.config)[-1]
    for talks in (films[:1], [films[0], conversation(1), films[1]]):
        inputs = tiny.inputs(talks)
        shown = (inputs["input_ids"] == token).any(1).sum()
        _expect(int(shown) == (len(talks) + 1) // 2, "a prompt has no tokens of its video")
        _equal_stock(tiny, talks)
        with compress(tiny.engine.model, SMALL) as session:
            tiny.generate(inputs)
            cache: Any = session.cache
            _expect(bool((cache.kept_per_head() == BUDGET).all()), "heads keep another number than the budget")
    return None


def static_loop(tiny: Tiny) -> str | None:
    """Decode steps captured once and replayed write the tokens of transformers' loop; on CPUs on a tape of the step."""
    model, inputs = tiny.engine.model, tiny.inputs(_two())
    told = {**inputs, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    stock = model.generate(**told)
    with compress(model, FULL[0]) as session:
        _expect(torch.equal(session.generate(**told), stock), "the loop with static buffers writes other tokens")
    graph = None
    with ExitStack() as stack:
        if model.device.type == "cpu":
            if not interpreted():
                return "not captured: triton was imported without TRITON_INTERPRET=1"
            graph = TapeGraph()
            for module, name, value in emulations():
                stack.enter_context(mock.patch.object(module, name, value))
        config = CompressionConfig("snapkv", budget=BUDGET, window_size=WINDOW, kernel_backend="triton")
        session = stack.enter_context(compress(model, config))
        wanted = model.generate(**told)
        found = model.generate(
            **told, custom_generate=Decoder(cuda_graph="on" if graph is None else "auto", graph=graph)
        )
    _expect(torch.equal(found, wanted), "a replayed step writes other tokens")
    _expect(graph is None or 0 < graph.captures < graph.replays, "decode steps were not captured")
    return None


def head_scores(tiny: Tiny) -> str | None:
    """`chase` scores the heads of the full layers, and they keep what the table of `budgets` says."""
    from sparsemm_lmms.visual_heads.budget_table import budget_table
    from sparsemm_lmms.visual_heads.chase import ChaseSettings, score_heads
    from sparsemm_lmms.visual_heads.render import GeneratedPages

    if tiny.family.grid is None:
        return "no head scores: the family names no token grid"
    model, file = tiny.engine.model, tiny.folder / "scores.json"
    pages = GeneratedPages(16, readings="mixture")
    score_heads(model, tiny.engine.processor, pages, file, ChaseSettings("teacher", batch_size=8))
    scores, shape = HeadScores.load(file), attention_shape(model.config)
    _expect(scores.values.shape == (shape.num_layers, shape.q_heads), f"scores of {scores.values.shape} heads")
    _expect(scores.values.sum() > 0, "no head has a score")
    config, inputs = CompressionConfig("sparsemm", budget=BUDGET, window_size=WINDOW), tiny.inputs(_two()[:1])
    with compress(model, config, scores) as session:
        tiny.generate(inputs)
        cache: Any = session.cache
        kept = cache.kept_per_head()[:, 0].numpy(force=True)
    shared = budget_table(scores, shape.kv_heads, config, inputs["input_ids"].shape[1])
    _expect(np.array_equal(kept, shared), f"heads keep {kept.tolist()}, by their scores {np.asarray(shared).tolist()}")
    return None


def lmms_eval(tiny: Tiny) -> None:
    """One document of a packaged task, by the host's own evaluator."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    name, task = f"{tiny.family.model_type}_snapkv", "sparsemm_demo_vqa"
    given = {"pretrained": tiny.checkpoint, "budget": BUDGET, "window_size": WINDOW, "device": tiny.device}
    manager = TaskManager(include_path=str(tasks_folder()), include_defaults=False, model_name=name)
    cache = "lmms_eval.api.task._resolve_hf_datasets_cache_dir"
    with mock.patch(cache, lambda: str(tiny.folder.parent / "datasets")):
        results = simple_evaluate(
            name, ",".join(f"{key}={value}" for key, value in (given | tiny.pixels).items()), tasks=[task],
            task_manager=manager, limit=1, bootstrap_iters=0, gen_kwargs=f"max_new_tokens={NEW}",
        )  # fmt: skip
    told, settings = results["throughput"], results["sparsemm_lmms"]["settings"]
    _expect(settings["model"] == name, f"the record is of {settings['model']}")
    _expect(len(results["samples"][task]) == 1, "the document has no answer")
    _expect(told["avg_kept_tokens"] == BUDGET < told["avg_prompt_tokens"], f"heads keep {told['avg_kept_tokens']}")
    _expect(told["avg_kv_bytes_used"] < told["avg_kv_bytes_full"], "the cache is as large as with everything kept")


def vlmevalkit(tiny: Tiny) -> str | None:
    """A choice and an open question, by the host's run.py, with each class of the family there; then resumed."""
    from sparsemm_lmms.model_wrappers.vlmevalkit.run import find_run_py, launch

    if tiny.family.vlmevalkit is None:
        return "no VLMEvalKit: the host has no model of the family"
    if importlib.util.find_spec("vlmeval") is None:
        return "not run: VLMEvalKit is not installed here"
    limits = [
        f"{word}{tiny.pixels[name]}" for word, name in (("minp", "min_pixels"), ("maxp", "max_pixels")) if tiny.pixels
    ]
    name = "_".join(["tiny", "snapkv", f"b{BUDGET}", f"w{WINDOW}", *limits, f"new{NEW}"])
    given = {"method": "snapkv", "pretrained": str(tiny.checkpoint), "budget": BUDGET, "window_size": WINDOW}
    given |= {"max_new_tokens": NEW, "device": tiny.device, **tiny.pixels}
    data = _questions(tiny.folder / "LMUData")
    for adapter in tiny.family.vlmevalkit.adapters:
        work = tiny.folder / adapter.name
        work.mkdir()
        config = work / "config.json"
        entry = {"class": adapter.name, **given}
        config.write_text(json.dumps({"model": {name: entry}, "data": dict.fromkeys(data, {})}))
        before: list[bytes] = []
        for _ in range(2):
            with ExitStack() as stack:
                stack.enter_context(mock.patch.dict(os.environ, LMUData=str(tiny.folder / "LMUData")))
                stack.enter_context(mock.patch.object(sys, "argv", list(sys.argv)))
                stack.enter_context(mock.patch.object(sys, "path", list(sys.path)))
                launch(["--config", str(config), "--work-dir", str(work)], find_run_py(None))
            files = [work / name / f"{name}_{dataset}.json" for dataset in data]
            written = [file.read_bytes() for file in files]
            _expect(before in ([], written), f"{adapter.name} answers again what it has answered")
            before = written
        records = [answer["extra_records"] for file in files for answer in json.loads(file.read_text()).values()]
        _expect(len(records) == len(data), f"{adapter.name} has {len(records)} answers")
        kept = [record["kept_tokens"] for record in records]
        _expect(kept == [BUDGET] * len(data), f"{adapter.name}: heads keep {kept}")
        _expect(all(record["prompt_tokens"] > BUDGET for record in records), f"{adapter.name}: prompts are short")
    return None


def _questions(folder: Path) -> tuple[str, str]:
    """Write a multiple choice and an open question in the host's format; their names."""
    folder.mkdir()
    buffer = io.BytesIO()
    picture(0, (84, 56)).save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    for name, choices in (names := {"TinyMCQ": ["one", "two"], "Tiny_openended": []}).items():
        with open(folder / f"{name}.tsv", "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["index", "image", "question", *"AB"[: len(choices)], "answer", "category"])
            writer.writerow(
                [0, image, "Which is it?", *choices, "A" if choices else "['x']", "Regular Text Recognition"]
            )
    first, second = names
    return first, second


CELLS: dict[str, Callable[[Tiny], str | None]] = {
    "batch 1": alone,
    "padded batch": padded,
    "small budget": small,
    "several images": several,
    "video": video,
    "static loop": static_loop,
    "head scores": head_scores,
    "lmms-eval": lmms_eval,
    "VLMEvalKit": vlmevalkit,
}
QUICK = ("batch 1", "padded batch", "small budget")


def check(kind: str, cells: Iterable[str] = tuple(CELLS), device: str = "cpu") -> dict[str, str]:
    """Run these cells on a fresh checkpoint of `kind`, a key of `MAKERS`.

    Returns:
        cell -> `PASSED`, why it does not apply, or `FAILED` and what the exception says in one line.
    """
    with tempfile.TemporaryDirectory() as folder:
        (own := Path(folder) / "tiny").mkdir()
        tiny = Tiny(kind, own, device)
        return {cell: _run(CELLS[cell], tiny) for cell in cells}


def _run(cell: Callable[[Tiny], str | None], tiny: Tiny) -> str:
    try:
        return cell(tiny) or PASSED
    except (Exception, SystemExit) as error:  # the matrix goes on, says it, and ends with status 1
        found = cause(error)
        return FAILED + " ".join(f"{type(found).__name__}: {found}".split())
