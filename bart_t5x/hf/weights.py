"""Weight files of Hugging Face models: safetensors, Flax msgpack, PyTorch .bin.

A model's weights are a flat dict from a dotted name to an array; which names there
are is `mapping`'s business. Writing is for whole models, reading takes sharded ones
too (`*.index.json`).
"""

import json
import pathlib

import flax.serialization
import flax.traverse_util
import numpy as np
import safetensors
import safetensors.numpy

from bart_t5x.hf import torch_files

Weights = dict[str, np.ndarray]

SAFETENSORS = 'model.safetensors'
MSGPACK = 'flax_model.msgpack'
TORCH = 'pytorch_model.bin'


def write_safetensors(path: pathlib.Path, weights: Weights) -> None:
  """Writes PyTorch's names; `format: pt` is what transformers asks for."""
  contiguous = {name: np.ascontiguousarray(w) for name, w in weights.items()}
  safetensors.numpy.save_file(contiguous, path, metadata={'format': 'pt'})
  path.chmod(0o644)  # safetensors leaves it to the owner alone


def write_msgpack(path: pathlib.Path, weights: Weights) -> None:
  """Writes Flax's names as the nested dict that `FlaxPreTrainedModel` reads."""
  nested = flax.traverse_util.unflatten_dict(weights, sep='.')
  path.write_bytes(flax.serialization.msgpack_serialize(nested))


def _read_safetensors(path: pathlib.Path) -> Weights:
  try:
    return safetensors.numpy.load_file(path)
  except safetensors.SafetensorError as e:
    raise ValueError(f'{path} is damaged or truncated ({e}). Download it again.') from e


def _read_msgpack(path: pathlib.Path) -> Weights:
  content = path.read_bytes()
  try:
    nested = flax.serialization.msgpack_restore(content)
    return flax.traverse_util.flatten_dict(nested, sep='.')
  except Exception as e:  # whatever the damaged bytes happen to mean
    raise ValueError(
      f'{path} is damaged or truncated ({e!r}). Download it again.'
    ) from e


def _read_torch(path: pathlib.Path) -> Weights:
  weights = torch_files.load(path)
  tensors = weights.values() if isinstance(weights, dict) else [None]
  if not all(isinstance(w, np.ndarray) for w in tensors):
    raise ValueError(f'{path} holds more than tensors: it is no state dict')
  return weights


# In the order in which they are looked for: the safest and fastest first.
_READERS = {
  SAFETENSORS: _read_safetensors,
  MSGPACK: _read_msgpack,
  TORCH: _read_torch,
}
KINDS = tuple(_READERS)


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
  """The files that an index names, all of them there and beside it."""
  try:
    names = sorted(set(json.loads(index.read_text())['weight_map'].values()))
  except (ValueError, LookupError, TypeError, AttributeError) as e:
    raise ValueError(
      f'{index} is damaged or no index ({e!r}). Download it again.'
    ) from e
  for name in names:
    if pathlib.PurePath(name).name != name:
      raise ValueError(f'{index}: {name!r} is no name of a shard beside it')
  missing = [name for name in names if not (index.parent / name).exists()]
  if missing:
    raise FileNotFoundError(
      f'{index} names shards that are not there: {", ".join(missing)}'
    )
  return [index.parent / name for name in names]


def read_weights(folder: pathlib.Path) -> tuple[Weights, str]:
  """Reads a model's weights from whichever file there is.

  Args:
    folder: with model.safetensors, flax_model.msgpack or pytorch_model.bin, whole
      or sharded with an index.

  Returns:
    The weights under the file's own names, and which of the three it was
    ('flax_model.msgpack' has Flax's names, the others PyTorch's).

  Raises:
    FileNotFoundError: there is none of them, or a shard is missing.
    ValueError: a file is damaged.
  """
  for name, read in _READERS.items():
    if (folder / name).exists():
      return read(folder / name), name
    index = folder / f'{name}.index.json'
    if index.exists():
      weights = {}
      for shard in _shards(index):
        weights |= read(shard)
      return weights, name
  raise FileNotFoundError(
    f'{folder} holds no weights: expected one of {", ".join(_READERS)} (or its '
    'sharded form with an index).'
  )
