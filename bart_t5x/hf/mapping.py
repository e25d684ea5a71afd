"""ONE table: how a parameter is called and laid out here and in Hugging Face BART.

Three things differ beside the names. PyTorch keeps kernels transposed. Hugging
Face has `<s>` 0 and `<pad>` 1 where the inside ids are `<s>` 1 and padding 0, so
the first two rows of the token table and columns of the logits' bias trade places.
And our vocabulary may be padded with rows that no id uses: they are dropped on the
way out and are zero on the way in.

NumPy only: neither JAX nor transformers is imported.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

Framework = Literal['flax', 'torch']

# Names under which PyTorch checkpoints repeat the token table.
TORCH_ALIASES = (
  'model.encoder.embed_tokens.weight',
  'model.decoder.embed_tokens.weight',
  'lm_head.weight',
)

_TOKEN_TABLE = 'token_embedder/embedding'
_LOGITS_BIAS = 'final_logits_bias'

# THE table. Module here, module in Hugging Face, what the module is.
_SIDE = (
  ('position_embedder', 'embed_positions', 'table'),
  ('embedding_layer_norm', 'layernorm_embedding', 'norm'),
)
_LAYER = (
  ('self_attention', 'self_attn', 'attention'),
  ('self_attention_layer_norm', 'self_attn_layer_norm', 'norm'),
  ('encoder_decoder_attention', 'encoder_attn', 'attention'),
  ('encoder_decoder_attention_layer_norm', 'encoder_attn_layer_norm', 'norm'),
  ('mlp/wi', 'fc1', 'linear'),
  ('mlp/wo', 'fc2', 'linear'),
  ('mlp_layer_norm', 'final_layer_norm', 'norm'),
)
_ATTENTION = (
  ('query', 'q_proj'),
  ('key', 'k_proj'),
  ('value', 'v_proj'),
  ('out', 'out_proj'),
)
# Its leaves: here and in Flax, in PyTorch.
_LEAVES = {
  'table': (('embedding', 'weight'),),
  'norm': (('scale', 'weight'), ('bias', 'bias')),
  'linear': (('kernel', 'weight'), ('bias', 'bias')),
}


class Leaf(NamedTuple):
  """One parameter under its three names.

  Attributes:
    path: here, layers written out: `encoder/layers_0/mlp/wi/kernel`.
    flax: in Flax: `model.encoder.layers.0.fc1.kernel`.
    torch: in PyTorch: `model.encoder.layers.0.fc1.weight`.
  """

  path: str
  flax: str
  torch: str

  def name(self, framework: Framework) -> str:
    """The name in that framework."""
    return self.torch if framework == 'torch' else self.flax


def _module_leaves(ours: str, theirs: str, kind: str) -> Iterator[Leaf]:
  """The leaves of one module, an attention's four projections included."""
  if kind == 'attention':
    for part, their_part in _ATTENTION:
      yield from _module_leaves(f'{ours}/{part}', f'{theirs}.{their_part}', 'linear')
    return
  for leaf, torch_leaf in _LEAVES[kind]:
    yield Leaf(f'{ours}/{leaf}', f'{theirs}.{leaf}', f'{theirs}.{torch_leaf}')


def leaves(num_encoder_layers: int, num_decoder_layers: int) -> list[Leaf]:
  """Every parameter of a model with that many layers."""
  found = [
    Leaf(_TOKEN_TABLE, 'model.shared.embedding', 'model.shared.weight'),
    Leaf(_LOGITS_BIAS, _LOGITS_BIAS, _LOGITS_BIAS),
  ]
  for side, count in (
    ('encoder', num_encoder_layers),
    ('decoder', num_decoder_layers),
  ):
    for ours, theirs, kind in _SIDE:
      found.extend(_module_leaves(f'{side}/{ours}', f'model.{side}.{theirs}', kind))
    for layer in range(count):
      for ours, theirs, kind in _LAYER:
        if side == 'encoder' and ours.startswith('encoder_decoder'):
          continue
        found.extend(
          _module_leaves(
            f'{side}/layers_{layer}/{ours}',
            f'model.{side}.layers.{layer}.{theirs}',
            kind,
          )
        )
  return found


def _swap_rows(rows: Shaped[np.ndarray, 'v ...']) -> Shaped[np.ndarray, 'v ...']:
  """Exchanges the rows of `<s>` and padding, as `tokenization.to_hf_ids` does ids."""
  return np.concatenate([rows[1::-1], rows[2:]])


