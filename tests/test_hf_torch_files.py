"""PyTorch's files read without PyTorch: what they hold, and that nothing is run."""

import argparse
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from bart_t5x.hf import torch_files

STATE = {
  'weight': np.arange(6, dtype=np.float32).reshape(2, 3),
  'half': np.array([1.5, -2], np.float16),
  'brain': np.array([[0.5], [3]], ml_dtypes.bfloat16),
  'count': np.array(7, np.int64),
}


@pytest.fixture(autouse=True)
def names(torch_format):
  """PyTorch's, for all tests here."""
  return torch_format


@pytest.fixture(params=['zip', 'stream'])
def file(request, tmp_path, torch_format):
  write = getattr(torch_format, f'write_{request.param}')
  return write(tmp_path / 'pytorch_model.bin', STATE)


def test_both_formats_give_the_arrays(file):
  loaded = torch_files.load(file)
  assert list(loaded) == list(STATE)
  for name, array in STATE.items():
    assert loaded[name].dtype == array.dtype
    np.testing.assert_array_equal(loaded[name], array)


def test_strides_are_followed(tmp_path, torch_format):
  state = {'w': STATE['weight']}
  tree = {'w': torch_format.Saved(STATE['weight'], '0', transposed=True)}
  loaded = torch_files.load(torch_format.write_zip(tmp_path / 'f.bin', state, tree))
  np.testing.assert_array_equal(loaded['w'], STATE['weight'].T)


def test_tied_tensors_share_a_storage(tmp_path, torch_format):
  state = {'w': STATE['weight']}
  tree = {
    name: torch_format.Saved(STATE['weight'], '0') for name in ('shared', 'lm_head')
  }
  loaded = torch_files.load(torch_format.write_zip(tmp_path / 'f.bin', state, tree))
  np.testing.assert_array_equal(loaded['shared'], loaded['lm_head'])


class Malicious:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (self.path, 'w')


@pytest.mark.parametrize('opaque', [False, True])
def test_nothing_in_a_file_is_run(tmp_path, torch_format, opaque):
  trace = tmp_path / 'trace'
  tree = {'w': Malicious(str(trace))}
  path = torch_format.write_zip(tmp_path / 'f.bin', {}, tree)
  if opaque:
    assert isinstance(torch_files.load(path, opaque)['w'], torch_files.Opaque)
  else:
    with pytest.raises(torch_files.UnsafeFileError, match=r'io\.open.*safetensors'):
      torch_files.load(path)
  assert not trace.exists()


def test_a_bare_pickle_is_no_checkpoint_and_is_not_run(tmp_path):
  path, trace = tmp_path / 'f.bin', tmp_path / 'trace'
  path.write_bytes(pickle.dumps(Malicious(str(trace)), protocol=2))
  with pytest.raises(torch_files.UnsafeFileError):
    torch_files.load(path)
  path.write_bytes(pickle.dumps({'w': 1}, protocol=2) * 2)
  with pytest.raises(ValueError, match='no PyTorch checkpoint'):
    torch_files.load(path)
  assert not trace.exists()


def test_namespaces_are_read_as_fairseq_writes_them(tmp_path, torch_format):
  path = torch_format.write_zip(
    tmp_path / 'f.pt', {}, {'args': argparse.Namespace(arch='bart')}
  )
  assert torch_files.load(path)['args'].arch == 'bart'


def test_every_cut_is_an_error_that_names_the_file(file):
  whole = file.read_bytes()
  for length in range(0, len(whole) - 1, 7):
    file.write_bytes(whole[:length])
    with pytest.raises(ValueError, match=r'pytorch_model\.bin'):
      torch_files.load(file)


def test_changed_bytes_never_end_in_another_error(file):
  """Damage is a ValueError, or is not noticeable (a changed number or name)."""
  whole = bytearray(file.read_bytes())
  random = np.random.default_rng(0)
  for _ in range(400):
    damaged = whole.copy()
    damaged[random.integers(len(whole))] = random.integers(256)
    file.write_bytes(damaged)
    try:
      torch_files.load(file)
    except ValueError as e:
      assert 'pytorch_model.bin' in str(e)


@pytest.mark.parametrize('change', [{'size': 5}, {'size': 9}])
def test_a_storage_of_another_size(tmp_path, torch_format, change):
  array = np.zeros(6, np.float32)
  tree = {'w': torch_format.Saved(np.zeros(change['size'], np.float32), '0')}
  path = torch_format.write_zip(tmp_path / 'f.bin', {'w': array}, tree)
  with pytest.raises(ValueError, match='has 24 bytes.*truncated, damaged'):
    torch_files.load(path)


def test_a_tensor_outside_its_storage(tmp_path, torch_format):
  class Outside(torch_format.Saved):
    def __reduce__(self):
      function, (storage, _, shape, strides, *rest) = super().__reduce__()
      return function, (storage, 3, shape, strides, *rest)

  tree = {'w': Outside(STATE['weight'], '0')}
  path = torch_format.write_zip(tmp_path / 'f.bin', {'w': STATE['weight']}, tree)
  with pytest.raises(ValueError, match='outside its storage'):
    torch_files.load(path)


def test_other_kinds_of_file(tmp_path, torch_format):
  path = tmp_path / 'f.bin'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('readme.txt', 'no checkpoint')
  with pytest.raises(ValueError, match='zip archive but no PyTorch checkpoint'):
    torch_files.load(path)
  with pytest.raises(ValueError, match='big-endian numbers, which are not'):
    torch_files.load(torch_format.write_zip(path, STATE, byteorder='big'))
  path.write_text('<html>Not found</html>')
  with pytest.raises(ValueError, match=r'f\.bin cannot be read'):
    torch_files.load(path)
