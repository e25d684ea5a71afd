"""Examples by hand as datasets and tasks."""

import numpy as np
import pytest
import seqio
import tiny

from t5x import interactive_data, interactive_model

FEATURES = {
  name: seqio.Feature(tiny.VOCABULARY, add_eos=True) for name in ('inputs', 'targets')
}
PREPROCESSORS = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]


def read(examples, preprocessors=PREPROCESSORS, lengths=None):
  dataset = interactive_model.get_dataset_from_natural_text_examples(
    examples, preprocessors, lengths, FEATURES
  )
  return list(dataset.as_numpy_iterator())


def ids(text):
  return [*tiny.VOCABULARY.encode(text), tiny.VOCABULARY.eos_id]


def test_texts_and_pairs_become_features():
  rows = read(['ab', {'input': 'cde', 'target': 'f'}, {'input': b'g'}])
  for row, (source, target) in zip(
    rows, [('ab', ''), ('cde', 'f'), ('g', '')], strict=True
  ):
    np.testing.assert_array_equal(row['inputs'], ids(source))
    np.testing.assert_array_equal(row['targets'], ids(target))
    assert row['inputs_pretokenized'].decode() == source


def test_features_are_cut_to_their_lengths():
  (row,) = read(['abcdef'], lengths={'inputs': 3, 'targets': 2})
  np.testing.assert_array_equal(row['inputs'], ids('abc')[:3])


def test_token_ids_are_taken_as_they_are():
  rows = read([{'input': [5, 6], 'target': [7]}, {'input': [8]}], preprocessors=[])
  assert [row['inputs'].tolist() for row in rows] == [[5, 6], [8]]
  assert [row['targets'].tolist() for row in rows] == [[7], []]


@pytest.mark.parametrize(
  'example', [{'target': 'a'}, {'input': 'a', 'targets': 'b'}, {}], ids=str
)
def test_other_keys_are_refused(example):
  with pytest.raises(ValueError, match='An example is a text'):
    read([example])


def test_no_examples_are_refused():
  with pytest.raises(ValueError, match='There are no examples'):
    read([])


def test_batches_are_repeated_or_cut():
  a, b = [{'input': 'a'}], [{'input': 'b'}]
  repeat = interactive_data.get_equal_length_batches
  assert repeat([a, b], 3) == [a, b, a]
  assert repeat([a, b], 1) == [a]
  assert repeat(a, 2) == [a, a]
  assert repeat(['text'], 2) == [['text'], ['text']]
  assert repeat(None, 2) == [None, None]


def test_batches_of_a_task():
  batches = interactive_model.get_batches_from_seqio(
    'tiny_copy', 'test', batch_size=2, num_batches=3, shuffle=False
  )
  assert [len(batch) for batch in batches] == [2, 2, 2]
  assert batches[0][0].keys() == {'input', 'target'}
  texts = read(batches[0])
  tokens = interactive_model.get_batches_from_seqio(
    'tiny_copy', 'test', 2, 3, get_pretokenized_examples=False, shuffle=False
  )
  for row, example in zip(texts, tokens[0], strict=True):
    assert row['inputs'].tolist() == example['input']
  with pytest.raises(ValueError, match=r"need 12 examples; 'tiny_copy' has 10"):
    interactive_model.get_batches_from_seqio('tiny_copy', 'test', 4, 3)


def test_a_task_of_examples():
  class Model:
    features = FEATURES

  task = interactive_model.get_seqio_task_from_examples(
    'by_hand', Model(), ['ab', 'cd'], PREPROCESSORS, [tiny.mean_score]
  )
  assert seqio.get_mixture_or_task('by_hand') is task
  rows = task.get_dataset(split='validation', shuffle=False).as_numpy_iterator()
  assert [row['inputs'].tolist() for row in rows] == [ids('ab'), ids('cd')]
  loose = interactive_model.get_seqio_task_from_examples(
    'not_registered', Model(), ['ab'], PREPROCESSORS, add_to_registry=False
  )
  assert loose.name not in seqio.TaskRegistry.names()
  assert task.score_metric_fns == [tiny.mean_score]
