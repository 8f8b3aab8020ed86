"""Calibration pages: generated, SynthDoG with detection, a folder; readings; bad inputs."""

import hashlib
import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image, ImageFile

from sparsemm_lmms.visual_heads.render import GeneratedPages, font_files, render_page
from sparsemm_lmms.visual_heads.samples import PAPER_PROMPT, Box, CalibrationSample, Page, Skipped, ask, checked
from sparsemm_lmms.visual_heads.sources import FolderPages, SynthDogPages


@pytest.fixture(scope="module")
def pages():
    return [render_page(k, seed=3) for k in range(12)]


def test_generated_pages_are_reproducible_and_differ(pages):
    for k in (0, 5, 11):
        again = render_page(k, seed=3)
        assert again.lines == pages[k].lines and again.image.tobytes() == pages[k].image.tobytes()
    assert len({page.image.tobytes() for page in pages}) == len(pages)
    assert render_page(0, seed=4).lines != pages[0].lines
    assert len(font_files()) >= 3 and font_files()[-1] == ""


def test_ink_is_in_the_boxes_and_nowhere_else(pages):
    """The page's colour is known outside the boxes' surroundings; inside every box there is ink."""
    for page in pages:
        grey = np.asarray(page.image.convert("L"), dtype=float)
        outside = np.ones(grey.shape, bool)
        for box in page.boxes:
            left, top, right, bottom = box.xyxy
            assert 0 <= left < right <= page.image.width and 0 <= top < bottom <= page.image.height
            outside[max(int(top) - 2, 0) : int(bottom) + 3, max(int(left) - 2, 0) : int(right) + 3] = False
        paper = np.median(grey[outside])
        assert np.abs(grey[outside] - paper).max() < 60  # gradient +-20, noise sigma 8
        for box in page.boxes:
            left, top, right, bottom = (int(v) for v in box.xyxy)
            assert np.abs(grey[top : bottom + 1, left : right + 1] - paper).max() > 60, box


def test_every_page_is_usable():
    samples = list(GeneratedPages(40, seed=1))
    assert len(samples) == 40 and all(isinstance(sample, CalibrationSample) for sample in samples)
    assert {sample.prompt for sample in samples} == {PAPER_PROMPT}
    assert all(sample.answer.split() == [box.text for box in sample.boxes] for sample in samples)


def test_mixture_asks_three_kinds_of_question():
    samples = list(GeneratedPages(40, seed=1, readings="mixture"))
    kinds = {sample.prompt.split('"')[0] for sample in samples}
    assert kinds == {PAPER_PROMPT, "Read the line of this image that starts with ", "Which word comes right after "}
    for sample in samples:
        words = [box.text for box in sample.boxes]
        if '"' in sample.prompt:
            key = sample.prompt.split('"')[1]
            assert words.count(key) == 1
            place = words.index(key) + (sample.prompt[0] == "W")
            assert sample.answer.split() == words[place : place + len(sample.answer.split())]
    assert [s.prompt for s in samples] == [s.prompt for s in GeneratedPages(40, seed=1, readings="mixture")]


def test_a_page_without_boxes_or_with_a_bad_one_is_skipped():
    image = Image.new("RGB", (50, 40))
    assert list(ask(Page(image, (), "p"), "mixture", 0)) == [Skipped("p", "has no text boxes.")]
    for xyxy in [(50, 0, 60, 9), (0, 40, 9, 50), (5, 5, 5, 9), (9, 9, 2, 20), (-9, 0, 0, 5), (float("nan"), 0, 5, 5)]:
        (result,) = ask(Page(image, ((Box("w", xyxy),),), "p"), "transcribe", 0)
        assert isinstance(result, Skipped) and "'w'" in result.reason and "50x40" in result.reason
    edge = CalibrationSample(image, "", "", (Box("w", (-3, -3, 60, 60)),))
    assert checked(edge) is edge  # sticks out, but shows


