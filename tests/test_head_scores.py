"""HeadScores: files of both kinds, every defect by name, controls, hashes."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparsemm_lmms.head_scores import HeadScores, provenance_path
from sparsemm_lmms.head_statistics import split_half
from tests.core.golden import SHARED

PUBLISHED = SHARED / "scores" / "llava-v1.6.npz"


def research_reader(path):
    """The loader of the research code (sparsemm_utils.py, SparseMM at f52655b), with its normalisation."""
    with open(path) as file:
        head_score = json.load(file)
    means = [np.mean(item[1]) for item in head_score.items()]
    return np.asarray(means / sum(means))


def write(tmp_path, content):
    path = tmp_path / "scores.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


GOOD = {"0-0": [1.0, 3.0], "0-1": 0.5, "1-0": [0.0], "1-1": [2, 4, 6]}


def test_keys_decide_not_order(tmp_path):
    expected = [[2.0, 0.5], [0.0, 4.0]]
    for order in (list(GOOD), list(GOOD)[::-1]):
        scores = HeadScores.load(write(tmp_path, {key: GOOD[key] for key in order}))
        assert scores.values.tolist() == expected
        assert (scores.layers, scores.heads) == (2, 2)
    assert scores.stderr[0, 0] == 1.0 and scores.stderr[1, 1] == pytest.approx(2 / 3**0.5)


def test_order_is_numeric_not_alphabetic(tmp_path):
    table = np.arange(1, 25, dtype=float).reshape(12, 2)
    content = {f"{i}-{j}": [table[i, j]] for i, j in sorted(np.ndindex(12, 2), key=str)}
    assert np.array_equal(HeadScores.load(write(tmp_path, content)).values, table)


@pytest.mark.parametrize(
    "content, words",
    [
        ("not json", ["not JSON"]),
        ("", ["not JSON"]),
        ("{}", ["holds no scores"]),
        ("[1, 2]", ["holds no scores"]),
        ("3", ["holds no scores"]),
        ({k: v for k, v in GOOD.items() if k != "0-1"}, ["lacks 1 of 2 x 2", '"0-1"']),
        ({**GOOD, "_note": 1}, ['extra entry "_note"', "remove"]),
        ({**GOOD, "1--1": 1}, ['extra entry "1--1"']),
        ('{"0-0": 1, "0-0": 2}', ['"0-0" twice']),
        ('{"0-0": 1, "00-0": 2}', ['"00-0" twice']),
        ('{"0-0": [1, NaN]}', ['"0-0"', "nan"]),
        ('{"0-0": Infinity}', ['"0-0"', "inf"]),
        ({**GOOD, "1-1": [-0.5]}, ['"1-1"', "-0.5", "not negative"]),
        ({**GOOD, "1-1": [3.0, -0.5]}, ['"1-1"', "-0.5"]),
        ({**GOOD, "1-1": []}, ['"1-1"', "non-empty"]),
        ({**GOOD, "1-1": "0.5"}, ['"1-1"', "float"]),
        ({**GOOD, "1-1": [True]}, ['"1-1"', "float"]),
        ({**GOOD, "1-1": {"a": 1}}, ['"1-1"', "float"]),
        ({"0-0": 0.0, "0-1": [0, 0]}, ["zero"]),
        ({"0-0": 10**400}, ["401 digits"]),
        ('{"0-0": 1' + "0" * 5000 + "}", ["5001 digits"]),
        ('{"0-0": 1e999}', ['"0-0"', "inf"]),
        ({"0-0": 1e308, "0-1": 1e308}, ["more than a float64"]),
        ({"0-0": [1e308, 1e308]}, ["not finite"]),
        ({"9" * 5000 + "-0": 1}, ["extra entry"]),
        ({"999999999-999999999": 1}, ["lacks", '"0-0"']),
        ({"a\nb": 1}, ["extra entry", r"a\nb"]),
        ('{"0-0": ' + "[" * 100_000, ["deeper than"]),
        ('{"0-0": "\\ud800"}', ["surrogate"]),
    ],
)
def test_every_defect_names_file_and_mend(tmp_path, content, words):
    path = write(tmp_path, content)
    with pytest.raises(ValueError) as caught:
        HeadScores.load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; make one with `sparsemm-lmms chase"):
        HeadScores.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="is a folder"):
        HeadScores.load(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\x80\x81\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        HeadScores.load(tmp_path / "binary.json")


@pytest.mark.filterwarnings("error")
def test_numbers_above_64_bits_are_numbers(tmp_path):
    path = write(tmp_path, {"0-0": 10**20, "0-1": [2**64, 2**70]})
    assert HeadScores.load(path).values.tolist() == [[1e20, 2.0**63 + 2.0**69]]


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="no regular file"):
        HeadScores.load(tmp_path / "fifo")
    path = HeadScores.uniform(1, 2).save(tmp_path / "s.json")
    provenance_path(path).unlink()
    os.mkfifo(provenance_path(path))
    assert set(HeadScores.load(path).provenance) == {"path"}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    content=st.binary(max_size=40)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0-0", "0-1", "1-0", "x"]), inner),
        max_leaves=6,
    ).map(lambda value: json.dumps(value).encode()),
    at=st.integers(0, 60),
    cut=st.integers(0, 2),
    put=st.binary(max_size=2),
    beside=st.booleans(),
)
def test_any_bytes_are_scores_or_a_sentence(tmp_path_factory, content, at, cut, put, beside):
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    content = content[:at] + put + content[at + cut :]
    if beside:
        HeadScores.uniform(1, 2).save(path)
        provenance_path(path).write_bytes(content)
        assert HeadScores.load(path).values.shape == (1, 2)
        return
    path.write_bytes(content)
    try:
        assert HeadScores.load(path).values.any()
    except ValueError as error:
        assert type(error) is ValueError and str(path) in str(error)


@settings(max_examples=60, deadline=None)
@given(
    values=hnp.arrays(np.float64, (3, 2), elements=st.floats(0, 1e6)).filter(np.any),
    share=hnp.arrays(np.float64, (3, 2), elements=st.floats(0, 1)),
)
def test_round_trip_is_exact_and_research_code_reads_it(tmp_path_factory, values, share):
    path = tmp_path_factory.mktemp("scores") / "deep" / "scores.json"
    scores = HeadScores(values, values * share, {"model": "tiny", "images": 7})
    scores.save(path)
    again = HeadScores.load(path)
    assert np.array_equal(again.values, values)  # bit for bit
    assert again.content_hash == scores.content_hash
    np.testing.assert_allclose(0 if again.stderr is None else again.stderr, values * share, rtol=1e-9, atol=1e-9)
    assert again.provenance["model"] == "tiny" and again.provenance["images"] == 7
    normalised = research_reader(path)
    np.testing.assert_allclose(normalised, (values / values.sum()).reshape(-1), rtol=1e-12)
    assert sorted(os.listdir(path.parent)) == ["scores.json", "scores.provenance.json"]


def test_stderr_of_means_never_exceeds_the_mean():
    """What lets [m - e, m + e] stay non-negative: for values >= 0 the standard error is at most the mean."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        x = rng.random(rng.integers(2, 9)) ** 8 * rng.integers(0, 2, 1)
        assert np.std(x, ddof=1) / np.sqrt(len(x)) <= np.mean(x) * (1 + 1e-12)


