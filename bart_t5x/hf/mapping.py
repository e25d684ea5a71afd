"""Maps the network's parameters to those of Hugging Face's BART and back.

Apart from names, three things differ. PyTorch kernels are transposed. The ids of `<s>`
and padding are 0 and 1 in Hugging Face, 1 and 0 here, so the first two rows of the
token table and of the logits bias are swapped. The table here may be padded: padding
rows are dropped on export and zero on import.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, Shaped

from bart_t5x import network, restack

Framework = Literal['flax', 'torch']

# Tied names of the token table in PyTorch files.
TORCH_ALIASES = (
  'model.encoder.embed_tokens.weight',
  'model.decoder.embed_tokens.weight',
  'lm_head.weight',
)

_TOKEN_TABLE = 'token_embedder/embedding'
_LOGITS_BIAS = 'final_logits_bias'

# Module here: module in Hugging Face. Others have the same name.
_MODULES = {
  'token_embedder': 'shared',
  'position_embedder': 'embed_positions',
  'embedding_layer_norm': 'layernorm_embedding',
  'self_attention': 'self_attn',
  'self_attention_layer_norm': 'self_attn_layer_norm',
  'encoder_decoder_attention': 'encoder_attn',
  'encoder_decoder_attention_layer_norm': 'encoder_attn_layer_norm',
  'query': 'q_proj',
  'key': 'k_proj',
  'value': 'v_proj',
  'out': 'out_proj',
  'wi': 'fc1',
  'wo': 'fc2',
  'mlp_layer_norm': 'final_layer_norm',
}


def hf_name(path: str, framework: Framework) -> str:
  """Returns Hugging Face's name of a parameter.

  `encoder/layers_0/mlp/wi/kernel` is `model.encoder.layers.0.fc1.kernel` in Flax and
  `model.encoder.layers.0.fc1.weight` in PyTorch.
  """
  if path == _LOGITS_BIAS:
    return path
  *modules, leaf = re.sub('layers_([0-9]+)', r'layers/\1', path).split('/')
  names = [_MODULES.get(module, module) for module in modules if module != 'mlp']
  if framework == 'torch' and leaf != 'bias':
    leaf = 'weight'
  return '.'.join(['model', *names, leaf])


@functools.lru_cache(maxsize=1)
def parameter_shapes(config: network.BartConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a network's parameters by path, layers not stacked."""
  module = network.Transformer(dataclasses.replace(config, scan_layers=False))

  def init():
    tokens = jnp.ones((1, 2), jnp.int32)
    return module.init(jax.random.key(0), tokens, tokens, tokens, enable_dropout=False)

  params = flatten_dict(jax.eval_shape(init)['params'], sep='/')
  return {path: leaf.shape for path, leaf in params.items()}


def to_hf(
  params: Mapping[str, Any], config: network.BartConfig, framework: Framework
) -> dict[str, Float[np.ndarray, '...']]:
  """Converts nested parameters, layers stacked or not, to Hugging Face's.

  Returns:
    Contiguous arrays by dotted name, without `TORCH_ALIASES`.

  Raises:
    ValueError: the parameters do not match the config.
  """
  flat = flatten_dict(restack.unstack_layers(params), sep='/')
  _check_sizes({hf_name(path, 'torch'): leaf for path, leaf in flat.items()}, config)
  shapes = parameter_shapes(config)
  _check_names(flat, shapes, 'The parameters')
  tensors = {}
  for path, shape in shapes.items():
    array = np.asarray(flat[path])
    _check_shape(path, array, shape)
    if path in (_TOKEN_TABLE, _LOGITS_BIAS):
      array = _swap_rows(array[: config.vocab_size])
    if path == _LOGITS_BIAS:
      array = array[None]
    if framework == 'torch' and path.endswith('/kernel'):
      array = array.T
    tensors[hf_name(path, framework)] = np.ascontiguousarray(array)
  return tensors


def from_hf(
  tensors: Mapping[str, Shaped[np.ndarray, '...']],
  config: network.BartConfig,
  framework: Framework,
) -> dict[str, Any]:
  """Converts Hugging Face's tensors to nested float32 parameters.

  The config decides about vocabulary padding and stacked layers.

  Raises:
    ValueError: the tensors do not match the config.
  """
  given = {name: array for name, array in tensors.items() if name not in TORCH_ALIASES}
  table = given.get(hf_name(_TOKEN_TABLE, framework))
  if table is not None and len(table) != config.vocab_size:
    raise ValueError(
      f'The config has vocab_size = {config.vocab_size}, the token table {len(table)} '
      'rows: they must agree.'
    )
  _check_sizes(given, config)
  shapes = parameter_shapes(config)
  names = {path: hf_name(path, framework) for path in shapes}
  _check_names(given, names.values(), 'The tensors')
  flat = {}
  for path, shape in shapes.items():
    array = np.asarray(given[names[path]]).astype(np.float32)
    if not np.isfinite(array).all():
      raise ValueError(f'{names[path]} has values that are NaN or infinite')
    if framework == 'torch' and path.endswith('/kernel'):
      array = array.T
    if path == _LOGITS_BIAS:
      array = array.reshape(-1)
    if path in (_TOKEN_TABLE, _LOGITS_BIAS):
      missing = config.padded_vocab_size - config.vocab_size
      array = np.pad(_swap_rows(array), [(0, missing)] + [(0, 0)] * (array.ndim - 1))
    _check_shape(path, array, shape)
    flat[path] = np.ascontiguousarray(array)
  params = unflatten_dict(flat, sep='/')
  return restack.stack_layers(params) if config.scan_layers else params


def _swap_rows(rows: Shaped[np.ndarray, 'v ...']) -> Shaped[np.ndarray, 'v ...']:
  return np.concatenate([rows[1::-1], rows[2:]])


def _check_sizes(tensors: Mapping[str, Any], config: network.BartConfig) -> None:
  """Compares sizes with the config's, before anything is made of the config's size.

  `tensors` have Hugging Face's names of either framework.
  """
  shapes = {
    re.sub(r'\.(weight|embedding)$', '', n): t.shape for n, t in tensors.items()
  }
  found = {}
  for side in ('encoder', 'decoder'):
    layers = [re.match(rf'model\.{side}\.layers\.(\d+)\.', name) for name in shapes]
    numbers = [int(match[1]) for match in layers if match]
    found[f'num_{side}_layers'] = max(numbers, default=-1) + 1
  if (table := 'model.shared') in shapes:
    found['emb_dim'] = shapes[table][-1]
  if (positions := 'model.encoder.embed_positions') in shapes:
    found['max_positions'] = shapes[positions][0] - network.POSITION_OFFSET
  if (hidden := 'model.encoder.layers.0.fc1.bias') in shapes:
    found['mlp_dim'] = shapes[hidden][0]
  for name, size in found.items():
    if getattr(config, name) != size:
      raise ValueError(
        f'The config has {name} = {getattr(config, name)}, the weights {size}: they '
        'must agree.'
      )


def _check_names(given, expected, what):
  given, expected = set(given), set(expected)
  missing, extra = sorted(expected - given), sorted(given - expected)
  if missing or extra:
    raise ValueError(
      f'{what} do not match the config. Missing {len(missing)}: '
      f'{missing[:5]}; unexpected {len(extra)}: {extra[:5]}'
    )


def _check_shape(path, array, shape):
  if array.shape != shape:
    raise ValueError(f'{path} has shape {array.shape}, the config needs {shape}')