def flatten(tree: Mapping[str, Any], separator: str = '/') -> dict[str, Any]:
  """Nested mappings -> one mapping with joined keys."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      inner = flatten(value, separator)
      flat.update({f'{key}{separator}{name}': leaf for name, leaf in inner.items()})
    else:
      flat[key] = value
  return flat


def unflatten(flat: Mapping[str, Any], separator: str = '/') -> dict[str, Any]:
  """The inverse of `flatten`."""
  tree = {}
  for name, leaf in flat.items():
    *parents, last = name.split(separator)
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters of a scanned model -> those of the same model written out.

  Args:
    params: nested parameters, either kind.

  Returns:
    Nested parameters with `layers_0`, `layers_1`, … instead of `layers`.
  """
  flat = {}
  for path, leaf in flatten(params).items():
    if '/layers/' not in path:
      flat[path] = leaf
      continue
    for layer in range(leaf.shape[0]):
      flat[path.replace('/layers/', f'/layers_{layer}/')] = leaf[layer]
  return unflatten(flat)


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `unstack_layers`; parameters already stacked stay as they are."""
  flat, stacks = {}, {}
  for path, leaf in flatten(params).items():
    match = re.search('/layers_([0-9]+)/', path)
    if match:
      stacked = path.replace(match[0], '/layers/')
      stacks.setdefault(stacked, {})[int(match[1])] = leaf
    else:
      flat[path] = leaf
  for path, by_layer in stacks.items():
    flat[path] = np.stack([by_layer[layer] for layer in range(len(by_layer))])
  return unflatten(flat)


def count_layers(names: Mapping[str, Any], side: str) -> int:
  """How many layers one side has, from flat names of any of the three kinds."""
  pattern = re.compile(rf'(?:model\.)?{side}[./]layers[._]([0-9]+)[./]')
  return len({match[1] for name in names if (match := pattern.match(name))})


def to_hf(
  params: Mapping[str, Any], vocab_size: int, framework: Framework
) -> dict[str, Float[np.ndarray, '...']]:
  """Our parameters -> Hugging Face's, as flat dotted names.

  Args:
    params: nested parameters, scanned or not.
    vocab_size: real number of ids; further rows are padding and are dropped.
    framework: 'flax' (split the names at dots for the nested tree) or 'torch'
      (without `TORCH_ALIASES`, which repeat `model.shared.weight`).

  Returns:
    Contiguous arrays by name.

  Raises:
    ValueError: if params are not exactly those of a BART.
  """
  flat = flatten(unstack_layers(params))
  table = leaves(count_layers(flat, 'encoder'), count_layers(flat, 'decoder'))
  _check_names(flat, [leaf.path for leaf in table], 'The parameters')
  rows = flat[_TOKEN_TABLE].shape[0]
  if rows < vocab_size:
    raise ValueError(
      f'The token table has {rows} rows, fewer than the vocabulary: {vocab_size}. '
      'The checkpoint belongs to another vocabulary.'
    )
  tensors = {}
  for leaf in table:
    array = np.asarray(flat[leaf.path])
    if leaf.path in (_TOKEN_TABLE, _LOGITS_BIAS):
      array = _swap_rows(array[:vocab_size])
    if leaf.path == _LOGITS_BIAS:
      array = array[None]
    if framework == 'torch' and leaf.path.endswith('/kernel'):
      array = array.T
    tensors[leaf.name(framework)] = np.ascontiguousarray(array)
  return tensors


def from_hf(
  tensors: Mapping[str, Shaped[np.ndarray, '...']],
  framework: Framework,
  padded_vocab_size: int | None = None,
  scan_layers: bool = False,
) -> dict[str, Any]:
  """Hugging Face's parameters -> ours, nested.

  Args:
    tensors: arrays by flat dotted name; PyTorch's aliases may be there or not.
    framework: whose names and layout they have, 'flax' or 'torch'.
    padded_vocab_size: rows wanted in the token table, None for as many as given.
    scan_layers: whether to stack the layers.

  Returns:
    Nested parameters, float32, padded rows zero.

  Raises:
    ValueError: if the tensors are not exactly those of a BART, or have more rows
      than padded_vocab_size.
  """
  given = {name: array for name, array in tensors.items() if name not in TORCH_ALIASES}
  table = leaves(count_layers(given, 'encoder'), count_layers(given, 'decoder'))
  names = [leaf.name(framework) for leaf in table]
  _check_names(given, names, "The checkpoint's tensors")
  flat = {}
  for leaf in table:
    array = np.asarray(given[leaf.name(framework)]).astype(np.float32)
    if framework == 'torch' and leaf.path.endswith('/kernel'):
      array = array.T
    if leaf.path == _LOGITS_BIAS:
      array = array.reshape(-1)
    if leaf.path in (_TOKEN_TABLE, _LOGITS_BIAS):
      array = _pad_rows(_swap_rows(array), padded_vocab_size)
    flat[leaf.path] = np.ascontiguousarray(array)
  params = unflatten(flat)
  return stack_layers(params) if scan_layers else params


def _pad_rows(array, rows):
  """Adds rows of zeros up to `rows`, if given."""
  if rows is None:
    return array
  if rows < len(array):
    raise ValueError(
      f'The checkpoint has {len(array)} vocabulary rows, more than the {rows} of '
      'the model: set BartConfig.vocab_size to the number in its config.json.'
    )
  padding = [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1)
  return np.pad(array, padding)


def _check_names(given, expected, what):
  """Raises one error that names what is missing and what is too much."""
  missing = sorted(set(expected) - set(given))
  extra = sorted(set(given) - set(expected))
  if missing or extra:
    raise ValueError(
      f'{what} are not those of a BART with as many layers. '
      f'Missing {len(missing)}: {missing[:5]}; unexpected {len(extra)}: {extra[:5]}'
    )
