"""A report is made from records alone: tables, figures, the paper's numbers, a folder to publish."""

from __future__ import annotations

import csv
import doctest
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sparsemm_lmms.reports import names, paper, plots, report, statistics, tables
from sparsemm_lmms.reports.statistics import Block, blocks
from sparsemm_lmms.reports.store import read_cell, read_cells, write_cell, write_compact

from .records import BUDGETS, cell, write_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with its report."""
    folder = write_sweep(tmp_path_factory.mktemp("sweep"))
    report.write_report(folder)
    return folder


def test_everything_is_there(sweep: Path) -> None:
    assert {p.name for p in (sweep / "figures").iterdir()} == {
        f"{n}.{s}" for n in plots.FIGURES for s in ("png", "svg")
    }
    for path in (sweep / "figures").glob("*.png"):
        pixels = Image.open(path).convert("L").histogram()
        assert sum(pixels[:200]) > 1000, f"{path.name} is blank"
    text = (sweep / "report.md").read_text()
    for said in ("# Sweep", "exact_match (%), 12 documents", "## ratio", "## mask_ratio", "## Draws", "| fullkv |"):
        assert said in text
    assert all((sweep / line.split("(")[1].rstrip(")")).exists() for line in text.splitlines() if line.startswith("!["))
    facts = json.loads((sweep / "report.json").read_text())
    assert facts["blocks"][0]["rows"][0]["method"] == "fullkv" and facts["environment"][0]["kernel_backend"] == "torch"


def test_the_csv_holds_what_the_records_say(sweep: Path) -> None:
    with (sweep / "tables" / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 1 + 6 * len(BUDGETS) + 3 + 2 * 2  # three draws of random are one row, two of mask_random too
    [line] = [line for line in lines if (line["method"], line["budget"], line["variant"]) == ("snapkv", "48", "")]
    [record] = [r for r in read_cells(sweep) if (r.method, r.budget) == ("snapkv", 48)]
    values = [sample.scores["exact_match"] for sample in record.samples]
    assert float(line["mean"]) == sum(values) / 12 and float(line["lost"]) == 12 - sum(values)
    assert float(line["mean_low"]) < float(line["mean"]) < float(line["mean_high"]) and line["gained"] == "0.0"
    [grid] = (sweep / "tables").glob("*__accuracy.csv")
    rows = list(csv.reader(grid.open()))
    assert rows[0] == ["tokens per kv head", "48", "96", "768"] and "*" not in grid.read_text()


def test_a_published_folder_makes_the_same_report(sweep: Path, tmp_path: Path) -> None:
    copy = tmp_path / "published"
    shutil.copytree(sweep, copy, ignore=shutil.ignore_patterns("cells", "figures", "tables"))
    assert list(read_cells(copy)) == list(read_cells(sweep))
    assert [r.samples for r in read_cells(copy)] == [r.samples for r in read_cells(sweep)]
    report.write_report(copy, ["scores", "ratio"])
    names = [sweep / "figures" / f"{name}.svg" for name in ("scores", "ratio")]
    for path in [sweep / "report.json", *sweep.glob("tables/*"), *names]:
        assert (copy / path.relative_to(sweep)).read_bytes() == path.read_bytes(), path.name


def test_what_was_published_is_not_lost_when_a_cell_is_added(tmp_path: Path) -> None:
    one, two = (cell(name, budget, {"t": {"m": [1.0]}}) for name, budget in (("fullkv", None), ("snapkv", 48)))
    write_compact(tmp_path, [one])
    write_cell(tmp_path, two)
    assert list(read_cells(tmp_path)) == [one, two]
    assert read_cell(tmp_path / "cells" / two.name) == two
    (tmp_path / "cells.jsonl.xz").write_bytes(b"torn")
    with pytest.raises(ValueError, match="not what a sweep wrote"):
        list(read_cells(tmp_path))


def test_the_papers_numbers_stand_beside_ours(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, "llava-v1.6-vicuna-7b-hf", "docvqa_val", "anls")
    write_cell(folder, cell("sparsemm", 64, {"docvqa_val": {"anls": [0.5] * 12}}, "llava-v1.6-vicuna-7b-hf"))
    [block] = blocks(read_cells(folder))
    assert [n.value for n in paper.published(block) if (n.method, n.budget) == ("sparsemm", 64)] == [0.6377]
    grid = tables.accuracy(block)
    assert next(line for line in grid.rows if line[0] == "sparsemm (paper)") == ["sparsemm (paper)", "", "63.8", "", ""]
    [axis] = plots.accuracy([block]).axes
    assert "sparsemm (paper)" in axis.get_legend_handles_labels()[1]


def test_examples_in_the_code() -> None:
    assert all(doctest.testmod(module).failed == 0 for module in (names, paper, plots, statistics, tables))


@pytest.mark.parametrize(
    ("model", "task", "metric", "count"),
    [
        ("llava-v1.6-mistral-7b-hf", "ocrbench", "ocrbench_accuracy", 38),  # Tables 3 and 1
        ("Qwen2-VL-7B-Instruct", "mmbench_en_dev_static", "gpt_eval_score", 36),  # Tables 4 and 2
        ("Qwen2-VL-7B-Instruct", "docvqa_val_lite", "anls", 0),  # other documents
        ("Qwen2-VL-2B-Instruct", "ocrbench", "ocrbench_accuracy", 0),  # another model
        ("Qwen2-VL-7B-Instruct", "docvqa_val", "accuracy", 0),  # another metric
    ],
)
def test_where_the_paper_has_numbers(model: str, task: str, metric: str, count: int) -> None:
    block = Block(model, "qwen2_vl", task, metric, 0, (), None)  # type: ignore[arg-type]
    found = paper.published(block)
    assert len(found) == count and all(0 < n.value <= (1 if metric != "gpt_eval_score" else 100) for n in found)


def test_mistakes_get_one_sentence(sweep: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown figure 'acuracy'.*Did you mean 'accuracy'"):
        report.write_report(sweep, ["acuracy"])
    with pytest.raises(ValueError, match="holds no cell with results"):
        report.write_report(tmp_path)
    few = list(blocks([cell("fullkv", None, {"t": {"m": [1.0]}}), cell("snapkv", 48, {"t": {"m": [0.0]}})]))
    with pytest.raises(ValueError, match="'ratio' needs cells.*possible here: accuracy, pareto"):
        plots.draw("ratio", few, tmp_path)


def test_lines_of_many_methods_are_told_apart_without_colour() -> None:
    """Twenty rows: names and marks beside the panel, none on another; the best and its controls strong."""
    methods = ["sparsemm", "permuted", "random", "snapkv", "adakv", "sparsemm_bacon", "sparsemm_bacon@permuted"]
    methods += [f"{scorer}+uniform" for scorer in "bacon cake keydiff mixkv recency tgv".split()]
    methods += [f"{scorer}+pyramid" for scorer in "bacon cake keydiff mixkv recency tgv".split()] + ["vlcache"]
    cells = [cell("fullkv", None, {"t": {"m": [1.0] * 20}})]
    for number, method in enumerate(methods):
        for budget in (48, 96, 768):
            right = 20 if budget == 768 else 18 if method == "mixkv+uniform" else 15 - number // 4 + budget // 48
            cells.append(cell(method, budget, {"t": {"m": [1.0] * right + [0.0] * (20 - right)}}))
    [block] = blocks(cells)
    [axis] = plots.accuracy([block]).axes
    texts = {text.get_text(): text for text in axis.texts if text.get_text()}
    assert set(texts) == set(methods) and len(methods) == 20
    heights = sorted(text.get_position()[1] for text in texts.values())
    apart = 0.9 * plots.NAME_HEIGHT / plots.HEIGHT * (axis.get_ylim()[1] - axis.get_ylim()[0])
    assert all(high - low > apart for low, high in zip(heights, heights[1:], strict=False))
    strong = {name for name, text in texts.items() if text.get_weight() == "bold"}
    assert strong == {"mixkv+uniform", "sparsemm", "permuted", "random"}
    lines = [line for line in axis.lines if list(line.get_xdata())[0] < 50 and len(line.get_xdata()) == 2]
    lines = [line for line in lines if line.get_marker() != "None"]
    assert len(lines) == 20  # of two points: at 768 all answer alike
    assert len({(str(line.get_marker()), line.is_dashed()) for line in lines}) == 20
    assert sum(line.get_linewidth() > 1 for line in lines) == len(strong)


def test_milliseconds_are_drawn_of_quiet_runs_alone() -> None:
    def panels(load: dict[str, float]) -> int:
        cells = [cell("fullkv", None, {"t": {"m": [1.0]}}), cell("snapkv", 48, {"t": {"m": [0.0]}})]
        told = [replace(made, statistics={"t": {**made.statistics["t"], **load}}) for made in cells]
        return len(plots.pareto(list(blocks(told))).axes)

    assert [panels({}), panels({"other_cores": 1.5}), panels({"other_cores": 0.02})] == [1, 1, 2]


def test_no_torch_is_needed(sweep: Path) -> None:
    code = (
        f"import sys; from pathlib import Path; from sparsemm_lmms.reports.report import write_report;"
        f"write_report(Path({str(sweep)!r}), ['accuracy']);"
        "print([m for m in ('torch', 'transformers', 'lmms_eval') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_published_sweep_still_says_the_same() -> None:
    """docs/sweep: the means of its stored answers are those of its table and of the host."""
    folder = Path(__file__).parents[2] / "docs" / "sweep"
    with (folder / "tables" / "results.csv").open() as file:
        told = {
            (r["model"], r["task"], r["metric"], r["method"], r["budget"], r["variant"]): r
            for r in csv.DictReader(file)
        }
    rows = [(block, row) for block in blocks(read_cells(folder)) for row in block.rows]
    assert len(rows) == len(told) > 100
    for block, row in rows:
        variant = " ".join(f"{name}={value:g}" for name, value in row.variant.items())
        line = told[block.model, block.task, block.metric, row.method, str(row.budget or ""), variant]
        assert float(line["mean"]) == pytest.approx(row.value) == pytest.approx(row.host)
