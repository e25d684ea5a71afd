"""A BART as fairseq saves it: `model.pt`, which holds weights and settings.

The file is a pickle; it is read by `torch_files`, which runs nothing of it. Settings
lie in `args` (argparse) or `cfg` (omegaconf), whose objects come as inert data. The
parameters bear the names that Hugging Face kept, without the prefix `model.`, but
for the token table; there is no bias on the logits.
"""

import argparse
import pathlib
import re
from typing import Any

import numpy as np

from bart_t5x.hf import torch_files
from bart_t5x.hf.weights import Weights

MODEL = 'model.pt'
DICTIONARY = 'dict.txt'

# Field of BartConfig: setting of fairseq.
_FIELDS = {
  'emb_dim': 'encoder_embed_dim',
  'num_heads': 'encoder_attention_heads',
  'num_encoder_layers': 'encoder_layers',
  'num_decoder_layers': 'decoder_layers',
  'mlp_dim': 'encoder_ffn_embed_dim',
  'max_positions': 'max_source_positions',
  'dropout_rate': 'dropout',
  'attention_dropout_rate': 'attention_dropout',
}
# What must agree: encoder's and decoder's.
_PAIRS = (
  ('encoder_embed_dim', 'decoder_embed_dim'),
  ('encoder_attention_heads', 'decoder_attention_heads'),
  ('encoder_ffn_embed_dim', 'decoder_ffn_embed_dim'),
  ('max_source_positions', 'max_target_positions'),
)
# What would make it another network; absent ones are as in fairseq's `bart_large`.
_REQUIRED = {
  'encoder_normalize_before': False,
  'decoder_normalize_before': False,
  'encoder_learned_pos': True,
  'decoder_learned_pos': True,
  'layernorm_embedding': True,
  'no_scale_embedding': True,
  'share_all_embeddings': True,
  'activation_fn': 'gelu',
  'no_token_positional_embeddings': False,
  'cross_self_attention': False,
  'no_cross_attention': False,
  'adaptive_input': False,
  'adaptive_softmax_cutoff': None,
}
_TABLE = 'encoder.embed_tokens.weight'
_TIED = ('decoder.embed_tokens.weight', 'decoder.output_projection.weight')
# Entries that hold no parameter of the network: format versions, buffers, and the
# heads of classifiers, which are trained after it.
_LEFTOVERS = re.compile(
  r'(en|de)coder\.(version|embed_positions\._float_tensor)|classification_heads\..*'
)


def find(path: pathlib.Path) -> pathlib.Path | None:
  """The checkpoint that a path names: a `.pt` file, or a folder with model.pt.

  A folder with a config.json is Hugging Face's, whatever else is in it.
  """
  if path.suffix == '.pt' and path.is_file():
    return path
  if (path / MODEL).is_file() and not (path / 'config.json').exists():
    return path / MODEL
  return None


def _plain(value: Any) -> Any:
  """Namespaces, and omegaconf's nodes as they come from the pickle, as plain data."""
  if isinstance(value, argparse.Namespace):
    return vars(value)
  if isinstance(value, torch_files.Opaque):
    state = value.state if isinstance(value.state, dict) else {}
    return _plain(state.get('_content', state.get('_val')))
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  return value


def _settings(state: dict[str, Any]) -> dict[str, Any]:
  """The model's settings out of a checkpoint, of an old or a new fairseq.

  Raises:
    ValueError: it holds none.
  """
  settings = _plain(state.get('args'))
  if settings is None:
    config = _plain(state.get('cfg'))
    settings = config.get('model') if isinstance(config, dict) else None
  if not isinstance(settings, dict):
    raise ValueError(
      'it holds no settings (args or cfg.model), without which the number of '
      'attention heads cannot be known'
    )
  return settings


