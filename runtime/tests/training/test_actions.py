"""Actions: when they ask for the end."""

import clu.values
import numpy as np
import pytest

from t5x import trainer
from t5x.training import actions


def run_all(action, values):
  return [action.run(None, {'task': {'metric': value}}) for value in values]


@pytest.mark.parametrize(
  ('mode', 'values', 'atol', 'rtol', 'stops'),
  [
    # By hand: a value is better if it beats the one before by more than
    # atol + rtol * |before|; three in a row of which none is better end the run.
    ('max', [1, 1, 1], 0.0, 0.0, True),
    ('max', [1, 0.9, 0.8], 0.0, 0.0, True),
    ('max', [1, 1.09, 1.18], 0.1, 0.0, True),
    ('max', [1, 1.2, 1.4], 0.1, 0.0, False),
    ('max', [1, 1.2, 1.4], 0.1, 0.08, False),
    ('max', [1, 1.2, 1.4], 0.0, 0.2, True),
    ('min', [1, 1, 1], 0.0, 0.0, True),
    ('min', [1, 0.9, 0.71], 0.2, 0.0, True),
    ('min', [1, 0.8, 0.6], 0.15, 0.0, False),
    ('min', [1, 0.8, 0.6], 0.1, 0.09, False),
    ('min', [1, 0.8, 0.6], 0.0, 0.3, True),
    ('min', [1, 0.8, 0.7, 0.6], 0.15, 0.0, True),
    ('min', [1, 2, 1.5], 0.0, 0.0, False),
    ('min', [-1, -1.05, -1.1], 0.0, 0.1, True),
    ('min', [1, float('nan'), float('nan')], 0.0, 0.0, True),
    ('min', [1, 1], 0.0, 0.0, False),
  ],
)
def test_early_stopping(mode, values, atol, rtol, stops):
  action = actions.EarlyStoppingAction(
    ('task', 'metric'), mode, patience=3, atol=atol, rtol=rtol
  )
  verdicts = run_all(action, [clu.values.Scalar(value) for value in values])
  assert verdicts == [*[False] * (len(values) - 1), stops]


@pytest.mark.parametrize('before', range(4))
def test_early_stopping_goes_on_where_it_stopped(before):
  values = [0.1, 0.7, 0.7, 0.7]  # 0.7 is another number in single precision
  action = actions.EarlyStoppingAction(('task', 'metric'), 'max', patience=3)
  recorded = {('task', 'metric'): np.float32(values[:before]).tolist()}
  action.recall(lambda *name: recorded[name])
  assert run_all(action, values[before:]) == [False] * (3 - before) + [True]


@pytest.mark.parametrize('kind', [clu.values.Scalar, float, np.float32])
def test_kinds_of_numbers(kind):
  action = actions.EarlyStoppingAction(('task', 'metric'), 'min', patience=2)
  assert run_all(action, [kind(1.0), kind(2.0)]) == [False, True]
  action = actions.TerminateOnNanAction('task', 'metric')
  assert run_all(action, [kind(1.0), kind('nan')]) == [False, True]


@pytest.mark.parametrize('kind', [int, np.int32])
def test_counts_are_numbers(kind):
  """A task's metric may be one."""
  action = actions.EarlyStoppingAction(('task', 'metric'), 'min', patience=2)
  assert run_all(action, [kind(1), kind(2)]) == [False, True]


@pytest.mark.parametrize('value', ['1', [1.0], clu.values.Text('1')])
def test_other_values_are_left_alone_with_a_warning(value, caplog):
  action = actions.TerminateOnNanAction('task', 'metric')
  assert run_all(action, [value]) == [False]
  assert "'metric' of 'task' is no scalar" in caplog.text


@pytest.mark.parametrize(
  ('task', 'metric', 'text'),
  [
    ('tusk', 'metric', "no task 'tusk'. There are: task"),
    ('task', 'los', "no metric 'los'. There are: metric"),
  ],
)
def test_names_that_are_not_there(task, metric, text, caplog):
  nan = float('nan')
  assert run_all(actions.TerminateOnNanAction(task, metric), [nan]) == [False]
  assert text in caplog.text
  early = actions.EarlyStoppingAction((task, metric), 'min', patience=2)
  assert run_all(early, [1.0, 1.0, 1.0]) == [False] * 3


@pytest.mark.parametrize(
  ('value', 'stops'), [(1.0, False), (np.nan, True), (np.inf, True), (-np.inf, True)]
)
def test_nan(value, stops):
  action = actions.TerminateOnNanAction('task')
  assert action.run(None, {'task': {'loss': clu.values.Scalar(value)}}) is stops


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'mode': 'least'}, "mode must be .*'least'"),
    ({'mode': 'min', 'patience': 1}, 'patience must be at least 2.*Got: 1'),
    ({'mode': 'min', 'atol': -1}, 'atol and rtol.*-1'),
    ({'mode': 'min', 'rtol': -0.5}, 'atol and rtol.*-0.5'),
  ],
)
def test_arguments_that_make_no_sense(arguments, message):
  with pytest.raises(ValueError, match=message):
    actions.EarlyStoppingAction(('task', 'metric'), **arguments)


def test_names_of_the_trainer_module():
  assert trainer.EarlyStoppingAction is actions.EarlyStoppingAction
  assert [mode.name for mode in trainer.ActionMode] == [
    'TRAIN',
    'TRAIN_EVAL',
    'INFER_EVAL',
  ]
