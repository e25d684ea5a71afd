"""Inference with a tiny model, interrupted and not, in this process."""

import json
import os

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
import tensorflow as tf
import tiny

from t5x import infer, partitioning, restore


def make_partitioner():
  return partitioning.PjitPartitioner(
    num_partitions=1,
    logical_axis_rules=partitioning.standard_logical_axis_rules(),
  )


@pytest.fixture
def run(tiny_run, tmp_path):
  """Calls `infer` on the test split, four examples a chunk."""

  def call(output_dir=tmp_path, **changes):
    arguments = {
      'mode': 'predict',
      'model': tiny.make_model(),
      'dataset_cfg': tiny.dataset_config('test', pack=False, batch_size=4),
      'restore_checkpoint_cfg': restore.RestoreCheckpointConfig(
        path=str(tiny_run / 'checkpoint_10'), mode='specific'
      ),
      # Four rows do not divide by eight devices; two partitions leave four.
      'partitioner': partitioning.PjitPartitioner(
        num_partitions=2,
        logical_axis_rules=partitioning.standard_logical_axis_rules(),
      ),
      'output_dir': str(output_dir),
      'checkpoint_period': 1,
      'summarize_config_fn': lambda model_dir, summary_writer, step: None,
      **changes,
    }
    infer.infer(**arguments)

  return call


def rows(folder, name):
  with open(folder / name) as file:
    return [json.loads(line) for line in file]


WHOLE = 'jsonl-00000-of-00001'


def test_predictions_come_in_order_with_their_inputs(run, tmp_path):
  run()
  name = f'tiny_copy-predict.{WHOLE}'
  got = rows(tmp_path, name)
  expected = list(tiny._examples('test').as_numpy_iterator())
  assert [row['inputs']['inputs_pretokenized'] for row in got] == [
    example['inputs'].decode() for example in expected
  ]
  assert all(isinstance(row['prediction'], str) for row in got)
  assert sorted(os.listdir(tmp_path)) == ['model-info.txt', name, f'{name}.COMPLETED']


def test_scores_are_those_of_the_model(run, tmp_path, tiny_run):
  run(mode='score')
  got = [row['score'] for row in rows(tmp_path, f'tiny_copy-score.{WHOLE}')]

  model = tiny.make_model()
  dataset = seqio.get_dataset(
    'tiny_copy',
    tiny.LENGTHS,
    dataset_split='test',
    shuffle=False,
    feature_converter=model.FEATURE_CONVERTER_CLS(pack=False),
  )
  batch = next(dataset.batch(tiny.TEST_EXAMPLES).as_numpy_iterator())
  initializer = restore.TrainStateInitializer(
    optimizer_def=None,
    init_fn=model.get_initial_variables,
    input_shapes={name: value.shape for name, value in batch.items()},
    partitioner=make_partitioner(),
  )
  state = initializer.from_checkpoint(
    [
      restore.RestoreCheckpointConfig(
        path=str(tiny_run / 'checkpoint_10'), mode='specific', strict=False
      )
    ]
  )
  # On one device: the reference is the model alone, without any mesh.
  params = jax.device_get(state.params)
  np.testing.assert_allclose(got, model.score_batch(params, batch), rtol=1e-5)


def test_predictions_with_scores(run, tmp_path):
  run(mode='predict_with_aux')
  got = rows(tmp_path, f'tiny_copy-predict_with_aux.{WHOLE}')
  assert len(got) == tiny.TEST_EXAMPLES
  assert all(row['aux']['scores'] < 0 for row in got)


class _Interrupted(Exception):
  pass


def interrupted_at(chunk):
  """A `write_fn` that fails at a chunk."""

  def write(path, *args):
    if path.endswith(f'-chunk{chunk:05}'):
      raise _Interrupted
    infer.write_inferences_to_file(path, *args)

  return write


