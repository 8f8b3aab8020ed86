"""head_scores=...: every word of it, the cache, and several processes with one that computes."""

import multiprocessing
import os
import shutil

import numpy as np
import pytest
from loguru import logger
from transformers import PreTrainedConfig

from sparsemm_lmms.head_scores import HeadScores
from sparsemm_lmms.visual_heads import resolve, resolve_head_scores
from sparsemm_lmms.visual_heads.checkpoints import folder_version
from sparsemm_lmms.visual_heads.resolve import cache_file

from . import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaVA-NeXT in the Hugging Face layout."""
    path = tmp_path_factory.mktemp("models") / "tiny-llava"
    tiny.llava_next("mistral").save_pretrained(path)
    tiny.llava_processor().save_pretrained(path)
    return path


@pytest.fixture()
def config(folder):
    found, _ = PreTrainedConfig.get_config_dict(str(folder))
    return found


def test_controls_and_files(config, folder, tmp_path):
    def get(spec, **options):
        return resolve_head_scores(spec, config, str(folder), "main", cache_dir=tmp_path / "cache", **options)

    assert np.ptp(get("uniform").values) == 0 and get("uniform").values.shape == (3, 4)
    assert np.array_equal(get("random", seed=3).values, HeadScores.random(3, 4, 3).values)
    table = HeadScores(np.arange(1.0, 13).reshape(3, 4))
    path = str(table.save(tmp_path / "s.json"))
    assert get(path).content_hash == table.content_hash
    assert get(f"layer_mean:{path}").content_hash == table.layer_mean().content_hash
    assert get(f"permuted:{path}", seed=2).content_hash == table.permuted(2).content_hash
    with pytest.raises(FileNotFoundError, match="'unifrom' is neither a file nor one of auto, uniform"):
        get("unifrom")
    wrong = str(HeadScores.uniform(32, 32).save(tmp_path / "w.json"))
    with pytest.raises(ValueError, match=r"32 layers x 32 heads.*tiny-llava has 3 layers x 4 heads"):
        get(wrong)
    assert not (tmp_path / "cache").exists()


def test_packaged_scores_come_first(config, folder, tmp_path):
    (tmp_path / "m").mkdir()
    table = HeadScores.random(3, 4, 1)
    table.save(tmp_path / "m" / "head_scores.json")
    found = resolve_head_scores("auto", config, str(tmp_path / "m"), cache_dir=tmp_path / "cache")
    assert found.content_hash == table.content_hash


def test_auto_chases_once_and_remembers(config, folder, tmp_path, monkeypatch):
    options = dict(cache_dir=tmp_path, pages=6, progress=False)
    made = resolve_head_scores("auto", config, str(folder), **options)
    assert made.values.shape == (3, 4) and made.provenance["data"]["readings"] == "mixture"
    assert made.provenance["model"] == str(folder) and made.provenance["images"] == 6
    path = cache_file(config, str(folder), "main", tmp_path)
    assert path.is_file() and path.name == "3x4.json" and tmp_path in path.parents

    def forbidden(*_, **__):
        raise AssertionError("computed twice")

    monkeypatch.setattr(resolve, "_make", forbidden)
    again = resolve_head_scores("auto", config, str(folder), **options)
    assert again.content_hash == made.content_hash
    mean = resolve_head_scores("layer_mean", config, str(folder), **options)
    assert mean.content_hash == made.layer_mean().content_hash


def test_the_cache_tells_models_revisions_and_weights_apart(config, folder, tmp_path):
    one = cache_file(config, "org/model", "main", tmp_path)
    assert one == cache_file(config, "org/model", "main", tmp_path)
    assert one != cache_file(config, "org/model", "v2", tmp_path)
    assert one != cache_file(config, "org2/model", "main", tmp_path)
    assert one != cache_file({**config, "_commit_hash": "abc"}, "org/model", "main", tmp_path)
    smaller = {**config, "text_config": {**config["text_config"], "num_hidden_layers": 2}}
    assert cache_file(smaller, "org/model", "main", tmp_path).name == "2x4.json"
    before = cache_file(config, str(folder), "main", tmp_path)
    os.utime(folder / "model.safetensors", (1, 1))
    assert cache_file(config, str(folder), "main", tmp_path) != before


def test_every_file_of_a_folder_that_shapes_answers_is_in_its_version(folder, tmp_path):
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    seen = [folder_version(copy)]
    assert seen == [folder_version(folder)]  # wherever it lies
    (copy / "sub").mkdir()
    names = ("chat_template.jinja", "tokenizer.model", "merges.txt", "config.json", "sub/vocab.txt", "x.safetensors")
    for name in names:
        file = copy / name
        file.write_bytes((file.read_bytes() if file.exists() else b"") + b" ")
        seen.append(folder_version(copy))
    template = (copy / "chat_template.jinja").stat()
    text = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").write_text(text[:-2] + "##")
    os.utime(copy / "chat_template.jinja", ns=(template.st_atime_ns, template.st_mtime_ns))
    seen.append(folder_version(copy))  # the same size and time
    (copy / "sub" / "vocab.txt").rename(copy / "vocab.txt")
    seen.append(folder_version(copy))
    assert len(set(seen)) == len(names) + 3
    HeadScores.random(3, 4).save(copy / "head_scores.json")
    HeadScores.random(3, 4).save(copy / "mine.json")
    (copy / "mine.json.partial.jsonl").write_text("{}")
    (copy / ".git").mkdir()
    (copy / ".git" / "HEAD").write_text("main")
    assert folder_version(copy) == seen[-1]


@pytest.fixture()
def warned():
    told = []
    handler = logger.add(lambda message: told.append(message.record["message"]), level="WARNING")
    yield told
    logger.remove(handler)


def test_scores_of_another_model_are_refused(config, folder, tmp_path, warned, monkeypatch):
    other = tmp_path / "tiny-llava"
    shutil.copytree(folder, other)
    os.utime(other / "model.safetensors", (2, 2))  # weights of their own
    facts = {"model": str(folder), "model_type": "llava_next", "checkpoint": folder_version(folder), "revision": "main"}

    def use(pretrained=folder, spec="{}", foreign=False, **more):
        path = HeadScores(np.arange(1.0, 13).reshape(3, 4), provenance={**facts, **more}).save(tmp_path / "s.json")
        name = str(pretrained)
        return resolve_head_scores(spec.format(path), config, name, "main", cache_dir=tmp_path / "c", foreign=foreign)

    mend = "make scores for this model with `sparsemm-lmms chase`, or set foreign_head_scores=true"
    refused = (
        rf"head_scores={tmp_path / 's.json'} were found on {folder} \(llava_next\), and the model is {other}.*{mend}"
    )
    for spec in ("{}", "layer_mean:{}", "permuted:{}"):
        with pytest.raises(ValueError, match=refused):
            use(other, spec)
    with pytest.raises(ValueError, match=r"found on org/model \(qwen2_vl\), and the model is .* \(llava_next\)"):
        use(model="org/model", model_type="qwen2_vl")
    with pytest.raises(ValueError, match=r"found on demo/llava_next \(llava_next\)"):
        use(model="demo/llava_next", checkpoint=None)
    with pytest.raises(ValueError, match="found on org/model"):
        use("org/model", model="org/model", revision="v1", checkpoint="abc")
    assert not warned
    assert np.array_equal(use(other, foreign=True).values.ravel(), np.arange(1.0, 13))
    assert len(warned) == 1 and "foreign_head_scores" in warned.pop()

    monkeypatch.chdir(folder.parent)
    use(folder.name)  # the same folder by another name
    use(model=folder.name)
    use(model="elsewhere/copy")  # the same files
    use(checkpoint=None)
    use("org/model", model="org/model", checkpoint="main")
    use(model=None, model_type=None, checkpoint=None)  # a file of other tools
    use(model=None, checkpoint=None)
    use(model="LlavaNextForConditionalGeneration", checkpoint=None)  # scored in memory
    assert not warned
    use(checkpoint="before")
    assert len(warned) == 1 and "files have changed since (checkpoint before there" in warned[0]


def test_a_demo_models_scores_go_with_it_under_both_names():
    from sparsemm_lmms.demo import FAMILIES, model_path

    for family in FAMILIES:
        path = model_path(family)
        config, _ = PreTrainedConfig.get_config_dict(path)
        scores = resolve_head_scores(f"{path}/head_scores.json", config, path)
        assert scores.provenance["model"] == f"demo/{family}"


def test_names_that_can_be_no_file(config, folder):
    for spec in ("a" * 300, "a\0b", "file/" * 2000):
        with pytest.raises(FileNotFoundError, match="is neither a file nor one of auto"):
            resolve_head_scores(spec, config, str(folder))
    for spec in ("layer_mean:" * 2000, "permuted:layer_mean", "layer_mean:permuted:auto"):
        with pytest.raises(ValueError, match="transforms the scores twice; give (permuted|layer_mean):PATH"):
            resolve_head_scores(spec, config, str(folder))
    assert np.ptp(resolve_head_scores("layer_mean:random", config, str(folder)).values, axis=1).max() == 0


def test_shape_comes_from_the_config_class_where_the_file_is_silent():
    config = resolve._as_config({"model_type": "llava_next", "text_config": {"model_type": "llama"}})
    assert resolve.text_shape(config) == (32, 32, 32)
    flat = {"model_type": "qwen2_vl", "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    assert resolve.text_shape(resolve._as_config({**flat, "hidden_size": 3584})) == (28, 28, 4)


def test_a_model_that_is_not_there(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="could not be loaded to find its visual heads"):
        resolve_head_scores("auto", config, str(empty), cache_dir=tmp_path, pages=2)


def test_a_kept_file_that_is_spoilt_and_a_cache_that_cannot_be_written(config, folder, tmp_path, monkeypatch):
    path = cache_file(config, str(folder), "main", tmp_path)
    path.write_text("{half")
    with pytest.raises(ValueError, match="kept by head_scores=auto: delete it"):
        resolve_head_scores("auto", config, str(folder), cache_dir=tmp_path)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(resolve, "cache_file", refuse)
    with pytest.raises(ValueError, match="cannot keep what it finds.*Permission denied.*set HF_ASSETS_CACHE"):
        resolve_head_scores("auto", config, str(folder))


def _compete(config, folder, cache, queue):
    from sparsemm_lmms.visual_heads import resolve

    stock, made = resolve._make, []

    def counting(*arguments):
        made.append(1)
        return stock(*arguments)

    resolve._make = counting
    scores = resolve.resolve_head_scores("auto", config, folder, cache_dir=cache, pages=4, progress=False)
    queue.put((len(made), scores.content_hash))


def test_one_process_computes_and_the_other_waits(config, folder, tmp_path):
    context = multiprocessing.get_context("fork")  # spawned ones would import transformers anew
    queue = context.Queue()
    processes = [context.Process(target=_compete, args=(config, str(folder), tmp_path, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=240) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(made for made, _ in results) == [0, 1]
    assert len({content for _, content in results}) == 1
