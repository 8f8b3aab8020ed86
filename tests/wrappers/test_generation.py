"""Generation settings and the clock."""

from __future__ import annotations

import pytest
import torch

from sparsemm_lmms import step_clock
from sparsemm_lmms.model_wrappers.generation import GenerationSettings, StepClock


def read(**gen_kwargs) -> GenerationSettings:
    return GenerationSettings.from_host(gen_kwargs, 128)


def test_greedy_by_default() -> None:
    arguments = read(until=["\n\n"]).for_generate()
    assert arguments == {
        "max_new_tokens": 128,
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "num_beams": 1,
    }


def test_sampling_when_asked() -> None:
    assert read(temperature="0.7", top_p=0.9).for_generate()["do_sample"]
    assert read(temperature=0.7, top_p=0.9).for_generate()["top_p"] == 0.9
    assert read(do_sample=True).temperature == 1.0
    assert not read(do_sample=True, temperature=0).for_generate()["do_sample"]
    assert not read(do_sample=False, temperature=0.7).for_generate()["do_sample"]


def test_numbers_of_the_task_win() -> None:
    settings = read(max_new_tokens=16, num_beams=3, repetition_penalty=1.1)
    assert (settings.max_new_tokens, settings.num_beams) == (16, 3)
    assert settings.for_generate()["repetition_penalty"] == 1.1
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        read(max_new_tokens=0)


@pytest.mark.parametrize(
    ("until", "cut"),
    [("C", "AB"), (["D", "B"], "A"), ([], "ABCD"), (None, "ABCD"), (["", "Z"], "ABCD"), (["CD", "AB"], "")],
)
def test_answers_end_at_the_first_stop_string(until, cut) -> None:
    assert read(until=until).cut("ABCD") == cut


def test_until_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match="until=3"):
        read(until=3)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("max_new_tokens", -3, "max_new_tokens=-3 must be at least 1"),
        ("max_new_tokens", "1e30", "max_new_tokens='1e30' is too large"),
        ("num_beams", 0, "num_beams=0 must be at least 1"),
        ("num_beams", 1.5, "num_beams=1.5 is not a whole number"),
        ("temperature", -0.5, "temperature=-0.5 must not be negative"),
        ("temperature", "inf", "temperature='inf' is not a finite number"),
        ("temperature", float("nan"), "temperature=nan is not a finite number"),
        ("top_p", 1.01, "top_p=1.01 must be larger than 0 and at most 1"),
        ("top_p", -0.1, "top_p=-0.1 must be"),
        ("top_k", -1, "top_k=-1 must be at least 0"),
        ("repetition_penalty", 0, "repetition_penalty=0.0 must be larger than 0"),
        ("repetition_penalty", -1, "repetition_penalty=-1.0 must be larger than 0"),
        ("repetition_penalty", float("inf"), "repetition_penalty=inf is not a finite number"),
    ],
)
def test_senseless_settings_are_one_sentence(name, value, sentence) -> None:
    with pytest.raises(ValueError) as caught:
        read(**{name: value})
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_no_top_p_is_refused_only_where_it_would_be_used() -> None:
    assert read(temperature=0, top_p=0).for_generate()["top_p"] is None
    with pytest.raises(ValueError, match="top_p=0.0 must be larger than 0"):
        read(temperature=0.7, top_p=0)


def test_limits_of_the_settings_are_accepted() -> None:
    settings = read(temperature=0.7, top_p=1, top_k=0, num_beams=1, repetition_penalty="1.0")
    assert (settings.top_p, settings.top_k, settings.repetition_penalty) == (1.0, 0, 1.0)


def test_foreign_keys_are_named() -> None:
    assert GenerationSettings.ignored({"image_aspect_ratio": "pad", "until": [], "do_sample": False}) == [
        "image_aspect_ratio"
    ]


def test_clock_separates_the_first_token_from_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.5, 16.5])  # start, first token, end
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: next(times))
    clock = StepClock(torch.device("cpu"))
    for _ in range(5):
        stop = clock(torch.zeros(3, 7), None)
    clock.stop()
    assert stop.tolist() == [False] * 3
    assert (clock.ttft, clock.tpot, clock.elapsed) == (2.5, 1.0, 6.5)


def test_clock_without_decode_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.0, 12.1])
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: next(times))
    clock = StepClock(torch.device("cpu"))
    clock(torch.zeros(1, 7), None)
    clock.stop()
    assert clock.tpot is None