@pytest.mark.parametrize('checkpoint_ds_iter', [True, False])
def test_an_interrupted_run_resumes_after_its_last_whole_chunk(
  run, tmp_path, checkpoint_ds_iter
):
  whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
  run(whole, mode='score')
  with pytest.raises(_Interrupted):
    run(
      resumed,
      mode='score',
      checkpoint_ds_iter=checkpoint_ds_iter,
      write_fn=interrupted_at(1),
    )
  assert not (resumed / f'tiny_copy-score.{WHOLE}').exists()
  written = []

  def write(path, *args):
    written.append(path[-5:])
    infer.write_inferences_to_file(path, *args)

  run(resumed, mode='score', checkpoint_ds_iter=checkpoint_ds_iter, write_fn=write)
  assert written == ['00001', '00002']
  name = f'tiny_copy-score.{WHOLE}'
  assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_a_complete_task_is_left_alone(run, tmp_path):
  run(mode='score')

  def fail(*args):
    raise AssertionError('written again')

  run(mode='score', write_fn=fail)


def test_other_settings_are_not_mixed_with_old_chunks_or_results(run, tmp_path):
  with pytest.raises(_Interrupted):
    run(mode='score', write_fn=interrupted_at(1))
  with pytest.raises(ValueError, match='checkpoint_period was 1 and is 2'):
    run(mode='score', checkpoint_period=2)
  run(mode='score')
  with pytest.raises(ValueError, match='checkpoint_period was 1 and is 2'):
    run(mode='score', checkpoint_period=2)
  # T5X's marks are empty.
  (tmp_path / f'tiny_copy-score.{WHOLE}.COMPLETED').write_text('')
  run(mode='score', checkpoint_period=2)


def test_modes_share_a_folder_of_chunks(run, tmp_path):
  with pytest.raises(_Interrupted):
    run(mode='score', write_fn=interrupted_at(2))
  run(mode='predict')
  written = []

  def write(path, *args):
    written.append(path[-5:])
    infer.write_inferences_to_file(path, *args)

  run(mode='score', write_fn=write)
  assert written == ['00002']
  assert not [name for name in os.listdir(tmp_path) if name.startswith('tmp-')]


def test_merging_joins_chunks_in_order(tmp_path):
  (tmp_path / 'tmp [1]*').mkdir()

  def merge():
    infer.merge_chunks_to_file(str(tmp_path), 'x', str(tmp_path / 'tmp [1]*'), 7)
    return (tmp_path / 'x').read_text()

  def chunk(number):
    return tmp_path / 'tmp [1]*' / f'x-chunk{number:05}'

  with pytest.raises(FileNotFoundError):
    merge()
  for number in range(12):
    chunk(number).write_text(f'{number}\n')
    chunk(f'{number:05}.COMPLETED').touch()
  assert merge() == ''.join(f'{number}\n' for number in range(12))


def test_the_newest_checkpoint_of_a_folder(run, tmp_path, tiny_run):
  def scores(folder, **which):
    which = restore.RestoreCheckpointConfig(**which)
    run(tmp_path / folder, mode='score', restore_checkpoint_cfg=which)
    return (tmp_path / folder / f'tiny_copy-score.{WHOLE}').read_text()

  newest = scores('newest', path=str(tiny_run), mode='latest')
  assert newest == scores('named', path=str(tiny_run / 'checkpoint_10'))
  with pytest.raises(ValueError, match='3'):
    scores('all', path=str(tiny_run), mode='all')


def test_a_share_without_examples_is_an_empty_file(run, tmp_path, caplog):
  shards = tiny.TEST_EXAMPLES + 1
  run(mode='predict', shard_id=tiny.TEST_EXAMPLES, num_shards=shards)
  name = f'tiny_copy-predict.jsonl-{shards - 1:05}-of-{shards:05}'
  assert rows(tmp_path, name) == []
  assert (tmp_path / f'{name}.COMPLETED').exists()
  assert f'{name}: this shard of the split is empty' in caplog.text


def test_shards_together_are_the_whole(run, tmp_path):
  for shard in range(2):
    run(mode='score', shard_id=shard, num_shards=2)
  texts = [
    row['inputs']['inputs_pretokenized']
    for shard in range(2)
    for row in rows(tmp_path, f'tiny_copy-score.jsonl-{shard:05}-of-00002')
  ]
  assert sorted(texts) == sorted(
    example['inputs'].decode() for example in tiny._examples('test').as_numpy_iterator()
  )


