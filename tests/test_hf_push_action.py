"""The action beside a run: it starts, tells, and ends with the run."""

import time
import types

import pytest

from bart_t5x.hf import hub, push_action

REPO = 'ola/norbart'


@pytest.fixture
def told(monkeypatch):
  """What the action logs."""
  lines = []

  def tell(text, *values):
    lines.append(text % values)

  monkeypatch.setattr(
    push_action, 'logging', types.SimpleNamespace(info=tell, warning=tell)
  )
  return lines


def test_pushes_while_the_run_goes_on_and_tells(server, make_run, tmp_path, told):
  run = make_run(tmp_path / 'trained')
  action = push_action.PushToHub(REPO, str(run.model_dir), corpus_dir=str(run.corpus))
  for _ in range(600):
    assert action.run(None, {}) is False
    if told:
      break
    time.sleep(0.1)
  assert 'Hub: ' in told[0] and 'checkpoint_0 pushed to' in told[0]
  assert 'model.safetensors' in server.repos[REPO]['branches']['main']
  start = time.monotonic()
  action.close()
  action.close()  # Also called by atexit.
  assert time.monotonic() - start < 30
  assert len(told) == 1


def test_a_wrong_token_stops_the_run_before_it_begins(server, tmp_path, monkeypatch):
  monkeypatch.setenv('HF_TOKEN', 'hf_wrongwrongwrong')
  with pytest.raises(hub.LoginError, match='hf auth login'):
    push_action.PushToHub(REPO, str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_a_folder_that_is_not_here_is_refused(server):
  with pytest.raises(ValueError, match="local folders only. Got: model_dir='gs://b/r'"):
    push_action.PushToHub(REPO, 'gs://b/r')
  assert not server.requests


def test_a_hub_that_is_away_stops_nothing(server, tmp_path, told):
  server.fail['whoami'] = 503
  action = push_action.PushToHub(REPO, str(tmp_path / 'run'))
  assert 'Training goes on' in told[0]
  assert action.run(None, {}) is False
  action.close()
