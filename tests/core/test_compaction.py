"""A cache that stays within `max_cache` while it writes: against heads that are plain lists of rows."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from sparsemm_lmms import CompressionConfig, compress
from sparsemm_lmms.cache import CACHE_NAME
from sparsemm_lmms.decode import Decoder
from sparsemm_lmms.head_scores import HeadScores
from sparsemm_lmms.kernels.backend import interpreted
from sparsemm_lmms.registry import find_scorer, scorer_names
from tests.kernels import naive

from .tape import TapeGraph, fast_kernels

LAYERS, Q_HEADS, KV_HEADS, DIM = 2, 4, 2, 16
WINDOW, KERNEL = 4, 3
NEVER = 10_000  # an end token outside the vocabulary


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=Q_HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=4096, attn_implementation="sdpa", initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def settings(budget=16, max_cache=40, method="snapkv", **more):
    return CompressionConfig(method=method, budget=budget, max_cache=max_cache, window_size=WINDOW, **more)


def scores():
    table = torch.tensor([[1.0, 2.0, 0.5, 0.5], [4.0, 1.0, 2.0, 1.0]])
    return HeadScores(table.numpy())


def prompts(*lengths, seed=0):
    """Left-padded ids and their mask."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(ids, lengths, strict=True):
        row[len(row) - length :] = torch.randint(1, 97, (length,), generator=draw)
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
    return {"input_ids": ids, "attention_mask": mask}


class SlowCache:
    """One prompt's heads as lists of (key, value) rows, one layer after the other; greedy, one token at a time."""

    def __init__(self, kept, config):
        self.config, self.kept = config, kept  # [layer][head] positions that prefill keeps
        self.rows = [[[] for _ in range(KV_HEADS)] for _ in range(LAYERS)]
        self.queries = [[] for _ in range(LAYERS)]
        self.appended = self.compactions = 0
        outside = [len(head) - config.window_size for layer in kept for head in layer]
        total = config.base * len(outside)
        exact = [Fraction(count * total, sum(outside)) for count in outside]
        share = [int(x) for x in exact]
        for i in sorted(range(len(exact)), key=lambda i: (share[i] - exact[i], i))[: total - sum(share)]:
            share[i] += 1
        self.share = [share[i * KV_HEADS : (i + 1) * KV_HEADS] for i in range(LAYERS)]

    def attention(self, module, query, key, value, mask, scaling, **_):
        layer, tokens = module.layer_idx, query.shape[2]
        if layer == 0 and tokens == 1:
            if self.appended == self.config.chunk:
                self.compact(scaling)
            self.appended += 1
        self.queries[layer] = (self.queries[layer] + list(query[0].unbind(1)))[-self.config.window_size :]
        if tokens > 1:
            for h, rows in enumerate(self.rows[layer]):
                rows += [(key[0, h, i], value[0, h, i]) for i in self.kept[layer][h].tolist()]
            group = Q_HEADS // KV_HEADS
            key, value = (x.repeat_interleave(group, 1) for x in (key, value))
            logits = (query @ key.mT * scaling).masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
            return (logits.softmax(-1) @ value).transpose(1, 2), None
        out = []
        for h, rows in enumerate(self.rows[layer]):
            rows.append((key[0, h, 0], value[0, h, 0]))
            keys, values = (torch.stack(x) for x in zip(*rows, strict=True))
            own = query[0, h * 2 : h * 2 + 2, 0]
            out.append((own @ keys.T * scaling).softmax(-1) @ values)
        return torch.cat(out)[None, None], None

    def compact(self, scaling):
        self.appended, self.compactions = 0, self.compactions + 1
        window = self.config.window_size
        for layer, heads in enumerate(self.rows):
            query = torch.stack(self.queries[layer], dim=1)
            for h, rows in enumerate(heads):
                keys = torch.stack([key for key, _ in rows])
                judged = self.judge(query[h * 2 : h * 2 + 2], keys, scaling)
                order = sorted(range(len(judged)), key=lambda i: (-judged[i], -i))[: self.share[layer][h]]
                heads[h] = [rows[i] for i in sorted(order)] + rows[-window:]

    def judge(self, query, keys, scaling):
        kernel, pooling = (7, "maxpool") if self.config.compact_by == "rkv" else (KERNEL, "avgpool")
        seen = naive.window_score(query[None], keys[None, None], scaling, kernel, pooling, "mean")[0, 0].tolist()
        if self.config.compact_by == "window":
            return seen
        unit = (keys / keys.norm(dim=-1, keepdim=True)).double()
        cosine = unit @ unit.T
        for i, row in enumerate(cosine):
            row[i] = 0
            alike = (row > 0.5).nonzero().flatten().tolist()
            if alike:
                row[alike[-1]] = 0
        likeness = cosine.mean(0).softmax(0).tolist()
        return [0.1 * a - 0.9 * b for a, b in zip(seen, likeness, strict=False)]