def test_chunks_can_stay_apart(run, tmp_path):
  run(mode='score', merge_chunked_results=False)
  folder = tmp_path / 'tmp-tiny_copy-00000-of-00001'
  chunks = [n for n in os.listdir(folder) if n[-5:].isdigit() and '-chunk' in n]
  assert len(chunks) == 3
  assert (tmp_path / f'tiny_copy-score.{WHOLE}.COMPLETED').exists()


def test_what_the_caller_of_infer_gives_is_called(run, tmp_path):
  summaries, checked, states = [], [], []

  def merge(output_dir, name, tmp_dir, step):
    assert step == 10
    infer.merge_chunks_to_file(output_dir, name, tmp_dir, step)
    os.rename(f'{output_dir}/{name}', f'{output_dir}/merged-{name}')

  def make_state(**arguments):
    states.append(arguments)
    return restore.TrainStateInitializer(**arguments)

  run(
    mode='score',
    merge_fn=merge,
    file_extension='json',
    train_state_initializer_cls=make_state,
    summarize_config_fn=lambda **arguments: summaries.append(arguments),
    verify_matching_vocabs_fn=lambda cfg, model: checked.append(cfg.split),
  )
  merged = 'merged-tiny_copy-score.json-00000-of-00001'
  assert len(rows(tmp_path, merged)) == tiny.TEST_EXAMPLES
  assert summaries == [{'model_dir': str(tmp_path), 'summary_writer': None, 'step': 0}]
  assert checked == ['test']
  assert states[0]['optimizer_def'] is None


def test_the_feature_whose_vocabulary_decodes(run, tmp_path):
  seen = []

  def write(path, inferences, examples, mode, vocabulary):
    seen.append(vocabulary)
    infer.write_inferences_to_file(path, inferences, examples, mode, vocabulary)

  features = tiny.two_vocabularies('tiny_two')
  config = tiny.dataset_config('test', 'tiny_two', pack=False, batch_size=4)
  for feature in ('inputs', 'targets'):
    run(
      tmp_path / feature,
      dataset_cfg=config,
      write_fn=write,
      checkpoint_period=9,
      verify_matching_vocabs_fn=None,
      output_vocab_feature_name=feature,
    )
  assert seen == [features['inputs'].vocabulary, features['targets'].vocabulary]
  assert seen[0] is not seen[1]


def test_missing_parameters_come_from_a_seed_in_infer(run, tmp_path, tiny_run):
  drop = restore.RestoreCheckpointConfig(
    path=str(tiny_run / 'checkpoint_10'),
    mode='specific',
    assignment_map=[(r'.*wo', None)],
    fallback_to_scratch=True,
  )

  def scores(folder, **changes):
    run(tmp_path / folder, mode='score', restore_checkpoint_cfg=drop, **changes)
    return (tmp_path / folder / f'tiny_copy-score.{WHOLE}').read_text()

  first = scores('first', fallback_init_rng=1)
  assert scores('other', fallback_init_rng=2) != first
  with pytest.raises(ValueError, match='key'):
    scores('none')


@pytest.mark.parametrize(
  'changes, part',
  [
    ({'mode': 'guess'}, "'guess'"),
    ({'checkpoint_period': 0}, 'checkpoint_period'),
    ({'shard_id': 2, 'num_shards': 2}, 'shard_id'),
    ({'dataset_cfg': tiny.dataset_config('test', pack=True)}, 'pack'),
    ({'dataset_cfg': tiny.dataset_config('tset', pack=False)}, 'tset'),
  ],
)
def test_invalid_arguments_are_errors(run, changes, part):
  with pytest.raises(ValueError, match=part):
    run(**changes)


def test_results_are_those_of_the_configuration_and_its_files(run, tmp_path):
  inputs = tmp_path / 'inputs.txt'
  inputs.write_text('first')
  gin.clear_config()
  try:
    with gin.unlock_config():
      gin.parse_config(f"INPUT_FILE = '{inputs}'\nINFER_OUTPUT_DIR = 'here'")
    run(tmp_path / 'out')
    with gin.unlock_config():
      gin.parse_config("INFER_OUTPUT_DIR = 'there'")
    run(tmp_path / 'out')  # The same, and complete.
    inputs.write_text('other')
    with pytest.raises(ValueError, match='INPUT_FILE'):
      run(tmp_path / 'out')
  finally:
    gin.clear_config()


