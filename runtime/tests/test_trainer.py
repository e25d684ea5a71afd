"""Training and evaluation on eight CPU devices, against plain JAX."""

import json
import os
import socket
import subprocess
import sys
import time
import types

import clu.metrics
import clu.values
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import two_process_training
from event_files import read_events
from flax.linen import partitioning as flax_partitioning

from t5x import metrics as metrics_lib
from t5x import optimizers, partitioning, train_state, trainer

ROWS, WIDTH = 16, 4


class Line(nn.Module):
  """y = x w + b, with dropout on x."""

  @nn.compact
  def __call__(self, x, deterministic):
    x = nn.Dropout(0.5, deterministic=deterministic)(x)
    weight = flax_partitioning.param_with_axes(
      'w', nn.initializers.normal(1.0), (WIDTH,), jnp.float32, axes=('embed',)
    )
    bias = flax_partitioning.param_with_axes(
      'b', nn.initializers.zeros, (1,), jnp.float32, axes=('kv',)
    )
    return x @ weight + bias[0]


class Model:
  """A sum of squared errors divided by a constant, so linear in examples."""

  optimizer_def = optimizers.adamw(learning_rate=0.01)

  def __init__(self, dropout=False):
    self._dropout = dropout

  def loss_fn(self, params, batch, dropout_rng):
    on = self._dropout and dropout_rng is not None
    rngs = {'dropout': dropout_rng} if on else None
    out = Line().apply({'params': params}, batch['x'], not on, rngs=rngs)
    squares = jnp.square(out - batch['y']) * batch['weight']
    loss = jnp.sum(squares) / ROWS
    metrics = {
      'loss': metrics_lib.AveragePerStep(total=loss),
      'loss_per_row': clu.metrics.Average(
        total=jnp.sum(squares), count=jnp.sum(batch['weight'])
      ),
      'rows': metrics_lib.Sum.from_model_output(batch['weight']),
      'timing/seqs_per_second': metrics_lib.TimeRate.from_model_output(
        jnp.float32(batch['x'].shape[0])
      ),
    }
    return loss, metrics

  def eval_fn(self, params, batch):
    return self.loss_fn(params, batch, None)


def make_batch(seed, rows=ROWS):
  random = np.random.default_rng(seed)
  return {
    'x': random.normal(size=(rows, WIDTH)).astype(np.float32),
    'y': random.normal(size=(rows,)).astype(np.float32),
    'weight': (random.random(rows) < 0.7).astype(np.float32),
  }


def batches(first, count):
  return iter([make_batch(seed) for seed in range(first, first + count)])


def fresh_state(model):
  variables = Line().init(jax.random.key(7), make_batch(0)['x'], True)
  return train_state.FlaxOptimTrainState.create(model.optimizer_def, variables)


def make_trainer(model=None, state=None, num_partitions=1, **arguments):
  model = model or Model()
  partitioner = partitioning.PjitPartitioner(num_partitions=num_partitions)
  state = fresh_state(model) if state is None else state
  axes = partitioner.get_mesh_axes(state)
  return trainer.Trainer(
    model=model,
    train_state=partitioner.move_params_to_devices(state, axes),
    partitioner=partitioner,
    train_state_axes=axes,
    **{
      'eval_names': ['task', 'other'],
      'summary_dir': None,
      'rng': jax.random.key(3),
      'learning_rate_fn': lambda step: 0.1 * (step + 1),
      'num_microbatches': None,
      **arguments,
    },
  )


def assert_equal_states(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))


def values_of(summary):
  return {name: float(value.value) for name, value in summary.items()}


def plain_training(model, steps):
  """(state, losses) of the same steps in plain JAX."""
  state = fresh_state(model)
  losses = []
  for step in range(steps):
    rng = jax.random.fold_in(jax.random.key(3), step)
    (loss, _), grads = jax.value_and_grad(model.loss_fn, has_aux=True)(
      state.params, make_batch(step), rng
    )
    losses.append(float(loss))
    state = state.apply_gradient(grads, learning_rate=0.0)
  return state, losses


@pytest.mark.parametrize('num_partitions', [1, 4])
def test_training_matches_plain_jax(num_partitions):
  model = Model(dropout=True)
  want, losses = plain_training(model, 4)
  with make_trainer(model, num_partitions=num_partitions) as made:
    summary = values_of(made.train(batches(0, 4), 4).result())
    got = made.train_state
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6),
    jax.device_get(got.params),
    jax.device_get(want.params),
  )
  assert int(got.step) == 4
  np.testing.assert_allclose(summary['loss'], np.mean(losses), rtol=1e-5)
  # Averages are sums over sums, not averages of the steps' averages.
  rows = sum(make_batch(seed)['weight'].sum() for seed in range(4))
  assert summary['rows'] == rows
  np.testing.assert_allclose(
    summary['loss_per_row'], sum(losses) * ROWS / rows, rtol=1e-5
  )


