"""Tokens that make up their text, and texts of the length that was asked for."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.simulator.answer import answer, tokenize


@given(st.text())
def test_nothing_is_lost_in_tokens(text):
    assert text == "".join(tokenize(text))


@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 7, 1000])
def test_the_length_is_exact(tokens, unicode):
    assert tokens == len(answer(Random(1), "hi", tokens, unicode=unicode))


def test_the_usual_length_is_about_sixty():
    lengths = {len(answer(Random(seed), "hi", None, unicode=False)) for seed in range(100)}
    assert (min(lengths) >= 60, max(lengths) < 80) == (True, True)


def test_a_long_question_is_quoted_in_part():
    text = "".join(answer(Random(1), "word " * 1000, None, unicode=False))
    assert ("…" in text, True) == (True, text.count("word") < 40)


def test_silence_gets_an_answer_too():
    assert "".join(answer(Random(1), " \n", None, unicode=False)).startswith("Hello!")


@pytest.mark.parametrize(
    "words, expected", [("in 20 words", True), ("use 20 tokens!", True), ("20", False), ("x20 words", False)]
)
def test_a_length_can_be_asked_for_in_words(words, expected):
    assert (len(answer(Random(1), words, None, unicode=False)) == 20) == expected