class Books(StoppingCriteria):
    """Bytes and addresses of the cache after each step."""

    only_looks_on = True

    def __init__(self, session):
        self.session, self.bytes, self.addresses = session, [], []

    def __call__(self, input_ids, scores, **kwargs):
        cache = self.session.cache
        if input_ids.shape[1] % 5:
            return torch.zeros(len(input_ids), dtype=torch.bool)
        self.bytes.append(cache.report()["kv_bytes_allocated"])
        self.addresses.append([x.data_ptr() for x in cache.static_tensors()])
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(("compact_by", "new"), [("window", 2000), ("rkv", 300)])
def test_tokens_and_rows_are_those_of_plain_lists(model, compact_by, new):
    config = settings(method="sparsemm", kernel_size=KERNEL, compact_by=compact_by)
    inputs = prompts(50)
    with compress(model, config, scores()) as session:
        books = Books(session)
        cache = session.new_cache(100)
        tokens = session.generate(
            **inputs, max_new_tokens=new, do_sample=False, eos_token_id=None, **{CACHE_NAME: cache},
            stopping_criteria=StoppingCriteriaList([books]),
        )  # fmt: skip
        kept = [cache.kept_positions(i)[0] for i in range(LAYERS)]
        report = cache.report()
    assert len(set(books.bytes[1:])) == 1 and all(x == books.addresses[1] for x in books.addresses[1:])
    row = 2 * DIM * 4
    queries = LAYERS * Q_HEADS * WINDOW * DIM * 4
    assert books.bytes[-1] == config.max_cache * LAYERS * KV_HEADS * row + queries
    assert report["kv_bytes_full"] == (50 + new - 1) * LAYERS * KV_HEADS * row
    assert report["kept_tokens"] == sum(len(head) for layer in kept for head in layer) / (LAYERS * KV_HEADS)

    slow = SlowCache(kept, config)
    AttentionInterface.register("lists", slow.attention)
    plain = copy.deepcopy(model)
    plain.config._attn_implementation = "lists"
    found = inputs["input_ids"][0].tolist()
    with torch.no_grad():
        given, place = inputs["input_ids"], torch.arange(50)[None]
        for _ in range(new):
            logits = plain(input_ids=given, position_ids=place, use_cache=False).logits
            given, place = logits[:, -1:].argmax(-1), place[:, -1:] + 1
            found.append(int(given))
    assert slow.compactions == (new - 2) // config.chunk > 10
    assert tokens[0].tolist() == found and len(set(found[50:])) > 20
    for layer, heads in zip(cache.full_layers, slow.rows, strict=True):
        for h, rows in enumerate(heads):
            start, length = int(layer.start[0, h]), int(layer.length[0, h])
            assert length == len(rows)
            for store, own in zip((layer.keys, layer.values), zip(*rows, strict=True), strict=True):
                torch.testing.assert_close(store[start : start + length], torch.stack(own), atol=1e-4, rtol=1e-4)


def rows_of(cache):
    """[sequence][layer, head] -> the keys that it holds."""
    return [
        [
            layer.keys[int(start) : int(start) + int(length)]
            for layer in cache.full_layers
            for start, length in zip(layer.start[b], layer.length[b], strict=True)
        ]
        for b in range(len(cache.prompt_lengths))
    ]


def alone_and_together(model, config, lengths, new, head_scores=None, **kwargs):
    """Tokens and rows of a padded batch must be those of its prompts one by one; returns the batch's cache."""
    inputs = prompts(*lengths)
    kwargs = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None} | kwargs
    with compress(model, config, head_scores) as session:
        tokens, cache = session.generate(**inputs, **kwargs), session.cache
        together = rows_of(cache)
        beams = kwargs.get("num_beams", 1)
        for b, length in enumerate(lengths):
            ids = inputs["input_ids"][b : b + 1, -length:]
            own = session.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)
            assert torch.equal(own[0, length:], tokens[b, max(lengths) :])
            for mine, theirs in zip(rows_of(session.cache), together[b * beams : (b + 1) * beams], strict=True):
                for x, y in zip(mine, theirs, strict=True):
                    torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    return cache


SHORT_AND_LONG = (30, 3, 9, 50, 17, 41, 1, 25)


