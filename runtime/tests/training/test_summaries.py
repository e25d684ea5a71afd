"""What reaches TensorBoard's files, and what the clock says."""

import time

import clu.metrics
import clu.values
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from event_files import read_events

from t5x import metrics as metrics_lib
from t5x.training import summaries


@flax.struct.dataclass
class Note(clu.metrics.Metric):
  """A metric that is a text."""

  def compute_value(self):
    return clu.values.Text('hello')


def test_only_the_first_process_writes(monkeypatch, tmp_path):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  manager = summaries.MetricsManager('train', str(tmp_path))
  assert manager.summary_dir == str(tmp_path / 'train')
  manager.write_scalar('loss', 1.0, 2)
  manager.close()
  assert not (tmp_path / 'train').exists()


def test_scalars(tmp_path):
  manager = summaries.MetricsManager('eval', str(tmp_path))
  manager.write_scalar('loss', 1.5, jnp.int32(1))
  manager.write_scalars(2, {'loss': jnp.float32(1.25), 'accuracy': 100})
  manager.flush()
  want = [(1, 'loss', 1.5), (2, 'loss', 1.25), (2, 'accuracy', 100.0)]
  assert read_events(tmp_path / 'eval') == want
  manager.close()
  manager.close()
  with pytest.raises(ValueError, match='is closed'):
    manager.write_scalar('loss', 1.0, 3)


def test_a_summary_sets_times_and_steps(tmp_path):
  manager = summaries.MetricsManager('train', str(tmp_path))
  manager.start_duration_timer()
  time.sleep(0.2)
  metrics = {
    'loss': metrics_lib.Sum(jnp.float32(40.0)),
    'accuracy': metrics_lib.AveragePerStep.from_model_output(jnp.float32(20.0)),
    'speed': metrics_lib.StepsPerTime.from_model_output(),
    'tokens': metrics_lib.TimeRate.from_model_output(jnp.float32(8.0)),
    'seconds': metrics_lib.Time(),
    'note': Note(),
  }
  values = manager.write_metrics_summary(metrics, step=4, num_steps=2).result()
  manager.close()
  seconds = float(values['seconds'].value)
  assert 0.2 <= seconds < 2
  want = {
    'loss': 40.0,
    'accuracy': 10.0,
    'speed': 2 / seconds,
    'tokens': 8 / seconds,
    'seconds': seconds,
  }
  for name, value in want.items():
    assert not isinstance(values[name].value, jax.Array)
    np.testing.assert_allclose(values[name].value, value, rtol=1e-6)
  assert values['note'] == clu.values.Text('hello')
  written = {tag: value for step, tag, value in read_events(tmp_path / 'train')}
  assert written.pop('note') == b'hello'
  assert written.keys() == want.keys()
  np.testing.assert_allclose(written['loss'], 40.0)


def test_the_clock_waits_for_the_devices():
  manager = summaries.MetricsManager('train')
  size = 700

  @jax.jit
  def slow(x):
    return jax.lax.fori_loop(0, 30, lambda _, y: y @ x / size, x)

  jax.block_until_ready(slow(jnp.ones((size, size))))
  begun = time.perf_counter()
  jax.block_until_ready(slow(jnp.ones((size, size))))
  needed = time.perf_counter() - begun
  manager.start_duration_timer()
  out = metrics_lib.Sum.from_model_output(slow(jnp.ones((size, size))))
  future = manager.write_metrics_summary({'s': metrics_lib.Time(), 'o': out}, 1, 1)
  assert float(future.result()['s'].value) > 0.3 * needed
  manager.close()


def test_the_clock_does_not_count_what_came_before(monkeypatch):
  done = time.perf_counter() + 0.3

  def compute(tree):
    time.sleep(max(0.0, done - time.perf_counter()))
    return time.perf_counter()

  monkeypatch.setattr(summaries, '_is_ready', lambda tree: tree != 'state')
  monkeypatch.setattr(summaries, 'time_when_ready', compute)
  manager = summaries.MetricsManager('train')
  manager.start_duration_timer(block_on='state')
  future = manager.write_metrics_summary({'s': metrics_lib.Time()}, 1, 1)
  assert float(future.result()['s'].value) < 0.2
  manager.close()


def test_summaries_come_in_order_and_do_not_overlap():
  manager = summaries.MetricsManager('train')
  begun = time.perf_counter()
  futures = []
  for step in range(20):
    manager.start_duration_timer()
    time.sleep(0.005)
    futures.append(manager.write_metrics_summary({'s': metrics_lib.Time()}, step, 1))
  total = sum(float(future.result()['s'].value) for future in futures)
  assert 20 * 0.005 <= total <= time.perf_counter() - begun
  manager.close()


def test_short_stretches_are_timed_from_end_to_end():
  """However late the clock's thread comes to it: the steps' time is not lost."""
  manager = summaries.MetricsManager('train')
  ready = jnp.zeros(3)
  manager._clock.submit(time.sleep, 0.2)
  futures, begun = [], time.perf_counter()
  for step in range(20):
    manager.start_duration_timer(block_on=ready)
    futures.append(manager.write_metrics_summary({'s': metrics_lib.Time()}, step, 1))
  seconds = [float(future.result()['s'].value) for future in futures]
  passed = time.perf_counter() - begun
  # The first is counted from the call, the others from the end of the one before.
  assert seconds[0] > 0.15
  assert 0.15 < sum(seconds) <= passed
  manager.close()


def test_a_stretch_after_a_pause_is_timed_from_its_call():
  manager = summaries.MetricsManager('train')
  for _ in range(2):
    manager.start_duration_timer(block_on=jnp.zeros(3))
    future = manager.write_metrics_summary({'s': metrics_lib.Time()}, 1, 1)
    assert float(future.result()['s'].value) < 0.2
    time.sleep(0.3)
  manager.close()


def test_donated_arrays_count_as_computed():
  x = jnp.zeros(3)
  before = time.perf_counter()
  x.delete()
  assert summaries.time_when_ready({'x': x}) >= before


def test_what_is_ready():
  x, gone = jnp.zeros(3), jnp.zeros(3)
  gone.delete()
  assert summaries._is_ready({'x': jax.block_until_ready(x), 'gone': gone, 'n': 3})


def test_a_clock_that_was_not_started():
  manager = summaries.MetricsManager('train')
  with pytest.raises(ValueError, match='start_duration_timer before'):
    manager.write_metrics_summary({}, 1, 1)
  manager.start_duration_timer()
  manager.write_metrics_summary({}, 1, 1).result()
  with pytest.raises(ValueError, match='start_duration_timer before'):
    manager.write_metrics_summary({}, 1, 1)
  manager.close()


def test_an_error_in_the_background_comes_out():
  @flax.struct.dataclass
  class Broken(clu.metrics.Metric):
    def compute_value(self):
      raise ArithmeticError('broken')

  manager = summaries.MetricsManager('train')
  manager.start_duration_timer()
  future = manager.write_metrics_summary({'b': Broken()}, 1, 1)
  with pytest.raises(ArithmeticError, match='broken'):
    manager.flush()
  with pytest.raises(ArithmeticError, match='broken'):
    future.result()
  manager.close()