def test_a_task_from_files_of_examples(tmp_path):
  path = str(tmp_path / 'data.tfrecord')
  with tf.io.TFRecordWriter(path) as writer:
    for question, answer in [('ja', 'nei'), ('opp', 'ned')]:
      values = {'question': question, 'answer': answer}
      features = {
        key: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value.encode()]))
        for key, value in values.items()
      }
      example = tf.train.Example(features=tf.train.Features(feature=features))
      writer.write(example.SerializeToString())
  feature = seqio.Feature(tiny.VOCABULARY)
  features = {'inputs': feature, 'targets': feature}

  def make(targets_key, **changes):
    arguments = {
      'paths': [str(tmp_path / '*.tfrecord')],
      'file_type': 'tfrecord',
      'inputs_key': 'question',
      'targets_key': targets_key,
      'features': features,
      **changes,
    }
    name = infer.create_task_from_tfexample_file(**arguments)
    dataset = seqio.get_mixture_or_task(name).get_dataset(
      {'inputs': 9, 'targets': 9}, 'infer', shuffle=False
    )
    decode = tiny.VOCABULARY.decode
    return name, [
      (decode(one['inputs'].tolist()), decode(one['targets'].tolist()))
      for one in dataset.as_numpy_iterator()
    ]

  scored, texts = make('answer')
  assert texts == [('ja', 'nei'), ('opp', 'ned')]
  predicted, texts = make(None)
  assert texts == [('ja', ''), ('opp', '')]
  assert scored != predicted == make(None)[0]
  with pytest.raises(ValueError, match='csv'):
    make(None, file_type='csv')
  with pytest.raises(ValueError, match='csv'):
    make(None, paths=[str(tmp_path / '*.csv')])


# ---- The files ----

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


def test_predictions_are_text_next_to_the_inputs(tmp_path, examples):
  path = str(tmp_path / 'out')
  ids = [np.array([*encode('en'), 0, 0]), encode('to')]
  infer.write_inferences_to_file(path, (ids, {}), examples, 'predict', VOCABULARY)
  assert rows(tmp_path, 'out') == [
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
  infer.write_inferences_to_file(
    path, (decodes, aux), examples, 'predict_with_aux', VOCABULARY, output_ids=True
  )
  first, second = rows(tmp_path, 'out')
  assert first['prediction'] == ['a', 'bb']
  assert first['prediction_tokens'] == [encode('a'), encode('bb')]
  assert (first['aux'], second['aux']) == (
    {'scores': [-2.0, -1.0]},
    {'scores': [-4.0, -3.0]},
  )


def test_scores_need_no_vocabulary_and_bfloat16_is_a_number(tmp_path, examples):
  path = str(tmp_path / 'out')
  scores = jnp.array([-1.5, -2.0], jnp.bfloat16)
  infer.write_inferences_to_file(path, (scores, {}), examples, 'score')
  assert [row['score'] for row in rows(tmp_path, 'out')] == [-1.5, -2.0]
  assert 'aux' not in rows(tmp_path, 'out')[0]


def test_fields_are_chosen(tmp_path, examples):
  path = str(tmp_path / 'out')

  def inputs(**how):
    infer.write_inferences_to_file(path, ([0.0, 0.0], {}), examples, 'score', **how)
    return rows(tmp_path, 'out')[1]['inputs']

  assert inputs(include_all_inputs=True)['inputs'] == [7, 0]
  assert set(inputs(input_fields_to_include=['inputs'])) == {
    'inputs', 'inputs_pretokenized',
  }  # fmt: skip
  with pytest.raises(ValueError, match='include_all_inputs'):
    inputs(include_all_inputs=True, input_fields_to_include=['inputs'])


def test_unknown_modes_and_missing_vocabularies_are_errors(tmp_path, examples):
  for mode, message in (('predcit', "'predcit'"), ('predict', 'vocabulary')):
    with pytest.raises(ValueError, match=message):
      infer.write_inferences_to_file(str(tmp_path / 'out'), ([], {}), examples, mode)


def test_a_failing_write_leaves_no_file(tmp_path, examples):
  path = tmp_path / 'out'
  with pytest.raises(IndexError):
    infer.write_inferences_to_file(str(path), ([0.0], {}), examples, 'score')
  assert not path.exists()
