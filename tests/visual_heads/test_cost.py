"""What scoring costs: memory that grows with the prompt, not with its square (a matrix would be seen), and time."""

import doctest
import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sparsemm_lmms.bench import scoring as cost
from sparsemm_lmms.bench import tensor_log
from sparsemm_lmms.bench.commands import app
from sparsemm_lmms.bench.tensor_log import TensorLog
from sparsemm_lmms.visual_heads import attention, passes
from sparsemm_lmms.visual_heads.samples import Box, CalibrationSample

from . import tiny

MODELS = {
    "llava-vicuna": (lambda: tiny.llava_next("vicuna"), tiny.llava_processor),
    "llava-mistral": (lambda: tiny.llava_next("mistral"), tiny.llava_processor),
    "qwen2-vl": (tiny.qwen2_vl, tiny.qwen_processor),
}
HEADS = 4


@pytest.fixture(scope="module", params=MODELS)
def family(request):
    model, processor = MODELS[request.param]
    return model(), processor()


def samples(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        image = Image.fromarray(rng.integers(0, 255, (224, 224, 3), dtype=np.uint8))
        yield CalibrationSample(image, "Read", "abXYc", (Box("abc", (0, 0, 90, 90)), Box("XYZ", (90, 90, 200, 200))))


@pytest.mark.parametrize("mode", cost.MODES)
def test_memory_grows_with_the_prompt_not_with_its_square(family, mode):
    short, long = cost.memory_growth(*family, list(samples(4)), mode, 4)["prompts"]
    growth = long["tokens"] / short["tokens"]
    assert 3 < growth < 5 and long["attention_matrix_bytes"] == 4 * HEADS * long["tokens"] ** 2
    assert 0 < long["largest_tensor_added_bytes"] < long["attention_matrix_bytes"] / 20
    extra, more = (prompt["peak_bytes_with"] - prompt["peak_bytes_without"] for prompt in (short, long))
    assert 0 < more < 1.3 * growth * max(extra, 4 * HEADS * short["tokens"])


def test_an_attention_matrix_would_be_seen(family, monkeypatch):
    """The same measurement of a watcher that weighs every row of the prompt."""

    def all_rows(query, key, mask, scaling):
        rows = attention._mask_rows(mask, 0, query.shape[2], query.shape[2], key)
        return attention._weights(query, key, rows, scaling)[:, :, -1:]

    monkeypatch.setattr(attention, "step_weights", all_rows)
    found = cost._memory(*family, list(samples(4)), "free")
    assert found["largest_tensor_added_bytes"] == found["attention_matrix_bytes"]
    assert found["peak_bytes_with"] - found["peak_bytes_without"] > found["attention_matrix_bytes"]


def test_time_ratio_compares_the_same_generation(family, monkeypatch):
    model, processor = family
    found = cost.time_ratio(model, processor, list(samples(3)), batch_size=2, repeats=2, max_new_tokens=6)
    assert found["images"] == 3 and 0 < found["tokens_written"] <= 18
    low, high = found["ratio_quartiles"]
    assert 0 < low <= found["ratio"] <= high and found["seconds_with"] > 0 < found["seconds_without"]
    short = passes.free_running
    monkeypatch.setattr(passes, "free_running", lambda *given: short(*given[:-1], 2))
    with pytest.raises(RuntimeError, match="Scoring changed what the model writes"):
        cost.time_ratio(model, processor, list(samples(1)), batch_size=1, repeats=1, max_new_tokens=6)


def test_tensor_log_counts_what_is_alive():
    assert doctest.testmod(tensor_log).failed == 0
    with TensorLog() as log:
        for _ in range(5):  # each gone before the next
            torch.zeros(100)
        kept = [torch.zeros(10), torch.zeros(10).expand(10**6, 10)]
    assert log.peak == 400 and log.sizes == {400: 5, 40: 2} and len(kept) == 2


def test_command(tmp_path):
    model, processor = tiny.qwen2_vl(), tiny.qwen_processor()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "tiny")
    arguments = "bench scoring --model qwen2_vl --device cpu --images 2 --longer 2 --repeats 1 --max-new-tokens 3"
    given = [*arguments.split(), "--pretrained", str(tmp_path / "tiny"), "--output", str(tmp_path / "cost.json")]
    result = CliRunner().invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "cost.json").read_text())
    assert found["threads"] == torch.get_num_threads() and [part["mode"] for part in found["memory"]] == [
        "free",
        "teacher",
    ]
    assert f"takes {found['time']['ratio']:.2f} x the time without" in result.output
