"""Our classes as the host uses them: its table, its prompts, images in order, conversations, records."""

from __future__ import annotations

import dataclasses
import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from sparsemm_lmms.families import FAMILIES
from sparsemm_lmms.methods import METHODS
from sparsemm_lmms.model_wrappers.vlmevalkit.model import CompressedVLM, Record, model_class, register
from sparsemm_lmms.model_wrappers.vlmevalkit.names import BASES, is_ours
from sparsemm_lmms.model_wrappers.vlmevalkit.stock import bare, extracted, written_prompt
from sparsemm_lmms.session import CompressionSession

from ..wrappers import tiny
from ..wrappers.tiny import BY_TURNS
from .conftest import CLASSES

ROOT = Path(__file__).parents[2]
BASE_OF = {"llava_next": "LLaVA-NeXT", "qwen2_vl": "Qwen2VL"}


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every cache that is made during a test."""
    made: list[Any] = []
    original = CompressionSession.new_cache
    monkeypatch.setattr(CompressionSession, "new_cache", lambda *a, **k: made.append(original(*a, **k)) or made[-1])
    yield made


def kept(cache: Any) -> list[list[list[int]]]:
    return [[head.tolist() for head in cache.kept_positions(layer)[0]] for layer in range(len(cache.layers))]


# -- the host's table --------------------------------------------------------------------------------------------------


def test_only_names_are_added(host: Any) -> None:
    after = host.supported_VLM
    assert type(after) is dict
    assert all(after[name] is entry for name, entry in host.before.items())
    assert set(after) - set(host.before) >= set(host.added) and not set(host.added) & set(host.before)
    assert not any(is_ours(name) for name in host.before)
    assert {
        f"{base}-Demo_{method}" for base in BASE_OF.values() for method in ("fullkv", "mask", "mask_random")
    } <= set(host.added)
    assert register() == []


def test_other_names_are_resolved_when_asked_for(host: Any) -> None:
    name = "Qwen2VL-7B-Instruct_snapkv_b96_w16_maxp2007040"
    assert name not in host.supported_VLM
    assert register([name]) == [name]
    entry, stock = host.supported_VLM[name], host.supported_VLM["Qwen2-VL-7B-Instruct"]
    assert isinstance(entry, partial) and entry.func is model_class("qwen2_vl")
    assert entry.keywords == {
        "method": "snapkv",
        "pretrained": stock.keywords["model_path"],
        "min_pixels": stock.keywords["min_pixels"],  # the stock model's, in its own entry
        "budget": 96,
        "window_size": 16,
        "max_pixels": 2007040,
    }
    assert host.supported_VLM["LLaVA-NeXT-Yi-34B_fullkv"].keywords["device_map"] == "auto"
    with pytest.raises(ValueError, match="budget=16 must be larger than window_size=32"):
        register(["Qwen2VL-7B-Instruct_snapkv_b16"])


@pytest.mark.parametrize(("family", "name"), CLASSES)
def test_classes_stand_in_front_of_the_stock_ones(family: str, name: str, host: Any) -> None:
    import vlmeval.vlm

    adapter = next(adapter for adapter in FAMILIES[family].vlmevalkit.adapters if adapter.name == name)
    cls = model_class(family, name)
    stock = getattr(vlmeval.vlm, adapter.stock or "BaseModel")
    assert cls is getattr(vlmeval.vlm, name) and cls.__bases__ == (CompressedVLM, stock)
    assert cls.adapter is adapter


def test_every_family_has_names(host: Any) -> None:
    words = {family: [word for word, base in BASES.items() if base.family == family] for family in FAMILIES}
    assert all(words.values())
    for family, own in words.items():
        assert any(f"{word}_sparsemm_b64" in host.supported_VLM for word in own), family


def test_an_entry_takes_over_what_the_host_says_of_the_checkpoint(host: Any) -> None:
    entry, stock = (
        host.supported_VLM[name].keywords for name in ("Qwen3VL-4B-Instruct_fullkv", "Qwen3-VL-4B-Instruct")
    )
    sampling = {name: stock[name] for name in ("temperature", "top_k", "top_p", "repetition_penalty") if name in stock}
    assert entry == {
        "method": "fullkv",
        "pretrained": "Qwen/Qwen3-VL-4B-Instruct",
        "use_custom_prompt": False,
        "max_new_tokens": 16384,
        "sampling": sampling,
    }
    assert host.supported_VLM["InternVL35-8B_fullkv"].keywords["pretrained"] == "OpenGVLab/InternVL3_5-8B-HF"
    assert host.supported_VLM["Ministral-3-8B-Instruct_fullkv"].keywords["pretrained"].startswith("mistralai/")


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BASE_OF)
def test_the_same_as_in_lmms_eval(family: str, host: Any, caches: list[Any], tmp_path: Path) -> None:
    """The demo models, the same images and questions: equal answers, equal kept positions of every head."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed beside VLMEvalKit")
    from lmms_eval.models import get_model

    from ..wrappers.conftest import request as lmms_request

    rows = pq.read_table(ROOT / "task_overrides" / "sparsemm_demo_vqa.parquet").to_pylist()[:2]
    ours = host.supported_VLM[f"{BASE_OF[family]}-Demo_sparsemm_b64"](device="cpu")
    theirs = get_model(f"{family}_sparsemm").create_from_arg_string("pretrained=demo,budget=64,device=cpu", {})
    questions = []
    for i, row in enumerate(rows):
        path = tmp_path / f"{i}.png"
        path.write_bytes(row["image"]["bytes"])
        questions.append([{"type": "image", "value": str(path)}, {"type": "text", "value": row["question"]}])
    here = [ours.generate(question, "Demo_openended") for question in questions]
    in_host = list(caches)
    caches.clear()
    requests = []
    for i, question in enumerate(questions):
        image = Image.open(question[0]["value"]).convert("RGB")
        parts = [{"type": "image", "url": image}, {"type": "text", "text": rows[i]["question"]}]
        requests.append(lmms_request(theirs, [{"role": "user", "content": parts}], i, {"max_new_tokens": 64}))
    there = theirs.generate_until(requests)
    assert [str(answer) for answer in here] == [result.text.strip() for result in there]
    assert all(str(answer) for answer in here)
    assert [kept(cache) for cache in in_host] == [kept(cache) for cache in caches] and len(caches) == len(rows)
    assert [a["extra_records"]["kept_tokens"] for a in here] == [r.token_counts.kept_tokens for r in there]


