"""Weight files of Hugging Face models: safetensors, Flax msgpack, PyTorch .bin.

Weights are a flat dict from dotted names to arrays; `mapping` knows the names.
"""

import json
import pathlib

import flax.serialization
import flax.traverse_util
import numpy as np
import safetensors.numpy

from bart_t5x.hf import torch_files

Weights = dict[str, np.ndarray]

SAFETENSORS = 'model.safetensors'
MSGPACK = 'flax_model.msgpack'
TORCH = 'pytorch_model.bin'
# In order of preference.
KINDS = (SAFETENSORS, MSGPACK, TORCH)


def write_safetensors(path: pathlib.Path, weights: Weights) -> None:
  """Writes contiguous arrays under PyTorch's names."""
  # transformers asks for the format.
  safetensors.numpy.save_file(weights, path, metadata={'format': 'pt'})
  path.chmod(0o644)  # safetensors lets only the owner read it.


def write_msgpack(path: pathlib.Path, weights: Weights) -> None:
  """Writes Flax's names as the nested dict that FlaxPreTrainedModel reads."""
  nested = flax.traverse_util.unflatten_dict(weights, sep='.')
  path.write_bytes(flax.serialization.msgpack_serialize(nested))


def read_weights(folder: pathlib.Path) -> tuple[Weights, str]:
  """Reads a model's weights, whole or sharded.

  Returns:
    The weights under the file's own names, and which of `KINDS` it was: MSGPACK has
    Flax's names, the others PyTorch's.

  Raises:
    FileNotFoundError: there are no weights, or a shard is missing.
    ValueError: a file is damaged, or needs PyTorch.
  """
  for kind in KINDS:
    index = folder / f'{kind}.index.json'
    if (folder / kind).exists():
      return _read(folder / kind, kind), kind
    if index.exists():
      weights = {}
      for name in sorted(set(json.loads(index.read_text())['weight_map'].values())):
        # The index comes with the model: it must not reach outside its folder.
        weights |= _read(folder / pathlib.PurePath(name).name, kind)
      return weights, kind
  raise FileNotFoundError(
    f'{folder} has no weights: expected one of {", ".join(KINDS)} (or shards with an '
    'index)'
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
  except Exception as e:  # Damaged msgpack can raise anything.
    raise ValueError(f'{path} is damaged or truncated ({e}). Download it again.') from e
