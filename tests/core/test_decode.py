"""The static decode loop: the stock loop's tokens, and a step that a CUDA graph can replay (see `tape.py`)."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, StoppingCriteria
from transformers.generation import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from sparsemm_lmms import CompressionConfig, compress
from sparsemm_lmms import cache as cache_module
from sparsemm_lmms import decode as decode_module
from sparsemm_lmms.cache import CACHE_NAME
from sparsemm_lmms.decode import DecodeLoop, Decoder, EndCheck
from sparsemm_lmms.decode_graph import Replay, check_mode, say_once, uncapturable
from sparsemm_lmms.kernels.backend import interpreted
from tests.wrappers import tiny

from . import tape
from .tape import TapeGraph, fast_kernels
from .test_session import PROMPTS, SMALL, encode, scores_for

NEW = 14
NEVER = 10_000  # an end token outside the vocabulary
FORMS = ["called", "replayed", "replayed, checked late"]


@pytest.fixture(scope="module", params=["llava_next", "qwen2_vl"])
def loaded(request, tmp_path_factory):
    folder = tiny.MAKERS[request.param](tmp_path_factory.mktemp(request.param))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    return model, processor


@pytest.fixture
def said(monkeypatch):
    """What was logged once, in this test."""
    messages = []
    for module in ("sparsemm_lmms.decode.say_once", "sparsemm_lmms.decode_graph.say_once"):
        monkeypatch.setattr(module, messages.append)
    return messages


@pytest.fixture(autouse=True)
def kernels(request, monkeypatch):
    if not request.node.get_closest_marker("gpu") and "interpreter" not in request.node.name:
        fast_kernels(monkeypatch)


def decoder_for(form):
    if form == "called":
        return Decoder()
    pytest.importorskip("triton", reason="triton is not installed")
    if not interpreted():
        pytest.skip("triton was imported without TRITON_INTERPRET=1, so its kernels cannot run on the CPU")
    return Decoder(graph=TapeGraph(), check_every=4 if form == "replayed, checked late" else None)


def settings(form, method="sparsemm", **more):
    backend = "torch" if form == "called" else "triton"
    return CompressionConfig(method=method, budget=10, kernel_backend=backend, **SMALL, **more)


def staggered_ends(rows):
    """End tokens that stop the rows of `rows [batch, new]` at different steps: one of each row's own tokens."""
    return sorted({int(row[3 + 2 * i]) for i, row in enumerate(rows)})


def both(model, session, inputs, decoder, room=4, seed=0, **kwargs):
    """(stock, ours), each as tokens and the report of the cache, from the same random state."""
    results = []
    for custom in (None, decoder):
        torch.manual_seed(seed)
        cache = session.new_cache(room)
        kwargs |= {} if custom is None else {"custom_generate": custom}
        tokens = model.generate(**inputs, **{"do_sample": False} | kwargs, **{CACHE_NAME: cache})
        report = cache.report()
        lengths = [layer.length.tolist() for layer in cache.layers]
        counts = [(layer.seen, layer.appended) for layer in cache.layers]
        results.append((tokens, report["kv_bytes_used"], lengths, counts))
    return results


def assert_same(stock, ours):
    assert torch.equal(stock[0], ours[0])
    assert stock[1:] == ours[1:]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("picked", [[0], [0, 1, 2, 3]], ids=["one", "padded batch"])
def test_tokens_equal_the_stock_loop(loaded, picked, form):
    """Ends at different steps, and more tokens than the cache has room for: the store moves twice."""
    model, processor = loaded
    inputs = encode(processor, [PROMPTS[i] for i in picked])
    decoder = decoder_for(form)
    with compress(model, settings(form), scores_for("sparsemm")) as session:
        free, same = both(model, session, inputs, decoder, max_new_tokens=NEW, eos_token_id=NEVER)
        assert_same(free, same)
        assert same[0].shape[1] == inputs["input_ids"].shape[1] + NEW
        ends = staggered_ends(free[0][:, inputs["input_ids"].shape[1] :])
        stock, ours = both(model, session, inputs, decoder, max_new_tokens=40, eos_token_id=ends)
        assert_same(stock, ours)
        assert stock[0].shape[1] < inputs["input_ids"].shape[1] + 40
        if decoder.graph is not None:  # a graph for each layout of the store: rooms of 4, 8 and 16
            assert decoder.graph.captures >= 3 and decoder.graph.replays >= NEW - 3


