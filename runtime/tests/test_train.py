"""Whole training runs of a tiny model in this process."""

import functools
import gc
import itertools
import json
import os
import signal
from unittest import mock

import clu.data.dataset_iterator as clu_iterators
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

from t5x import checkpoints, data, launch, restore, train, trainer


def run(model_dir, **changes):
  return train.train(**tiny.train_arguments(model_dir, **changes))


def assert_equal_states(one, other):
  jax.tree.map(np.testing.assert_array_equal, one.state_dict(), other.state_dict())


def scalars(folder):
  """{tag: {step: value}} of TensorBoard files."""
  events = event_accumulator.EventAccumulator(str(folder), size_guidance={'tensors': 0})
  events.Reload()
  return {
    tag: {
      event.step: float(tensor_util.make_ndarray(event.tensor_proto))
      for event in events.Tensors(tag)
    }
    for tag in events.Tags()['tensors']
    if not tag.startswith('config')
  }


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory):
  """(folder, state) of an uninterrupted run of ten steps on randomly noised data."""
  folder = tmp_path_factory.mktemp('whole')
  step, state = run(
    folder,
    task='tiny_noised',
    train_eval_dataset_cfg=tiny.dataset_config('validation'),
    infer_eval_dataset_cfg=tiny.dataset_config('validation', pack=False, batch_size=8),
    stats_period=2,
    run_eval_before_training=True,
  )
  assert step == 10
  return folder, state


def test_the_files_of_a_run(whole_run):
  folder, _ = whole_run
  assert {'model-info.txt', 'train', 'training_eval', 'inference_eval'} <= set(
    os.listdir(folder)
  )
  assert checkpoints.all_steps(str(folder)) == [0, 5, 10]
  assert 'embedding' in (folder / 'model-info.txt').read_text()
  assert (folder / 'inference_eval' / 'tiny_copy-metrics.jsonl').exists()


def test_reports_happen_at_their_periods(whole_run):
  folder, _ = whole_run
  train_metrics = scalars(folder / 'train')
  assert list(train_metrics['loss']) == [2, 4, 5, 6, 8, 10]
  evaluated = scalars(folder / 'training_eval' / 'tiny_copy')
  assert list(evaluated['loss']) == [0, 5, 10]
  # The model learns.
  per_token = evaluated['loss_per_nonpadding_target_token']
  assert per_token[10] < per_token[0] - 0.05
  inferred = scalars(folder / 'inference_eval' / 'tiny_copy')
  (equal,) = [values for tag, values in inferred.items() if 'equal' in tag]
  assert list(equal) == [0, 5, 10]
  assert {'timing/checkpoint_seconds', 'timing/init_or_restore_seconds'} <= set(
    train_metrics
  )
  # metrics.jsonl has the values of TensorBoard.
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  reports = {(r['step'], r['source']): r['values'] for r in map(json.loads, lines)}
  assert len(reports) == len(lines) == 12
  for source, metric, by_step in (
    ('train', 'loss', train_metrics['loss']),
    ('training_eval/tiny_copy', 'loss', evaluated['loss']),
    ('inference_eval/tiny_copy/eval', 'equal', equal),
  ):
    for step, value in by_step.items():
      assert np.float32(reports[step, source][metric]) == np.float32(value)


@pytest.mark.parametrize('periods', itertools.combinations((0, 1, 3, 4, 10, 50), 3))
@pytest.mark.parametrize('further', [(), (7, 20, 99)])
def test_stops_are_the_steps_at_which_something_happens(periods, further):
  for first in (0, 1, 7, 20):
    step, stops = first, []
    while step < 21:
      step = train._next_stop(step, 21, periods, further)
      stops.append(step)
    assert stops == [
      step
      for step in range(first + 1, 22)
      if step == 21 or step in further or any(p and step % p == 0 for p in periods)
    ]


