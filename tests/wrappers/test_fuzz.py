"""Whatever stands in `--model_args`, in a task's generation settings or in an image file: a value, or one sentence."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sparsemm_lmms.families import FAMILIES
from sparsemm_lmms.model_wrappers.arguments import known_run_options, known_settings, parse_arguments, split_arguments
from sparsemm_lmms.model_wrappers.generation import GenerationSettings
from sparsemm_lmms.model_wrappers.loading import check_possible
from sparsemm_lmms.presets import METHODS
from sparsemm_lmms.visual_heads.sources import open_image

BOUNDED = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
WORDS = ["", "0", "-1", "1e400", "nan", "-inf", "64.0", "1_000", "0x10", "9" * 5000, "true", "None", "auto", "cuda:7"]
WORDS += [
    "'",
    '"',
    "[1,2",
    "{a:1}",
    "()",
    "a=b",
    "\\n",
    "\x00",
    "\u2028",
    "١٢",
    "1e-400",
    "+5",
    "--",
    "demo",
    "..",
    "/",
]
TEXT = st.one_of(st.sampled_from(WORDS), st.integers().map(str), st.floats().map(str), st.text(max_size=12))
ANY = st.one_of(TEXT, st.none(), st.booleans(), st.integers(), st.floats(), st.lists(TEXT, max_size=2))


@BOUNDED
@given(data=st.data())
def test_arguments(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(list(FAMILIES.values())))
    method = data.draw(st.sampled_from(list(METHODS)))
    names = st.sampled_from(sorted(known_run_options(family, method) | known_settings(method))) | st.text(max_size=6)
    pairs = data.draw(st.lists(st.tuples(names, TEXT), max_size=3))
    try:
        given_arguments = parse_arguments(",".join(f"{name}={value}" for name, value in pairs))
        options, compression = split_arguments(family, method, given_arguments)
        check_possible(options, compression, torch.device("cpu"))
    except (ValueError, FileNotFoundError) as error:
        assert str(error).strip() and len(str(error)) < 1500
        return
    assert compression.budget >= 0 and compression.window_size > 0 and options.batch_size > 0


GENERATION = ["max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "do_sample", "until", "seed", "anything"]


@BOUNDED
@given(given_settings=st.dictionaries(st.sampled_from(GENERATION), ANY, max_size=4))
def test_generation_settings(given_settings: dict[str, Any]) -> None:
    try:
        found = GenerationSettings.from_host(given_settings, 16)
    except ValueError as error:
        assert any(name in str(error) for name in given_settings)
        return
    assert found.max_new_tokens > 0 and found.num_beams > 0


def _encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = bytes((7 * i * i) % 256 for i in range(40 * 30 * 3))
    Image.frombytes("RGB", (40, 30), pixels).save(buffer, kind)
    return buffer.getvalue()


@BOUNDED
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
@given(data=st.data())
def test_image_files(kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = _encoded(kind)
    changed = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=3)):
        if place < len(changed):
            changed[place] = data.draw(st.integers(0, 255))
    file = Path(tmp_path_factory.getbasetemp()) / f"fuzz.{kind.lower()}"
    file.write_bytes(changed)
    try:
        image = open_image(file)
    except (ValueError, OSError) as error:
        assert str(file) in str(error)
        return
    assert image.mode == "RGB" and min(image.size) > 0
