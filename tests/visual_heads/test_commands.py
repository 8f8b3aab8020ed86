"""The commands end to end on a tiny model, and the pictures: right numbers drawn, both file types."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sparsemm_lmms.families import FAMILIES
from sparsemm_lmms.head_scores import HeadScores, provenance_path
from sparsemm_lmms.model_wrappers.loading import find_family
from sparsemm_lmms.model_wrappers.matrix import makers
from sparsemm_lmms.visual_heads import plots
from sparsemm_lmms.visual_heads.commands import app, calibration_source
from sparsemm_lmms.visual_heads.plots import plot_budgets, plot_heads
from sparsemm_lmms.visual_heads.resolve import load_model
from sparsemm_lmms.visual_heads.summary import sentences, summarise
from sparsemm_lmms.visual_heads.token_grid import grid_for

from . import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-qwen"
    tiny.qwen2_vl().save_pretrained(path)
    tiny.qwen_processor().save_pretrained(path)
    return path


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_chase_heads_budgets(folder, tmp_path):
    scores = tmp_path / "scores.json"
    told = invoke(
        "chase", "--model", "qwen2_vl", "--pretrained", folder, "--images", 6, "--mode", "teacher", "--readings",
        "mixture", "--batch-size", 2, "--output", scores, "--device", "cpu",
    )  # fmt: skip
    assert "6 images (0 skipped)" in told and "top 10 %" in told and f"head_scores={scores}" in told
    facts = json.loads(provenance_path(scores).read_text())
    assert facts["model"] == str(folder) and facts["kv_heads"] == 2 and facts["data"]["readings"] == "mixture"
    told = invoke("heads", scores, "--plot", tmp_path / "h.png", "--top", 3)
    assert HeadScores.load(scores).content_hash in told and "Drawn" in told
    told = invoke("heads", scores, scores, "--plot", tmp_path / "h2.svg", "--summary", tmp_path / "summary.json")
    assert "The two files: Spearman 1.000; overlap of the top 5 % 100%" in told
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (
        found["agreement"]["top_10_percent_overlap"] == 1 and [f["file"] for f in found["files"]] == [scores.name] * 2
    )
    told = invoke("budgets", scores, "--budget", 64, "--plot", tmp_path / "b.png")
    assert "of nominal 384" in told  # 3 layers x 2 kv heads x 64, kv heads from the provenance
    told = invoke("budgets", scores, "--budget", 64, "--prompt-length", 100, "--redistribute")
    assert "Sum 384 of nominal 384 (100.0%)" in told
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("scores")) == [
        "b.png", "h.png", "h2.svg", "summary.json",
    ]  # fmt: skip


def test_chase_keeps_what_is_finished_unless_told(folder, tmp_path):
    scores = tmp_path / "scores.json"
    command = ["chase", "--model", "qwen2_vl", "--pretrained", folder, "--mode", "teacher", "--device", "cpu"]
    command += ["--output", scores, "--images"]
    invoke(*command, 4)
    before = scores.read_bytes()
    assert "Written to" in invoke(*command, 4) and scores.read_bytes() == before
    with pytest.raises(ValueError, match=f"--output {scores} holds the scores of another run .inputs: 4 there, 3 here"):
        invoke(*command, 3)
    with pytest.raises(ValueError, match="data.seed: 0 there, 1 here.*--overwrite"):
        invoke(*command, 4, "--seed", 1)
    assert scores.read_bytes() == before
    invoke(*command, 3, "--overwrite")
    assert json.loads(provenance_path(scores).read_text())["images"] == 3


def test_wrong_family_and_too_many_files(folder, tmp_path):
    with pytest.raises(ValueError, match="is a qwen2_vl model, not llava_next; set --model"):
        invoke("chase", "--pretrained", folder, "--output", tmp_path / "s.json", "--images", 1, "--device", "cpu")
    path = HeadScores.uniform(2, 2).save(tmp_path / "u.json")
    with pytest.raises(ValueError, match="one file or two, got 3"):
        invoke("heads", path, path, path)
    with pytest.raises(ValueError, match="must be generated, demo, folder:PATH or synthdog"):
        calibration_source("folder:", 3)
    with pytest.raises(ValueError, match="--prompt does not apply to --data demo"):
        calibration_source("demo", 3, prompt="Read")
    with pytest.raises(ValueError, match="redistribute depends on the prompt"):
        invoke("budgets", path, "--redistribute")
    with pytest.raises(ValueError, match="kv_heads=3 must divide the 2 query heads"):
        invoke("budgets", path, "--kv-heads", 3)


def test_any_checkpoint_with_a_grid_that_its_config_tells(tmp_path):
    """`--model vlm`: GLM-OCR has no family; its patches are those of GLM-4V."""
    assert "glm_ocr" not in {name for family in FAMILIES.values() for name in family.architectures}
    glm_ocr, scores = makers.glm("GlmOcr", tmp_path / "glm_ocr"), tmp_path / "s.json"
    named = ["--model", "vlm", "--pretrained", glm_ocr, "--device", "cpu"]
    invoke("chase", *named, "--mode", "teacher", "--readings", "mixture", "--images", 12, "--output", scores)
    assert json.loads(provenance_path(scores).read_text())["model_type"] == "glm_ocr"
    show = ["--image", "demo:3", "--question", "What?", "--heads", 1, "--tokens", 1, "--plot", tmp_path / "v.png"]
    assert "Answer:" in invoke("show", *named, *show, "--head-scores", scores)
    family = find_family("vlm_sparsemm", {"pretrained": str(glm_ocr)})
    assert family.grid == "patches"
    model, processor = load_model(str(glm_ocr))
    picture, text = Image.new("RGB", (84, 140)), "<|begin_of_image|><|image|><|end_of_image|>What?"
    inputs = processor(text=[text], images=[picture], return_tensors="np")
    (grid,) = grid_for(model.config).grids(inputs, [picture.size])
    _, rows, columns = inputs["image_grid_thw"][0] // 2
    assert len(grid.boxes) == rows * columns == (inputs["input_ids"] == model.config.image_token_id).sum()
    assert grid.boxes[-1].tolist() == pytest.approx([84 - 84 / columns, 140 - 140 / rows, 84, 140])


def test_a_checkpoint_without_a_grid_is_refused_before_its_weights(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vipllava", "image_token_index": 3}')
    for command in (
        ["chase", "--output", tmp_path / "s.json"],
        ["show", "--image", "demo:3", "--plot", tmp_path / "v.png"],
    ):
        with pytest.raises(ValueError, match="No token grid for model type 'vipllava'.*head_scores=PATH"):
            invoke(*command, "--model", "vlm", "--pretrained", tmp_path, "--device", "cpu")
    with pytest.raises(ValueError, match="--model vlm needs --pretrained"):
        invoke("chase", "--model", "vlm", "--output", tmp_path / "s.json")


def test_sources_by_name(tmp_path):
    assert len(calibration_source("generated", 7)) == 7
    assert calibration_source("demo", 3, "mixture").kind == "mixed" and calibration_source("demo", 3).kind == "all"
    assert calibration_source(f"folder:{tmp_path}", 3).folder == str(tmp_path)
    assert calibration_source("synthdog:org/data", 3, prompt="Read").prompt == "Read"


def test_summary_says_what_the_file_holds():
    values = np.array([[6.0, 2.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0, 0.0]])
    facts = {"images": 200, "tokens": 9, "tokens_counted": 7, "mode": "free", "skipped": {"count": 1, "first": ["x"]}}
    found = summarise(HeadScores(values, values / 4, facts))
    assert found["top_10_percent"] == {"heads": 1, "share": 0.6} and found["heads_holding"] == {
        "50_percent": 1,
        "90_percent": 3,
    }
    assert found["relative_stderr_top_10_percent"] == {"median": 0.25, "most": 0.25, "most_with_50_images": 0.5}
    assert found["skipped"] == 1 and found["layers"] == 2 and "split_half" not in found
    told = " ".join(sentences(HeadScores(values, values / 4, facts)))
    assert (
        "top 10 % (1) 60%; 1 heads (10%) hold half of it, 3 (30%) nine tenths" in told
        and "200 images (1 skipped), 7 of 9 tokens" in told
    )
    assert "at most 25.0% of its score; with 50 images about 50.0%" in told
    assert len(sentences(HeadScores(values))) == 2  # shares and hash: a bare file tells no more


@pytest.fixture()
def figures(monkeypatch):
    """The figures that get drawn, to look into."""
    seen = []
    stock = plots._figure

    def keep(*size):
        seen.append(stock(*size))
        return seen[-1]

    monkeypatch.setattr(plots, "_figure", keep)
    return seen


def test_heads_picture_shows_the_table(tmp_path, figures):
    table = np.arange(1.0, 41).reshape(4, 10) ** 2
    plot_heads(HeadScores(table, provenance={"path": "x/mine.json"}), tmp_path / "h.png")
    heat, curve = figures[0].axes[:2]
    np.testing.assert_allclose(heat.images[0].get_array(), 100 * table / table.sum())
    assert heat.get_xlabel() == "head" and heat.get_ylabel() == "layer" and heat.get_title() == "mine.json"
    line = curve.lines[0].get_ydata()
    assert len(line) == 41 and line[-1] == pytest.approx(100) and (np.diff(line, 2) <= 1e-9).all()
    held = [np.sort(table.reshape(-1))[-count:].sum() / table.sum() for count in (2, 4)]
    assert curve.get_legend().get_texts()[0].get_text() == f"mine.json: {held[0]:.0%} and {held[1]:.0%}"
    assert curve.get_title() == "What the top 5 % and 10 % of heads (2 and 4) hold"
    assert curve.lines[1].get_xydata().ravel() == pytest.approx([5, 100 * held[0], 10, 100 * held[1]])
    written = [text.get_text() for text in heat.texts]
    assert len(written) == 40 and written[-1] == f"{100 * table[3, 9] / table.sum():.1f}"
    with Image.open(tmp_path / "h.png") as image:
        assert image.format == "PNG" and image.width > 1000


def test_two_files_side_by_side(tmp_path, figures):
    a, b = HeadScores.random(4, 8, 0), HeadScores.random(4, 8, 1)
    plot_heads(a, tmp_path / "h.svg", b, names=("first", "second"))
    assert [axis.get_title() for axis in figures[0].axes[:2]] == ["first", "second"]
    assert "Spearman" in figures[0].get_suptitle() and "overlap of the top 5 %" in figures[0].get_suptitle()
    assert ElementTree.parse(tmp_path / "h.svg").getroot().tag.endswith("svg")
    with pytest.raises(ValueError, match="need one shape, got 4 layers x 8 heads and 2 x 2"):
        plot_heads(a, tmp_path / "x.png", HeadScores.uniform(2, 2))
    with pytest.raises(ValueError, match=".png or .svg"):
        plot_heads(a, tmp_path / "h.pdf")


def test_budgets_picture_shows_the_table(tmp_path, figures):
    tokens = np.array([[32, 96], [64, 70], [33, 40]])
    plot_budgets(tokens, 64, tmp_path / "b.png", "mine", 32)
    heat, spread = figures[0].axes[:2]
    assert np.array_equal(heat.images[0].get_array(), tokens) and heat.get_xlabel() == "kv head"
    assert spread.get_title() == f"sum 335 of nominal 384 ({335 / 384:.1%})"
    assert [text.get_text() for text in heat.texts] == ["32", "96", "64", "70", "33", "40"]
    assert np.array_equal(spread.lines[0].get_xdata(), tokens.mean(axis=1))
    assert [line.get_xdata().tolist() for line in spread.lines[1:3]] == tokens.T.tolist()
    with pytest.raises(ValueError, match="must be a table"):
        plot_budgets(tokens[0], 64, tmp_path / "b.png")


def test_show_asks_a_demo_page_its_own_question(folder, tmp_path):
    scores = HeadScores.random(3, 4).save(tmp_path / "s.json")
    options = ["--model", "qwen2_vl", "--pretrained", folder, "--device", "cpu", "--head-scores", scores, "--heads", 1]
    HeadScores(np.ones((3, 4)), provenance={"model_type": "llava_next"}).save(tmp_path / "other.json")
    other = ["show", "--image", "demo:3", "--tokens", 1, "--plot", tmp_path / "o.png", *options]
    other[other.index(scores)] = tmp_path / "other.json"
    with pytest.raises(ValueError, match="were found on another model .llava_next., and the model is"):
        invoke(*other)
    assert "Answer:" in invoke(*other, "--foreign-head-scores")
    told = invoke("show", "--image", "demo:3", "--tokens", 1, "--plot", tmp_path / "v.png", *options)
    assert "Answer:" in told and (tmp_path / "v.png").is_file()
    Image.new("RGB", (50, 40)).save(tmp_path / "page.png")
    with pytest.raises(ValueError, match="page.png needs a --question"):
        invoke("show", "--image", tmp_path / "page.png", "--plot", tmp_path / "v.png", *options)
    with pytest.raises(FileNotFoundError, match="Image demo:x does not exist"):
        invoke("show", "--image", "demo:x", "--plot", tmp_path / "v.png", *options)


def test_a_full_disk_is_one_sentence(monkeypatch):
    from sparsemm_lmms import cli

    def full():
        raise OSError(28, "No space left on device; 7 inputs are kept", "s.json.partial.jsonl")

    monkeypatch.setattr(cli, "app", full)
    with pytest.raises(
        SystemExit, match="sparsemm-lmms: .*No space left on device; 7 inputs are kept: 's.json.partial"
    ):
        cli.main()