def test_numbers_of_steps_must_be_whole():
  assert type(train._whole_steps('eval_period', 1e2)) is int
  for wrong in (-1, 2.5, '3'):
    with pytest.raises(ValueError, match=f'eval_period.*{wrong}'):
      train._whole_steps('eval_period', wrong)


@pytest.mark.parametrize('use_orbax', [True, False])
def test_interrupted_run_is_identical_to_an_uninterrupted_one(
  whole_run, tmp_path, use_orbax
):
  resume = functools.partial(run, tmp_path, task='tiny_noised', use_orbax=use_orbax)
  step, _ = resume(total_steps=4)
  assert step == 4
  step, _ = resume(total_steps=7)
  assert step == 7
  step, state = resume()
  assert step == 10
  assert_equal_states(state, whole_run[1])
  assert (tmp_path / 'checkpoint_7/checkpoint').exists() != use_orbax


def test_resuming_with_another_task_is_an_error(tmp_path):
  run(tmp_path, total_steps=5)
  with pytest.raises(ValueError, match='tiny_noised'):
    run(tmp_path, task='tiny_noised')
  unsaved = tiny.checkpoint_config(save_dataset=False)
  step, _ = run(tmp_path, task='tiny_noised', checkpoint_cfg=unsaved)
  assert step == 10


def test_periods_do_not_drift_after_a_resume(tmp_path):
  run(tmp_path, total_steps=3, checkpoint_cfg=tiny.checkpoint_config(period=4))
  run(tmp_path, checkpoint_cfg=tiny.checkpoint_config(period=4))
  assert checkpoints.all_steps(str(tmp_path)) == [0, 3, 4, 8, 10]


def test_finished_run_trains_nothing(whole_run, monkeypatch, caplog):
  folder, state = whole_run

  def fail(*args, **kwargs):
    raise AssertionError('The finished run was trained, compiled or configured.')

  monkeypatch.setattr(trainer.Trainer, 'train', fail)
  monkeypatch.setattr(trainer.Trainer, 'compile_train', fail)
  caplog.set_level('INFO')
  step, again = run(folder, task='tiny_noised', summarize_config_fn=fail)
  assert step == 10
  assert 'Nothing to train' in caplog.text
  assert_equal_states(again, state)


def test_checkpoint_beyond_the_last_step_is_an_error(whole_run):
  with pytest.raises(ValueError, match='step 8, .* step 10'):
    run(whole_run[0], task='tiny_noised', total_steps=8)


class _Stopper(trainer.BaseAction):
  """Asks to stop at a step."""

  def __init__(self, step):
    self.step = step

  def run(self, train_state, metrics_by_task):
    return int(train_state.step) >= self.step


class _KillingIterator(clu_iterators.TfDatasetIterator):
  """Sends a signal at the n-th batch."""

  def __init__(self, dataset, batch, number):
    super().__init__(dataset, checkpoint=True)
    self._left = batch
    self._signal = number

  def __next__(self):
    self._left -= 1
    if self._left == 0:
      os.kill(os.getpid(), self._signal)
    return super().__next__()


@pytest.mark.parametrize(
  'number, bound, code, step, evaluated',
  [
    (signal.SIGTERM, None, 143, 5, []),
    (signal.SIGINT, None, 130, 7, [5]),
    (signal.SIGHUP, 0, 0, 7, [5]),
  ],
)
def test_signals_save_without_evaluating_and_resume_is_exact(
  whole_run, tmp_path, monkeypatch, number, bound, code, step, evaluated
):
  def get_dataset(*args):
    return _KillingIterator(data.get_dataset(*args), step, number)

  codes = []
  monkeypatch.setattr(launch, 'exit_with', codes.append)
  default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
  # A shell that runs the tests in the background ignores some signals.
  original = signal.signal(number, default)
  stopped = run(
    tmp_path,
    task='tiny_noised',
    get_dataset_fn=get_dataset,
    train_eval_dataset_cfg=tiny.dataset_config('validation'),
    interrupted_exit_code=bound,
  )
  assert signal.signal(number, original) == default
  assert codes == [code]
  assert stopped[0] == int(stopped[1].step) == step
  assert checkpoints.latest_step(str(tmp_path)) == step
  losses = scalars(tmp_path / 'training_eval' / 'tiny_copy').get('loss', {})
  assert list(losses) == evaluated
  _, state = run(tmp_path, task='tiny_noised')
  assert_equal_states(state, whole_run[1])