def test_resuming_is_bit_exact():
  model = Model(dropout=True)
  with make_trainer(model) as whole:
    whole.train(batches(0, 6), 6).result()
    want = jax.device_get(whole.train_state)
  with make_trainer(model) as first:
    first.train(batches(0, 2), 2).result()
    middle = jax.device_get(first.train_state)
  with make_trainer(model, state=middle) as second:
    second.train(batches(2, 1), 1)
    second.train(batches(3, 3), 3, start_step=3)
    assert_equal_states(second.train_state, want)


@pytest.mark.parametrize('num_microbatches', [1, 2])
@pytest.mark.parametrize('num_partitions', [1, 2, 8])
def test_microbatches_give_the_gradient_of_the_batch(num_microbatches, num_partitions):
  def train(**arguments):
    with make_trainer(**arguments) as made:
      summary = values_of(made.train(batches(0, 3), 3).result())
      return jax.device_get(made.train_state.params), summary

  want, want_summary = train()
  got, summary = train(num_microbatches=num_microbatches, num_partitions=num_partitions)
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5), got, want)
  for name in ('loss_per_row', 'rows', 'weight_gradient_norm'):
    np.testing.assert_allclose(summary[name], want_summary[name], rtol=1e-5)
  # A microbatch is not a step: losses are summed.
  np.testing.assert_allclose(summary['loss'], want_summary['loss'], rtol=1e-5)


def test_microbatches_keep_rows_on_their_devices():
  partitioner = partitioning.PjitPartitioner(num_partitions=1)
  spec = partitioner.data_partition_spec
  deal = partitioner.partition(
    lambda batch: trainer._split_microbatches(batch, 4, spec),
    in_axis_resources=(spec,),
    out_axis_resources=partitioning.PartitionSpec(None, 'data'),
  )
  rows = np.arange(64 * 3).reshape(64, 3)
  np.testing.assert_array_equal(deal(rows)[1], rows[1::4])
  program = partitioner.compile(deal, rows).as_text()
  for exchange in ('all-gather', 'all-to-all', 'collective-permute', 'all-reduce'):
    assert exchange not in program


def test_reports_of_an_interval():
  with make_trainer(
    weight_metrics_computer=trainer.WeightMetricsComputer(), num_partitions=2
  ) as made:
    summary = values_of(made.train(batches(0, 4), 4).result())
  # Rates of steps 0 … 3: 0.1, 0.2, 0.3, 0.4.
  np.testing.assert_allclose(summary['learning_rate'], 0.25, rtol=1e-6)
  np.testing.assert_allclose(summary['learning_rate/current'], 0.4, rtol=1e-6)
  seconds = summary['timing/seconds']
  assert 0 < seconds <= summary['timing/uptime']
  np.testing.assert_allclose(summary['timing/steps_per_second'], 4 / seconds, rtol=1e-5)
  np.testing.assert_allclose(
    summary['timing/seqs_per_second'], 4 * ROWS / seconds, rtol=1e-5
  )
  assert 0 <= summary['timing/data_wait_share'] <= 1
  assert summary['weight_norm'] > 0 and summary['weight_gradient_norm'] > 0
  for name in ('weight_rms/w', 'weight_gradient_rms/b', 'weight_update_rms/w'):
    assert np.isfinite(summary[name])


def test_wait_for_data_is_reported():
  def slow():
    for batch in batches(0, 4):
      time.sleep(0.2)
      yield batch

  with make_trainer() as made:
    made.compile_train(make_batch(0))
    summary = values_of(made.train(slow(), 4).result())
  assert summary['timing/seconds'] >= 0.8
  assert summary['timing/data_wait_share'] > 0.8


def test_compiled_steps_are_used():
  with make_trainer(num_partitions=2) as made, make_trainer(num_partitions=2) as other:
    made.compile_train(make_batch(0))
    made._partitioned_train_step = None
    made.train(batches(0, 2), 2).result()
    other.train(batches(0, 2), 2).result()
    assert_equal_states(made.train_state.params, other.train_state.params)
    made.compile_eval({'task': make_batch(0), 'other': make_batch(1)})
    made._partitioned_eval_step = None
    assert made._eval_programs['task'] is made._eval_programs['other']
    made.eval({'task': batches(0, 2), 'other': batches(0, 1)})
    made._partitioned_eval_step = other._partitioned_eval_step
    made.compile_eval({'other': make_batch(1, rows=8)})
    assert made._eval_programs['task'] is not made._eval_programs['other']