@pytest.mark.parametrize("family", BASE_OF)
def test_images_stand_where_the_message_puts_them(
    family: str, model: Callable[..., Any], picture: Callable[..., str], caches: list[Any]
) -> None:
    ours = model(family, method="fullkv")
    image = [{"type": "image", "value": picture(i)} for i in (1, 2)]
    words = [{"type": "text", "value": word} for word in ("Left", "right")]
    orders = [[image[0], words[0], image[1], words[1]], [image[1], words[0], image[0], words[1]], [*image, *words]]
    prompts = []
    for message in orders:
        prompts.append(ours._answer(ours._conversation([{"role": "user", "content": message}], None), None).prompts[0])
    mark = {"llava_next": "<image>", "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>"}[family]
    assert prompts == [f"user: {mark}Left{mark}rightassistant: "] * 2 + [f"user: {mark * 2}Leftrightassistant: "]
    keys = [cache.layers[1].keys for cache in caches]
    assert keys[0].shape == keys[1].shape and not keys[0].equal(keys[1])  # exchanged images are not the same


DATASETS = ("MMBench_DEV_EN", "HallusionBench", "DocVQA_VAL", "OCRBench")
"""Multiple choice, yes or no, an open question, reading."""
QUESTION = "Which?\nOptions:\nA. one"
CHOICES = QUESTION.replace("Options", "Choices")
TERSE = (
    "Give a short and terse answer to the following question. Do not paraphrase or reformat the text you see in the "
    "image. Do not include any full stops. Just give the answer without additional explanation. Question: "
)
YES_NO, BRIEF, END = "\nAnswer yes or no.", "\nGive a very brief answer.", "<end_of_utterance>\nAssistant:"
SEEN = "<|vision_start|><|image_pad|><|vision_end|>"


def turn(text: str, before: str = "") -> list[str]:
    return [f"{before}user: {text}assistant: "] * len(DATASETS)


