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

SCORES = 'tiny_copy-score.jsonl-00000-of-00001'


def make_partitioner(num_partitions=1):
  return partitioning.PjitPartitioner(
    num_partitions=num_partitions,
    logical_axis_rules=partitioning.standard_logical_axis_rules(),
  )


@pytest.fixture
def run(tiny_run, tmp_path):
  """Calls `infer` on the test split: three chunks of up to four examples."""

  def call(output_dir=tmp_path, **changes):
    arguments = {
      'mode': 'score',
      'model': tiny.make_model(),
      'dataset_cfg': tiny.dataset_config('test', pack=False, batch_size=4),
      'restore_checkpoint_cfg': restore.RestoreCheckpointConfig(
        path=str(tiny_run / 'checkpoint_10'), mode='specific'
      ),
      # Four rows need at most four data partitions of the eight devices.
      'partitioner': make_partitioner(2),
      'output_dir': str(output_dir),
      'checkpoint_period': 1,
      'summarize_config_fn': lambda model_dir, summary_writer, step: None,
      **changes,
    }
    infer.infer(**arguments)
    path = output_dir / SCORES
    return path.read_text() if path.exists() else None

  return call


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def texts(path):
  return [row['inputs']['inputs_pretokenized'] for row in rows(path)]


def expected_texts():
  examples = tiny._examples('test').as_numpy_iterator()
  return [example['inputs'].decode() for example in examples]


class _Interrupted(Exception):
  pass


class Writer:
  """A `write_fn` that records the chunks it writes and fails at one of them."""

  def __init__(self, fail_at=None):
    self.fail_at = fail_at
    self.chunks = []

  def __call__(self, path, *args):
    chunk = int(path[-5:])
    if chunk == self.fail_at:
      raise _Interrupted
    self.chunks.append(chunk)
    infer.write_inferences_to_file(path, *args)


def test_predictions_are_in_order_with_their_inputs(run, tmp_path):
  run(mode='predict')
  name = 'tiny_copy-predict.jsonl-00000-of-00001'
  assert texts(tmp_path / name) == expected_texts()
  assert all(isinstance(row['prediction'], str) for row in rows(tmp_path / name))
  names = [f'.{name}.lock', 'model-info.txt', name, f'{name}.COMPLETED']
  assert sorted(os.listdir(tmp_path)) == names


def test_scores_are_those_of_the_model(run, tmp_path, tiny_run):
  run()
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
  checkpoint = restore.RestoreCheckpointConfig(
    path=str(tiny_run / 'checkpoint_10'), mode='specific', strict=False
  )
  # On one device: the reference is the model alone, without any mesh.
  params = jax.device_get(initializer.from_checkpoint([checkpoint]).params)
  got = [row['score'] for row in rows(tmp_path / SCORES)]
  np.testing.assert_allclose(got, model.score_batch(params, batch), rtol=1e-5)


def test_predictions_with_scores(run, tmp_path):
  run(mode='predict_with_aux')
  got = rows(tmp_path / 'tiny_copy-predict_with_aux.jsonl-00000-of-00001')
  assert len(got) == tiny.TEST_EXAMPLES
  assert all(row['aux']['scores'] < 0 for row in got)


@pytest.mark.parametrize('checkpoint_ds_iter', [True, False])
def test_an_interrupted_run_resumes_after_its_last_whole_chunk(
  run, tmp_path, checkpoint_ds_iter
):
  whole = run(tmp_path / 'whole')
  settings = {
    'output_dir': tmp_path / 'resumed',
    'checkpoint_ds_iter': checkpoint_ds_iter,
  }
  with pytest.raises(_Interrupted):
    run(**settings, write_fn=Writer(fail_at=1))
  assert not (tmp_path / 'resumed' / SCORES).exists()
  run(mode='predict', **settings)  # Another mode does not touch these chunks.
  writer = Writer()
  assert run(**settings, write_fn=writer) == whole
  assert writer.chunks == [1, 2]
  run(**settings, write_fn=writer)  # Complete: not written again.
  assert writer.chunks == [1, 2]
  assert not [n for n in os.listdir(tmp_path / 'resumed') if n.startswith('tmp-')]


def test_other_settings_are_not_mixed_with_old_chunks_or_results(run, tmp_path):
  with pytest.raises(_Interrupted):
    run(write_fn=Writer(fail_at=1))
  with pytest.raises(ValueError, match='checkpoint_period was 1 and is 2'):
    run(checkpoint_period=2)
  run()
  with pytest.raises(ValueError, match='checkpoint_period was 1 and is 2'):
    run(checkpoint_period=2)
  (tmp_path / f'{SCORES}.COMPLETED').write_text('')  # As upstream T5X writes it.
  run(checkpoint_period=2)