def test_foreign_provenance_is_ignored(tmp_path):
    path = HeadScores.uniform(2, 2).save(tmp_path / "a.json")
    HeadScores.random(2, 2).save(tmp_path / "b.json")
    os.replace(tmp_path / "b.json", path)
    assert set(HeadScores.load(path).provenance) == {"path"}
    for damaged in ("{half", "[" * 100_000, "[]", '{"content_hash": 1}', "1" * 5000):
        provenance_path(path).write_text(damaged)
        assert set(HeadScores.load(path).provenance) == {"path"}


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = HeadScores.uniform(2, 2).save(tmp_path / "s.json")
    before = path.read_bytes()

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        HeadScores.random(2, 2).save(path)
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["s.json", "s.provenance.json"]


def test_shape_check_names_both_shapes():
    HeadScores.uniform(2, 4).check_shape(2, 4, "tiny")
    with pytest.raises(ValueError, match=r"2 layers x 4 heads.*llava-big has 32 layers x 32 heads"):
        HeadScores.uniform(2, 4).check_shape(32, 32, "llava-big")


def test_controls():
    base = HeadScores(np.arange(1.0, 9).reshape(2, 4))
    assert np.ptp(HeadScores.uniform(3, 4).values) == 0
    assert base.layer_mean().values.tolist() == [[2.5] * 4, [6.5] * 4]
    drawn = HeadScores.random(3, 4, 5)
    assert drawn.values.sum() == pytest.approx(1.0)
    assert np.array_equal(drawn.values, HeadScores.random(3, 4, 5).values)
    assert not np.array_equal(drawn.values, HeadScores.random(3, 4, 6).values)
    assert len({row.tobytes() for row in drawn.values}) == 3
    dealt = base.permuted(1)
    assert sorted(dealt.values.reshape(-1)) == sorted(base.values.reshape(-1))
    assert not np.array_equal(dealt.values, base.values)


def test_hash_depends_on_shape_and_values_only():
    table = np.arange(1.0, 9)
    a, b = HeadScores(table.reshape(2, 4)), HeadScores(table.reshape(4, 2))
    assert a.content_hash != b.content_hash
    assert a.content_hash == HeadScores(table.reshape(2, 4), table.reshape(2, 4) / 2, {"x": 1}).content_hash
    table[0] += 1e-12
    assert HeadScores(table.reshape(2, 4)).content_hash != a.content_hash


def test_tables_are_checked_and_frozen():
    for bad in ([[1.0, np.nan]], [[-1.0]], [[0.0]], [1.0], np.zeros((0, 2))):
        with pytest.raises(ValueError):
            HeadScores(np.array(bad))
    with pytest.raises(ValueError, match="shape"):
        HeadScores(np.ones((2, 2)), np.ones((2, 3)))
    with pytest.raises(ValueError, match="read-only"):
        HeadScores.uniform(2, 2).values[0, 0] = 3


def test_a_value_for_each_image_tells_how_far_the_images_agree(tmp_path):
    images = np.random.default_rng(0).random((100, 2, 3)) * np.arange(1, 7).reshape(2, 3)
    content = {f"{i}-{j}": images[:, i, j].tolist() for i, j in np.ndindex(2, 3)}
    facts = HeadScores.load(write(tmp_path, content)).provenance
    assert facts["images"] == 100 and facts["split_half"] == split_half(images)
    assert facts["groups_of_50"]["groups"] == 2
    content["0-0"].append(0.5)  # lists of unequal length are means of unknown images
    assert set(HeadScores.load(write(tmp_path, content)).provenance) == {"path"}


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published score table states no licence and is not shipped")
def test_published_table(tmp_path):
    table = np.load(PUBLISHED)
    content = {f"{i}-{j}": table["raw"][i, j].tolist() for i, j in np.ndindex(32, 32)}
    scores = HeadScores.load(write(tmp_path, content))
    assert np.array_equal(scores.values, table["mean"])
    top = np.sort(scores.values.reshape(-1))[::-1]
    assert top[:51].sum() / top.sum() == pytest.approx(0.55, abs=0.01)  # the paper's claim: 5 % of the heads


def test_import_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, sparsemm_lmms.head_scores; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