WRITTEN = {
    **dict.fromkeys(
        ("CompressedQwen2VL", "CompressedQwen25VL", "CompressedQwen3VL", "CompressedQwen35"), turn(f"{SEEN}{QUESTION}")
    ),
    **dict.fromkeys(("CompressedLLaVA", "CompressedLLaVANext", "CompressedMistral3"), turn(f"<image>{QUESTION}")),
    **dict.fromkeys(("CompressedLLaVAOneVision", "CompressedInternVL"), turn(f"<image>\n{QUESTION}")),
    "CompressedGemma3": turn(f"<start_of_image>{QUESTION}", "system: You are a helpful assistant. "),
    "CompressedIdefics3": [
        f"User:<image>{CHOICES}{END} Answer:",
        *(f"User:<image>{QUESTION}{end}{END}" for end in (YES_NO, BRIEF, "")),
    ],
    "CompressedGemma4": turn(f"<image>{QUESTION}"),
    "CompressedGLM4V": [
        f"user: <|begin_of_image|><|image|><|end_of_image|>{QUESTION}{more}assistant: "
        for more in ("", "Please answer yes or no.", "", "")
    ],
    "CompressedSmolVLM": [
        f"<|im_start|>User:<image>{CHOICES}{END} Answer:",
        f"<|im_start|>User:<image>{QUESTION}{YES_NO}{END}",
        f"<|im_start|>User:<image>{TERSE}{QUESTION}{END}",
        f"<|im_start|>User:<image>{QUESTION}{BRIEF}{END}",
    ],
}
WRITTEN["CompressedSmolVLM2"] = WRITTEN["CompressedSmolVLM"]
"""Our class -> what is asked of it in each of `DATASETS`, as the stock class of the host writes it."""


