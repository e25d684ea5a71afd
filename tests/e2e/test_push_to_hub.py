"""A run with gin/push_to_hub.gin, against a server on this machine."""

import pytest

pytestmark = pytest.mark.slow


def test_a_run_pushes_at_its_saves_and_its_end(
  server, helpers, data_root, tmp_path, monkeypatch
):
  run = tmp_path / 'run'
  files = [*helpers.TRAIN_FILES, 'gin/push_to_hub.gin']
  changes = {
    **helpers.tiny_training(run),
    'TRAIN_STEPS': 60,
    'train.eval_period': 20,
    'utils.SaveCheckpointConfig.period': 20,
    'HUB_REPO': 'ola/norbart',
  }
  command = helpers.gin_flags(files, changes)
  outcome = helpers.Process(data_root, 't5x.train', *command).end()
  assert outcome.code == 0, outcome.text
  assert 'checkpoint_60 pushed to' in outcome.text
  pushed = server.repos['ola/norbart']['branches']['main']
  assert {'model.safetensors', 'flax_model.msgpack', 'README.md'} <= pushed.keys()
  assert b'for 60 steps' in pushed['README.md']
  assert any(name.startswith('runs/train/events') for name in pushed)
  assert server.token not in outcome.text

  # Without a login nothing is trained.
  monkeypatch.setenv('HF_TOKEN', 'hf_wrongwrongwrong')
  changes['MODEL_DIR'] = str(tmp_path / 'other')
  command = helpers.gin_flags(files, changes)
  outcome = helpers.Process(data_root, 't5x.train', *command).end()
  assert outcome.code == 1 and 'hf auth login' in outcome.text
  assert not list((tmp_path / 'other').glob('checkpoint_*'))
