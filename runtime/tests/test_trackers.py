"""Reports reach the tracking services, under one run per MODEL_DIR."""

import sqlite3
import sys

import pytest

from t5x import trackers

VALUES = {'loss': 2.5, 'accuracy': 0.25}


def tracked(model_dir, service):
  """Reports a late evaluation after a newer step; returns wandb's id and summary."""
  tracker = trackers.Tracker('project', service)
  tracker.open(str(model_dir))
  tracker.log(20, 'train', VALUES)
  tracker.log(10, 'inference_eval/task/eval', {'chrf': 3.0})
  kept = (tracker.run.id, dict(tracker.run.summary)) if service == 'wandb' else None
  tracker.close()
  return kept


def test_wandb(tmp_path, monkeypatch):
  pytest.importorskip('wandb')
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('WANDB_MODE', 'offline')
  (first, summary), (second, _) = (tracked(tmp_path, 'wandb') for _ in range(2))
  assert first == second == (tmp_path / 'tracker_run.txt').read_text()
  assert summary['train/loss'] == 2.5 and summary['train/accuracy'] == 0.25
  assert summary['inference_eval/task/eval/chrf'] == 3.0 and summary['step'] == 10


def test_trackio(tmp_path, monkeypatch):
  monkeypatch.setenv('TRACKIO_DIR', str(tmp_path / 'trackio'))
  pytest.importorskip('trackio')
  for _ in range(2):
    tracked(tmp_path, 'trackio')
  with sqlite3.connect(tmp_path / 'trackio' / 'project.db') as db:
    rows = db.execute('SELECT run_name, step, metrics FROM metrics').fetchall()
  name = (tmp_path / 'tracker_run.txt').read_text()
  assert {(run, step) for run, step, _ in rows} == {(name, 20), (name, 10)}
  assert all(b'train/loss' in text for _, step, text in rows if step == 20)


def test_missing_package_and_unknown_service(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ImportError, match='pip install wandb'):
    trackers.Tracker('project').open(str(tmp_path))
  with pytest.raises(ValueError, match="'mlflow'"):
    trackers.Tracker('project', 'mlflow')