@pytest.mark.parametrize(("family", "name"), CLASSES)
def test_prompts_are_the_stock_models(
    family: str, name: str, model: Callable[..., Any], picture: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {} if FAMILIES[family].lmms_eval.pixel_limits is None else {"max_pixels": 400 * 28 * 28}
    ours, line = model(family, name, **wide), {"index": 4, "question": "Which?", "A": "one", "B": "two"}
    ours.set_dump_image(lambda line: [picture(line["index"])])
    stock = ours.stock.__new__(ours.stock)
    vars(stock).update(_use_custom_prompt=True, dump_image_func=ours.dump_image_func, use_mpo_prompt=False)
    asked, answer = [], ours.engine.answer
    monkeypatch.setattr(ours.engine, "answer", lambda *given: asked.extend(given[1]) or answer(*given))
    for dataset in DATASETS:
        assert ours.use_custom_prompt(dataset) == stock.use_custom_prompt(dataset)
        if ours.use_custom_prompt(dataset):
            assert ours.build_prompt(line, dataset=dataset) == stock.build_prompt(line, dataset=dataset)
        ours.generate([{"type": "image", "value": picture(4)}, {"type": "text", "value": QUESTION}], dataset)
    assert [prompt.text for prompt in asked] == WRITTEN[name]
    assert all(len(prompt.images) == 1 for prompt in asked)
    if name not in ("CompressedGLM4V",) and not ours.adapter.prepares_content:  # sent as JPEG; resized already
        assert all(prompt.images[0].tobytes() == tiny.picture(4).tobytes() for prompt in asked)
    ours.host = dataclasses.replace(ours.host, use_custom_prompt=False)
    assert not any(ours.use_custom_prompt(dataset) for dataset in DATASETS)


def test_tiles_are_limited_as_the_host_does_for_each_dataset(
    model: Callable[..., Any], picture: Callable[..., str]
) -> None:
    ours = model("internvl")
    limit = ours.processor.image_processor
    for dataset, images, most in (
        ("OCRBench", 1, 24),
        ("DocVQA_VAL", 1, 18),
        ("MMBench_DEV_EN", 1, 6),
        ("OCRBench", 4, 16),
    ):
        parts = [{"type": "image", "value": picture(i, (56, 56))} for i in range(images)]
        ours.generate([*parts, {"type": "text", "value": "Which?"}], dataset)
        assert limit.max_patches == most


def test_answers_are_found_by_the_stock_class(host: Any) -> None:
    from vlmeval import vlm

    answer = "<think>hm</think> It is <|begin_of_box|>left<|end_of_box|>"
    boxed = vlm.GLMThinking.__new__(vlm.GLMThinking)
    assert extracted(boxed.extract_answer, answer, "Tiny") == "left"
    assert extracted(boxed.extract_answer, answer, "OCRBench") == "It is <|begin_of_box|>left<|end_of_box|>"
    assert extracted(vlm.Gemma4.extract_response_for_eval, "<think>hm</think> left ", "Tiny") == "left"


def test_a_system_prompt_replaces_the_stock_models(
    model: Callable[..., Any], picture: Callable[..., str], caches: list[Any]
) -> None:
    question = [{"type": "image", "value": picture(0)}, {"type": "text", "value": "Which?"}]
    lengths = []
    for more in ({}, {"system_prompt": "Look."}):
        model("gemma3", **more).generate(question, "Tiny")
        lengths.append(caches[-1].layers[-1].prompt_lengths[0])
    assert lengths[0] - lengths[1] == len("You are a helpful assistant. ") - len("Look.")
    with pytest.raises(ValueError, match="system_prompt has no place in the prompts of SmolVLM"):
        model("smolvlm", "CompressedSmolVLM", system_prompt="Look.")


def test_a_stock_class_that_asks_nothing_is_told() -> None:
    class Silent:
        def generate_inner(self, message: Any, dataset: str | None) -> str:
            return "left"

    with pytest.raises(ValueError, match="Silent of this VLMEvalKit asks no processor"):
        written_prompt(bare(Silent, {}), None, [], None, None)


def test_pixel_limits_are_the_hosts_for_each_dataset(model: Callable[..., Any], picture: Callable[..., str]) -> None:
    ours = model("qwen2_vl", min_pixels=10 * 28 * 28, max_pixels=400 * 28 * 28)
    question = [{"type": "image", "value": picture(0)}, {"type": "text", "value": "Which?"}]  # 6 tokens as it is
    small, large = (ours.generate(question, name)["extra_records"]["prompt_tokens"] for name in ("Tiny", "OCRBench"))
    text = len("user: ") + 2 + len("Which?assistant: ")  # 2: around the image; it grows from 3 x 2 tokens to at least
    assert (small, large) == (text + 4 * 3, text + 13 * 9)  # 10 and, as the host shows OCRBench, 100 tokens


def test_the_stock_classes_answer_is_cut_out_of_the_whole_text(host: Any) -> None:
    ours = model_class("llava_next").__new__(model_class("llava_next"))
    told = "USER: <image>\nWhich? ASSISTANT:"
    assert ours.post_process(told, " left") == "left"
    assert ours.post_process(told, " left USER: and? ASSISTANT: right") == "left USER: and?"  # as the stock class does
    assert ours.post_process("user: Which?\nassistant: ", " left ") == "left"  # a template that it does not know


@pytest.mark.parametrize(("family", "method"), BY_TURNS)
def test_every_method_answers_and_records(
    family: str, method: str, model: Callable[..., Any], picture: Callable[..., str]
) -> None:
    more = {"head_scores": "random"} if METHODS[method].needs_head_scores else {}
    answer = model(family, method=method, **more).generate(
        [{"type": "image", "value": picture(0)}, {"type": "text", "value": "What is it?"}], "Tiny_openended"
    )
    record, compresses = answer["extra_records"], METHODS[method].compresses
    assert str(answer) == answer["prediction"] and 1 <= record["output_tokens"] <= 6
    assert (record["kept_tokens"] < record["prompt_tokens"]) == compresses
    assert (record["kv_bytes_used"] < record["kv_bytes_full"]) == compresses
    assert record["nominal_budget"] == (20 if compresses else None)
    assert (record["head_scores"] is not None) == METHODS[method].needs_head_scores
    assert record["ttft_ms"] > 0


def test_weights_are_let_go_with_the_model(model: Callable[..., Any]) -> None:
    """The host loads the next model as soon as it drops one: two would not fit beside each other."""
    ours = model("qwen2_vl")
    weights = weakref.ref(ours.model)
    gc.disable()
    try:
        del ours
        assert weights() is None
    finally:
        gc.enable()


def test_a_record_reads_as_its_prediction_everywhere() -> None:
    """Video datasets, and image datasets of which some answers failed, write `str(answer)`."""
    record = Record(prediction="left", extra_records={"kept_tokens": 20.0})
    again = pickle.loads(pickle.dumps(record))
    assert (str(again), f"{again}", again) == ("left", "left", record) and isinstance(again, dict)


def test_stock_generation_is_read_from_the_stock_class(model: Callable[..., Any]) -> None:
    ours = model("qwen2_vl", generation="stock")._generation_settings()
    assert (ours.temperature, ours.top_k, ours.top_p, ours.max_new_tokens) == (0.01, 1, 0.001, 6)
    assert model("qwen2_vl")._generation_settings().for_generate()["do_sample"] is False
    sampling = {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.5}
    ours = model("qwen3_vl", generation="stock", sampling=sampling)._generation_settings()
    assert (ours.temperature, ours.top_k, ours.top_p, ours.repetition_penalty) == (0.7, 5, 0.8, 1.5)
    assert model("llava_next", generation="stock")._generation_settings().for_generate()["do_sample"] is False


# -- conversations and video -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*BASE_OF, "gemma3"])
def test_a_conversation_carries_its_images_and_answers(
    family: str, model: Callable[..., Any], picture: Callable[..., str], caches: list[Any]
) -> None:
    ours = model(family)
    turns = [{"role": "user", "content": [{"type": "image", "value": picture(0)}, {"type": "text", "value": "What?"}]}]
    first = ours.chat(turns, dataset="Tiny")
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    second = ours.chat(turns, dataset="Tiny")
    assert type(first) is type(second) is str
    lengths = [cache.layers[-1].prompt_lengths[0] for cache in caches]
    # the image, the first question and its answer come again
    assert lengths[1] > lengths[0] + len("user: Why?assistant: ")


def test_an_error_in_a_conversation_is_not_swallowed(model: Callable[..., Any]) -> None:
    """The host's `chat` would ask again without the first turns, and call that the answer."""
    ours, asked = model("llava_next"), []

    def fail(turns: list[Any], dataset: str) -> str:
        asked.append(len(turns))
        raise RuntimeError("out of memory")

    ours.chat_inner = fail
    turns = [{"role": role, "content": "Why?"} for role in ("user", "assistant", "user")]
    with pytest.raises(RuntimeError, match="out of memory"):
        ours.chat(turns, dataset="Tiny")
    assert asked == [3]


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "qwen3_vl"])
def test_families_without_video_refuse_it(family: str, model: Callable[..., Any]) -> None:
    with pytest.raises(NotImplementedError, match="text and images only in VLMEvalKit"):
        model(family).generate_inner([{"type": "video", "value": "a.mp4"}], "Tiny")


