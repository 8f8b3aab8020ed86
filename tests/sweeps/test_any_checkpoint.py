"""`--model vlm`: a sweep of a checkpoint whose type has no family, in the prompts of the host's model for any."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsemm_lmms.model_wrappers.sweeps.plan import make_plan, open_sweep
from sparsemm_lmms.model_wrappers.sweeps.runner import run
from sparsemm_lmms.reports.store import read_cells

from ..wrappers.conftest import scores, task
from ..wrappers.test_any_checkpoint import asked, given, keyed, other
from ..wrappers.test_evaluate import SIZES, evaluate, replies
from .kill_run import Silent

__all__ = ["asked", "keyed", "other", "scores", "task"]  # fixtures


def test_a_sweep_of_any_checkpoint(
    other: Path, keyed: Path, scores: Path, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"pretrained": other, "window_size": 8, "device": "cpu", "head_scores": scores}
    plan = make_plan(
        families="vlm",
        model_args=",".join(f"{name}={value}" for name, value in arguments.items()),
        methods="sparsemm,snapkv,mask",
        budgets="20",
        tasks="tiny_images",
        include_path=str(keyed),
    )
    open_sweep(tmp_path / "sweep", plan)
    run(plan, tmp_path / "sweep", Silent())
    cells = {cell.method: cell for cell in read_cells(tmp_path / "sweep")}
    assert set(cells) == {"fullkv", "sparsemm", "snapkv", "mask"}
    assert {(cell.family, cell.model, cell.error) for cell in cells.values()} == {("vlm", other.name, None)}
    assert len(asked) == 4 * len(SIZES) and all("as huggingface" in text for text in asked)
    alone = evaluate("vlm_snapkv", given(other), keyed)
    assert [sample.answer for sample in cells["snapkv"].samples] == replies(alone)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "vlm_fullkv needs pretrained=ORG/NAME, or a folder"),
        ("pretrained=demo", "names no checkpoint to vlm_fullkv; use --model llava_next_fullkv or qwen2_vl_fullkv"),
    ],
)
def test_the_checkpoint_must_be_given(arguments: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_plan(families="vlm", model_args=arguments, methods="snapkv", budgets="64", tasks="tiny_images")


def test_head_scores_that_cannot_be_found_are_told_before_anything_runs(other: Path) -> None:
    with pytest.raises(ValueError, match="head_scores=auto .* no token grid .* 'vipllava'.*PATH"):
        make_plan(families="vlm", model_args=f"pretrained={other}", budgets="64", tasks="tiny_images")