def test_evaluation_merges_batches_without_dropout():
  model = Model(dropout=True)
  with make_trainer(model) as made:
    params = jax.device_get(made.train_state.params)
    got = made.eval({'task': batches(0, 3), 'other': batches(5, 1)})
  for name, seeds in (('task', range(3)), ('other', [5])):
    parts = [
      Model().loss_fn(params, make_batch(seed), None)[1]['loss_per_row']
      for seed in seeds
    ]
    total = sum(float(p.total) for p in parts) / sum(float(p.count) for p in parts)
    np.testing.assert_allclose(got[name]['loss_per_row'].value, total, rtol=1e-5)


def test_mutable_collections_are_updated():
  class Counting(Model):
    def loss_fn(self, params, batch, dropout_rng, flax_mutables=None):
      loss, metrics = super().loss_fn(params, batch, None)
      seen = flax_mutables['seen'] + batch['x'].shape[0]
      return loss, (metrics, flax_mutables.copy({'seen': seen}))

    def eval_fn(self, params, batch, flax_mutables):
      loss, (metrics, _) = self.loss_fn(params, batch, None, flax_mutables)
      return loss, metrics

  for num_microbatches in (None, 2):
    model = Counting()
    state = fresh_state(model)
    variables = {
      'params': state.params,
      'params_axes': state.params_axes,
      'seen': jnp.int32(0),
    }
    state = train_state.FlaxOptimTrainState.create(model.optimizer_def, variables)
    axes = jax.tree.map(lambda _: None, state)
    with make_trainer(num_microbatches=num_microbatches) as made:
      made._model, made._train_state_axes = model, axes
      made.train_state = state
      made.train(batches(0, 3), 3).result()
      assert int(made.train_state.flax_mutables['seen']) == 3 * ROWS
      made.eval({'task': batches(0, 1)})


@pytest.mark.parametrize(
  ('rows', 'num_microbatches', 'num_partitions'),
  [(12, None, 1), (16, 4, 1), (16, 3, 8)],
)
def test_indivisible_batch_size_is_an_error(rows, num_microbatches, num_partitions):
  with make_trainer(
    num_microbatches=num_microbatches, num_partitions=num_partitions
  ) as made:
    with pytest.raises(ValueError, match=f'{rows}'):
      made.train(iter([make_batch(0, rows)]), 1)


def test_empty_evaluation_dataset_is_an_error():
  with make_trainer() as made:
    with pytest.raises(ValueError, match="'task' has no batch"):
      made.eval({'task': iter([])})


def test_end_of_data_keeps_the_state_of_finished_steps():
  with make_trainer() as made:
    with pytest.raises(ValueError, match='before step 2'):
      made.train(batches(0, 2), 5)
    assert int(made.train_state.step) == 2
    made.train(batches(2, 1), 1).result()
    assert int(made.train_state.step) == 3


def test_preemption_keeps_the_state_of_finished_steps():
  def until_preempted():
    yield from batches(0, 2)
    raise trainer.PreemptionError('now')

  with make_trainer() as made, make_trainer() as other:
    with pytest.raises(trainer.PreemptionError):
      made.train(until_preempted(), 5)
    other.train(batches(0, 2), 2).result()
    assert_equal_states(made.train_state.params, other.train_state.params)


def bad_batch(seed):
  batch = make_batch(seed)
  batch['x'][3, 1] = np.nan
  batch['weight'][:] = 1
  return batch


@pytest.mark.parametrize('bad', [0, 2, 4, 5])
def test_non_finite_loss_stops_and_saves_its_batch(tmp_path, bad):
  data = [make_batch(seed) for seed in range(6)]
  data[bad] = bad_batch(bad)
  with make_trainer(summary_dir=str(tmp_path)) as made:
    with pytest.raises(trainer.NonFiniteLossError, match=f'step {bad}') as e:
      made.train(iter(data), 6).result()
    assert e.value.step == bad
    with np.load(e.value.batch_path) as kept:
      assert kept.keys() == data[bad].keys()
      for name in kept:
        np.testing.assert_array_equal(kept[name], data[bad][name])
    assert len(list(tmp_path.glob('nonfinite*'))) == 1
    # The state cannot be read or saved, and training does not continue.
    with pytest.raises(trainer.NonFiniteLossError):
      _ = made.train_state
    with pytest.raises(trainer.NonFiniteLossError):
      made.train(batches(0, 1), 1)
    made.train_state = made._partitioner.move_params_to_devices(
      fresh_state(Model()), made._train_state_axes
    )
    made.train(batches(0, 4), 4).result()
    assert int(made.train_state.step) == 4


