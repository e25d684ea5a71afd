"""Reads a fairseq BART: `model.pt` with weights and settings, and `dict.txt`.

Settings are in `args` (argparse) or `cfg` (a dictionary). Weights have the names of a
Hugging Face model saved without its head.
"""

import argparse
import pathlib
import re
from typing import Any

import numpy as np

from bart_t5x.hf import torch_files

MODEL = 'model.pt'
DICTIONARY = 'dict.txt'

# BartConfig field: fairseq setting.
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
# The decoder's value must equal the encoder's.
_PAIRS = {
  'decoder_embed_dim': 'encoder_embed_dim',
  'decoder_attention_heads': 'encoder_attention_heads',
  'decoder_ffn_embed_dim': 'encoder_ffn_embed_dim',
  'max_target_positions': 'max_source_positions',
}
# network.py computes only these variants.
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
# Buffers, and copies of weights that fairseq 0.12 saved with each encoder layer.
_IGNORED = re.compile(
  r'(en|de)coder\.embed_positions\._float_tensor'
  r'|encoder\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)'
)
# Query, key and value of fairseq before 0.9.
_FUSED = re.compile(r'(.*_attn)\.in_proj_(weight|bias)')


def find(path: pathlib.Path) -> pathlib.Path | None:
  """Returns a `.pt` file as it is, a fairseq folder's model.pt, otherwise None."""
  if path.suffix == '.pt' and path.is_file():
    return path
  if (path / MODEL).is_file() and not (path / 'config.json').exists():
    return path / MODEL
  return None


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Reads a `.pt` file.

  Returns:
    BartConfig fields, and weights under Hugging Face's PyTorch names, without head.

  Raises:
    ValueError: damaged, not a BART, or a variant that network.py does not compute.
  """
  state = torch_files.read(path, allowed_classes=(argparse.Namespace,))
  settings = state.get('args') or (state.get('cfg') or {}).get('model')
  if isinstance(settings, argparse.Namespace):
    settings = vars(settings)
  weights = state.get('model') or {}
  if not settings or _TABLE not in weights:
    raise ValueError(
      f'{path} is not a fairseq BART: it needs settings (args or cfg.model) and '
      f'weights (model) with {_TABLE}'
    )
  tensors = {}
  for name, tensor in weights.items():
    if match := _FUSED.fullmatch(name):
      for part, rows in zip('qkv', np.split(tensor, 3), strict=True):
        tensors[f'{match[1]}.{part}_proj.{match[2]}'] = rows
    elif name == 'decoder.output_projection.weight':
      tensors['lm_head.weight'] = tensor
    elif not _IGNORED.fullmatch(name):
      tensors[name] = tensor
  return {'vocab_size': len(weights[_TABLE]), **_fields(settings, path)}, tensors


def _fields(settings: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
  missing = [key for key in _FIELDS.values() if key not in settings]
  if missing:
    raise ValueError(f'{path}: the settings lack {", ".join(missing)}')
  same = {theirs: settings[ours] for theirs, ours in _PAIRS.items() if ours in settings}
  for key, value in {**_REQUIRED, **same}.items():
    if settings.get(key, value) != value:
      raise ValueError(
        f'{path}: {key} is {settings[key]!r}. This network supports only {value!r}.'
      )
  fields = {ours: settings[theirs] for ours, theirs in _FIELDS.items()}
  # Older files name it relu_dropout.
  rate = settings.get('activation_dropout') or settings.get('relu_dropout') or 0.0
  return {**fields, 'activation_dropout_rate': rate}


def read_dictionary(path: pathlib.Path) -> list[str]:
  """Returns the symbols of a `dict.txt`, in order: that of line i has id 4 + i.

  `<s>`, `<pad>`, `</s>` and `<unk>` precede them. Fillers (`madeupword0000`) count.

  Raises:
    ValueError: a line is not `symbol count`.
  """
  symbols = []
  # Not splitlines: symbols may contain Unicode line separators.
  lines = path.read_text(encoding='utf-8').removesuffix('\n').split('\n')
  for number, line in enumerate(lines, 1):
    entry = line.rstrip().removesuffix(' #fairseq:overwrite')
    symbol, _, count = entry.rpartition(' ')
    if not symbol or not count.isdecimal():
      raise ValueError(
        f'{path}, line {number}: {line!r} is not `symbol count`. Is this a fairseq '
        'dictionary?'
      )
    if entry != line.rstrip() and symbol in symbols:
      symbols[symbols.index(symbol)] = f'<overwritten {number}>'
    symbols.append(symbol)
  return symbols
