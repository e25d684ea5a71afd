"""Metrics at values computed by hand."""

import numpy as np
import pytest
import seqio

from bart_t5x import metrics, noise
from bart_t5x.features import BartFeatureConverter
from bart_t5x.vocabularies import load_vocabulary
from tasks import pretrain


def test_half_of_the_texts_exact():
  scores = metrics.reconstruction(['aaaaaaaa', 'bbbbbbbb'], ['aaaaaaaa', 'cccccccc'])
  assert scores['exact_match'] == 50.0
  # Of n-grams of each order 1 to 6 half are right, in both directions.
  assert scores['chrf'] == pytest.approx(50.0)


def test_classes_by_hand():
  targets = ['ja', 'ja', 'nei', 'nei']
  scores = metrics.classification(targets, ['ja', 'nei', 'nei', 'nei'], ('ja', 'nei'))
  assert scores['accuracy'] == 75.0
  # F1 of ja: P 1, R 1/2; of nei: P 2/3, R 1.
  assert scores['macro_f1'] == pytest.approx(100 * (2 / 3 + 4 / 5) / 2)
  # (tp tn - fp fn) / sqrt((tp + fp)(tp + fn)(tn + fp)(tn + fn)) = 2 / sqrt(12)
  assert scores['mcc'] == pytest.approx(100 * 2 / 12**0.5)
  assert scores['unknown_labels'] == 0.0


def test_unknown_labels_are_wrong_and_counted():
  scores = metrics.classification(['ja', 'nei'], ['ja', 'kanskje'], ('ja', 'nei'))
  assert scores['accuracy'] == scores['unknown_labels'] == 50.0
  # F1: ja 1, nei 0. The unknown text is not a third class.
  assert scores['macro_f1'] == 50.0


def test_unknown_target_raises():
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


def test_summaries_by_hand():
  """The longest common subsequence over the lengths of both."""
  targets = [['a b c d', 'a b x y'], ['p q']]
  scores = metrics.summarisation(targets, ['a b c', 'r'])
  # F1 with the first: 2 * 3 / (4 + 3), with the second: 2 * 2 / (4 + 3).
  assert scores['rouge_lsum_max'] == pytest.approx(100 * 6 / 7 / 2)
  assert scores['rouge_lsum_avg'] == pytest.approx(100 * (6 / 7 + 4 / 7) / 2 / 2)
  assert scores['rouge_l'] == pytest.approx(scores['rouge_lsum_max'])


def test_summaries_by_sentence():
  """In another order, the sentences are all found, but not as one line."""
  scores = metrics.summarisation([['e f g . a b c']], ['a b c . e f g'])
  assert scores['rouge_lsum_max'] == pytest.approx(100)
  assert scores['rouge_l'] == pytest.approx(50)


@pytest.mark.parametrize(
  'metric',
  [
    metrics.reconstruction,
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


# ---- Denoising ----

PARTS = [('Kari gikk ', False), ('ut av', True), (' huset og ', False), ('lo.', True)]


def test_parts_of_a_text(corpus_dir):
  vocabulary = load_vocabulary(corpus_dir)
  ids = np.array([1, *vocabulary.encode('Åse og barna på sjø'), 2])
  words = ['Åse', ' og', ' barna', ' på', ' sjø']
  sizes = [len(vocabulary.encode(word)) for word in words]
  flags = np.repeat([1, 2, 2, 1, 2], sizes)
  codes = np.concatenate([[1], flags, [noise.END]])
  assert metrics.parts_of(ids, codes, vocabulary) == [
    ('Åse', False),
    (' og barna', True),
    (' på', False),
    (' sjø', True),
  ]


@pytest.mark.parametrize(
  ('prediction', 'spans'),
  [
    ('Kari gikk ut av huset og lo.', ['ut av', 'lo .']),
    ('Kari gikk forbi huset og gråt', ['forbi', 'gråt']),
    # Nothing was written for the first, much for the second.
    ('Kari gikk huset og lo og lo.', ['', 'lo og lo .']),
    # The context after the first span is lost: it extends to the next word found.
    ('Kari gikk ut av hytta og lo.', ['ut av hytta', 'lo .']),
    # No word is found again: all of the text stands for each span.
    ('hei', ['hei', 'hei']),
    ('', ['', '']),
  ],
)
def test_counterparts_are_between_copied_words(prediction, spans):
  pairs = metrics.aligned_spans(PARTS, prediction)
  assert [wanted for wanted, _ in pairs] == ['ut av', 'lo .']
  assert [found for _, found in pairs] == spans


def test_half_of_the_spans_exact():
  scores = metrics.denoising([PARTS], ['Kari gikk ut av huset og gråt.'])
  assert scores['exact_match'] == 0
  assert scores['infilled_exact_match'] == 50
  assert 50 < scores['infilled_chrf'] < 100


def test_partly_masked_word_counts_as_masked():
  parts = [('sjo', False), ('kolade', True), (' er godt', False)]
  assert metrics.aligned_spans(parts, 'sjokolade er godt') == [
    ('sjokolade', 'sjokolade')
  ]


def test_no_spans():
  scores = metrics.denoising([[('Hei der.', False)]], ['Hei der.'])
  assert scores['exact_match'] == 100
  assert scores['infilled_spans'] == scores['infilled_chrf'] == 0
  with pytest.raises(ValueError, match='split is empty'):
    metrics.denoising([], [])


def test_seqio_evaluates_a_denoising_task(corpus_dir):
  """The postprocessor gets the codes; right answers score 100."""
  task = pretrain.add_denoising_task(
    'infill_test', corpus_dir, noise.Recipe(whole_words=True)
  )
  try:
    lengths = {'inputs': 64, 'targets': 64}
    evaluator = seqio.Evaluator(
      'infill_test',
      BartFeatureConverter(pack=False),
      eval_split='validation',
      sequence_length=lengths,
      num_examples=8,
      seed=1,
    )
    examples = list(evaluator.cached_task_datasets['infill_test'].as_numpy_iterator())
    answers = [
      (i, np.pad(example['targets'], (0, 64 - len(example['targets']))))
      for i, example in enumerate(examples)
    ]
    results, _ = evaluator.evaluate(
      compute_metrics=True, step=1, predict_fn=lambda dataset: answers
    )
    scores = results.result()['infill_test']
  finally:
    seqio.TaskRegistry.remove(task.name)
  assert scores['infilled_spans'] > 8
  assert scores['infilled_exact_match'] == scores['exact_match'] == 100