def test_non_finite_gradient_stops():
  class Cliff(Model):
    def loss_fn(self, params, batch, dropout_rng):
      loss, metrics = super().loss_fn(params, batch, dropout_rng)
      # sqrt is 0 at 0, but its gradient is infinite.
      return loss + jnp.sqrt(0 * jnp.sum(params['w'])), metrics

  with make_trainer(Cliff()) as made:
    with pytest.raises(trainer.NonFiniteLossError, match='step 0 .*not saved'):
      made.train(batches(0, 1), 1).result()


def test_non_finite_loss_can_be_allowed():
  with make_trainer() as made:
    made.halt_on_nonfinite_loss = False
    summary = made.train(iter([bad_batch(0)]), 1).result()
    assert np.isnan(summary['loss'].value)
    assert int(made.train_state.step) == 1


def test_weight_metrics_by_hand():
  old = types.SimpleNamespace(params={'a': {'w': jnp.array([3.0, 0.0])}})
  new = types.SimpleNamespace(params={'a': {'w': jnp.array([3.3, -4.0])}})
  gradients = {'a': {'w': jnp.array([6.0, 8.0])}}
  metrics = trainer.WeightMetricsComputer().compute_metrics(gradients, old, new)
  got = {name: float(metric.compute()) for name, metric in metrics.items()}
  want = {
    'weight_gradient_norm': 10.0,
    'weight_gradient_rms/a/w': np.sqrt((36 + 64) / 2),
    'weight_rms/a/w': np.sqrt((3.3**2 + 16) / 2),
    'weight_max/a/w': 4.0,
    'weight_update_rms/a/w': np.sqrt((0.3**2 + 16) / 2),
    # Without the second weight, which was 0.
    'weight_update_divided_by_weight_rms/a/w': 0.1,
  }
  assert got.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5)


def test_step_donates_the_state():
  with make_trainer() as made:
    before = made.train_state.params['w']
    made.train(batches(0, 1), 1).result()
    assert before.is_deleted()


def test_interval_times_do_not_overlap():
  with make_trainer() as made:
    made.compile_train(make_batch(0))
    begun = time.perf_counter()
    intervals = [made.train(batches(step, 2), 2, step) for step in range(0, 20, 2)]
    seconds = [float(i.result()['timing/seconds'].value) for i in intervals]
    passed = time.perf_counter() - begun
  assert min(seconds) > 0 and sum(seconds) < passed
  # Time between two intervals, such as an evaluation, is not counted.
  with make_trainer() as made:
    made.train(batches(0, 2), 2).result()
    time.sleep(0.5)
    assert float(made.train(batches(2, 2), 2).result()['timing/seconds'].value) < 0.5


# ---- MetricsManager ----


@flax.struct.dataclass
class Note(clu.metrics.Metric):
  """A text metric."""

  def compute_value(self):
    return clu.values.Text('hello')


def test_only_the_first_process_writes(monkeypatch, tmp_path):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  manager = trainer.MetricsManager('train', str(tmp_path))
  manager.write_scalar('loss', 1.0, 2)
  manager.close()
  assert not (tmp_path / 'train').exists()


def test_metrics_are_written_with_times_and_steps(tmp_path):
  manager = trainer.MetricsManager('train', str(tmp_path))
  metrics = {
    'loss': metrics_lib.Sum(jnp.float32(40.0)),
    'accuracy': metrics_lib.AveragePerStep.from_model_output(jnp.float32(20.0)),
    'speed': metrics_lib.StepsPerTime.from_model_output(),
    'tokens': metrics_lib.TimeRate.from_model_output(jnp.float32(8.0)),
    'seconds': metrics_lib.Time(),
    'note': Note(),
  }
  values = manager.write_metrics_summary(metrics, jnp.int32(4), 2, seconds=0.5)
  manager.write_scalars(5, {'loss': jnp.float32(1.25)})
  manager.flush()
  want = {'loss': 40.0, 'accuracy': 10.0, 'speed': 4.0, 'tokens': 16.0, 'seconds': 0.5}
  assert {name: values[name].value for name in want} == want
  assert not any(isinstance(values[name].value, jax.Array) for name in want)
  events = read_events(tmp_path / 'train')
  assert {(4, name, value) for name, value in want.items()} <= set(events)
  assert {(4, 'note', b'hello'), (5, 'loss', 1.25)} <= set(events)
  manager.close()


# ---- Actions ----


