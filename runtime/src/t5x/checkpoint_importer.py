"""Imports T5 checkpoints of Mesh TensorFlow under the names of T5X's T5.

TensorFlow is imported when a checkpoint is opened, not before.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from t5x.checkpointing.lazy_arrays import (
  LazyArray,
  LazyAwaitableArray,
  LazyThreadPoolArray,
)

__all__ = [
  'CheckpointTranslator',
  'LazyArray',
  'LazyAwaitableArray',
  'LazyThreadPoolArray',
  'load_tf_ckpt',
  'restore_from_t5_checkpoint',
  't5_importer',
]

_Renamed = tuple[str | None, Any]


class CheckpointTranslator:
  """Renames variables by rules: the first whose pattern matches the whole name."""

  def __init__(self):
    self.rules = []

  def add(self, pattern: str) -> Callable[[Callable[..., _Renamed]], Callable]:
    """Decorates a rule.

    Args:
      pattern: a regular expression, matched against the whole name.

    Returns:
      A decorator of functions (opts, key, val, *groups) -> (new name, value); a name of
      None drops the variable.
    """

    def register(rule):
      self.rules.append((re.compile(pattern), rule))
      return rule

    return register

  def apply(self, flatdict: Mapping[str, Any], **opts: Any) -> dict[str, Any]:
    """Renames all variables.

    Args:
      flatdict: name -> value.
      **opts: handed to the rules.

    Returns:
      New name -> value.

    Raises:
      ValueError: no rule matches some names.
    """
    renamed, unmatched = {}, []
    for key, value in flatdict.items():
      for pattern, rule in self.rules:
        if match := pattern.fullmatch(key):
          new_key, new_value = rule(opts, key, value, *match.groups())
          if new_key is not None:
            renamed[new_key] = new_value
          break
      else:
        unmatched.append(key)
    if unmatched:
      raise ValueError(
        f'No rule for {len(unmatched)} variables: {", ".join(sorted(unmatched))}. '
        'Add rules, or drop them with a rule that returns the name None.'
      )
    return renamed


t5_importer = CheckpointTranslator()

SLOT_MAP = {'_slot_vc': 'v_col', '_slot_vr': 'v_row', '_slot_v': 'v'}
# A decoder alone is called transformer there.
TOWER_MAP = {'transformer': 'decoder'}
_TOWER = r'(encoder|decoder|transformer)'
_LAYER = _TOWER + r'/block_(\d+)/layer_'


def _name(*parts: str, slot: str) -> str:
  """Joins a parameter's path, or that of a statistic Adafactor keeps for it."""
  if not slot:
    return '/'.join(['target', *parts])
  return '/'.join(['state/param_states', *parts, SLOT_MAP[slot]])


def _tower(encdec: str) -> str:
  return TOWER_MAP.get(encdec, encdec)


def _block(encdec: str, blocknum: str) -> tuple[str, str]:
  return _tower(encdec), f'layers_{int(blocknum)}'


@t5_importer.add(r'global_step')
def global_step(opts: Any, key: str, val: Any) -> _Renamed:
  """The step, as an int32 that is read right away."""
  del opts, key
  if isinstance(val, LazyArray):
    val = val.astype(np.int32).get()
  return 'state/step', val


@t5_importer.add(r'shared/embedding(\w*)')
def shared_embeddings(opts: Any, key: str, val: Any, slot: str) -> _Renamed:
  """The embedding that encoder and decoder share."""
  del opts, key
  return _name('token_embedder', 'embedding', slot=slot), val


@t5_importer.add(_TOWER + r'/embedding(\w*)')
def separate_embeddings(
  opts: Any, key: str, val: Any, encdec: str, slot: str
) -> _Renamed:
  """An embedding of the encoder's or the decoder's own."""
  del opts, key
  return _name(_tower(encdec), 'token_embedder', 'embedding', slot=slot), val


@t5_importer.add(_LAYER + r'000/SelfAttention/relative_attention_bias(\w*)')
def rel_embeddings(
  opts: Any, key: str, val: Any, encdec: str, blocknum: str, slot: str
) -> _Renamed:
  """Relative positions, as if each block had its own; mended once all are seen."""
  del opts, key
  return _name(*_block(encdec, blocknum), 'relpos_bias/rel_embedding', slot=slot), val


@t5_importer.add(_LAYER + r'\d+/(SelfAttention|EncDecAttention)/(q|k|v|o)(\w*)')
def attention_layers(
  opts: Any,
  key: str,
  val: Any,
  encdec: str,
  blocknum: str,
  attntype: str,
  qkvo: str,
  slot: str,
) -> _Renamed:
  """A projection of an attention."""
  del opts, key
  module = 'self_attention'
  if encdec == 'encoder':
    module = 'attention'
  elif attntype == 'EncDecAttention':
    module = 'encoder_decoder_attention'
  projection = {'q': 'query', 'k': 'key', 'v': 'value', 'o': 'out'}[qkvo]
  return _name(*_block(encdec, blocknum), module, projection, 'kernel', slot=slot), val


@t5_importer.add(_LAYER + r'\d+/DenseReluDense/(wi|wo)(?:_(\d+))?/kernel(\w*)')
def mlpblock(
  opts: Any,
  key: str,
  val: Any,
  encdec: str,
  blocknum: str,
  io_name: str,
  io_num: str | None,
  slot: str,
) -> _Renamed:
  """A projection of a feed-forward layer; gated ones have two inputs, numbered."""
  del opts, key
  projection = f'{io_name}_{io_num}' if io_num else io_name
  return _name(*_block(encdec, blocknum), 'mlp', projection, 'kernel', slot=slot), val