def test_changed_gin_values_and_input_files_are_other_settings(run, tmp_path):
  inputs = tmp_path / 'inputs.txt'
  inputs.write_text('first')
  gin.clear_config()
  try:
    for folder in ('here', 'there'):  # Another folder gives the same results.
      with gin.unlock_config():
        gin.parse_config(f"INPUT_FILE = '{inputs}'\nINFER_OUTPUT_DIR = '{folder}'")
      run(tmp_path / 'out')
    inputs.write_text('other')
    with pytest.raises(ValueError, match='INPUT_FILE'):
      run(tmp_path / 'out')
  finally:
    gin.clear_config()


def test_chunks_are_merged_in_order(tmp_path):
  folder = tmp_path / 'tmp [1]*'
  folder.mkdir()
  with pytest.raises(FileNotFoundError):
    infer.merge_chunks_to_file(str(tmp_path), 'x', str(folder), 7)
  for number in range(12):
    (folder / f'x-chunk{number:05}').write_text(f'{number}\n')
    (folder / f'x-chunk{number:05}.COMPLETED').touch()
  infer.merge_chunks_to_file(str(tmp_path), 'x', str(folder), 7)
  assert (tmp_path / 'x').read_text() == ''.join(f'{n}\n' for n in range(12))


def test_chunks_can_stay_separate(run, tmp_path):
  run(merge_chunked_results=False)
  chunks = (tmp_path / 'tmp-tiny_copy-00000-of-00001').glob('*-chunk?????')
  assert len(list(chunks)) == 3
  assert (tmp_path / f'{SCORES}.COMPLETED').exists()


def test_the_newest_checkpoint_of_a_folder(run, tmp_path, tiny_run):
  def scores(path, **mode):
    cfg = restore.RestoreCheckpointConfig(path=str(path), **mode)
    return run(tmp_path / path.name, restore_checkpoint_cfg=cfg)

  assert scores(tiny_run, mode='latest') == scores(tiny_run / 'checkpoint_10')
  with pytest.raises(ValueError, match='3'):
    scores(tiny_run, mode='all')


def test_shards_together_have_every_example(run, tmp_path):
  for shard in range(2):
    run(shard_id=shard, num_shards=2)
  halves = [texts(tmp_path / f'tiny_copy-score.jsonl-0000{i}-of-00002') for i in (0, 1)]
  assert sorted(halves[0] + halves[1]) == sorted(expected_texts())


def test_a_shard_without_examples_is_an_empty_file(run, tmp_path, caplog):
  run(shard_id=tiny.TEST_EXAMPLES, num_shards=tiny.TEST_EXAMPLES + 1)
  name = 'tiny_copy-score.jsonl-00010-of-00011'
  assert rows(tmp_path / name) == []
  assert (tmp_path / f'{name}.COMPLETED').exists()
  assert name in caplog.text


def test_functions_of_the_caller_are_called(run, tmp_path):
  summaries, checked, states = [], [], []

  def merge(output_dir, name, tmp_dir, step):
    assert step == 10
    infer.merge_chunks_to_file(output_dir, f'{name}', tmp_dir, step)
    os.rename(f'{output_dir}/{name}', f'{output_dir}/merged')

  def make_state(**arguments):
    states.append(arguments)
    return restore.TrainStateInitializer(**arguments)

  run(
    merge_fn=merge,
    file_extension='json',
    train_state_initializer_cls=make_state,
    summarize_config_fn=lambda **arguments: summaries.append(arguments),
    verify_matching_vocabs_fn=lambda cfg, model: checked.append(cfg.split),
  )
  assert len(rows(tmp_path / 'merged')) == tiny.TEST_EXAMPLES
  assert (tmp_path / 'tiny_copy-score.json-00000-of-00001.COMPLETED').exists()
  assert summaries == [{'model_dir': str(tmp_path), 'summary_writer': None, 'step': 0}]
  assert checked == ['test']
  assert states[0]['optimizer_def'] is None


def test_output_vocab_feature_name_selects_the_vocabulary(run, tmp_path):
  like = seqio.TaskRegistry.get('tiny_copy')
  vocabularies = {'inputs': seqio.ByteVocabulary(3), 'targets': tiny.VOCABULARY}
  features = {name: seqio.Feature(v) for name, v in vocabularies.items()}
  seqio.TaskRegistry.add('tiny_two', like.source, features, like.preprocessors)
  for feature, vocabulary in vocabularies.items():

    def write(path, inferences, examples, mode, used, expected=vocabulary):
      assert used is expected
      infer.write_inferences_to_file(path, inferences, examples, mode, used)

    run(
      tmp_path / feature,
      mode='predict',
      dataset_cfg=tiny.dataset_config('test', 'tiny_two', pack=False, batch_size=4),
      write_fn=write,
      checkpoint_period=9,
      verify_matching_vocabs_fn=None,
      output_vocab_feature_name=feature,
    )