def test_the_kernels_themselves_interpreter(loaded):
    """A short run of the tape with the Triton kernels and not their references."""
    model, processor = loaded
    inputs = encode(processor, PROMPTS[3:])
    decoder = decoder_for("replayed")
    config = settings("replayed", "snapkv")
    with compress(model, config) as session:
        ours = model.generate(**inputs, max_new_tokens=5, do_sample=False, custom_generate=decoder)
        assert decoder.graph.replays == 3
    with compress(model, settings("called", "snapkv")) as session:
        assert torch.equal(session.generate(**inputs, max_new_tokens=5, do_sample=False), ours)


def test_full_kv_equals_the_uncompressed_model(loaded):
    model, processor = loaded
    inputs = encode(processor, PROMPTS)
    stock = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    decoder = decoder_for("replayed")
    with compress(model, settings("replayed", "fullkv")) as session:
        ours = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, custom_generate=decoder)
        assert torch.equal(ours, stock)
        assert torch.equal(session.generate(**inputs, max_new_tokens=NEW, do_sample=False), stock)
        assert decoder.graph.captures == 1


@pytest.mark.parametrize("form", FORMS)
def test_sampling_draws_the_same_tokens(loaded, form):
    model, processor = loaded
    inputs = encode(processor, PROMPTS)
    sampling = dict(do_sample=True, temperature=0.8, top_k=30, top_p=0.95, min_p=0.01, max_new_tokens=NEW)
    decoder = decoder_for(form)
    with compress(model, settings(form, "adakv")) as session:
        for seed in (0, 1):
            assert_same(*both(model, session, inputs, decoder, seed=seed, **sampling))
    if decoder.graph is not None:
        assert decoder.graph.replays >= 2 * (NEW - 5)


