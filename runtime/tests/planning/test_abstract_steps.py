"""Steps without data: their shapes and programs are those of a run."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

from t5x import data, partitioning, restore
from t5x.planning import abstract_steps


def run_of(arguments):
  names = ('model', 'train_dataset_cfg', 'partitioner', 'trainer_cls', 'random_seed')
  return abstract_steps.Run(**{name: arguments[name] for name in names})


@pytest.fixture
def arguments(tmp_path):
  return tiny.train_arguments(tmp_path)


@pytest.mark.parametrize('pack', [False, True])
def test_batches_have_the_shapes_of_the_data(arguments, pack):
  cfg = dataclasses.replace(arguments['train_dataset_cfg'], pack=pack)
  converter = arguments['model'].FEATURE_CONVERTER_CLS
  real = data.get_dataset(cfg, 0, 1, converter).element_spec
  planned = abstract_steps.batch_spec(cfg, converter)
  assert {k: (v.shape, v.dtype) for k, v in planned.items()} == {
    k: (tuple(v.shape), v.dtype.as_numpy_dtype) for k, v in real.items()
  }


def test_a_batch_that_does_not_divide_is_refused(arguments):
  cfg = dataclasses.replace(arguments['train_dataset_cfg'], batch_size=9)
  with pytest.raises(ValueError, match='batch of 9'):
    run_of(arguments).step('train', cfg)


@pytest.mark.parametrize('kind', ['train', 'eval'])
def test_the_program_is_that_of_the_trainer(arguments, kind):
  step = run_of(arguments).step(kind)
  planned = step.trace().lower().as_text()

  # The run's own way: real data, a real state, a Trainer.
  cfg, partitioner = arguments['train_dataset_cfg'], arguments['partitioner']
  model = arguments['model']
  rows = data.get_dataset(cfg, 0, 1, model.FEATURE_CONVERTER_CLS)
  batch = next(rows.as_numpy_iterator())
  initializer = restore.TrainStateInitializer(
    model.optimizer_def,
    model.get_initial_variables,
    {name: x.shape for name, x in batch.items()},
    partitioner,
    {name: x.dtype for name, x in batch.items()},
  )
  init_key, train_key = jax.random.split(
    jax.random.PRNGKey(arguments['random_seed'] or 0)
  )
  with arguments['trainer_cls'](
    model=model,
    train_state=initializer.from_scratch(init_key),
    partitioner=partitioner,
    train_state_axes=initializer.train_state_axes,
    eval_names=(),
    summary_dir=None,
    rng=train_key,
  ) as real:
    function = (
      real._partitioned_train_step if kind == 'train' else real._partitioned_eval_step
    )
    batch = real._on_devices(batch)
    assert function.lower(real.train_state, batch).as_text() == planned


def test_target_tokens(arguments):
  step = run_of(arguments).step('train')
  cfg = arguments['train_dataset_cfg']
  assert step.target_tokens == cfg.batch_size * cfg.task_feature_lengths['targets']
  assert step.parts == arguments['partitioner'].data_mesh_size
  with pytest.raises(ValueError, match='decoder_target_tokens'):
    abstract_steps.target_tokens({'x': jax.ShapeDtypeStruct((2, 3), np.int32)})


def test_the_decode_step_runs(arguments):
  """Compiled for this machine it gives predictions for each row."""
  step = run_of(arguments).step('decode')
  state, batch, key, _, mutables = step.arguments

  def zeros(tree):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)

  rows = arguments['train_dataset_cfg'].batch_size
  found, (predictions, aux) = step.function(
    zeros(state), zeros(batch), zeros(key), np.arange(rows, dtype=np.int32), mutables
  )
  assert found.tolist() == list(range(rows))
  assert predictions.shape == (rows, tiny.LENGTHS['targets'])
  assert 'scores' in aux
  assert step.longest_loop == tiny.LENGTHS['targets']


def test_what_arrays_take_on_a_device(arguments):
  """By two partitions of the model: halves where the rules say so; rows else."""
  split = partitioning.PjitPartitioner(num_partitions=2)
  step = run_of({**arguments, 'partitioner': split}).step('train')
  width = tiny.Network().width
  assert step.bytes_on_device((tiny.VOCABULARY_SIZE, width), np.float32) == (
    tiny.VOCABULARY_SIZE * width * 4 / 2
  )
  # Four parts of the batch.
  assert step.bytes_on_device((8, 100), np.float32) == 8 * 100 * 4 / 4


def test_microbatches(arguments):
  cut = functools.partial(arguments['trainer_cls'], num_microbatches=2)
  run = run_of({**arguments, 'trainer_cls': cut})
  cfg = dataclasses.replace(arguments['train_dataset_cfg'], batch_size=16)
  assert run.step('train', cfg).microbatches == 2
  assert run.step('eval', cfg).microbatches == 1
  assert run_of(arguments).step('train').microbatches == 1
