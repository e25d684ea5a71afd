"""Files of weights: written, read, sharded, damaged."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors

from bart_t5x.hf import weights

STATE = {
  'model.shared.weight': np.arange(12, dtype=np.float32).reshape(3, 4),
  'model.encoder.layers.0.fc1.weight': np.arange(6, dtype=np.float32).reshape(2, 3).T,
  'model.encoder.layers.10.fc1.bias': np.array([1, 2], ml_dtypes.bfloat16),
  'final_logits_bias': np.ones((1, 3), np.float32),
}


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


KINDS = (weights.SAFETENSORS, weights.MSGPACK)


@pytest.mark.parametrize('kind', KINDS)
def test_there_and_back(tmp_path, kind):
  write(tmp_path, kind)
  state, read_kind = weights.read_weights(tmp_path)
  assert read_kind == kind
  assert_same(state, STATE)


def test_safetensors_say_that_they_are_pytorchs(tmp_path):
  with safetensors.safe_open(write(tmp_path, KINDS[0]), 'np') as file:
    assert file.metadata() == {'format': 'pt'}


@pytest.mark.parametrize('kind', KINDS)
def test_everybody_may_read_what_is_published(tmp_path, kind):
  assert write(tmp_path, kind).stat().st_mode & 0o444 == 0o444


def test_safetensors_come_before_the_others(tmp_path):
  write(tmp_path, weights.MSGPACK, {'a': np.zeros(1)})
  write(tmp_path, weights.SAFETENSORS)
  (tmp_path / weights.TORCH).write_bytes(b'damaged, and never looked at')
  assert weights.read_weights(tmp_path)[1] == weights.SAFETENSORS


def shard(folder, kind=weights.SAFETENSORS, write_shard=write):
  """The state in two files and their index, named as transformers names them."""
  names = sorted(STATE)
  stem, _, suffix = kind.partition('.')
  where = {}
  for i, part in enumerate((names[:2], names[2:]), start=1):
    file = f'{stem}-{i:05}-of-00002.{suffix}'
    write_shard(folder, kind, {name: STATE[name] for name in part}).rename(
      folder / file
    )
    where |= dict.fromkeys(part, file)
  index = folder / f'{kind}.index.json'
  index.write_text(json.dumps({'metadata': {}, 'weight_map': where}))
  return index


@pytest.mark.parametrize('kind', KINDS)
def test_shards_are_joined(tmp_path, kind):
  shard(tmp_path, kind)
  state, read_kind = weights.read_weights(tmp_path)
  assert read_kind == kind
  assert_same(state, STATE)


def test_shards_of_pytorch_are_joined(tmp_path, torch_format):
  def write_torch(folder, kind, state):
    return torch_format.write_zip(folder / kind, state)

  shard(tmp_path, weights.TORCH, write_torch)
  state, kind = weights.read_weights(tmp_path)
  assert kind == weights.TORCH
  assert_same(state, STATE)


def test_a_missing_shard_is_named(tmp_path):
  shard(tmp_path)
  (tmp_path / 'model-00002-of-00002.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match='not there: model-00002-of-00002'):
    weights.read_weights(tmp_path)


def test_an_index_names_no_file_elsewhere(tmp_path):
  """An index comes with the model: it must not reach outside its folder."""
  folder = tmp_path / 'model'
  folder.mkdir()
  write(tmp_path, weights.SAFETENSORS)
  index = folder / 'model.safetensors.index.json'
  for name in ('../model.safetensors', str(tmp_path / 'model.safetensors')):
    index.write_text(json.dumps({'weight_map': {'a': name}}))
    with pytest.raises(ValueError, match='is no name of a shard'):
      weights.read_weights(folder)


@pytest.mark.parametrize('text', ['{', '[]', '{"weight_map": 3}', '{}'])
def test_a_damaged_index_is_named(tmp_path, text):
  (tmp_path / 'model.safetensors.index.json').write_text(text)
  with pytest.raises(ValueError, match=r'index\.json is damaged'):
    weights.read_weights(tmp_path)


@pytest.mark.parametrize('kind', KINDS)
def test_cut_files_are_damaged(tmp_path, kind):
  file = write(tmp_path, kind)
  whole = file.read_bytes()
  for length in (0, 1, 7, 9, len(whole) // 2, len(whole) - 1):
    file.write_bytes(whole[:length])
    with pytest.raises(ValueError, match=f'{kind} is damaged or truncated'):
      weights.read_weights(tmp_path)


def test_a_page_instead_of_weights(tmp_path):
  for kind in weights.SAFETENSORS, weights.MSGPACK, weights.TORCH:
    file = tmp_path / kind
    file.write_text('<html>Not found</html>')
    with pytest.raises(ValueError, match=kind):
      weights.read_weights(tmp_path)
    file.unlink()


def test_large_flax_leaves_are_split_and_joined(tmp_path, monkeypatch):
  import flax.serialization

  monkeypatch.setattr(flax.serialization, 'MAX_CHUNK_SIZE', 16)
  write(tmp_path, weights.MSGPACK)
  assert_same(weights.read_weights(tmp_path)[0], STATE)


def test_no_weights(tmp_path):
  with pytest.raises(FileNotFoundError, match='expected one of model.safetensors'):
    weights.read_weights(tmp_path)