class Biased(LogitsProcessor):
    """Depends on the step, keeps what it was given, and works in place."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids, scores.clone()))
        scores[:, input_ids.shape[1] % 7 + 5] += 2
        return scores


class StopsRows(StoppingCriteria):
    """Row b ends after 4 + 2 b new tokens."""

    def __init__(self, prompt):
        self.prompt, self.lengths = prompt, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return input_ids.shape[1] - self.prompt >= 4 + 2 * torch.arange(len(input_ids))


class Collects(BaseStreamer):
    def __init__(self):
        self.put_tokens, self.ended = [], 0

    def put(self, value):
        self.put_tokens.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("form", FORMS[:2])
def test_processors_and_criteria_of_users(loaded, form, said):
    model, processor = loaded
    inputs = encode(processor, PROMPTS)
    mine, decoder = [], decoder_for(form)
    results = []
    with compress(model, settings(form, "snapkv")) as session:
        for custom in ({}, {"custom_generate": decoder}):
            bias, stop = Biased(), StopsRows(inputs["input_ids"].shape[1])
            tokens = model.generate(
                **inputs, **custom, max_new_tokens=40, do_sample=False, repetition_penalty=1.3, no_repeat_ngram_size=2,
                logits_processor=[bias], stopping_criteria=[stop], **{CACHE_NAME: session.new_cache(3)},
                eos_token_id=NEVER,
            )  # fmt: skip
            results.append(tokens)
            mine.append((bias, stop))
    assert torch.equal(*results)
    assert mine[0][1].lengths == mine[1][1].lengths and len(mine[0][1].lengths) == 10
    for (ids, scores), (other_ids, other_scores) in zip(mine[0][0].seen, mine[1][0].seen, strict=True):
        assert torch.equal(ids, other_ids) and torch.allclose(scores, other_scores, atol=1e-4)
    if decoder.graph is not None:  # the model is replayed all the same
        assert decoder.graph.replays >= 6


def test_streamer_stop_strings_and_dictionaries(loaded):
    model, processor = loaded
    inputs = encode(processor, PROMPTS[:1])
    common = dict(max_new_tokens=NEW, do_sample=False)
    with compress(model, settings("called", "snapkv")) as session:
        tokens = model.generate(**inputs, **common)
        written = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])
        streams = [Collects(), Collects()]
        for generate, stream in zip((model.generate, session.generate), streams, strict=True):
            generate(**inputs, **common, streamer=stream)
        assert streams[0].put_tokens == streams[1].put_tokens and streams[1].ended == 1
        stop = dict(stop_strings=[written[4:6]], tokenizer=processor.tokenizer)
        stopped = model.generate(**inputs, **common, **stop)
        assert torch.equal(stopped, session.generate(**inputs, **common, **stop))
        assert stopped.shape[1] < tokens.shape[1]
        result = session.generate(**inputs, **common, return_dict_in_generate=True)
        assert torch.equal(result.sequences, tokens) and result[CACHE_NAME] is session.cache


def test_a_later_turn_on_the_same_cache(loaded):
    """What ran after the end is rolled back, so the next question finds the cache that the stock loop leaves."""
    model, processor = loaded
    inputs = encode(processor, PROMPTS[:1])
    later = processor.tokenizer("And the third?", return_tensors="pt")["input_ids"]
    answers = []
    with compress(model, settings("called", "snapkv")) as session:
        free = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        end = int(free[0, inputs["input_ids"].shape[1] + 4])
        for custom in (None, Decoder(check_every=4)):
            cache = session.new_cache(3)
            common = dict(do_sample=False, **{CACHE_NAME: cache}, custom_generate=custom)
            first = model.generate(**inputs, **common, max_new_tokens=30, eos_token_id=end)
            ids = torch.cat([first, later], dim=1)
            more = {"mm_token_type_ids": torch.zeros_like(ids)} if "mm_token_type_ids" in inputs else {}
            answers.append(model.generate(input_ids=ids, **more, **common, max_new_tokens=6))
    assert torch.equal(*answers)


def test_a_step_neither_waits_nor_moves_anything(loaded, monkeypatch):
    """Captured under a mode that refuses every synchronising operator; addresses are compared around 8 replays."""
    model, processor = loaded
    inputs = encode(processor, PROMPTS)
    decoder, loops = decoder_for("replayed"), []
    monkeypatch.setattr(decode_module, "DecodeLoop", lambda *args: loops.append(DecodeLoop(*args)) or loops[-1])
    addresses = []
    original = TapeGraph.replay

    def replay(self):
        loop = loops[-1]
        static = [loop.ids, loop.token, loop.position, loop.cursor, loop.finished, loop.live]
        addresses.append([x.data_ptr() for x in [*static, *loop.cache.static_tensors()]])
        original(self)

    monkeypatch.setattr(TapeGraph, "replay", replay)
    config = settings("replayed", "mask", mask_ratio=0.3)
    with compress(model, config, scores_for("mask")) as session:
        torch.manual_seed(0)
        model.generate(
            **inputs, max_new_tokens=10, do_sample=True, top_k=9, top_p=0.9, custom_generate=decoder,
            **{CACHE_NAME: session.new_cache(16)}, eos_token_id=7,
        )  # fmt: skip
    assert loops[0].whole and decoder.graph.captures == 1 and len(addresses) == 8
    assert all(row == addresses[0] for row in addresses)


def test_launches_do_not_depend_on_the_step(loaded, monkeypatch):
    """Grids and numbers of an eager step are those of every other step of a layout: what a capture bakes in holds."""
    model, processor = loaded
    inputs = encode(processor, PROMPTS)
    steps, launch = [], tape.Emulated.__getitem__

    def noted(self, grid):
        def run(*args, **constants):
            steps[-1].append((grid, constants, [x for x in args if not isinstance(x, torch.Tensor)]))
            return launch(self, grid)(*args, **constants)

        return run

    monkeypatch.setattr(tape.Emulated, "__getitem__", noted)
    decode = cache_module.ragged_decode

    def noted_decode(*tensors, **numbers):
        steps[-1].append({name: x for name, x in numbers.items() if not isinstance(x, torch.Tensor)})
        return decode(*tensors, **numbers)

    monkeypatch.setattr(cache_module, "ragged_decode", noted_decode)
    with compress(model, settings("replayed"), scores_for("sparsemm")) as session:
        hook = model.register_forward_pre_hook(lambda *_: steps.append([]))
        model.generate(**inputs, max_new_tokens=9, do_sample=False, **{CACHE_NAME: session.new_cache(16)})
        hook.remove()
    assert len(steps) == 9 and len(steps[1]) >= 3 * tiny.LAYERS and all(step == steps[1] for step in steps[1:])


def test_what_cannot_be_captured_runs_without_a_graph_and_says_why(loaded, said):
    """The torch kernels read lengths on the host: the capture fails, and the tokens are right all the same."""
    model, processor = loaded
    inputs = encode(processor, PROMPTS)
    decoder = Decoder(graph=TapeGraph())
    with compress(model, settings("called"), scores_for("sparsemm")) as session:
        assert_same(*both(model, session, inputs, decoder, max_new_tokens=NEW))
        assert decoder.graph.replays == 0
        assert len(said) == 1 and "cannot be captured" in said[0]
        decoder.cuda_graph = "on"
        with pytest.raises(RuntimeError, match="cuda_graph=on, but the decode step cannot be captured"):
            both(model, session, inputs, decoder, max_new_tokens=NEW)


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(num_beams=2), "beam_search needs it"),
        (dict(output_scores=True, return_dict_in_generate=True), "output_scores keep tensors of every step"),
        (dict(custom_generate=lambda model, input_ids, **_: input_ids), "custom_generate was given"),
    ],
)
def test_stock_loop_where_ours_cannot(loaded, said, options, reason):
    model, processor = loaded
    inputs = encode(processor, PROMPTS[:2])
    with compress(model, settings("called", "fullkv")) as session:
        stock = model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)
        ours = session.generate(**inputs, max_new_tokens=5, do_sample=False, **options)
        stock, ours = (x if isinstance(x, torch.Tensor) else x.sequences for x in (stock, ours))
        assert torch.equal(stock, ours)
        assert len(said) == 1 and reason in said[0]
        off = session.generate(**inputs, max_new_tokens=5, do_sample=False, cuda_graph="off")
        assert len(said) == 1 and off.shape == ours.shape or "custom_generate" in options


def test_a_model_that_is_not_compressed_uses_the_stock_loop(loaded, said):
    model, processor = loaded
    inputs = encode(processor, PROMPTS[:1])
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(decode_module.generate(model, **inputs, max_new_tokens=5, do_sample=False), tokens)
    assert "not under sparsemm_lmms.compress" in said[0]


def test_modes_are_checked(loaded):
    model, processor = loaded
    inputs = encode(processor, PROMPTS[:1])
    with compress(model, settings("called", "fullkv")) as session:
        with pytest.raises(ValueError, match="cuda_graph=on needs a CUDA device, but the model is on cpu"):
            session.generate(**inputs, cuda_graph="on")
        with pytest.raises(ValueError, match="cuda_graph='yes' is unknown; use auto, on or off"):
            session.generate(**inputs, cuda_graph="yes")
    check_mode("on", torch.device("cuda", 0))


def test_reasons_known_before_a_capture(loaded):
    model, processor = loaded
    inputs = encode(processor, PROMPTS[:1])
    with torch.no_grad(), compress(model, settings("called", "fullkv")) as session:
        cache = model(**inputs)[CACHE_NAME]
        assert "kernel_backend=torch" in uncapturable(model, cache)
    with torch.no_grad(), compress(model, settings("replayed", "fullkv")) as session:
        decoder_for("replayed")
        cache = model(**inputs, **{CACHE_NAME: session.new_cache()})[CACHE_NAME]
        assert uncapturable(model, cache) is None
        handle = model.lm_head.register_forward_hook(lambda *_: None)
        assert "module lm_head has forward hooks" in uncapturable(model, cache)
        handle.remove()
        model.hf_device_map = {"model": 0, "lm_head": 1}
        assert "several devices" in uncapturable(model, cache)
        del model.hf_device_map


def test_a_cache_that_moved_is_noticed(loaded):
    model, processor = loaded
    inputs = encode(processor, PROMPTS[:1])
    with torch.no_grad(), compress(model, settings("called", "fullkv")) as session:
        cache = model(**inputs, **{CACHE_NAME: session.new_cache(4)})[CACHE_NAME]

        class Nothing:
            def capture(self, step): ...

            def replay(self): ...

        replay = Replay(lambda: None, cache, Nothing())
        for _ in range(3):
            replay()
        assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 2
        cache.reserve(100)
        with pytest.raises(RuntimeError, match="moved under a captured decode step"):
            replay()
        replay.look_again()
        replay()


def test_a_segment_without_room_is_an_error(loaded, monkeypatch):
    """Were the room ever miscounted, the device refuses to write and generate raises."""
    model, processor = loaded
    inputs = encode(processor, PROMPTS[:1])
    with compress(model, settings("called", "fullkv")) as session:
        cache = session.new_cache(3)
        monkeypatch.setattr(type(cache.layers[0]), "reserve", lambda self, tokens: None)
        with pytest.raises(RuntimeError, match="ran out of room"):
            session.generate(**inputs, max_new_tokens=NEW, do_sample=False, **{CACHE_NAME: cache}, eos_token_id=NEVER)


@pytest.mark.parametrize("every", [2, 3, 8])
def test_the_end_is_seen_late_but_seen(every):
    finished = torch.zeros(3, dtype=torch.bool)
    check = EndCheck(finished, every)
    assert not any(check() for _ in range(5))
    finished[:] = True
    seen = [check() for _ in range(2 * every)]
    assert any(seen)


def test_said_once(caplog):
    say_once.cache_clear()
    say_once("This stands in the log one time.")
    say_once("This stands in the log one time.")
    assert say_once.cache_info().misses == 1 and say_once.cache_info().hits == 1


@pytest.mark.gpu
@pytest.mark.parametrize("picked", [[0], [0, 1, 2, 3]], ids=["one", "padded batch"])
@pytest.mark.parametrize("method", ["sparsemm", "fullkv"])
def test_graph_on_a_gpu(loaded, picked, method, said):
    """The real thing, against the stock loop on the same kernels, in float32: greedy, ends, sampling, moved stores."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: torch.cuda.is_available() is False")
    model, processor = loaded
    model = model.to("cuda")
    try:
        inputs = encode(processor, [PROMPTS[i] for i in picked]).to("cuda")
        config = CompressionConfig(method=method, budget=10, **SMALL)
        with compress(model, config, scores_for(method)) as session:
            decoder = Decoder(cuda_graph="on")
            free, same = both(model, session, inputs, decoder, max_new_tokens=40, eos_token_id=NEVER)
            assert_same(free, same)
            ends = staggered_ends(free[0][:, inputs["input_ids"].shape[1] :])
            assert_same(*both(model, session, inputs, decoder, max_new_tokens=60, eos_token_id=ends))
            sampling = dict(do_sample=True, top_k=30, top_p=0.9, max_new_tokens=40)
            assert_same(*both(model, session, inputs, decoder, **sampling))
            penalty = dict(max_new_tokens=40, repetition_penalty=1.3)
            assert_same(*both(model, session, inputs, decoder, **penalty))
            assert not any("Decoding without" in message for message in said)
    finally:
        model.to("cpu")