def test_qwen2_vl_reads_video(model: Callable[..., Any], video: Callable[[int], str]) -> None:
    path = video(8)
    ours = model("qwen2_vl", method="fullkv")
    ours.nframe, ours.fps = 4, None  # as the host's video loop sets them from the dataset
    four = ours.generate([{"type": "video", "value": path}, {"type": "text", "value": "What?"}], "Tiny")
    ours.nframe = 8
    eight = ours.generate([{"type": "video", "value": path}, {"type": "text", "value": "What?"}], "Tiny")
    tokens = [answer["extra_records"]["prompt_tokens"] for answer in (four, eight)]
    assert tokens[1] - tokens[0] == 2 * 14 * 10  # two frames make one patch, which the processor enlarges to its least


# -- without the hosts -------------------------------------------------------------------------------------------------

WITHOUT = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lmms_eval", "vlmeval"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from sparsemm_lmms.families import FAMILIES
from sparsemm_lmms.model_wrappers.vlmevalkit.model import CompressedVLM
for family in FAMILIES.values():
    ours = type("Ours", (CompressedVLM,), {"family": family, "adapter": family.vlmevalkit})
    assert ours.name_suffix("snapkv", {"budget": 64}) == "snapkv_b64"
import sparsemm_lmms.model_wrappers.vlmevalkit.run
"""


def test_imports_without_either_host() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, cwd=ROOT)
