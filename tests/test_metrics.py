"""Metrics at values worked by hand."""

import sys

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


def test_classes_by_hand():
  targets = ['ja', 'ja', 'nei', 'nei']
  scores = metrics.classification(targets, ['ja', 'nei', 'nei', 'nei'], ('ja', 'nei'))
  assert scores['accuracy'] == 75.0
  # F1 of ja: P 1, R 1/2; of nei: P 2/3, R 1.
  assert scores['macro_f1'] == pytest.approx(100 * (2 / 3 + 4 / 5) / 2)
  # (tp tn - fp fn) / sqrt((tp + fp)(tp + fn)(tn + fp)(tn + fn)) = 2 / sqrt(12)
  assert scores['mcc'] == pytest.approx(100 * 2 / 12**0.5)
  assert scores['unknown_labels'] == 0.0


def test_generated_text_that_is_no_label_is_wrong_and_counted():
  scores = metrics.classification(['ja', 'nei'], ['ja', 'kanskje'], ('ja', 'nei'))
  assert scores['accuracy'] == scores['unknown_labels'] == 50.0
  # F1: ja 1, nei 0. The unknown text is no third class.
  assert scores['macro_f1'] == 50.0


def test_a_target_that_is_no_label_is_an_error():
  with pytest.raises(ValueError, match='kanskje'):
    metrics.classification(['kanskje'], ['ja'], ('ja', 'nei'))


def test_a_class_that_never_occurs_counts_in_macro_f1():
  scores = metrics.classification(['a', 'b'], ['a', 'b'], ('a', 'b', 'c'))
  assert scores['macro_f1'] == pytest.approx(200 / 3)


def test_spans_by_hand():
  targets = ['PER: Kari Dahl | LOC: Oslo', 'ingen', 'ORG: NRK']
  predictions = ['LOC: Oslo | PER: Kari', 'LOC: Bergen', 'ORG:  NRK ']
  scores = metrics.entity_spans(targets, predictions)
  assert scores['span_precision'] == 50.0
  assert scores['span_recall'] == pytest.approx(200 / 3)
  assert scores['span_f1'] == pytest.approx(100 * 2 * 2 / 7)


def test_spans_agree_with_seqeval():
  seqeval = pytest.importorskip('seqeval.metrics')
  gold = [['B-PER', 'I-PER', 'O', 'B-LOC'], ['O', 'B-ORG', 'O', 'O']]
  guess = [['B-PER', 'I-PER', 'O', 'B-ORG'], ['O', 'B-ORG', 'O', 'B-LOC']]
  as_text = (
    ['PER: Kari Dahl | LOC: Oslo', 'ORG: NRK'],
    ['PER: Kari Dahl | ORG: Oslo', 'ORG: NRK | LOC: her'],
  )
  scores = metrics.entity_spans(*as_text)
  assert scores['span_f1'] == pytest.approx(100 * seqeval.f1_score(gold, guess))
  assert scores['span_recall'] == pytest.approx(100 * seqeval.recall_score(gold, guess))


def test_an_entity_named_once_too_often_is_wrong():
  scores = metrics.entity_spans(['LOC: Oslo'], ['LOC: Oslo | LOC: Oslo'])
  assert (scores['span_precision'], scores['span_recall']) == (50.0, 100.0)


def test_answers_by_hand():
  scores = metrics.question_answering(
    [['i 1814', '1814'], ['Eidsvoll verk'], ['Bergen']],
    ['1814.', 'på Eidsvoll', 'Oslo'],
  )
  assert scores['em'] == pytest.approx(100 / 3)
  # 1, one word of two in both directions, 0.
  assert scores['f1'] == pytest.approx(100 * (1 + 0.5) / 3)


def test_translations_at_known_values():
  same = ['Eg heiter Kari og bur i ei lita bygd.']
  assert metrics.translation(same, same) == pytest.approx({'bleu': 100, 'chrf': 100})
  # n-grams that agree: 5 of 6, 4 of 5, 3 of 4, 2 of 3; lengths are equal.
  scores = metrics.translation(['a b c d e f'], ['a b c d e g'])
  assert scores['bleu'] == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)


@pytest.mark.parametrize(
  ('metric', 'module', 'package'),
  [
    (metrics.classification, 'sklearn.metrics', 'scikit-learn'),
    (metrics.summarisation, 'rouge_score.rouge_scorer', 'rouge-score'),
  ],
)
def test_a_missing_library_is_named(metric, module, package, monkeypatch):
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ImportError, match=f'need {package}: pip install'):
    metric(['a'], ['a'])


def test_summaries_by_hand():
  """The longest common subsequence over the lengths of both."""
  targets = [['a b c d', 'a b x y'], ['p q']]
  scores = metrics.summarisation(targets, ['a b c', 'r'])
  # F1 with the first: 2 * 3 / (4 + 3), with the second: 2 * 2 / (4 + 3).
  assert scores['rouge_lsum_max'] == pytest.approx(100 * 6 / 7 / 2)
  assert scores['rouge_lsum_avg'] == pytest.approx(100 * (6 / 7 + 4 / 7) / 2 / 2)
  assert scores['rouge_l'] == pytest.approx(scores['rouge_lsum_max'])


def test_sentences_of_a_summary_are_compared_one_by_one():
  """In another order, the sentences are all found, but not as one line."""
  scores = metrics.summarisation([['e f g . a b c']], ['a b c . e f g'])
  assert scores['rouge_lsum_max'] == pytest.approx(100)
  assert scores['rouge_l'] == pytest.approx(50)


def test_a_text_without_a_summary_is_an_error():
  with pytest.raises(ValueError, match='no right summary'):
    metrics.summarisation([[]], ['x'])


@pytest.mark.parametrize(
  'metric',
  [
    metrics.classification,
    metrics.entity_spans,
    metrics.question_answering,
    metrics.summarisation,
    metrics.translation,
  ],
)
def test_every_metric_needs_pairs(metric):
  with pytest.raises(ValueError, match='split is empty'):
    metric([], [])
  with pytest.raises(ValueError, match='1 targets, but 2 predictions'):
    metric(['a'], ['a', 'b'])
