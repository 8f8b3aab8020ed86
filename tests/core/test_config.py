"""Settings: every senseless value is one sentence that names the argument and the value."""

from __future__ import annotations

import dataclasses

import pytest

from sparsemm_lmms import CompressionConfig

BAD = [
    ({"budget": 0}, "budget=0 must be at least 1"),
    ({"budget": -1}, "budget=-1"),
    ({"budget": 32}, "budget=32 must be larger than window_size=32"),
    ({"budget": "abc"}, "budget='abc' is not a whole number"),
    ({"budget": 64.5}, "budget=64.5 is not a whole number"),
    ({"budget": True}, "budget=True is not a whole number"),
    ({"budget": "inf"}, "budget='inf' is not a whole number"),
    ({"budget": "None"}, "budget='None' is not a whole number"),
    ({"window_size": 0}, "window_size=0 must be at least 1"),
    ({"kernel_size": 4}, "kernel_size=4 must be odd"),
    ({"kernel_size": -1}, "kernel_size=-1 must be odd"),
    ({"pooling": "avg"}, "Unknown pooling 'avg'; known: avgpool, maxpool. Did you mean 'avgpool'?"),
    ({"gqa_func": "min"}, "Unknown gqa_func 'min'"),
    ({"method": "sparsemn"}, "Did you mean 'sparsemm'?"),
    ({"kernel_backend": "cuda"}, "Unknown kernel_backend 'cuda'"),
    ({"ratio": 1.5}, "ratio=1.5 must lie between 0 and 1"),
    ({"ratio": "nan"}, "ratio='nan' is not a finite number"),
    ({"ratio": float("inf")}, "ratio=inf is not a finite number"),
    ({"ratio": "1" + "0" * 400}, "is not a finite number"),
    ({"ratio": 10**400}, "is not a finite number"),
    ({"ratio": "0_1"}, "ratio='0_1' is not a number"),
    ({"budget": "1_000"}, "budget='1_000' is not a whole number"),
    ({"budget": "½"}, "budget='½' is not a whole number"),
    ({"budget": float("nan")}, "budget=nan is not a whole number"),
    ({"budget": ""}, "budget='' is not a whole number"),
    ({"seed": 2**63}, "seed=9223372036854775808 is too large"),
    ({"seed": "1e999999"}, "seed='1e999999' is too large"),
    ({"kernel_size": "4611686018427387904"}, "kernel_size=4611686018427387904 must be odd"),
    ({"method": "fullkv", "budget": 0}, "budget=0 must be at least 1"),
    ({"method": "fullkv", "budget": "-5"}, "budget=-5 must be at least 1"),
    ({"method": "mask", "budget": -5}, "budget=-5 must be at least 1"),
    ({"floor_ratio": -0.1}, "floor_ratio=-0.1"),
    ({"beta": 0}, "beta=0 must be at least 1"),
    ({"skip": -1}, "skip=-1"),
    ({"seed": -1}, "seed=-1"),
    ({"redistribute": "maybe"}, "redistribute='maybe' is not true or false"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=lambda value: str(value)[:40])
def test_bad_values(arguments, sentence):
    with pytest.raises(ValueError) as caught:
        CompressionConfig.from_dict(arguments)
    assert sentence in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_unknown_argument_names_the_nearest():
    with pytest.raises(ValueError, match="Unknown argument 'buget'.*Did you mean 'budget'"):
        CompressionConfig.from_dict({"buget": 64})


def test_strings_of_a_command_line():
    given = {"method": "adakv", "budget": "64", "redistribute": "True", "floor_ratio": "0.3", "normalize": "no"}
    config = CompressionConfig.from_dict({**given, "ratio": "0.2"})
    assert (config.budget, config.redistribute, config.floor_ratio, config.normalize) == (64, True, 0.3, False)
    assert "ratio" not in config.to_dict()  # of another method: checked, and left out
    with pytest.raises(AttributeError, match="method 'adakv' has no setting 'ratio'"):
        _ = config.ratio


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("9007199254740993", 2**53 + 1),
        ("9007199254740993.0", 2**53 + 1),
        (2**63 - 1, 2**63 - 1),
        ("0064", 64),
        ("64.0", 64),
        ("6.4e1", 64),
        (64.0, 64),
        (" 7 ", 7),
    ],
)
def test_whole_numbers_stay_exact(given, value):
    seed = CompressionConfig(method="random", seed=given).seed
    assert (type(seed), seed) == (int, value)


def test_a_number_too_long_to_write_out():
    with pytest.raises(ValueError, match="seed=a number of more than 40 digits is too large"):
        CompressionConfig(seed=10**5000)


def test_a_record_rebuilds_the_config():
    config = CompressionConfig(method="adakv", budget=100, floor_ratio=0.3, skip=2)
    assert CompressionConfig.from_dict(config.to_dict()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.budget = 3


def test_fullkv_needs_no_budget():
    assert CompressionConfig(method="fullkv", budget=1).method == "fullkv"