def test_checkpoint_is_saved_with_the_metrics_of_its_step(tmp_path):
  monitored = 'inference_eval/tiny_copy/eval/equal'
  saved = {}

  class Manager(checkpoints.OrbaxCheckpointManagerInterface):
    def save(self, train_state, state_transformation_fns=(), metrics=None):
      saved[int(train_state.step)] = metrics
      return super().save(train_state, state_transformation_fns, metrics=metrics)

  tracker = mock.Mock()
  run(
    tmp_path,
    tracker=tracker,
    train_eval_dataset_cfg=tiny.dataset_config('validation'),
    infer_eval_dataset_cfg=tiny.dataset_config('validation', pack=False, batch_size=8),
    checkpoint_cfg=tiny.checkpoint_config(
      period=4,
      checkpoint_steps=[5],
      checkpoint_manager_cls=Manager,
      checkpointer_cls=functools.partial(
        checkpoints.SaveBestCheckpointer, metric_name_to_monitor=monitored
      ),
    ),
  )
  evaluated = scalars(tmp_path / 'training_eval' / 'tiny_copy')['loss']
  assert list(saved) == [0, 4, 5, 8, 10]
  assert not saved[0]
  for step in (4, 5, 8, 10):
    assert np.isfinite(saved[step]['train/loss'])
  for step in (5, 10):
    assert saved[step]['training_eval/tiny_copy/loss'] == evaluated[step]
    assert 0 <= saved[step][monitored] <= 1
  assert 'training_eval/tiny_copy/loss' not in saved[8]

  tracker.open.assert_called_once_with(str(tmp_path))
  tracked = [{'step': s, 'source': n, 'values': v}
             for (s, n, v), _ in tracker.log.call_args_list]  # fmt: skip
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert tracked == [json.loads(line) for line in lines]
  tracker.close.assert_called_once_with(False)


def test_all_reports_are_written_before_a_checkpoint(tmp_path):
  written = {}

  class Manager(checkpoints.OrbaxCheckpointManagerInterface):
    def save(self, train_state, *args, **kwargs):
      if (tmp_path / 'metrics.jsonl').exists():
        written[int(train_state.step)] = (tmp_path / 'metrics.jsonl').read_text()
      return super().save(train_state, *args, **kwargs)

  run(
    tmp_path,
    infer_eval_dataset_cfg=tiny.dataset_config('validation', pack=False, batch_size=8),
    checkpoint_cfg=tiny.checkpoint_config(period=4, checkpoint_manager_cls=Manager),
  )
  assert '"step": 5, "source": "inference_eval/' in written[8]
  assert '"step": 10, "source": "inference_eval/' in written[10]


def test_tracker_shows_a_failure_before_the_first_step(tmp_path):
  class Unable(_Stopper):
    def recall(self, values):
      raise KeyError('loss')

  tracker = mock.Mock()
  with pytest.raises(KeyError):
    run(
      tmp_path,
      tracker=tracker,
      concurrent_metrics=False,
      actions={'TRAIN': [Unable(4)]},
    )
  tracker.close.assert_called_once_with(True)


def test_non_finite_loss_ends_the_run_without_a_checkpoint(tmp_path):
  class Overflowing(tiny.models.EncoderDecoderModel):
    def loss_fn(self, params, batch, dropout_rng):
      loss, metrics = super().loss_fn(params, batch, dropout_rng)
      return loss * jnp.inf, metrics

  model = tiny.make_model()
  model.__class__ = Overflowing
  with pytest.raises(trainer.NonFiniteLossError):
    run(tmp_path, model=model, stats_period=1)
  assert checkpoints.all_steps(str(tmp_path)) == [0]
  with np.load(tmp_path / 'nonfinite_step_0.npz') as batch:
    assert batch['decoder_target_tokens'].shape == (8, 8)