def run_all(action, values):
  return [action.run(None, {'task': {'metric': value}}) for value in values]


@pytest.mark.parametrize(
  ('mode', 'values', 'atol', 'rtol', 'stops'),
  [
    # By hand: an improvement is more than atol + rtol * |previous value|; three
    # values without one stop the run.
    ('max', [1, 1, 1], 0.0, 0.0, True),
    ('max', [1, 1.09, 1.18], 0.1, 0.0, True),
    ('max', [1, 1.2, 1.4], 0.1, 0.08, False),
    ('max', [1, 1.2, 1.4], 0.0, 0.2, True),
    ('min', [1, 0.9, 0.71], 0.2, 0.0, True),
    ('min', [1, 0.8, 0.6], 0.1, 0.09, False),
    ('min', [1, 0.8, 0.7, 0.6], 0.15, 0.0, True),
    ('min', [1, 2, 1.5], 0.0, 0.0, False),
    ('min', [-1, -1.05, -1.1], 0.0, 0.1, True),
    ('min', [1, float('nan'), float('nan')], 0.0, 0.0, True),
    ('min', [1, 1], 0.0, 0.0, False),
  ],
)
def test_early_stopping(mode, values, atol, rtol, stops):
  action = trainer.EarlyStoppingAction(
    ('task', 'metric'), mode, patience=3, atol=atol, rtol=rtol
  )
  verdicts = run_all(action, [clu.values.Scalar(value) for value in values])
  assert verdicts == [*[False] * (len(values) - 1), stops]


@pytest.mark.parametrize('before', range(4))
def test_early_stopping_recalls_values_of_a_resumed_run(before):
  values = [0.1, 0.7, 0.7, 0.7]
  action = trainer.EarlyStoppingAction(('task', 'metric'), 'max', patience=3)
  recorded = {('task', 'metric'): values[:before]}
  action.recall(lambda *name: recorded[name])
  assert run_all(action, values[before:]) == [False] * (3 - before) + [True]


@pytest.mark.parametrize('kind', [clu.values.Scalar, float, np.float32, np.array])
def test_terminate_on_nan(kind):
  action = trainer.TerminateOnNanAction('task', 'metric')
  values = [kind(value) for value in (1.0, np.nan, np.inf, -np.inf)]
  assert run_all(action, values) == [False, True, True, True]


@pytest.mark.parametrize(
  ('task', 'metric', 'value'),
  [
    ('tusk', 'metric', np.nan),
    ('task', 'los', np.nan),
    ('task', 'metric', [np.nan]),
    ('task', 'metric', clu.values.Text('nan')),
  ],
)
def test_missing_numbers_are_ignored_with_a_warning(task, metric, value, caplog):
  assert run_all(trainer.TerminateOnNanAction(task, metric), [value]) == [False]
  assert f'{metric!r} of {task!r}' in caplog.text
  early = trainer.EarlyStoppingAction((task, metric), 'min', patience=2)
  assert run_all(early, [value] * 3) == [False] * 3


@pytest.mark.parametrize(
  'arguments', [{'mode': 'least'}, {'patience': 1}, {'atol': -1}, {'rtol': -0.5}]
)
def test_early_stopping_validates_its_arguments(arguments):
  with pytest.raises(ValueError, match='mode|patience'):
    trainer.EarlyStoppingAction(('task', 'metric'), **{'mode': 'min', **arguments})


# ---- Two processes ----


def run_two_processes(num_partitions, folder):
  """Outputs of two processes of four devices."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=4'
  running = [
    subprocess.Popen(
      [
        sys.executable,
        two_process_training.__file__,
        *map(str, (port, index, num_partitions, folder)),
      ],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=240) for process in running]
  finally:
    for process in running:
      process.kill()
  for process, (_, log) in zip(running, outputs):
    assert process.returncode == 0, log
  return [json.loads(text.splitlines()[-1]) for text, _ in outputs]


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
  want = two_process_training.train(2, str(tmp_path / 'one'))
  both = run_two_processes(2, tmp_path / 'two')
  for got in both:
    assert got['shards'] == 2
    np.testing.assert_allclose(got['losses'], want['losses'], rtol=1e-5)
    np.testing.assert_allclose(got['evaluated'], want['evaluated'], rtol=1e-5)
    assert "batches of 'task': 1 of 2" in got['uneven']
  # With two shards both processes have a bad row in the same step.
  assert [got['stopped'] for got in (want, *both)] == [5, 5, 5]
  kept = sorted(path.name for path in (tmp_path / 'two').glob('nonfinite*'))
  assert kept == [f'nonfinite_step_5_process_{i}.npz' for i in (0, 1)]
