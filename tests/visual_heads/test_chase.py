"""Chase against the rule recomputed from eager attention matrices: both families, both modes, batches, resumption."""

import json
import multiprocessing
import os
import resource
import signal
import string
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextForConditionalGeneration

from sparsemm_lmms.head_scores import HeadScores, provenance_path
from sparsemm_lmms.visual_heads import passes
from sparsemm_lmms.visual_heads.chase import ChaseSettings, text_shape
from sparsemm_lmms.visual_heads.chase import score_heads as chase
from sparsemm_lmms.visual_heads.inputs import chat_messages
from sparsemm_lmms.visual_heads.partial import PartialResults
from sparsemm_lmms.visual_heads.samples import Box, CalibrationSample, Skipped, Span
from sparsemm_lmms.visual_heads.token_grid import grid_for

from . import tiny

FAMILIES = {
    "llava-vicuna": (lambda: tiny.llava_next("vicuna"), tiny.llava_processor),
    "llava-mistral": (lambda: tiny.llava_next("mistral"), tiny.llava_processor),
    "qwen2-vl": (tiny.qwen2_vl, tiny.qwen_processor),
}
LETTERS = string.ascii_letters + string.digits


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    model, processor = FAMILIES[request.param]
    return model(), processor()


def noise(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def quarters(width, height, item=0):
    """Four boxes that share the letters among them, so that nearly every letter occurs in exactly one."""
    boxes = []
    for k in range(4):
        left, top = (k % 2) * width / 2, (k // 2) * height / 2
        text = LETTERS[k::4] + ("e" if k else "")  # "e" occurs in several and never counts
        boxes.append(Box(text, (left + 1, top + 1, left + width / 2 - 1, top + height / 2 - 1), item))
    return tuple(boxes)


def make_samples(count=5):
    sizes = [(112, 112), (150, 60), (60, 170), (100, 100), (200, 90)]
    rng = np.random.default_rng(0)
    for k in range(count):
        width, height = sizes[k % len(sizes)]
        answer = "".join(rng.choice(list(LETTERS + " ."), 6 + 3 * k))
        picture = noise(width, height, k)
        yield CalibrationSample(picture, f"Read{'!' * k}", answer, quarters(width, height), name=f"s{k}")


def reference_score(model, processor, sample, mode, views="high", max_new_tokens=12):
    """The published rule, token by token, from attention matrices; an own path through processor and model."""
    text = processor.apply_chat_template(chat_messages(sample), tokenize=False, add_generation_prompt=True)
    pictures = {"videos": [list(sample.video)]} if sample.video else {"images": list(sample.images)}
    inputs = processor(text=[text], return_tensors="pt", add_special_tokens=False, **pictures)
    sizes = ([], sample.item_sizes) if sample.video else (sample.item_sizes, [])
    (grid,) = grid_for(model.config).grids(inputs, *sizes)
    prompt = inputs["input_ids"].shape[1]
    layers, heads, _ = text_shape(model.config)
    score, counted = np.zeros((layers, heads)), 0
    model.set_attn_implementation("eager")
    try:
        if mode == "teacher":
            tokens = processor.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
        else:
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
            tokens = out[0, prompt:].tolist()
        full = dict(inputs)
        full["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
        full["attention_mask"] = torch.ones_like(full["input_ids"])
        if "mm_token_type_ids" in full:
            kinds = full["mm_token_type_ids"]
            full["mm_token_type_ids"] = torch.cat([kinds, torch.zeros(1, len(tokens), dtype=kinds.dtype)], dim=1)
        with torch.no_grad():
            attentions = model(**full, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    for j, token in enumerate(tokens):
        if token == 2:
            break
        word = processor.tokenizer.decode([token]).strip()
        having = [box for box in sample.boxes if word and word in box.text and token >= 8]
        if len(having) != 1:
            continue
        counted += 1
        shown = set(grid.inside(having[0].xyxy, having[0].item, views).tolist())
        for layer in range(layers):
            for head in range(heads):
                if int(attentions[layer][0, head, prompt - 1 + j].argmax()) in shown:
                    score[layer, head] += 1 / len(shown)
    return score, counted


@pytest.mark.parametrize("mode", ["teacher", "free"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_rule_recomputed_from_attention_matrices(family, mode, batch_size, tmp_path):
    model, processor = family
    samples = list(make_samples())
    settings = ChaseSettings(mode=mode, batch_size=batch_size, max_new_tokens=12)
    scores = chase(model, processor, samples, tmp_path / "s.json", settings, progress=False)
    references = [reference_score(model, processor, sample, mode) for sample in samples]
    expected = np.mean([score for score, _ in references], axis=0)
    np.testing.assert_allclose(scores.values, expected, rtol=1e-9, atol=1e-12)
    assert scores.values.any()
    spread = np.std([score for score, _ in references], axis=0, ddof=1) / len(samples) ** 0.5
    np.testing.assert_allclose(scores.stderr, spread, rtol=1e-9, atol=1e-12)
    facts = json.loads(provenance_path(tmp_path / "s.json").read_text())
    assert facts["tokens_counted"] == sum(counted for _, counted in references)
    assert facts["images"] == 5 and facts["mode"] == mode and facts["query_row"] == "predicting"
    assert (facts["layers"], facts["q_heads"], facts["kv_heads"]) == text_shape(model.config)
    assert np.array_equal(HeadScores.load(tmp_path / "s.json").values, scores.values)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.json", "s.provenance.json"]


def test_all_views_of_llava_next(tmp_path):
    model, processor = tiny.llava_next(), tiny.llava_processor()
    samples = list(make_samples(3))
    scores = chase(
        model, processor, samples, tmp_path / "s.json", ChaseSettings("teacher", views="all"), progress=False
    )
    expected = np.mean([reference_score(model, processor, s, "teacher", "all")[0] for s in samples], axis=0)
    np.testing.assert_allclose(scores.values, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("held", [1, 4, 64])
def test_free_running_is_teacher_forcing_on_the_models_own_text(family, held, tmp_path, monkeypatch):
    """Two code paths (cache and one forward), one answer: what the model says, given back as the known text."""
    monkeypatch.setattr(passes, "HELD", held)
    model, processor = family
    told = []
    for sample in make_samples():
        text = processor.apply_chat_template(chat_messages(sample), tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=list(sample.images), return_tensors="pt", add_special_tokens=False)
        out = model.generate(**inputs, max_new_tokens=15, do_sample=False, pad_token_id=0)
        answer = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        told.append(replace(sample, answer=answer))
    free = chase(model, processor, told, tmp_path / "f.json", ChaseSettings(max_new_tokens=15), progress=False)
    forced = chase(model, processor, told, tmp_path / "t.json", ChaseSettings("teacher"), progress=False)
    free_facts, forced_facts = free.provenance, forced.provenance
    assert free_facts["tokens_counted"] == forced_facts["tokens_counted"] > 0
    np.testing.assert_allclose(free.values, forced.values, rtol=1e-9)
    np.testing.assert_allclose(free_facts["attention_mass"], forced_facts["attention_mass"], rtol=1e-3, atol=1e-6)


def test_attention_mass_is_the_mean_over_counted_tokens(tmp_path):
    """One token, one box over the whole image: its mass is the row's sum over the high-resolution tokens."""
    model, processor = tiny.llava_next(), tiny.llava_processor()
    sample = CalibrationSample(noise(112, 112, 1), "Read", "a", (Box("a", (0, 0, 112, 112)),))
    text = processor.apply_chat_template(chat_messages(sample), tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[sample.image], return_tensors="pt", add_special_tokens=False)
    (grid,) = grid_for(model.config).grids(inputs, [(112, 112)])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        rows = torch.stack(model(**inputs, output_attentions=True).attentions)[:, 0, :, -1].numpy()
    model.set_attn_implementation("sdpa")
    try:
        scores = chase(model, processor, [sample], tmp_path / "s.json", ChaseSettings("teacher"), progress=False)
        mass = scores.provenance["attention_mass"]
    except ValueError as error:  # no head's argmax in the image: mass can't be reported
        pytest.skip(str(error))
    np.testing.assert_allclose(mass, rows[..., grid.positions[grid.view == 1]].sum(-1), atol=1e-5)


def test_several_images_and_a_video(tmp_path):
    model, processor = tiny.qwen2_vl(), tiny.qwen_processor()
    two = CalibrationSample(
        (noise(112, 84, 1), noise(60, 120, 2)), "Which?", "aXbYc09", quarters(112, 84)[:2] + quarters(60, 120, 1)[2:]
    )
    frames = tuple(noise(112, 112, 10 + k) for k in range(4))
    clip = CalibrationSample((), "What?", "abcdXYZ", quarters(112, 112), video=frames)
    llava, llava_processor = tiny.llava_next(), tiny.llava_processor()
    for mode in ("teacher", "free"):
        alone = ChaseSettings(mode, max_new_tokens=10)
        for name, sample in (("pictures", two), ("clip", clip)):
            path = tmp_path / f"{name}-{mode}.json"
            chase(model, processor, [sample], path, alone, progress=False)
            expected = reference_score(model, processor, sample, mode, max_new_tokens=10)[0]
            np.testing.assert_allclose(HeadScores.load(path).values, expected, rtol=1e-9, atol=1e-12)
        settings = ChaseSettings(mode, max_new_tokens=10, batch_size=2)
        scores = chase(model, processor, [two, clip], tmp_path / f"{mode}.json", settings, progress=False)
        expected = np.mean([reference_score(model, processor, s, mode, max_new_tokens=10)[0] for s in (two, clip)], 0)
        np.testing.assert_allclose(scores.values, expected, rtol=1e-9, atol=1e-12)
        scores = chase(llava, llava_processor, [two], tmp_path / f"l{mode}.json", settings, progress=False)
        expected = reference_score(llava, llava_processor, two, mode, max_new_tokens=10)[0]
        np.testing.assert_allclose(scores.values, expected, rtol=1e-9, atol=1e-12)
        assert scores.stderr is None  # one sample has no spread


def test_spans_count_characters_that_many_boxes_share(family, tmp_path):
    model, processor = family
    spans = tuple(Span(k, k + 1, (28 * k, 0, 28 * k + 28, 112)) for k in range(4))
    sample = CalibrationSample(noise(112, 112, 3), "Read", "aaba", spans=spans)
    boxes = tuple(Box(letter, span.xyxy) for letter, span in zip("ABCD", spans, strict=True))
    same = CalibrationSample(noise(112, 112, 3), "Read", "ABCD", boxes)
    tokens = processor.tokenizer("aaba", add_special_tokens=False)["input_ids"]
    aligned = chase(model, processor, [sample] * 2, tmp_path / "a.json", ChaseSettings("teacher"), progress=False)
    assert aligned.provenance["tokens_counted"] == 2 * len(tokens)
    with pytest.raises(ValueError, match="Not one of 4 written tokens"):
        boxes = tuple(Box("a", span.xyxy) for span in spans)
        repeated = CalibrationSample(sample.image, "Read", "aaaa", boxes)
        chase(model, processor, [repeated], tmp_path / "r.json", ChaseSettings("teacher"), progress=False)
    assert not (tmp_path / "r.json").exists()
    # The first token's row is the same prompt position whatever follows, so its credit follows the same rule.
    first = replace(sample, answer="a", spans=spans[:1]), replace(same, answer="A", boxes=same.boxes[:1])
    tables = [_table_or_zero(model, processor, one, tmp_path / f"{k}.json") for k, one in enumerate(first)]
    np.testing.assert_array_equal(*tables)


def _table_or_zero(model, processor, sample, path):
    try:
        return chase(model, processor, [sample], path, ChaseSettings("teacher"), progress=False).values
    except ValueError as error:
        assert "zero" in str(error)
        return np.zeros(text_shape(model.config)[:2])


def run(model, processor, samples, path, **options):
    settings = ChaseSettings("teacher", batch_size=2)
    return chase(model, processor, samples, path, settings, progress=False, **options)


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path):
    model, processor = tiny.llava_next("mistral"), tiny.llava_processor()
    samples = [*make_samples(3), Skipped("broken.png", "is not readable."), *make_samples(4)]
    whole = run(model, processor, samples, tmp_path / "whole.json")

    class Killed(Exception):
        pass

    def until(stop):
        for k, sample in enumerate(samples):
            if k == stop:
                raise Killed
            yield sample

    # The source must look the same to the settings check: a generator both times.
    path = tmp_path / "killed.json"
    partial = tmp_path / "killed.json.partial.jsonl"
    for stop in (3, 6):
        with pytest.raises(Killed):
            run(model, processor, until(stop), path)
        assert not path.exists() and partial.exists()
        with open(partial, "ab") as file:
            file.write(b'{"index": 99, "sco')  # killed while writing
    looked = []
    stock = passes.teacher_forced

    def counting(model, batch, *rest):
        looked.extend(sample.name for sample in batch.samples)
        return stock(model, batch, *rest)

    import sparsemm_lmms.visual_heads.chase as module

    module.teacher_forced, before = counting, module.teacher_forced
    try:
        resumed = run(model, processor, until(None), path)
    finally:
        module.teacher_forced = before
    assert looked == ["s2", "s3"]  # only the last batch was left
    assert np.array_equal(resumed.values, whole.values) and np.array_equal(resumed.stderr, whole.stderr)
    assert path.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not partial.exists()
    assert resumed.provenance["skipped"] == {"count": 1, "first": ["broken.png: is not readable."]}


@pytest.mark.parametrize("limit", [1, 3, 4, 5])
def test_a_killed_run_is_ended_with_fewer_or_more_inputs(limit, tmp_path):
    model, processor = tiny.llava_next(), tiny.llava_processor()

    def killed():
        yield from make_samples(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, processor, killed(), tmp_path / "s.json", limit=5)
    ended = run(model, processor, (sample for sample in make_samples(5)), tmp_path / "s.json", limit=limit)
    whole = run(model, processor, (sample for sample in make_samples(5)), tmp_path / "w.json", limit=limit)
    assert np.array_equal(ended.values, whole.values) and ended.provenance == {**whole.provenance}
    assert ended.provenance["images"] == ended.provenance["inputs"] == limit


def _in_a_child(work):
    """Exit code of ``work`` in a forked process (a spawned one would import transformers anew)."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    return process.exitcode


def test_kill_9_between_two_images(tmp_path):
    model, processor = tiny.llava_next(), tiny.llava_processor()

    def killed_after(count):
        for k, sample in enumerate(make_samples(4)):
            if k == count:
                os.kill(os.getpid(), signal.SIGKILL)
            yield sample

    def again(count, path):
        chase(model, processor, killed_after(count), path, ChaseSettings("teacher"), progress=False)

    for count in (1, 3):
        assert _in_a_child(lambda count=count: again(count, tmp_path / "k.json")) == -signal.SIGKILL
        assert os.listdir(tmp_path) == ["k.json.partial.jsonl"]
        lines = (tmp_path / "k.json.partial.jsonl").read_bytes().splitlines()
        assert len(lines) == 1 + count  # header
    again(None, tmp_path / "k.json")
    again(None, tmp_path / "w.json")
    for name in ("{}.json", "{}.provenance.json"):
        assert (tmp_path / name.format("k")).read_bytes() == (tmp_path / name.format("w")).read_bytes()


def test_partial_of_other_settings_is_refused(tmp_path):
    model, processor = tiny.llava_next(), tiny.llava_processor()

    def breaking():
        yield from make_samples(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, processor, breaking(), tmp_path / "s.json")
    with pytest.raises(ValueError, match=r"other settings \(views: 'high' there, 'all' here\); delete it"):
        settings = ChaseSettings("teacher", batch_size=2, views="all")
        chase(model, processor, breaking(), tmp_path / "s.json", settings, progress=False)


def test_a_partial_file_of_other_images_weights_or_processor_is_refused(tmp_path):
    tiny.llava_next("mistral").save_pretrained(tmp_path / "m")
    processor = tiny.llava_processor()

    def load():
        model = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "m")
        return tiny.sayable(model.eval())

    def killed(samples):
        yield from samples
        raise KeyboardInterrupt

    def resumed(samples, model=None, processor=processor):
        return run(model or load(), processor, killed(samples), tmp_path / "s.json")

    good = list(make_samples(4))
    with pytest.raises(KeyboardInterrupt):
        resumed(good[:2])
    before = (tmp_path / "s.json.partial.jsonl").read_bytes()
    others = [
        (replace(good[0], image=noise(112, 112, 9)), "input 0: 's0' there, another here"),
        (replace(good[0], answer="abc"), "input 0: 's0' there, another here"),
        (replace(good[0], prompt="?"), "another here"),
        (replace(good[0], boxes=good[0].boxes[1:]), "another here"),
        (replace(good[0], name="new"), "input 0: 's0' there, 'new' here"),
        (Skipped("s0", "is gone."), "another here"),
    ]
    for other, words in others:
        with pytest.raises(
            ValueError, match=f"s.json.partial.jsonl belongs to a run on other images .*{words}.*delete"
        ):
            resumed([other, *good[1:]])
    with pytest.raises(ValueError, match="input 1: 's1' there, none here"):
        run(load(), processor, (sample for sample in good[:1]), tmp_path / "s.json")
    with pytest.raises(ValueError, match="other settings .processor: '"):
        resumed(good, processor=tiny.llava_processor(do_normalize=False))
    os.utime(tmp_path / "m" / "model.safetensors", (1, 1))
    with pytest.raises(ValueError, match="other settings .checkpoint: '"):
        resumed(good)
    assert (tmp_path / "s.json.partial.jsonl").read_bytes() == before
    model = load()
    scores = run(model, processor, iter(good), tmp_path / "s.json", overwrite=True)
    assert np.array_equal(scores.values, run(model, processor, iter(good), tmp_path / "w.json").values)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: {**record, "score": "abc"}, 'has "?.?abc.* for score, not a list'),
        (lambda record: {**record, "score": record["score"][1:]}, "score is no table of 3 x 4 numbers"),
        (lambda record: {**record, "mass": [[1], *record["mass"][1:]]}, "mass is no table of 3 x 4 numbers"),
        (lambda record: {**record, "tokens": None}, "tokens"),
        (lambda record: {**record, "index": 5}, "index is 5, not 0"),
        (lambda record: {**record, "skipped": 1}, "skipped"),
        (lambda record: [], "has a list for its content"),
    ],
)
def test_a_partial_file_that_holds_something_else_is_refused(change, said, tmp_path):
    settings = {"layers": 3, "q_heads": 4}
    record = {"index": 0, "name": "a", "sample": "f", "tokens": 1, "counted": 1}
    record |= {"score": [[0.5] * 4] * 3, "mass": [[0] * 4] * 3}
    with PartialResults(tmp_path / "s.json", settings, 1) as partial:
        partial.append([record])
    with PartialResults(tmp_path / "s.json", settings, 1) as partial:
        assert partial.records == [record]
    path = tmp_path / "s.json.partial.jsonl"
    header = path.read_bytes().splitlines()[0]
    path.write_bytes(header + b"\n" + json.dumps(change(record)).encode() + b"\n")
    with pytest.raises(ValueError, match=rf"Line 2 of {path}:? .*{said}.*; delete it or choose another output"):
        PartialResults(tmp_path / "s.json", settings, 1).__enter__()


def test_a_partial_file_that_is_no_text_or_no_file(tmp_path):
    path = tmp_path / "s.json.partial.jsonl"
    deep = b"[" * 100000
    for content, words in ((b"\xff\n{}\n", "not UTF-8"), (deep + b"\n{}\n", "deeper"), (b"3\n{}\n", "another version")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path} .*{words}.*; delete it"):
            PartialResults(tmp_path / "s.json", {}, 1).__enter__()
    path.unlink()
    for make in (os.mkfifo, os.mkdir):
        make(path)
        with pytest.raises(ValueError, match=f"{path} is no regular file; delete it"):
            PartialResults(tmp_path / "s.json", {}, 1).__enter__()
        path.unlink() if make is os.mkfifo else path.rmdir()


class Described(list):
    """Samples that say what they are, and count how often they are read."""

    read = 0

    def __iter__(self):
        type(self).read += 1
        return super().__iter__()

    def describe(self):
        return {"source": "test", "names": [sample.name for sample in list.__iter__(self)]}


def test_a_finished_file_is_kept_and_no_other_run_replaces_it(tmp_path):
    model, processor, path = tiny.llava_next(), tiny.llava_processor(), tmp_path / "s.json"
    samples = Described(make_samples(3))
    made = run(model, processor, samples, path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert made.provenance["inputs"] == 3 and Described.read == 1
    assert run(model, processor, samples, path).content_hash == made.content_hash
    others = [
        (lambda: run(model, processor, samples, path, limit=2), "inputs: 3 there, 2 here"),
        (lambda: run(model, processor, Described(samples[1:]), path), r"data.names: \['s0', 's1', 's2'\] there"),
        (
            lambda: run(tiny.qwen2_vl(), tiny.qwen_processor(), samples, path),
            "model_type: 'llava_next' there, 'qwen2_vl'",
        ),
        (lambda: run(model, processor, samples, path, model_id="org/model"), "model: .* there, 'org/model' here"),
        (lambda: chase(model, processor, samples, path, ChaseSettings("free", batch_size=2)), "mode: 'teacher' there"),
        (lambda: run(model.double(), processor, samples, path), "dtype: 'float32' there, 'float64' here"),
        (lambda: run(model.float(), processor, samples[:], path), "data.source: 'test' there, 'list' here"),
    ]
    read = Described.read
    for other, words in others:
        with pytest.raises(
            ValueError, match=rf"--output {path} holds the scores of another run \(.*{words}.*--overwrite"
        ):
            other()
    assert Described.read == read and files == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    again = run(model, processor, samples, path, limit=2, overwrite=True)
    assert again.provenance["inputs"] == 2 and HeadScores.load(path).content_hash == again.content_hash

    unknown = tmp_path / "list.json"
    run(model, processor, samples[:], unknown)
    with pytest.raises(ValueError, match="these samples do not say what they are; give another name, or --overwrite"):
        run(model, processor, samples[:], unknown)
    provenance_path(path).unlink()
    with pytest.raises(ValueError, match="no record of how it was made; give another name, or --overwrite"):
        run(model, processor, samples, path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="no finished score file .*; give another name, or --overwrite"):
        run(model, processor, samples, path)


def test_a_run_that_did_nothing_leaves_nothing(tmp_path):
    model, processor = tiny.llava_next(), tiny.llava_processor()

    def nothing():
        raise FileNotFoundError("no such folder")
        yield

    with pytest.raises(FileNotFoundError):
        run(model, processor, nothing(), tmp_path / "s.json")
    assert not os.listdir(tmp_path)
    (tmp_path / "s.json.partial.jsonl").write_text('{"killed": "before the first image"}\n')
    assert run(model, processor, make_samples(2), tmp_path / "s.json").provenance["images"] == 2


def test_two_runs_into_one_output_are_refused(tmp_path):
    model, processor = tiny.llava_next(), tiny.llava_processor()

    def nested():
        yield from make_samples(2)
        with pytest.raises(ValueError, match="Another process is writing"):
            run(model, processor, nested(), tmp_path / "s.json")

    run(model, processor, nested(), tmp_path / "s.json")


def test_full_disk_keeps_whole_lines(tmp_path, monkeypatch):
    model, processor = tiny.llava_next(), tiny.llava_processor()
    from sparsemm_lmms.visual_heads import partial as module

    calls = []
    stock = module.os.fsync

    def full_disk(handle):
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return stock(handle)

    monkeypatch.setattr(module.os, "fsync", full_disk)
    samples = list(make_samples(5))
    with pytest.raises(OSError, match="No space"):
        run(model, processor, samples, tmp_path / "s.json")
    lines = (tmp_path / "s.json.partial.jsonl").read_bytes()
    assert lines.endswith(b"\n") and len(lines.splitlines()) == 3  # header and the first batch
    monkeypatch.setattr(module.os, "fsync", stock)
    resumed = run(model, processor, samples, tmp_path / "s.json")
    assert np.array_equal(resumed.values, run(model, processor, samples, tmp_path / "w.json").values)


def test_a_write_that_the_system_refuses_midway(tmp_path):
    """The system takes part of a record, as a disk that fills up: whole lines stay, and the sentence says so."""
    model, processor = tiny.llava_next(), tiny.llava_processor()
    path, partial = tmp_path / "s.json", tmp_path / "s.json.partial.jsonl"

    def breaking():
        yield from make_samples(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, processor, breaking(), path)
    whole = partial.read_bytes()

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, resource.RLIM_INFINITY))
        try:
            run(model, processor, make_samples(5), path)
        except OSError as error:
            os._exit(
                0 if f"2 inputs are kept: make room and run the same command again: '{partial}'" in str(error) else 1
            )
        os._exit(2)

    assert _in_a_child(limited) == 0
    assert partial.read_bytes() == whole and os.listdir(tmp_path) == [partial.name]
    resumed = run(model, processor, make_samples(5), path)
    assert np.array_equal(resumed.values, run(model, processor, make_samples(5), tmp_path / "w.json").values)


def test_bad_inputs_are_named_counted_and_skipped(tmp_path):
    model, processor = tiny.llava_next(), tiny.llava_processor()
    good = list(make_samples(2))
    picture = noise(50, 50, 0)
    bad = [
        CalibrationSample(picture, "Read", "a", (), name="empty"),
        CalibrationSample(picture, "Read", "a", (Box("a", (60, 0, 70, 9)),), name="outside"),
        CalibrationSample(picture, "Read", "a", (Box("a", (9, 9, 9, 20)),), name="flat"),
        CalibrationSample(picture, "Read", "a", (Box("a", (0, 0, 9, 9), item=1),), name="which"),
        CalibrationSample(noise(4, 900, 0), "Read", "a", (Box("a", (0, 0, 4, 9)),), name="thin"),
        CalibrationSample((), "Read", "a", (Box("a", (0, 0, 9, 9)),), name="none"),
        Skipped("torn.png", "is not a readable image."),
    ]
    mixed = [bad[0], good[0], *bad[1:], good[1]]
    scores = run(model, processor, mixed, tmp_path / "s.json")
    # The same two samples in the same batches of one: skipped inputs change nothing.
    alone = chase(model, processor, good, tmp_path / "g.json", ChaseSettings("teacher"), progress=False)
    np.testing.assert_allclose(scores.values, alone.values, rtol=1e-12)
    facts = scores.provenance
    assert facts["images"] == 2 and facts["skipped"]["count"] == 7
    told = " ".join(facts["skipped"]["first"])
    for words in ("empty: has no text boxes", "outside: box 'a'", "flat: box", "names image 1", "too long", "torn.png"):
        assert words in told
    with pytest.raises(ValueError, match="No usable calibration images among 7: empty: has no text boxes"):
        run(model, processor, bad, tmp_path / "none.json")
    assert run(model, processor, good, tmp_path / "none.json").provenance["images"] == 2  # the mended images are read


def test_limit_and_per_token(tmp_path):
    model, processor = tiny.llava_next(), tiny.llava_processor()
    samples = list(make_samples(4))
    limited = run(model, processor, samples, tmp_path / "a.json", limit=2)
    assert np.array_equal(limited.values, run(model, processor, samples[:2], tmp_path / "b.json").values)
    settings = ChaseSettings("teacher", per_token=True)
    shares = chase(model, processor, samples, tmp_path / "c.json", settings, progress=False)
    references = [reference_score(model, processor, sample, "teacher") for sample in samples]
    expected = np.mean([score / counted for score, counted in references], axis=0)
    np.testing.assert_allclose(shares.values, expected, rtol=1e-9)


def test_settings_are_checked():
    for options, words in (
        ({"mode": "beam"}, "mode must be one of free, teacher"),
        ({"views": "low"}, "views must be one of"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            ChaseSettings(**options)