def test_action_on_training_metrics_stops_and_saves(tmp_path):
  step, _ = run(
    tmp_path,
    stats_period=2,
    concurrent_metrics=False,
    actions={'TRAIN': [_Stopper(4)]},
  )
  assert step == 4
  assert checkpoints.latest_step(str(tmp_path)) == 4


@pytest.mark.parametrize('stop', [0, 5])
def test_action_on_evaluation_stops_and_saves(tmp_path, stop):
  step, state = run(
    tmp_path,
    train_eval_dataset_cfg=tiny.dataset_config('validation'),
    actions={'TRAIN_EVAL': [_Stopper(stop)]},
    run_eval_before_training=True,
  )
  assert step == int(state.step) == stop
  assert checkpoints.latest_step(str(tmp_path)) == stop


def test_failing_metric_at_the_last_evaluation_is_an_error(tmp_path):
  with pytest.raises(ValueError, match='no count'):
    run(
      tmp_path,
      infer_eval_dataset_cfg=tiny.dataset_config(
        'validation', tiny.with_a_broken_metric(), pack=False
      ),
      eval_period=10,
    )
  assert checkpoints.latest_step(str(tmp_path)) == 10


class _Witness(trainer.BaseAction):
  """Records the values of a metric, including recalled ones."""

  def __init__(self, task, metric):
    self.name, self.values, self.recalled = (task, metric), [], None

  def recall(self, recorded):
    self.recalled = recorded(*self.name)

  def run(self, train_state, metrics_by_task):
    task, metric = self.name
    value = metrics_by_task[task][metric]
    self.values.append(float(getattr(value, 'value', value)))
    return False


def test_actions_recall_the_metrics_of_a_resumed_run(tmp_path):
  def resume(total_steps, **changes):
    witnesses = {
      'TRAIN': _Witness('train', 'loss'),
      'TRAIN_EVAL': _Witness('tiny_copy', 'loss'),
      'INFER_EVAL': _Witness('tiny_copy', 'mean_score'),
    }
    run(
      tmp_path,
      total_steps=total_steps,
      train_eval_dataset_cfg=tiny.dataset_config('validation'),
      infer_eval_dataset_cfg=tiny.dataset_config('validation', pack=False),
      concurrent_metrics=False,
      actions={mode: [witness] for mode, witness in witnesses.items()},
      **changes,
    )
    return witnesses.values()

  first, second = resume(5), resume(10)
  for before, after in zip(first, second, strict=True):
    assert before.recalled == [] and before.values
    assert after.recalled == before.values and after.values
  # Metrics after the last checkpoint are dropped.
  (tmp_path / 'checkpoint_10').rename(tmp_path / 'lost')
  for before, after in zip(first, resume(10), strict=True):
    assert after.recalled == before.values
  # An evaluation to be repeated before the first step is not recalled.
  (tmp_path / 'checkpoint_10').rename(tmp_path / 'lost again')
  first, *evaluated = zip(first, resume(10, run_eval_before_training=True), strict=True)
  assert first[1].recalled == first[0].values
  for before, after in evaluated:
    assert [*after.recalled, after.values[0]] == before.values


@pytest.mark.parametrize(
  'actions, message',
  [({'TRIAN': []}, "Got: 'TRIAN'"), ({'TRAIN': []}, 'concurrent_metrics = False')],
)
def test_actions_that_cannot_run_are_an_error(tmp_path, actions, message):
  with pytest.raises(ValueError, match=message):
    run(tmp_path, actions=actions)


