"""Parameters of the network and of Hugging Face's BART: names, layouts, ids.

Three things differ apart from names. PyTorch keeps kernels transposed. Hugging Face has
`<s>` 0 and `<pad>` 1 where the ids here are `<s>` 1 and padding 0, so the first two
rows of the token table and of the bias on the logits are swapped. And the table here
may be padded with rows that no id uses: dropped on export, zero on import.
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

# Names under which PyTorch files may repeat the token table.
TORCH_ALIASES = (
  'model.encoder.embed_tokens.weight',
  'model.decoder.embed_tokens.weight',
  'lm_head.weight',
)

_TOKEN_TABLE = 'token_embedder/embedding'
_LOGITS_BIAS = 'final_logits_bias'

# Module of the network: module of Hugging Face. What is not here has one name.
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
  """Hugging Face's name of a parameter.

  Args:
    path: such as `encoder/layers_0/mlp/wi/kernel`.
    framework: 'flax' gives `model.encoder.layers.0.fc1.kernel`, 'torch'
      `model.encoder.layers.0.fc1.weight`.
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
  """Shapes of a network's parameters by path, layers written out."""
  module = network.Transformer(dataclasses.replace(config, scan_layers=False))

  def init():
    tokens = jnp.ones((1, 2), jnp.int32)
    return module.init(jax.random.key(0), tokens, tokens, tokens, enable_dropout=False)

  params = flatten_dict(jax.eval_shape(init)['params'], sep='/')
  return {path: leaf.shape for path, leaf in params.items()}


def to_hf(
  params: Mapping[str, Any], config: network.BartConfig, framework: Framework
) -> dict[str, Float[np.ndarray, '...']]:
  """Converts parameters of the network to Hugging Face's.

  Args:
    params: nested, layers stacked or not.
    config: of the network.
    framework: whose names and layout to give; Flax's names are split at dots for the
      nested tree, PyTorch's come without `TORCH_ALIASES`.

  Returns:
    Contiguous arrays by name.

  Raises:
    ValueError: the parameters are not those of this network.
  """
  flat = flatten_dict(restack.unstack_layers(params), sep='/')
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
  """Converts Hugging Face's parameters to those of the network.

  Args:
    tensors: arrays by name; PyTorch's aliases may be among them.
    config: of the network, which decides about padding and stacking.
    framework: whose names and layout the tensors have.

  Returns:
    Nested parameters, float32.

  Raises:
    ValueError: the tensors are not those of this network.
  """
  given = {name: array for name, array in tensors.items() if name not in TORCH_ALIASES}
  shapes = parameter_shapes(config)
  names = {path: hf_name(path, framework) for path in shapes}
  _check_names(given, names.values(), 'The tensors')
  table = given[names[_TOKEN_TABLE]]
  if len(table) != config.vocab_size:
    raise ValueError(
      f'The config has vocab_size = {config.vocab_size}, the token table {len(table)} '
      'rows: they must agree.'
    )
  flat = {}
  for path, shape in shapes.items():
    array = np.asarray(given[names[path]]).astype(np.float32)
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


def _check_names(given, expected, what):
  given, expected = set(given), set(expected)
  missing, extra = sorted(expected - given), sorted(given - expected)
  if missing or extra:
    raise ValueError(
      f"{what} are not those of this config's BART. Missing {len(missing)}: "
      f'{missing[:5]}; unexpected {len(extra)}: {extra[:5]}'
    )


def _check_shape(path, array, shape):
  if array.shape != shape:
    raise ValueError(f'{path} is {array.shape}, the config asks for {shape}')