def _fields(settings: dict[str, Any]) -> dict[str, Any]:
  """The values of BartConfig, but for the vocabulary's size.

  Raises:
    ValueError: the settings are no BART's, or of one that is not computed here.
  """
  for key, value in _REQUIRED.items():
    if settings.get(key, value) != value:
      raise ValueError(
        f'its setting {key} is {settings[key]!r}, that of BART {value!r}: a variant '
        'that this network does not compute (mBART, for one, is pre-norm)'
      )
  missing = [key for key in _FIELDS.values() if key not in settings]
  if missing:
    raise ValueError(f'its settings lack {", ".join(missing)}: it is no BART')
  for ours, theirs in _PAIRS:
    if settings.get(theirs, settings[ours]) != settings[ours]:
      raise ValueError(
        f'its settings have {ours} = {settings[ours]} and {theirs} = '
        f'{settings[theirs]}: they must agree here'
      )
  fields = {ours: settings[theirs] for ours, theirs in _FIELDS.items()}
  # Old settings call the same rate by the name of another activation.
  rate = settings.get('activation_dropout') or settings.get('relu_dropout') or 0.0
  return {**fields, 'activation_dropout_rate': rate}


def _tensors(state: dict[str, Any]) -> Weights:
  """The parameters under Hugging Face's names for PyTorch.

  Raises:
    ValueError: there are none, or several token tables.
  """
  model = state.get('model')
  if not isinstance(model, dict) or _TABLE not in model:
    raise ValueError(f'it holds no model with {_TABLE}')
  table = model[_TABLE]
  for name in _TIED:
    if name in model and not np.array_equal(model[name], table):
      raise ValueError(
        f'{name} differs from {_TABLE}: the model has several token tables, this '
        'network has one'
      )
  kept = {
    f'model.{name}': tensor
    for name, tensor in model.items()
    if name not in (_TABLE, *_TIED) and not _LEFTOVERS.fullmatch(name)
  }
  bias = np.zeros((1, len(table)), np.float32)
  return {'model.shared.weight': table, 'final_logits_bias': bias, **kept}


def read(path: pathlib.Path) -> tuple[dict[str, Any], Weights]:
  """Reads a checkpoint of fairseq.

  Args:
    path: the `.pt` file.

  Returns:
    Field name of BartConfig to value, as `configs.from_hf` gives them, and the
    weights under Hugging Face's names for PyTorch.

  Raises:
    ValueError: it is damaged, no BART, or a variant that network.py does not
      compute.
  """
  state = torch_files.load(path, opaque_classes=True)
  try:
    if not isinstance(state, dict):
      raise ValueError('it is no checkpoint of fairseq')
    tensors = _tensors(state)
    fields = _fields(_settings(state))
  except ValueError as e:
    raise ValueError(f'{path} cannot be imported: {e}') from e
  vocab_size = len(tensors['model.shared.weight'])
  return {'vocab_size': vocab_size, **fields}, tensors


def read_dictionary(path: pathlib.Path) -> list[str]:
  """The symbols of a `dict.txt`, in order: that of line i has id 4 + i.

  Before them come `<s>`, `<pad>`, `</s>` and `<unk>`, behind them, added by the
  denoising task, `<mask>`. Fillers (`madeupword0000`), with which the length was
  rounded up, are symbols as well.

  Args:
    path: of lines `symbol count`; the count may be missing, as where transformers
      writes the file.

  Returns:
    The symbols.

  Raises:
    ValueError: a line is of another form, or a symbol appears twice.
  """
  symbols = []
  # Not splitlines: a symbol may hold what Unicode calls a line's end.
  lines = path.read_text(encoding='utf-8').removesuffix('\n').split('\n')
  for number, line in enumerate(lines, 1):
    symbol, separator, count = line.rstrip().rpartition(' ')
    if not separator:
      symbol, count = count, '0'
    if not symbol or not count.isdecimal():
      raise ValueError(
        f'{path}, line {number}: {line!r} is no symbol with its count; it is no '
        'dictionary of fairseq'
      )
    symbols.append(symbol)
  if len(set(symbols)) < len(symbols):
    twice = next(s for i, s in enumerate(symbols) if s in symbols[:i])
    raise ValueError(f'{path} has the symbol {twice!r} twice')
  return symbols
