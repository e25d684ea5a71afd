"""Chunks of predictions: what is written, and what an interruption leaves."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x import infer_writer

VOCABULARY = seqio.ByteVocabulary()


def encode(text):
  return VOCABULARY.encode(text) + [VOCABULARY.eos_id]


@pytest.fixture
def examples():
  return tf.data.Dataset.from_tensor_slices(
    {
      'inputs_pretokenized': ['første', 'andre'],
      'targets_pretokenized': ['1', '2'],
      'inputs': [[5, 6], [7, 0]],
    }
  )


def rows(path):
  with open(path) as file:
    return [json.loads(line) for line in file]


def test_predictions_are_text_beside_the_text_they_are_of(tmp_path, examples):
  path = str(tmp_path / 'out')
  ids = [np.array([*encode('en'), 0, 0]), encode('to')]
  infer_writer.write_inferences_to_file(
    path, (ids, {}), examples, 'predict', VOCABULARY
  )
  assert rows(path) == [
    {
      'inputs': {'inputs_pretokenized': 'første', 'targets_pretokenized': '1'},
      'prediction': 'en',
    },
    {
      'inputs': {'inputs_pretokenized': 'andre', 'targets_pretokenized': '2'},
      'prediction': 'to',
    },
  ]


def test_several_decodes_ids_and_scores(tmp_path, examples):
  path = str(tmp_path / 'out')
  decodes = np.array([[[*encode('a'), 0], [*encode('bb')]]] * 2)
  aux = {'scores': np.array([[-2.0, -1.0], [-4.0, -3.0]])}
  infer_writer.write_inferences_to_file(
    path, (decodes, aux), examples, 'predict_with_aux', VOCABULARY, output_ids=True
  )
  first, second = rows(path)
  assert first['prediction'] == ['a', 'bb']
  assert first['prediction_tokens'] == [encode('a'), encode('bb')]
  assert (first['aux'], second['aux']) == (
    {'scores': [-2.0, -1.0]},
    {'scores': [-4.0, -3.0]},
  )


def test_scores_need_no_vocabulary_and_bfloat16_is_a_number(tmp_path, examples):
  path = str(tmp_path / 'out')
  scores = jnp.array([-1.5, -2.0], jnp.bfloat16)
  infer_writer.write_inferences_to_file(path, (scores, {}), examples, 'score')
  assert [row['score'] for row in rows(path)] == [-1.5, -2.0]
  assert 'aux' not in rows(path)[0]


def test_fields_are_chosen(tmp_path, examples):
  path = str(tmp_path / 'out')

  def inputs(**how):
    infer_writer.write_inferences_to_file(
      path, ([0.0, 0.0], {}), examples, 'score', **how
    )
    return rows(path)[1]['inputs']

  assert inputs(include_all_inputs=True)['inputs'] == [7, 0]
  assert set(inputs(input_fields_to_include=['inputs'])) == {
    'inputs', 'inputs_pretokenized',
  }  # fmt: skip
  with pytest.raises(ValueError, match='exclude each other'):
    inputs(include_all_inputs=True, input_fields_to_include=['inputs'])


def test_bad_modes_are_named(tmp_path, examples):
  for mode, message in (('predcit', "Got: 'predcit'"), ('predict', 'vocabulary')):
    with pytest.raises(ValueError, match=message):
      infer_writer.write_inferences_to_file(
        str(tmp_path / 'out'), ([], {}), examples, mode
      )


def test_a_failing_write_leaves_no_file(tmp_path, examples):
  path = tmp_path / 'out'
  with pytest.raises(IndexError):
    infer_writer.write_inferences_to_file(str(path), ([0.0], {}), examples, 'score')
  assert not path.exists()


@pytest.fixture
def output(tmp_path):
  return infer_writer.TaskOutput(str(tmp_path), str(tmp_path / 'tmp'), 'x.jsonl', {})


def with_settings(output, settings):
  return infer_writer.TaskOutput(
    output.output_dir, output.tmp_dir, output.name, settings
  )


def put_chunk(output, chunk, text):
  os.makedirs(output.tmp_dir, exist_ok=True)
  with open(output.chunk_path(chunk), 'w') as file:
    file.write(text)
  output.finish_chunk(chunk)


def test_only_marked_chunks_from_the_first_on_count(output):
  assert output.chunks_done() == 0
  put_chunk(output, 0, 'a\n')
  put_chunk(output, 1, 'b\n')
  put_chunk(output, 3, 'd\n')
  with open(output.chunk_path(2), 'w') as file:
    file.write('half a li')
  assert output.chunks_done() == 2


def test_finishing_joins_in_order_marks_and_cleans_up(output, tmp_path):
  for chunk in range(3):
    put_chunk(output, chunk, f'{chunk}\n')
  output.finish(infer_writer.merge_chunks_to_file, step=7)
  assert (tmp_path / 'x.jsonl').read_text() == '0\n1\n2\n'
  assert sorted(os.listdir(tmp_path)) == ['x.jsonl', 'x.jsonl.COMPLETED']
  assert output.is_complete()


@pytest.mark.parametrize('folder', ['tmp', 'tmp [1]*'])
def test_several_outputs_share_a_folder(tmp_path, folder):
  """Modes of one task do, also at the same time."""
  first, second = (
    infer_writer.TaskOutput(str(tmp_path), str(tmp_path / folder), name, {})
    for name in ('x-predict.jsonl', 'x-predict_with_aux.jsonl')
  )
  for output in (first, second):
    output.claim()
    for chunk in range(2):
      with open(output.position_path(chunk) + '.index', 'w') as file:
        file.write(output.name)
      put_chunk(output, chunk, f'{output.name} {chunk}\n')
    assert not output.has_position(0) and output.has_position(1)
  first.finish(infer_writer.merge_chunks_to_file, step=7)
  assert (tmp_path / first.name).read_text() == (
    'x-predict.jsonl 0\nx-predict.jsonl 1\n'
  )
  assert second.chunks_done() == 2 and second.has_position(1)
  second.finish(infer_writer.merge_chunks_to_file, step=7)
  assert not (tmp_path / folder).exists()


def test_without_a_merge_function_chunks_stay(output, tmp_path):
  put_chunk(output, 0, 'a\n')
  output.finish(None, step=7)
  assert os.path.exists(output.chunk_path(0))
  assert output.is_complete()


def test_a_missing_chunk_and_no_chunk_are_errors(output):
  os.makedirs(output.tmp_dir)
  with pytest.raises(FileNotFoundError, match='No results'):
    output.finish(infer_writer.merge_chunks_to_file, None)
  put_chunk(output, 0, 'a')
  put_chunk(output, 2, 'c')
  with pytest.raises(FileNotFoundError, match='Chunk 1 is missing'):
    output.finish(infer_writer.merge_chunks_to_file, None)
  assert not output.is_complete()


def test_more_chunks_than_five_digits_count():
  names = ['x-chunk100000', 'x-chunk99999', 'x-chunk00007', 'x-chunk7', 'y-chunk00001']
  assert infer_writer._chunks_among([*names, 'x-chunk00007.COMPLETED'], 'x') == [
    'x-chunk00007', 'x-chunk99999', 'x-chunk100000',
  ]  # fmt: skip


def test_chunks_of_another_run_are_refused(output):
  with_settings(output, {'batch_size': 4, 'checkpoint': '/a'}).claim()
  with_settings(output, {'batch_size': 4, 'checkpoint': '/a'}).claim()
  with pytest.raises(ValueError, match='batch_size was 4 and is 8'):
    with_settings(output, {'batch_size': 8, 'checkpoint': '/a'}).claim()


def test_results_of_other_settings_are_not_taken_for_these(output):
  done = with_settings(output, {'lengths': (3, 4), 'PROMPT': "'a: '", 'BEAMS': '4'})
  put_chunk(done, 0, 'a\n')
  done.finish(infer_writer.merge_chunks_to_file, step=7)
  again = {'lengths': (3, 4), 'PROMPT': "'a: '", 'BEAMS': '4'}
  assert with_settings(output, again).is_complete()
  other = with_settings(output, {'lengths': (3, 4), 'PROMPT': "'b: '", 'FILE': "'c'"})
  with pytest.raises(ValueError, match='complete, and was made with other') as caught:
    other.is_complete()
  for change in (
    "PROMPT was 'a: ' and is 'b: '", 'BEAMS was 4 and is unset',
    "FILE was unset and is 'c'",
  ):  # fmt: skip
    assert change in str(caught.value)
  assert 'lengths' not in str(caught.value)
  # T5X's marks are empty.
  mark = os.path.join(output.output_dir, output.name + infer_writer.DONE_MARK)
  open(mark, 'w').close()
  assert other.is_complete()


def test_a_failure_in_the_pool_surfaces_in_the_main_thread():
  pool = infer_writer.FailFastThreadPoolExecutor(max_workers=1)
  pool.submit(lambda: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    pool.shutdown(wait=True)

  pool = infer_writer.FailFastThreadPoolExecutor(max_workers=1)
  future = pool.submit(lambda: 1 / 0)
  future.exception()
  with pytest.raises(ZeroDivisionError):
    pool.submit(lambda: None)
  pool.shutdown()
