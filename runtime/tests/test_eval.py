"""Evaluation of checkpoints of a tiny model in this process."""

import functools
import json

import pytest
import seqio
import tiny

from t5x import data, restore, trainer
from t5x import eval as eval_lib


def evaluate(output_dir, path, *, mode='specific', split='test', **changes):
  usual = tiny.train_arguments(output_dir)
  names = 'model', 'partitioner', 'inference_evaluator_cls', 'summarize_config_fn'
  arguments = {
    **{name: usual[name] for name in names},
    'dataset_cfg': tiny.dataset_config(split, pack=False),
    'restore_checkpoint_cfg': restore.RestoreCheckpointConfig(
      path=str(path), mode=mode
    ),
    'output_dir': str(output_dir),
    **changes,
  }
  eval_lib.evaluate(**arguments)


def metrics(output_dir):
  """[metrics of one evaluation, ...] as the evaluator wrote them."""
  text = (output_dir / 'inference_eval' / 'tiny_copy-metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize('task', ['tiny_copy', seqio.TaskRegistry.get('tiny_copy')])
def test_one_checkpoint(tiny_run, tmp_path, task):
  summaries, states = [], []

  def make_state(**arguments):
    states.append(arguments)
    return restore.TrainStateInitializer(**arguments)

  evaluate(
    tmp_path,
    tiny_run / 'checkpoint_10',
    dataset_cfg=tiny.dataset_config('test', task, pack=False),
    train_state_initializer_cls=make_state,
    summarize_config_fn=lambda **arguments: summaries.append(arguments),
  )
  (only,) = metrics(tmp_path)
  assert only['step'] == 10
  assert 0 <= only['equal'] <= 1
  assert only['mean_score'] < 0
  assert (tmp_path / 'model-info.txt').exists()
  assert (tmp_path / 'eval.tiny_copy.ckpt').exists()
  assert summaries[0]['model_dir'] == str(tmp_path)
  assert states[0]['optimizer_def'] is None


def test_mode_all_evaluates_each_checkpoint_once(tiny_run, tmp_path):
  output = tmp_path / 'evaluation'
  evaluate(output, tiny_run, mode='all')
  assert [one['step'] for one in metrics(output)] == [0, 5, 10]
  scores = [one['mean_score'] for one in metrics(output)]
  assert scores[2] > scores[0]
  listed = (output / 'eval.tiny_copy.ckpt').read_text().splitlines()
  assert listed == [f'{tiny_run}/checkpoint_{step}' for step in (0, 5, 10)]
  evaluate(output, tiny_run, mode='all')
  assert len(metrics(output)) == 3


def test_training_metrics(tiny_run, tmp_path):
  evaluate(
    tmp_path,
    tiny_run / 'checkpoint_5',
    split='validation',
    training_evaluator_cls=trainer.Trainer,
    train_eval_get_dataset_fn=functools.partial(
      data.get_training_eval_datasets, eval_steps=1
    ),
  )
  assert list((tmp_path / 'training_eval' / 'tiny_copy').iterdir())
  assert metrics(tmp_path)[0]['step'] == 5


def test_missing_parameters_depend_on_the_seed(tiny_run, tmp_path):
  drop = restore.RestoreCheckpointConfig(
    path=str(tiny_run / 'checkpoint_5'),
    mode='specific',
    assignment_map=[(r'.*wo', None)],
    fallback_to_scratch=True,
  )

  def score(folder, seed):
    evaluate(
      tmp_path / folder, None, restore_checkpoint_cfg=drop, fallback_init_rng=seed
    )
    return metrics(tmp_path / folder)[0]['mean_score']

  assert score('one', 1) != score('two', 2)


def test_missing_checkpoint_is_an_error(tmp_path):
  with pytest.raises((ValueError, FileNotFoundError), match='checkpoint_7'):
    evaluate(tmp_path / 'out', tmp_path / 'checkpoint_7')


def test_missing_split_is_an_error(tiny_run, tmp_path):
  with pytest.raises(ValueError, match='tiny_copy.*dev'):
    evaluate(tmp_path, tiny_run / 'checkpoint_5', split='dev')
