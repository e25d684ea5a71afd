"""Metrics at values worked by hand."""

import pytest

from bart_t5x import metrics


def test_perfect_texts_score_100():
  texts = ['Katten sover.', 'Hunden løper.']
  assert metrics.reconstruction(texts, texts) == {'exact_match': 100.0, 'chrf': 100.0}


def test_half_of_the_texts_exact():
  scores = metrics.reconstruction(['aaaaaaaa', 'bbbbbbbb'], ['aaaaaaaa', 'cccccccc'])
  assert scores['exact_match'] == 50.0
  # Of n-grams of each order 1 to 6 half are right, in both directions.
  assert scores['chrf'] == pytest.approx(50.0)


def test_nothing_to_compare_is_an_error():
  with pytest.raises(ValueError, match='split is empty'):
    metrics.reconstruction([], [])


def test_lengths_must_agree():
  with pytest.raises(ValueError):
    metrics.reconstruction(['a', 'b'], ['a'])
