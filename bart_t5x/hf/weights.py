"""Reads and writes weight files of Hugging Face: safetensors, msgpack, PyTorch .bin."""

import json
import pathlib

import flax.serialization
import flax.traverse_util
import numpy as np
import safetensors.numpy

from bart_t5x.hf import torch_files

Weights = dict[str, np.ndarray]  # by dotted names

SAFETENSORS = 'model.safetensors'
MSGPACK = 'flax_model.msgpack'
TORCH = 'pytorch_model.bin'
# In order of preference.
KINDS = (SAFETENSORS, MSGPACK, TORCH)


def write_safetensors(path: pathlib.Path, weights: Weights) -> None:
  """Writes contiguous arrays under PyTorch's names."""
  # transformers requires this metadata.
  safetensors.numpy.save_file(weights, path, metadata={'format': 'pt'})
  path.chmod(0o644)  # safetensors creates it with 0600.


def write_msgpack(path: pathlib.Path, weights: Weights) -> None:
  """Writes weights under Flax's names."""
  nested = flax.traverse_util.unflatten_dict(weights, sep='.')
  path.write_bytes(flax.serialization.msgpack_serialize(nested))


def read_weights(folder: pathlib.Path) -> tuple[Weights, str]:
  """Reads a model's weights, whole or sharded.

  Returns:
    The weights, and which of `KINDS` they were: MSGPACK has Flax's names, the others
    PyTorch's.

  Raises:
    FileNotFoundError: no weights, or a missing shard.
    ValueError: a file is damaged, or PyTorch is needed and not installed.
  """
  for kind in KINDS:
    index = folder / f'{kind}.index.json'
    if (folder / kind).is_file():
      return _read(folder / kind, kind), kind
    if index.exists():
      weights = {}
      for name in sorted(set(json.loads(index.read_text())['weight_map'].values())):
        # An untrusted index must not name files outside the folder.
        weights |= _read(folder / pathlib.PurePath(name).name, kind)
      return weights, kind
  raise FileNotFoundError(
    f'{folder} has no weights. Expected one of {", ".join(KINDS)}, whole or sharded.'
  )


def _read(path: pathlib.Path, kind: str) -> Weights:
  if kind == TORCH:
    return torch_files.read(path)
  try:
    if kind == SAFETENSORS:
      return safetensors.numpy.load_file(path)
    nested = flax.serialization.msgpack_restore(path.read_bytes())
    return flax.traverse_util.flatten_dict(nested, sep='.')
  except OSError:
    raise
  except Exception as e:  # Damaged msgpack raises anything.
    raise ValueError(f'{path} is damaged or truncated ({e}). Download it again.') from e
