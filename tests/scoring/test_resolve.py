"""head_scores=...: every word of it, the cache, and several processes with one that computes."""

import multiprocessing
import os

import numpy as np
import pytest
from transformers import PreTrainedConfig

from sparsemm_lmms.head_scores import HeadScores
from sparsemm_lmms.scoring import resolve, resolve_head_scores
from sparsemm_lmms.scoring.resolve import cache_file

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
    from sparsemm_lmms.scoring import resolve

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
