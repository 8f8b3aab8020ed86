"""Documents of our own in the schemas of the paper's eight data sets, under the names that the host's tasks load.

`write(root)` lays out `root/lmms-lab-encoder/DocVQA/...` and so on. `datasets.load_dataset("lmms-lab-encoder/DocVQA")`
prefers a local folder of that name, so the host's tasks run unchanged in `root` as the working directory: prompts,
generation settings, metrics, aggregation and submission files are theirs, only the documents are ours.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, Image

from sparsemm_lmms.demo.data import Sample, sample

COUNT = 2  # documents of each data set
LITE = "lmms-lab-encoder/LMMs-Eval-Lite"


def page(index: int, kind: str = "line") -> Sample:
    """A page that the demo models read, with a question on one line of it."""
    return sample(kind, 7, "heldout", index)


def picture(page: Sample) -> dict[str, Any]:
    buffer = io.BytesIO()
    page.image.convert("L").save(buffer, "PNG", optimize=True)
    return {"bytes": buffer.getvalue(), "path": None}


def docvqa(i: int, answer: str | None = None) -> dict[str, Any]:
    doc = page(i)
    return {
        "questionId": str(100 + i),
        "question": doc.question,
        "question_types": ["form"],
        "image": picture(doc),
        "docId": i,
        "ucsf_document_id": f"demo{i}",
        "ucsf_document_page_no": "1",
        "answers": [answer or doc.answer],
        "data_split": "val",
    }


def ocrbench(i: int, answer: str | None = None) -> dict[str, Any]:
    doc = page(10 + i, ("line", "all")[i % 2])
    kind = ("Doc-oriented VQA", "Regular Text Recognition")[i % 2]
    return {
        "dataset": ("docVQA", "IIIT5K")[i % 2],
        "question": doc.question,
        "question_type": kind,
        "answer": [answer or doc.answer],
        "image": picture(doc),
    }


def textvqa(i: int, answer: str | None = None) -> dict[str, Any]:
    doc = page(23 + i)
    return {
        "image_id": f"demo{i}",
        "question_id": 200 + i,
        "question": doc.question,
        "question_tokens": doc.question.lower().rstrip("?").split(),
        "image": picture(doc),
        "image_width": doc.image.width,
        "image_height": doc.image.height,
        "answers": [answer or doc.answer] * 7 + ["unanswerable"] * 3,
        "image_classes": ["page"],
        "ocr_tokens": [word["text"] for word in doc.words],
        "set_name": "val",
    }


def chartqa(i: int, answer: str | None = None) -> dict[str, Any]:
    doc = page(30 + i)
    return {
        "type": ("human_test", "augmented_test")[i % 2],
        "question": doc.question,
        "answer": answer or doc.answer,
        "image": picture(doc),
    }


def textcaps(i: int, answer: str | None = None) -> dict[str, Any]:
    doc = page(40 + i, "all")
    captions = [answer or f"A page that reads {line}." for line in doc.page.lines[:2]]
    return {
        "question_id": str(300 + i),
        "question": "Please carefully observe the image and come up with a caption for the image",
        "image": picture(doc),
        "image_id": f"demo{i}",
        "image_classes": ["page"],
        "caption_id": list(range(len(captions))),
        "caption_str": captions,
        "reference_strs": captions,
    }


def mmbench(i: int, answer: str | None = None) -> dict[str, Any]:
    doc = page(50 + i)  # the answer is a letter, whatever `answer` says
    lines = doc.page.lines[:3]
    return {
        "index": 400 + i,
        "question": "Which line does the page begin with?",
        "hint": ("nan", "Read from top to bottom.")[i % 2],
        "answer": "A",
        **dict(zip("ABCD", [*lines, "nan"], strict=True)),
        "category": "ocr",
        "image": picture(doc),
        "source": "demo",
        "L2-category": "finegrained_perception (instance-level)",
        "comment": "",
        "split": "dev",
    }


def gqa(i: int, answer: str | None = None) -> dict[str, Any]:
    doc = page(60 + i)
    return {
        "id": str(500 + i),
        "imageId": f"n{i}",
        "question": doc.question,
        "isBalanced": True,
        "answer": answer or doc.answer,
        "fullAnswer": f"It reads {doc.answer}.",
        "types": {"semantic": "attr", "structural": "query", "detailed": "read"},
    }


def gqa_image(i: int, answer: str | None = None) -> dict[str, Any]:
    return {"id": f"n{i}", "image": picture(page(60 + i))}


def vqav2(i: int, answer: str | None = None) -> dict[str, Any]:
    doc = page(70 + i)
    answers = [answer or doc.answer] * 8 + ["nothing"] * 2
    return {
        "question_type": "what is",
        "multiple_choice_answer": doc.answer,
        "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n + 1} for n, a in enumerate(answers)],
        "image_id": 600 + i,
        "answer_type": "other",
        "question_id": 6000 + i,
        "question": doc.question,
        "image": picture(doc),
    }


SETS: list[tuple[str, str, str, Callable[..., dict[str, Any]]]] = [
    ("lmms-lab-encoder/DocVQA", "DocVQA", "validation", docvqa),
    ("echo840/OCRBench", "default", "test", ocrbench),
    ("lmms-lab-encoder/textvqa", "default", "validation", textvqa),
    ("lmms-lab-encoder/ChartQA", "default", "test", chartqa),
    ("lmms-lab-encoder/TextCaps", "default", "val", textcaps),
    ("lmms-lab-encoder/MMBench", "en", "dev", mmbench),
    ("lmms-lab-encoder/GQA", "testdev_balanced_instructions", "testdev", gqa),
    ("lmms-lab-encoder/GQA", "testdev_balanced_images", "testdev", gqa_image),
    ("lmms-lab-encoder/VQAv2", "default", "validation", vqav2),
    (LITE, "docvqa_val", "lite", docvqa),
    (LITE, "textvqa_val", "lite", textvqa),
    (LITE, "chartqa", "lite", chartqa),
    (LITE, "textcaps_val", "lite", textcaps),
    (LITE, "mmbench_en_dev", "lite", mmbench),
    (LITE, "gqa", "lite", gqa),
    (LITE, "vqav2_val", "lite", vqav2),
]
"""(repository, configuration, split, document i)."""


TASKS = {
    docvqa: "docvqa_val",
    ocrbench: "ocrbench",
    textvqa: "textvqa_val",
    chartqa: "chartqa",
    textcaps: "textcaps_val",
    gqa: "gqa",
    vqav2: "vqav2_val",
}


def write(root: Path, count: int = COUNT, answers: dict[str, list[str]] | None = None) -> Path:
    """Write all data sets below `root` and return it.

    Args:
        count: documents of each.
        answers: task -> reference answers in place of the true ones.
    """
    configs: dict[str, list[str]] = {}
    for repository, config, split, document in SETS:
        given = (answers or {}).get(TASKS.get(document, ""), [None] * count)
        rows = Dataset.from_list([document(i, answer) for i, answer in enumerate(given)])
        if "image" in rows.column_names:
            rows = rows.cast_column("image", Image())
        file = root / repository / f"{config}-{split}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(file)
        entry = f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {file.name}\n"
        configs.setdefault(repository, []).append(entry)
    for repository, entries in configs.items():
        (root / repository / "README.md").write_text("---\nconfigs:\n" + "".join(entries) + "---\n")
    return root
