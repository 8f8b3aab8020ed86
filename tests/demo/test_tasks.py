"""The demo tasks: reproducible documents that no training image shows, and the host's own machinery on them."""

import io
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sparsemm_lmms.demo.build_tasks import DOCUMENTS, TASKS, table
from sparsemm_lmms.demo.data import SPLITS, stream
from sparsemm_lmms.demo.metrics import character_accuracy, edit_distance
from sparsemm_lmms.demo.packing import Packer
from sparsemm_lmms.demo.stages import EVEN, example, generators
from sparsemm_lmms.demo.vocabulary import build_tokenizer

FOLDER = Path(str(files("sparsemm_lmms.task_overrides")))


def stored(task):
    return pq.read_table(FOLDER / f"sparsemm_demo_{task}.parquet").to_pylist()


@pytest.mark.parametrize("task", TASKS)
def test_documents_are_reproducible(task):
    documents = stored(task)
    assert len(documents) == DOCUMENTS and {d["kind"] for d in documents} == set(TASKS[task])
    for made, kept in zip(table(task, 6).to_pylist(), documents, strict=False):
        pixels = [np.asarray(Image.open(io.BytesIO(d.pop("image")["bytes"]))) for d in (made, kept)]
        assert np.array_equal(*pixels) and made == kept


def test_files_are_small():
    assert sum((FOLDER / f"sparsemm_demo_{task}.parquet").stat().st_size for task in TASKS) < 6e6


def test_documents_are_not_in_the_training_streams():
    assert len(set(SPLITS.values())) == len(SPLITS)
    assert stream(0, "train", 5).integers(2**62) != stream(0, "vqa_task", 5).integers(2**62)
    tokenizer = build_tokenizer("llava_next")
    packer = Packer("llava_next", lambda text: tokenizer(text, add_special_tokens=False).input_ids)
    seen = set()
    for step in range(40):
        seen |= {"\n".join(example(packer, rng, 0.1, EVEN)[0].lines) for rng in generators(0, step, 4)}
    whole = {d["answer"] for d in stored("ocr") if d["kind"] == "all"}
    assert len(seen) == 160 and not seen & whole


def test_metrics():
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "ab") == 2
    assert character_accuracy("ABCD", "ABXD ") == 0.75
    assert character_accuracy("AB", "") == 0.0 and character_accuracy("", "") == 1.0
    assert character_accuracy("A", "XYZ") == 0.0


def test_near_misses_differ_in_one_letter():
    from sparsemm_lmms.task_overrides.utils import near_misses, right_choice

    places = set()
    for document in stored("vqa"):
        choices = near_misses(document)
        right = right_choice(document)
        assert len(set(choices)) == 4 and choices[right] == document["answer"] and choices == near_misses(document)
        wrong = choices[:right] + choices[right + 1 :]
        assert [sum(a != b for a, b in zip(c, document["answer"], strict=True)) for c in wrong] == [1, 1, 1]
        places.add(right)
    assert places == {0, 1, 2, 3}


def test_the_host_loads_and_scores_the_tasks():
    pytest.importorskip("lmms_eval")
    from lmms_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager(include_path=str(FOLDER))
    loaded = get_task_dict(["sparsemm_demo_ocr", "sparsemm_demo_vqa"], manager, "chat")
    for name, right in (("sparsemm_demo_ocr", {"character_accuracy", "anls"}), ("sparsemm_demo_vqa", {"exact_match"})):
        task = loaded[name]
        document = task.test_docs()[0]
        [turn] = task.doc_to_messages(document)
        assert [part["type"] for part in turn["content"]] == ["image", "text"]
        assert turn["content"][1]["text"] == document["question"]
        perfect = task.process_results(document, [document["answer"]])
        assert set(perfect) == right and all(value == pytest.approx(1.0) for value in perfect.values())
        wrong = task.process_results(document, ["~"])
        assert all(value == 0 for value in wrong.values())
    assert "sparsemm_demo" in manager.all_groups
