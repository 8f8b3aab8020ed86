"""Write the documents of the demo tasks: python -m sparsemm_lmms.demo.build_tasks [--output DIR].

The streams of splits `ocr_task` and `vqa_task` are their own, see `data.SPLITS`; the files are the same bytes at
every run with one version of pyarrow and Pillow.
"""

import argparse
import io
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sparsemm_lmms.demo.data import Sample, sample

SEED = 2026
TASKS = {"ocr": ("all", "line"), "vqa": ("line", "column")}  # question kinds take turns
DOCUMENTS = 200


def documents(task: str, count: int = DOCUMENTS) -> list[Sample]:
    """The first `count` documents of one of TASKS."""
    kinds = TASKS[task]
    return [sample(kinds[i % len(kinds)], SEED, f"{task}_task", i) for i in range(count)]


def _png(document: Sample) -> bytes:
    buffer = io.BytesIO()
    document.image.convert("L").save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def table(task: str, count: int = DOCUMENTS) -> pa.Table:
    """Columns id, kind, image (bytes and path, as the `datasets` image feature has them), question, answer."""
    found = documents(task, count)
    names = [f"{task}-{i:03d}" for i in range(len(found))]
    images = [{"bytes": _png(d), "path": f"{name}.png"} for name, d in zip(names, found, strict=True)]
    columns = {
        "id": names,
        "kind": [d.kind for d in found],
        "image": images,
        "question": [d.question for d in found],
        "answer": [d.answer for d in found],
    }
    return pa.table(columns)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sparsemm_lmms.demo.build_tasks", description=__doc__)
    default = files("sparsemm_lmms.task_overrides")
    parser.add_argument("--output", type=Path, default=Path(str(default)))
    args = parser.parse_args(argv)
    for task in TASKS:
        path = args.output / f"sparsemm_demo_{task}.parquet"
        pq.write_table(table(task), path, compression="none", row_group_size=50)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