@pytest.mark.parametrize("compact_by", ["window", "rkv"])
@pytest.mark.parametrize("method", ["sparsemm", "adakv", "pyramidkv", "cake"])
def test_padded_batches(model, method, compact_by):
    config = settings(method=method, compact_by=compact_by, max_cache=26)
    cache = alone_and_together(model, config, SHORT_AND_LONG, 45, scores())
    assert all((layer.newest.dropped > 0).all() for layer in cache.full_layers)
    shares = sum(layer.newest.share.sum(1) for layer in cache.full_layers)
    assert shares.tolist() == [config.budget * LAYERS * KV_HEADS] * len(SHORT_AND_LONG)


@pytest.mark.parametrize("scorer", [name for name in scorer_names() if not find_scorer(name).reads_turn])
def test_every_scorer_judges_again(model, scorer):
    alone_and_together(model, settings(method=f"{scorer}+uniform", max_cache=20), (30, 3, 12), 12)


def test_beams_are_compacted_as_well(model):
    alone_and_together(model, settings(max_cache=20), (30, 9), 14, num_beams=2)


@pytest.mark.parametrize("form", ["stock", "replayed", "replayed, checked late"])
def test_a_captured_step_outlives_compactions(model, form, monkeypatch):
    """The stock loop, and replays; sequences end at different steps, and a late look has compactions in its reach."""
    fast_kernels(monkeypatch)
    if form != "stock" and not interpreted():
        pytest.skip("triton was imported without TRITON_INTERPRET=1, so its kernels cannot run on the CPU")
    config = settings(max_cache=22)
    inputs = prompts(30, 9, 21)
    run = {**inputs, "do_sample": False, "pad_token_id": 0}
    with compress(model, config) as session:
        free = session.generate(**run, max_new_tokens=60, eos_token_id=NEVER)[:, 30:]
        firsts = [[x for i, x in enumerate(row) if i > 14 and x not in row[:i]] for row in free.tolist()]
        eos = sorted(fresh[0] for fresh in firsts)
        wanted = session.generate(**run, max_new_tokens=60, eos_token_id=eos)
        rows = rows_of(session.cache)
    backend = "torch" if form == "stock" else "triton"
    graph = TapeGraph()
    decoder = Decoder(graph=graph, check_every=4 if form == "replayed, checked late" else None)
    custom = {} if form == "stock" else {"custom_generate": decoder}
    with compress(model, settings(max_cache=22, kernel_backend=backend)) as session:
        made = model.generate(**run, max_new_tokens=60, eos_token_id=eos, **custom)
        assert torch.equal(made, wanted)
        for mine, theirs in zip(rows_of(session.cache), rows, strict=True):
            for x, y in zip(mine, theirs, strict=True):
                torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    if form != "stock":
        assert graph.captures == 1 and graph.replays > 2 * config.chunk


def test_room_grows_until_a_chunk_fits(model):
    """Short answers do not take the room of long ones, and the store moves only until it has its final size."""
    config = settings(max_cache=48)
    with compress(model, config) as session:
        cache = session.new_cache(4)
        books = Books(session)
        run = {**prompts(30), "do_sample": False, "eos_token_id": None, CACHE_NAME: cache}
        session.generate(**run, max_new_tokens=80, stopping_criteria=StoppingCriteriaList([books]))
    assert books.bytes[0] < books.bytes[-1] and books.bytes == sorted(books.bytes)
    moves = [a != b for a, b in zip(books.addresses, books.addresses[1:], strict=False)]
    assert any(moves[:4]) and not any(moves[4:])


def test_what_cannot_be_compacted_is_refused(model):
    for given, told in (
        ({"max_cache": 16}, "max_cache=16 must be larger than budget=16"),
        ({"method": "expected_attention"}, "method='expected_attention' reads how .* use compact_by=rkv"),
        ({"compact_by": "random"}, "Unknown compact_by 'random'"),
    ):
        with pytest.raises(ValueError, match=told):
            settings(**given)
    assert settings(method="fullkv").chunk == 0
    with compress(model, settings(max_cache=20)) as session, torch.no_grad():
        cache = session.new_cache(8)
        model(**prompts(30), **{CACHE_NAME: cache})
        one = torch.ones(1, 1, dtype=torch.long)
        with pytest.raises(ValueError, match="max_cache=20 compacts the cache of one prompt"):
            model(one.expand(1, 2), **{CACHE_NAME: cache})
        for _ in range(6):
            model(one, **{CACHE_NAME: cache})
        with pytest.raises(ValueError, match="3 tokens cannot be rolled back: 2 came after"):
            cache.rollback(3)
        cache.rollback(2)
        with pytest.raises(ValueError, match="behind a rollback need max_cache=0"):
            model(one, **{CACHE_NAME: cache})
