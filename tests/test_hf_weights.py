"""Weight files of safetensors and Flax; for PyTorch's see tests/interop."""

import json
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors

from bart_t5x.hf import weights

STATE = {
  'model.shared.weight': np.arange(12, dtype=np.float32).reshape(3, 4),
  'model.encoder.layers.0.fc1.weight': np.arange(6, dtype=np.float32).reshape(2, 3),
  'model.encoder.layers.10.fc1.bias': np.array([1, 2], ml_dtypes.bfloat16),
  'final_logits_bias': np.ones((1, 3), np.float32),
}
KINDS = (weights.SAFETENSORS, weights.MSGPACK)


def assert_same(left, right):
  assert set(left) == set(right)
  for name in left:
    assert left[name].dtype == right[name].dtype
    np.testing.assert_array_equal(left[name], right[name])


def write(folder, kind, state=STATE):
  if kind == weights.SAFETENSORS:
    weights.write_safetensors(folder / kind, state)
  else:
    weights.write_msgpack(folder / kind, state)
  return folder / kind


@pytest.mark.parametrize('kind', KINDS)
def test_round_trip(tmp_path, kind):
  file = write(tmp_path, kind)
  assert file.stat().st_mode & 0o444 == 0o444
  state, read_kind = weights.read_weights(tmp_path)
  assert read_kind == kind
  assert_same(state, STATE)
  if kind == weights.SAFETENSORS:
    with safetensors.safe_open(file, 'np') as opened:
      assert opened.metadata() == {'format': 'pt'}  # transformers requires it


def test_safetensors_are_preferred(tmp_path):
  write(tmp_path, weights.MSGPACK, {'a': np.zeros(1)})
  write(tmp_path, weights.SAFETENSORS)
  (tmp_path / weights.TORCH).write_bytes(b'damaged, and never read')
  assert weights.read_weights(tmp_path)[1] == weights.SAFETENSORS


def shard(folder, kind):
  """Writes the state as two shards, with transformers' file names."""
  names = sorted(STATE)
  stem, _, suffix = kind.partition('.')
  where = {}
  for i, part in enumerate((names[:2], names[2:]), start=1):
    file = f'{stem}-{i:05}-of-00002.{suffix}'
    write(folder, kind, {name: STATE[name] for name in part}).rename(folder / file)
    where |= dict.fromkeys(part, file)
  index = folder / f'{kind}.index.json'
  index.write_text(json.dumps({'metadata': {}, 'weight_map': where}))


@pytest.mark.parametrize('kind', KINDS)
def test_shards_are_joined(tmp_path, kind):
  shard(tmp_path, kind)
  state, read_kind = weights.read_weights(tmp_path)
  assert read_kind == kind
  assert_same(state, STATE)
  next(tmp_path.glob('*-00002-of-00002.*')).unlink()
  with pytest.raises(FileNotFoundError, match='00002-of-00002'):
    weights.read_weights(tmp_path)


def test_index_cannot_name_files_elsewhere(tmp_path):
  folder = tmp_path / 'model'
  folder.mkdir()
  write(tmp_path, weights.SAFETENSORS).rename(tmp_path / 'other.safetensors')
  index = folder / 'model.safetensors.index.json'
  for name in ('../other.safetensors', str(tmp_path / 'other.safetensors')):
    index.write_text(json.dumps({'weight_map': {'a': name}}))
    with pytest.raises(FileNotFoundError):
      weights.read_weights(folder)


@pytest.mark.parametrize('kind', KINDS)
def test_truncated_files_are_errors(tmp_path, kind):
  file = write(tmp_path, kind)
  whole = file.read_bytes()
  for length in (0, 9, len(whole) - 1):
    file.write_bytes(whole[:length])
    with pytest.raises(ValueError, match=f'{kind} is damaged or truncated'):
      weights.read_weights(tmp_path)


def test_pytorch_files_without_pytorch(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  (tmp_path / weights.TORCH).touch()
  with pytest.raises(ValueError, match='pip install torch'):
    weights.read_weights(tmp_path)


@pytest.mark.parametrize('kind', weights.KINDS)
def test_a_folder_is_not_a_weight_file(tmp_path, kind):
  (tmp_path / kind).mkdir()
  with pytest.raises(FileNotFoundError, match='no weights'):
    weights.read_weights(tmp_path)