def test_missing_parameters_come_from_a_seed_in_infer(run, tmp_path, tiny_run):
  drop = restore.RestoreCheckpointConfig(
    path=str(tiny_run / 'checkpoint_10'),
    mode='specific',
    assignment_map=[(r'.*wo', None)],
    fallback_to_scratch=True,
  )

  def scores(seed):
    folder = tmp_path / f'{seed}'
    return run(folder, restore_checkpoint_cfg=drop, fallback_init_rng=seed)

  assert scores(1) != scores(2)
  with pytest.raises(ValueError, match='key'):
    scores(None)


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


def test_a_task_from_files_of_examples(tmp_path):
  path = str(tmp_path / 'data.tfrecord')
  with tf.io.TFRecordWriter(path) as writer:
    for values in (
      {'question': b'ja', 'answer': b'nei'},
      {'question': b'opp', 'answer': b'ned'},
    ):
      features = {
        key: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        for key, value in values.items()
      }
      example = tf.train.Example(features=tf.train.Features(feature=features))
      writer.write(example.SerializeToString())
  feature = seqio.Feature(tiny.VOCABULARY)

  def make(targets_key, files='*.tfrecord', file_type='tfrecord'):
    name = infer.create_task_from_tfexample_file(
      [str(tmp_path / files)],
      file_type,
      inputs_key='question',
      targets_key=targets_key,
      features={'inputs': feature, 'targets': feature},
    )
    dataset = seqio.get_mixture_or_task(name).get_dataset(
      {'inputs': 9, 'targets': 9}, 'infer', shuffle=False
    )
    return name, [
      tuple(tiny.VOCABULARY.decode(one[k].tolist()) for k in ('inputs', 'targets'))
      for one in dataset.as_numpy_iterator()
    ]

  scored, pairs = make('answer')
  assert pairs == [('ja', 'nei'), ('opp', 'ned')]
  predicted, pairs = make(None)
  assert pairs == [('ja', ''), ('opp', '')]
  assert scored != predicted == make(None)[0]
  for wrong in ({'file_type': 'csv'}, {'files': '*.csv'}):
    with pytest.raises(ValueError, match='csv'):
      make(None, **wrong)


# ---- The written files ----


def encode(text):
  return tiny.VOCABULARY.encode(text) + [tiny.VOCABULARY.eos_id]


@pytest.fixture
def write(tmp_path):
  """Writes inferences for two examples and returns the rows of the file."""
  examples = tf.data.Dataset.from_tensor_slices(
    {
      'inputs_pretokenized': ['første', 'andre'],
      'targets_pretokenized': ['1', '2'],
      'inputs': [[5, 6], [7, 0]],
    }
  )

  def call(outputs, mode='score', vocabulary=None, aux=None, **options):
    path = tmp_path / 'out'
    infer.write_inferences_to_file(
      str(path), (outputs, aux or {}), examples, mode, vocabulary, **options
    )
    return rows(path)

  return call


def test_predictions_are_written_as_text(write):
  ids = [np.array([*encode('en'), 0, 0]), encode('to')]
  first, second = write(ids, 'predict', tiny.VOCABULARY)
  assert first == {
    'inputs': {'inputs_pretokenized': 'første', 'targets_pretokenized': '1'},
    'prediction': 'en',
  }
  assert second['prediction'] == 'to'


def test_several_decodes_with_ids_and_scores(write):
  decodes = np.array([[[*encode('a'), 0], [*encode('bb')]]] * 2)
  aux = {'scores': np.array([[-2.0, -1.0], [-4.0, -3.0]])}
  first, second = write(
    decodes, 'predict_with_aux', tiny.VOCABULARY, aux, output_ids=True
  )
  assert first['prediction'] == ['a', 'bb']
  assert first['prediction_tokens'] == [encode('a'), encode('bb')]
  assert first['aux'] == {'scores': [-2.0, -1.0]}
  assert second['aux'] == {'scores': [-4.0, -3.0]}


def test_bfloat16_scores_are_numbers(write):
  written = write(jnp.array([-1.5, -2.0], jnp.bfloat16))
  assert [row['score'] for row in written] == [-1.5, -2.0]
  assert 'aux' not in written[0]


def test_fields_are_chosen(write):
  scores = [0.0, 0.0]
  assert write(scores, include_all_inputs=True)[1]['inputs']['inputs'] == [7, 0]
  chosen = write(scores, input_fields_to_include=['inputs'])[1]['inputs']
  assert set(chosen) == {'inputs', 'inputs_pretokenized'}
  with pytest.raises(ValueError, match='include_all_inputs'):
    write(scores, include_all_inputs=True, input_fields_to_include=['inputs'])


def test_unknown_modes_and_missing_vocabularies_are_errors(write):
  for mode, message in (('predcit', "'predcit'"), ('predict', 'vocabulary')):
    with pytest.raises(ValueError, match=message):
      write([], mode)


def test_a_failing_write_leaves_no_file(write, tmp_path):
  with pytest.raises(IndexError):
    write([0.0])
  assert not (tmp_path / 'out').exists()
