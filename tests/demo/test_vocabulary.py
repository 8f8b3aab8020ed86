"""The demo tokenizer gives back every printable text, before and after it is saved."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sparsemm_lmms.demo import FAMILIES
from sparsemm_lmms.demo.pages import SYMBOLS
from sparsemm_lmms.demo.questions import TEMPLATES
from sparsemm_lmms.demo.vocabulary import build_tokenizer

PRINTABLE = "".join(c for c in string.printable if c not in "\r\x0b\x0c\t")


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    build_tokenizer(request.param).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@settings(max_examples=100, deadline=None)
@given(text=st.text(PRINTABLE))
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("kind", TEMPLATES)
def test_questions_are_short(tokenizer, kind):
    """What names the target must lie inside an observation window of 32 tokens, with room for the chat's end."""
    for template in TEMPLATES[kind]:
        text = template.format("NAME" if kind == "key" else 5)
        assert len(tokenizer(text).input_ids) <= 20
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_answers_are_spelled_in_characters(tokenizer):
    assert len(tokenizer("NAME: K7-Q2\nXY").input_ids) == len("NAME: K7-Q2\nXY")
    assert len(set(tokenizer.convert_tokens_to_ids(list(SYMBOLS)))) == len(SYMBOLS)


def test_unknown_characters_and_padding(tokenizer):
    assert tokenizer("é").input_ids == [tokenizer.unk_token_id]
    batch = tokenizer(["A", "ABC"], padding=True)
    assert batch["attention_mask"][0] == [0, 0, 1]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