@t5_importer.add(_LAYER + r'(\d+)/(?:layer|rms)_norm/scale(\w*)')
def layernorms(
  opts: Any,
  key: str,
  val: Any,
  encdec: str,
  blocknum: str,
  lyrnum: str,
  slot: str,
) -> _Renamed:
  """The norm before a block's attention or feed-forward layer, by its number."""
  del opts, key
  before = {
    'encoder': ('attention', 'mlp'),
    'decoder': ('self_attention', 'cross_attention', 'mlp'),
    'transformer': ('self_attention', 'mlp'),
  }[encdec][int(lyrnum)]
  norm = f'pre_{before}_layer_norm'
  return _name(*_block(encdec, blocknum), norm, 'scale', slot=slot), val


@t5_importer.add(_TOWER + r'/(?:final_layer|rms)_norm/scale(\w*)')
def final_layernorms(opts: Any, key: str, val: Any, encdec: str, slot: str) -> _Renamed:
  """The norm at the end of the encoder or the decoder."""
  del opts, key
  tower = _tower(encdec)
  return _name(tower, f'{tower}_norm', 'scale', slot=slot), val


@t5_importer.add(r'(?:decoder|transformer)/logits/kernel(\w*)')
def final_logits(opts: Any, key: str, val: Any, slot: str) -> _Renamed:
  """The projection to the vocabulary."""
  del opts, key
  return _name('decoder', 'logits_dense', 'kernel', slot=slot), val


def _share_positions(data: Mapping[str, Any]) -> dict[str, Any]:
  """Moves relative positions out of block 0 if no other has any: all share them."""
  in_block = re.compile(r'layers_(\d+)/relpos_bias')
  blocks = {m[1] for m in map(in_block.search, data) if m}
  if blocks - {'0'}:
    return dict(data)
  return {in_block.sub('relpos_bias', name): value for name, value in data.items()}


def _with_unused_statistics(data: Mapping[str, Any]) -> dict[str, Any]:
  """Adds the placeholders of what T5X's Adafactor does not use for a parameter."""
  placeholders = {}
  for name in data:
    if not name.startswith('target/'):
      continue
    entry = 'state/param_states/' + name.removeprefix('target/')
    kept = {s for s in ('v', 'v_row', 'v_col', 'm') if f'{entry}/{s}' in data}
    if kept:
      for unused in {'v', 'v_row', 'v_col', 'm'} - kept:
        placeholders[f'{entry}/{unused}'] = np.zeros((1,), np.float32)
  return {**data, **placeholders}


def load_tf_ckpt(path: str) -> dict[str, LazyThreadPoolArray]:
  """Opens a TensorFlow checkpoint.

  Args:
    path: a folder, or the prefix `.../model.ckpt-<step>`.

  Returns:
    Variable -> array that is read when asked for.
  """
  import tensorflow as tf  # Seconds, which nobody else here should spend.

  reader = tf.train.load_checkpoint(path)
  dtypes = reader.get_variable_to_dtype_map()
  return {
    name: LazyThreadPoolArray(
      shape,
      jnp.dtype(dtypes[name].as_numpy_dtype),
      lambda name=name: np.asarray(reader.get_tensor(name)),
    )
    for name, shape in reader.get_variable_to_shape_map().items()
  }


def restore_from_t5_checkpoint(
  state_dict: Mapping[str, Any],
  path: str,
  lazy_parameters: bool = False,
  strict: bool = True,
  translator: CheckpointTranslator | None = None,
) -> dict[str, Any]:
  """Reads a T5 of Mesh TensorFlow as the state of a T5X model with Adafactor.

  Args:
    state_dict: the state, for its names and shapes.
    path: a folder, or the prefix `.../model.ckpt-<step>`.
    lazy_parameters: whether to leave arrays to be read when asked for.
    strict: whether a variable that the state has not is an error. What the state has
      and the checkpoint has not is always one.
    translator: the rules; None for those of T5 and T5 1.1.

  Returns:
    The state dict with the checkpoint's values.

  Raises:
    ValueError: names or shapes do not fit.
  """
  translator = translator or t5_importer
  data = translator.apply(load_tf_ckpt(path))
  data = _with_unused_statistics(_share_positions(data))
  wanted = flax.traverse_util.flatten_dict(state_dict, sep='/')
  missing, extra = sorted(wanted.keys() - data), sorted(data.keys() - wanted)
  if missing or (strict and extra):
    raise ValueError(
      f'{path!r} is of another model. Missing: {", ".join(missing) or "nothing"}. '
      f'Not in the model: {", ".join(extra) or "nothing"}.'
    )
  wrong = [
    f'{name} is {tuple(np.shape(data[name]))}, the model has {tuple(np.shape(leaf))}'
    for name, leaf in wanted.items()
    if tuple(np.shape(data[name])) != tuple(np.shape(leaf))
  ]
  if wrong:
    raise ValueError(f'{path!r} is of another model: {"; ".join(wrong)}.')
  chosen = {name: data[name] for name in wanted}
  if not lazy_parameters:
    chosen = jax.tree.map(
      lambda leaf: leaf.get() if isinstance(leaf, LazyArray) else leaf, chosen
    )
  return flax.traverse_util.unflatten_dict(chosen, sep='/')
