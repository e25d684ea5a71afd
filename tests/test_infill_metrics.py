"""Spans that the noise took away, found again in generated text; worked by hand."""

import numpy as np
import pytest
import seqio

from bart_t5x import metrics, noise
from bart_t5x.features import BartFeatureConverter
from bart_t5x.vocabularies import load_vocabulary
from tasks import pretrain

PARTS = [('Kari gikk ', False), ('ut av', True), (' huset og ', False), ('lo.', True)]


def test_parts_are_the_text_in_runs(corpus_dir):
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


def test_a_text_given_back_is_perfect():
  scores = metrics.denoising([PARTS], ['Kari gikk ut av huset og lo.'])
  assert scores == pytest.approx(
    {
      'exact_match': 100,
      'chrf': 100,
      'infilled_exact_match': 100,
      'infilled_chrf': 100,
      'infilled_spans': 2,
    }
  )


@pytest.mark.parametrize(
  ('prediction', 'spans'),
  [
    ('Kari gikk ut av huset og lo.', ['ut av', 'lo .']),
    ('Kari gikk forbi huset og gråt', ['forbi', 'gråt']),
    # Nothing was written for the first, much for the second.
    ('Kari gikk huset og lo og lo.', ['', 'lo og lo .']),
    # The context after the first span is lost: it goes on to the next word found.
    ('Kari gikk ut av hytta og lo.', ['ut av hytta', 'lo .']),
    # No word is found again: all of the text stands for each span.
    ('hei', ['hei', 'hei']),
    ('', ['', '']),
  ],
)
def test_counterparts_lie_between_the_words_that_were_not_masked(prediction, spans):
  pairs = metrics.aligned_spans(PARTS, prediction)
  assert [wanted for wanted, _ in pairs] == ['ut av', 'lo .']
  assert [found for _, found in pairs] == spans


def test_half_of_the_spans_exact():
  scores = metrics.denoising([PARTS], ['Kari gikk ut av huset og gråt.'])
  assert scores['exact_match'] == 0
  assert scores['infilled_exact_match'] == 50
  assert 50 < scores['infilled_chrf'] < 100


def test_a_word_masked_in_part_counts_as_masked():
  parts = [('sjo', False), ('kolade', True), (' er godt', False)]
  assert metrics.aligned_spans(parts, 'sjokolade er godt') == [
    ('sjokolade', 'sjokolade')
  ]


def test_no_spans_are_no_error():
  scores = metrics.denoising([[('Hei der.', False)]], ['Hei der.'])
  assert scores['exact_match'] == 100
  assert scores['infilled_spans'] == scores['infilled_chrf'] == 0
  with pytest.raises(ValueError, match='split is empty'):
    metrics.denoising([], [])


def test_seqio_evaluates_a_denoising_task(corpus_dir):
  """The evaluator hands the codes to the postprocessor; a perfect model is perfect."""
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