def test_relative_steps_count_from_the_start_of_the_run(tmp_path):
  first, second = tmp_path / 'first', tmp_path / 'second'
  run(first, total_steps=3)
  relative = functools.partial(
    run,
    second,
    checkpoint_cfg=tiny.checkpoint_config(initial=str(first / 'checkpoint_3')),
    total_steps=0,
    relative_steps=4,
  )
  assert relative()[0] == 7
  assert relative()[0] == 7  # Restarted.


def test_fine_tuning_starts_from_the_initial_checkpoint(tmp_path):
  first, second = tmp_path / 'first', tmp_path / 'second'
  _, before = run(first, total_steps=3)
  step, after = run(
    second,
    checkpoint_cfg=tiny.checkpoint_config(initial=str(first / 'checkpoint_3')),
    total_steps=3,
  )
  assert step == 3
  assert_equal_states(before, after)


@pytest.mark.parametrize(
  ('config', 'saved'),
  [
    (tiny.restore.CheckpointConfig(), []),
    (tiny.checkpoint_config(period=None), []),
    (tiny.checkpoint_config(period=None, checkpoint_steps=[2, 7]), [2, 7, 10]),
  ],
)
def test_steps_to_save(tmp_path, config, saved):
  step, _ = run(tmp_path, checkpoint_cfg=config)
  assert step == 10
  assert checkpoints.all_steps(str(tmp_path)) == saved


def test_two_initial_checkpoints_are_an_error(tmp_path):
  config = tiny.checkpoint_config()
  config.restore.path = ['/a', '/b']
  with pytest.raises(ValueError, match="one checkpoint.*'/a', '/b'"):
    run(tmp_path, checkpoint_cfg=config)


def test_unwritable_model_dir_is_an_error(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError, match='model_dir .*/file/run'):
    run(tmp_path / 'file' / 'run')


def test_unknown_task_suggests_the_nearest_name(tmp_path):
  with pytest.raises(ValueError, match="'tiny_copi'.*tiny_copy"):
    run(tmp_path, train_dataset_cfg=tiny.dataset_config('train', 'tiny_copi'))


def test_gc_period_collects_garbage_and_then_enables_it(tmp_path, monkeypatch):
  enabled = []
  monkeypatch.setattr(gc, 'collect', lambda: enabled.append(gc.isenabled()))
  run(tmp_path, gc_period=5)
  assert enabled == [False, False]
  assert gc.isenabled()


def test_run_without_a_seed(tmp_path):
  before = jax.config.jax_default_prng_impl
  try:
    step, _ = run(tmp_path, random_seed=None, total_steps=1)
    assert step == 1
    assert jax.config.jax_default_prng_impl == 'unsafe_rbg'
  finally:
    jax.config.update('jax_default_prng_impl', before)


def test_functions_given_to_train_are_called(tmp_path):
  called = {}

  def spy(name, original):
    def call(*args, **kwargs):
      called.setdefault(name, []).append((args, kwargs))
      return original(*args, **kwargs)

    return call

  run(
    tmp_path,
    total_steps=1,
    eval_period=1,
    eval_steps=3,
    train_eval_dataset_cfg=tiny.dataset_config('validation'),
    infer_eval_dataset_cfg=tiny.dataset_config('validation', pack=False),
    train_state_initializer_cls=spy('state', restore.TrainStateInitializer),
    verify_matching_vocabs_fn=spy('vocabularies', lambda cfg, model: None),
    summarize_config_fn=spy('summary', lambda *args: None),
    inference_evaluator_cls=spy('evaluator', tiny.EVALUATOR),
    get_dataset_fn=spy('data', data.get_dataset),
    train_eval_get_dataset_fn=spy('eval_data', data.get_training_eval_datasets),
  )
  times = {name: len(calls) for name, calls in called.items()}
  assert times.pop('vocabularies') == 3  # Of three dataset configurations.
  assert times.pop('data') >= 1
  assert times == dict.fromkeys(('state', 'summary', 'evaluator', 'eval_data'), 1)
  assert called['eval_data'][0][0][3] == 3