def png(width=40, height=30):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (9, 9, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def test_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval's tasks leave it

    def write(name, image=None, facts=None):
        if image is not None:
            (tmp_path / f"{name}.png").write_bytes(image)
        if facts is not None:
            (tmp_path / f"{name}.json").write_text(facts if isinstance(facts, str) else json.dumps(facts))

    word = {"text": "Total", "box": [1, 2, 20, 9]}
    more = {"text": "42", "box": [22, 2, 30, 9]}, {"text": "end", "box": [1, 12, 9, 20]}
    write("a", png(), {"lines": [[word, more[0]], [more[1]]]})
    write("b", png(), {"boxes": [word]})
    write("c", b"not an image", {"boxes": [word]})
    write("d", png(), None)
    write("e", png(), {"boxes": [{"text": "Total"}]})
    write("f", png(), "{half")
    write("g", png()[:60], {"boxes": [word]})
    write("h", png(), {"boxes": []})
    write("i", png(), {"boxes": [{"text": "x", "box": [100, 100, 120, 120]}]})
    write("j", png(), {"boxes": [word]})
    read = list(FolderPages(tmp_path))
    assert len(FolderPages(tmp_path)) == len(read)
    assert [isinstance(sample, Skipped) for sample in read] == [False, False, *[True] * 7, False]
    assert read[0].answer == "Total 42\nend" and read[0].boxes[1] == Box("42", (22, 2, 30, 9))
    names = [sample.name for sample in read]
    assert names == [f"{letter}.png" for letter in "abcdefghij"]
    reasons = [sample.reason for sample in read[2:9]]
    for reason, words in zip(
        reasons,
        [
            "not a readable image",
            "d.json is missing",
            "e.json lacks the field boxes[0].box",
            "f.json",
            "not a readable",
            "no text",
            "outside",
        ],
        strict=True,
    ):
        assert words in reason
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list(FolderPages(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no images"):
        list(FolderPages(tmp_path / "empty"))


def test_a_file_of_boxes_that_is_wrong_names_the_place(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    beside = tmp_path / "a.json"
    word = {"text": "x", "box": [1, 2, 20, 9]}
    for facts, words in [
        ({"lines": [[word], [{**word, "text": None}]]}, "null for lines[1][0].text"),
        ({"lines": [word]}, "an object for lines[0], not a list"),
        ({"lines": "abc"}, "for lines, not a list"),
        ({"boxes": [word, {**word, "box": [1, 2, "3", 4]}]}, "for boxes[1].box[2], not a number"),
        ({"boxes": [{**word, "box": [1, 2, 3]}]}, "3 numbers for the box of 'x'"),
        ({"boxes": [{**word, "box": [10**50, 2, 3, 4]}]}, "a number of 51 digits"),
        ([word], "a list for its content, not an object"),
        ({}, "lacks the field boxes"),
    ]:
        beside.write_text(json.dumps(facts))
        [skipped] = FolderPages(tmp_path)
        assert f"its file of boxes {beside}" in skipped.reason and words in skipped.reason
    beside.write_bytes(b"\xff")
    assert "not UTF-8" in next(iter(FolderPages(tmp_path))).reason
    beside.unlink()
    os.mkfifo(beside)
    assert "no regular file" in next(iter(FolderPages(tmp_path))).reason
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "b.json").write_text(json.dumps({"boxes": [word]}))
    assert "b.png is no regular file" in list(FolderPages(tmp_path))[1].reason
    assert FolderPages(tmp_path).describe()["sha256"]  # waits for neither


def test_a_folder_says_what_it_holds(tmp_path):
    def told(**options):
        facts = FolderPages(tmp_path, **options).describe()
        return facts.pop("seed"), json.dumps(facts)

    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png())
        (tmp_path / f"{name}.json").write_text('{"boxes": []}')
    first = told()
    (tmp_path / "notes.txt").write_text("no image, no boxes")
    assert told() == first and told(seed=3) == (3, first[1])
    seen = {first, told(readings="mixture"), told(prompt="?")}
    for change in (
        lambda: (tmp_path / "a.png").write_bytes(png(41)),
        lambda: (tmp_path / "b.json").write_text('{"lines": []}'),
        lambda: (tmp_path / "a.json").rename(tmp_path / "c.json"),
        lambda: (tmp_path / "c.png").write_bytes(png()),
    ):
        change()
        seen.add(told())
    assert len(seen) == 7


@pytest.fixture()
def synthdog(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    chunk = {"chunk": "quick brown", "coord": [[2.0, 3.0], [20.0, 9.0]]}
    square = [[1, 1], [9, 1], [9, 5], [1, 5]]
    rows = [
        {"image": {"bytes": png(), "path": None}, "2_coord": [chunk, {"chunk": "fox", "coord": [[2, 12], [9, 20]]}]},
        {"image": {"bytes": b"torn", "path": None}, "2_coord": [chunk]},
        {"image": None, "2_coord": [chunk]},
        {"image": {"bytes": png(), "path": None}, "2_coord": []},
        {"image": {"bytes": png(), "path": None}, "2_coord": [{"chunk": "x", "coord": [[400.0, 3.0], [420.0, 9.0]]}]},
        {"image": {"bytes": png(), "path": None}, "2_coord": [{"chunk": "q", "coord": square}]},
    ]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    coords = pa.list_(pa.struct([("chunk", pa.string()), ("coord", pa.list_(pa.list_(pa.float64())))]))
    table = pa.table(
        {
            "image": pa.array([row["image"] for row in rows], image),
            "2_coord": pa.array([row["2_coord"] for row in rows], coords),
        }
    )
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(table, folder / "train-00000.parquet")
    return folder


def test_synthdog_parquet(synthdog):
    for where in (synthdog, synthdog / "train-00000.parquet"):
        read = list(SynthDogPages(str(where)))
        assert [isinstance(sample, Skipped) for sample in read] == [False, True, True, True, True, False]
        assert read[0].boxes == (Box("quick brown", (2, 3, 20, 9)), Box("fox", (2, 12, 9, 20)))
        assert read[0].answer == "quick brown\nfox" and read[0].prompt == PAPER_PROMPT
        assert read[5].boxes == (Box("q", (1, 1, 9, 5)),)
        for sample, words in zip(read[1:5], ["not a readable", "no image", "no text boxes", "outside"], strict=True):
            assert words in sample.reason and sample.name.startswith(str(where))


def test_synthdog_says_what_it_holds(synthdog):
    file = synthdog / "train-00000.parquet"
    whole, one = (SynthDogPages(str(where), seed=4).describe() for where in (synthdog, file))
    assert whole["seed"] == 4 and one["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    shutil.copy(file, synthdog / "train-00001.parquet")
    assert SynthDogPages(str(synthdog)).describe()["sha256"] not in (whole["sha256"], one["sha256"])
    assert SynthDogPages("org/data").describe()["sha256"] is None


def test_synthdog_text_that_is_none(synthdog):
    import pyarrow.parquet as pq

    file = synthdog / "train-00000.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[0]["2_coord"][1]["chunk"] = None
    pq.write_table(type(table).from_pylist(rows, table.schema), file)
    assert "chunk is None, not text" in next(iter(SynthDogPages(str(synthdog)))).reason


def test_synthdog_saved_to_disk_and_wrong_columns(synthdog, tmp_path):
    import datasets

    rows = datasets.load_dataset("parquet", data_files=str(synthdog / "*.parquet"), split="train")
    rows.save_to_disk(str(tmp_path / "saved"))
    assert len(list(SynthDogPages(str(tmp_path / "saved")))) == 6
    rows.remove_columns("2_coord").to_parquet(str(tmp_path / "wrong.parquet"))
    with pytest.raises(ValueError, match="no column '2_coord'; found image"):
        list(SynthDogPages(str(tmp_path / "wrong.parquet")))
    (tmp_path / "bare").mkdir()
    with pytest.raises(FileNotFoundError, match="no parquet files"):
        list(SynthDogPages(str(tmp_path / "bare")))
