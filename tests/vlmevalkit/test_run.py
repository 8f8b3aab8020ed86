"""`sparsemm-lmms vlmeval`: the host's run.py found and given its arguments, our models among its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sparsemm_lmms import HeadScores, cli
from sparsemm_lmms.families import FAMILIES
from sparsemm_lmms.methods import METHODS
from sparsemm_lmms.model_wrappers.vlmevalkit import run as vlmevalkit_run
from sparsemm_lmms.model_wrappers.vlmevalkit.listing import listing
from sparsemm_lmms.model_wrappers.vlmevalkit.names import BASES, vocabulary
from sparsemm_lmms.model_wrappers.vlmevalkit.run import asked_models, check_config, find_run_py, launch

from .conftest import IS_REAL, STAND_IN

COUNT = 2
RUN_PY = find_run_py(None) if IS_REAL else STAND_IN / "run.py"


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`launch` changes what `python run.py` would: arguments and the search path."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """`config({name: entry})`: a --config file with these models."""

    def write(models: dict[str, Any], data: dict[str, Any] | None = None) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"model": models, "data": data or {}}))
        return path

    return write


def test_without_the_host_one_sentence_says_how_to_install_it(tmp_path: Path) -> None:
    hidden = "import sys; sys.path = [p for p in sys.path if 'vlmeval' not in p.lower()]; sys.modules['vlmeval'] = None"
    code = f"{hidden}; from sparsemm_lmms.cli import main; main()"
    command = [sys.executable, "-c", code, "vlmeval", "--data", "X", "--model", "Qwen2VL-Demo_fullkv"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("sparsemm-lmms: VLMEvalKit is not installed here; in an environment of its own")
    assert done.stderr.count("\n") == 1


def test_run_py_lies_beside_an_editable_install_or_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_run_py(None).name == "run.py" and find_run_py(RUN_PY) == RUN_PY.resolve()
    with pytest.raises(FileNotFoundError, match="--run-py .*nowhere.py does not exist"):
        find_run_py(tmp_path / "nowhere.py")
    package = tmp_path / "site-packages" / "vlmeval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(package.parent), *sys.path])
    monkeypatch.setitem(sys.modules, "vlmeval", None)
    monkeypatch.delitem(sys.modules, "vlmeval")
    with pytest.raises(FileNotFoundError, match="site-packages without its run.py; give that of its clone"):
        find_run_py(None)
    other = tmp_path / "run.py"
    other.write_text("print('not it')")
    with pytest.raises(ValueError, match="has no function load_env"):
        launch([], other)


def test_arguments_reach_the_host_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(vlmevalkit_run, "launch", lambda *given: seen.append(given))
    rest = [
        "--data",
        "A",
        "B",
        "--model",
        "Qwen2VL-Demo_fullkv",
        "--judge",
        "exact_matching",
        "--reuse",
        "--mode",
        "all",
    ]
    ours = ["--run-py", "x/run.py", "--head-scores", "a.json", "--head-scores", "b.json"]
    result = CliRunner().invoke(cli.app, ["vlmeval", *rest[:4], *ours, *rest[4:]])
    assert result.exit_code == 0, result.output
    assert seen == [(rest, Path("x/run.py"), [Path("a.json"), Path("b.json")])]


def test_names_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlmevalkit_run, "launch", lambda *given: pytest.fail("launched"))
    everything = CliRunner().invoke(cli.app, ["vlmeval", "--list"]).output
    words = set(everything.split())
    assert set(BASES) | set(FAMILIES) <= words and "the datasets' own" in everything
    assert {f"{name}_b<budget>" if cls.compresses else name for name, cls in METHODS.items()} <= words
    numbers, flags = vocabulary()
    assert {*(f"{word}<number>" for word in numbers), *flags} <= words
    for family in FAMILIES:
        own = set(CliRunner().invoke(cli.app, ["vlmeval", "--list", "--family", family]).output.split())
        assert own & set(BASES) == {word for word, base in BASES.items() if base.family == family}
    with pytest.raises(ValueError, match="Unknown family 'qwen'"):
        listing("qwen")
    with pytest.raises(ValueError, match="--family mine chooses what --list prints"):
        CliRunner().invoke(cli.app, ["vlmeval", "--family", "mine"], catch_exceptions=False)


def test_models_are_read_from_the_arguments_as_the_host_reads_them(tmp_path: Path) -> None:
    assert asked_models(["--mode", "infer", "--model", "a", "b", "--data", "c"]) == (["a", "b"], None)
    assert asked_models(["--model", "a", "--base-url", "http://localhost"]) == ([], None)
    assert asked_models(["--config", "c.json"]) == ([], Path("c.json"))


def test_a_mistyped_name_is_told_before_the_host_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlmevalkit_run, "load_run_py", lambda *given: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="Did you mean 'Qwen2VL-Demo'"):
        launch(["--data", "X", "--model", "Qwen2VLDemo_sparsemm_b64"], RUN_PY)
    with pytest.raises(ValueError, match="does not state its budget"):
        launch(["--data", "X", "--model", "Qwen2VL-Demo_sparsemm"], RUN_PY)


def test_names_of_the_host_pass_and_others_are_refused(host: Any) -> None:
    vlmevalkit_run.add_models(["llava_next_vicuna_7b", "Qwen2VL-Demo_snapkv_b77"], None, {})
    assert "Qwen2VL-Demo_snapkv_b77" in host.supported_VLM
    with pytest.raises(
        ValueError, match="neither one of this VLMEvalKit .* Did you mean 'llava_next_vicuna_7b'"
    ) as error:
        vlmevalkit_run.add_models(["llava_next_vicuna"], None, {})
    assert len(str(error.value)) < 500


def test_config_names_must_tell_their_settings(host: Any, config: Callable[..., Path], tmp_path: Path) -> None:
    scores = HeadScores.random(3, 4)
    path = str(scores.save(tmp_path / "scores.json"))
    given = {"class": "CompressedQwen2VL", "pretrained": "mine", "budget": 96, "head_scores": path}
    name = f"mine_sparsemm_b96_hs-{scores.content_hash[:8]}"
    assert check_config(config({name: given, "Qwen2VL-Demo_fullkv": {}})) == ["Qwen2VL-Demo_fullkv"]
    with pytest.raises(ValueError, match=f"let it end in _{name.removeprefix('mine_')}"):
        check_config(config({"mine_sparsemm_b64": given}))
    with pytest.raises(ValueError, match="resolved by its name alone; state window_size in the name"):
        check_config(config({"Qwen2VL-Demo_snapkv_b64": {"window_size": 16}}))
    with pytest.raises(ValueError, match="Unknown argument of llava_next_sparsemm 'budgt'"):
        check_config(config({"x": {"class": "CompressedLLaVANext", "budgt": 64}}))
    assert check_config(config({"x": {"class": "GPT4V", "model": "y"}, "z": {}})) == ["z"]


@pytest.mark.skipif(IS_REAL, reason="test_real_host.py runs the real one in processes of its own")
def test_from_the_command_to_the_answers(
    datasets: Callable[[int], tuple[str, str]], checkpoint: Callable[..., Path],
    config: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    """One class; `families --check` has all of them."""
    data, name = datasets(COUNT), "tiny_snapkv_b20_w8_new6"
    tiny = {"pretrained": str(checkpoint("llava_next")), "budget": 20, "window_size": 8, "max_new_tokens": 6}
    models = {name: {"class": "CompressedLLaVANext", "method": "snapkv", "device": "cpu", **tiny}}
    command = ["--config", str(config(models, dict.fromkeys(data, {}))), "--work-dir", str(tmp_path)]
    launch(command, RUN_PY)
    files = [tmp_path / name / f"{name}_{dataset}.json" for dataset in data]
    answers = [json.loads(file.read_text()) for file in files]
    assert [list(answer) for answer in answers] == [[str(i) for i in range(COUNT)]] * 2
    records = [record["extra_records"] for answer in answers for record in answer.values()]
    assert all(record["kept_tokens"] == 20 < record["prompt_tokens"] for record in records)
    assert records[0]["prompt_tokens"] > records[COUNT]["prompt_tokens"]  # the choices, by the stock model's prompt
    before = [file.read_bytes() for file in files]
    launch(command, RUN_PY)  # everything is there
    assert [file.read_bytes() for file in files] == before
    assert Path(sys.argv[0]) == RUN_PY.resolve() and sys.argv[1:] == command
    assert os.environ["LMUData"]
