"""A BART of Hugging Face or fairseq as a T5X checkpoint, with its gin file."""

import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bart_t5x import network, tokenization
from bart_t5x.hf import (
  checkpoints,
  configs,
  fairseq,
  folders,
  mapping,
  tokenizer_files,
  tokenizer_import,
  weights,
)

# Entries of old PyTorch files that hold no parameter.
_LEFTOVERS = re.compile(r'(model\.)?(encoder|decoder)\.version')
# How a model that was saved without its head begins its names.
_HEADLESS = re.compile(r'(shared|encoder|decoder)\.')
# Dropout's fields, each to be changed by DROPOUT_RATE where they agree.
_DROPOUTS = ('dropout_rate', 'attention_dropout_rate', 'activation_dropout_rate')

_GIN = """\
# {model}, imported from {origin}.
#
# Give this file after that of a run, instead of one of gin/models, and as the
# checkpoint
#   {checkpoint}
# It is CHECKPOINT_PATH to gin/eval.gin and gin/infer.gin, INITIAL_CHECKPOINT_PATH to
# gin/finetune.gin, and with gin/from_checkpoint.gin to the files that pre-train. The
# task must use the tokenizer beside this file: name this folder where a corpus folder
# is asked for.
include 'gin/models/bart.gin'

DROPOUT_RATE = {dropout_rate}
network.BartConfig:
{bindings}
"""
# For a model whose config forces the first token.
_GIN_FORCED = """
# Every text that this model writes begins with this token.
model.BartModel.forced_first_id = {forced_first_id}
"""


class Source(NamedTuple):
  """A foreign model, read and checked.

  Attributes:
    origin: whose it is, 'Hugging Face' or 'fairseq'.
    folder: where its tokenizer lies.
    fields: of BartConfig, those that the model determines.
    tensors: weights under Hugging Face's names.
    framework: whose names and layout they have.
    forced_first_id: the (inside) id with which its texts begin, or None.
  """

  origin: str
  folder: pathlib.Path
  fields: dict[str, Any]
  tensors: weights.Weights
  framework: mapping.Framework
  forced_first_id: int | None


def read_config(folder: pathlib.Path) -> tuple[dict[str, Any], int | None]:
  """What a model folder's configurations say.

  Returns:
    The fields of BartConfig that config.json determines, and the (inside) id that
    every text of the model begins with, None where none is forced.

  Raises:
    FileNotFoundError, ValueError: it is not there, damaged, or no BART's.
  """
  path = folder / 'config.json'
  if not path.exists():
    raise FileNotFoundError(
      f'{folder} is no model folder: it holds no config.json (Hugging Face) and no '
      f'{fairseq.MODEL} (fairseq)'
    )
  hf = tokenizer_files.read_json(path)
  fields = configs.from_hf(hf)
  generation = folder / 'generation_config.json'
  forced = configs.forced_bos(
    hf, tokenizer_files.read_json(generation) if generation.exists() else None
  )
  if forced is not None:
    forced = int(tokenization.from_hf_ids(np.asarray(forced)))
  return fields, forced


def normalized(
  tensors: weights.Weights, framework: mapping.Framework
) -> weights.Weights:
  """Brings the ways in which a BART is saved to the one that `mapping` knows.

  A model saved without its head lacks the prefix `model.` and the bias on the
  logits, which is zero then; old files hold a format's version among the weights.

  Args:
    tensors: as they were read.
    framework: whose names they have.

  Returns:
    Tensors under the names of BartForConditionalGeneration.

  Raises:
    ValueError: the head has a table of its own.
  """
  tensors = {k: w for k, w in tensors.items() if not _LEFTOVERS.fullmatch(k)}
  if any(_HEADLESS.match(name) for name in tensors):
    tensors = {
      f'model.{name}' if _HEADLESS.match(name) else name: w
      for name, w in tensors.items()
    }
  table = 'model.shared.embedding' if framework == 'flax' else 'model.shared.weight'
  aliases = [name for name in mapping.TORCH_ALIASES if name in tensors]
  if table not in tensors and aliases:
    # Where all names share one tensor, a file keeps it under any of them.
    tensors[table] = tensors[aliases[0]]
  for alias in aliases:
    if not np.array_equal(tensors[alias], tensors[table]):
      raise ValueError(
        f'{alias} differs from {table}: the model has several token tables, this '
        'network has one'
      )
  if table in tensors and 'final_logits_bias' not in tensors:
    rows = tensors[table].shape[0]
    tensors['final_logits_bias'] = np.zeros((1, rows), np.float32)
  return tensors


def _check_shapes(params: dict[str, Any], config: network.BartConfig) -> None:
  """Raises unless the parameters are those of the network that config describes."""
  tokens = jnp.ones((1, 2), jnp.int32)
  expected = jax.eval_shape(
    lambda: network.Transformer(config).init(
      jax.random.key(0), tokens, tokens, tokens, enable_dropout=False
    )
  )['params']
  wanted = {path: leaf.shape for path, leaf in mapping.flatten(expected).items()}
  given = {path: leaf.shape for path, leaf in mapping.flatten(params).items()}
  wrong = [
    f'{path} is {given.get(path)}, config.json asks for {wanted.get(path)}'
    for path in sorted(wanted.keys() | given.keys())
    if given.get(path) != wanted.get(path)
  ]
  if wrong:
    raise ValueError(
      f'the weights do not fit config.json in {len(wrong)} places: '
      + '; '.join(wrong[:3])
    )


def read_source(path: pathlib.Path) -> Source:
  """Reads a model of either kind.

  Args:
    path: a folder of Hugging Face's; or of fairseq's, or its `.pt` file.

  Raises:
    FileNotFoundError, ValueError: it is not there, damaged, or no BART.
  """
  if checkpoint := fairseq.find(path):
    fields, tensors = fairseq.read(checkpoint)
    return Source('fairseq', checkpoint.parent, fields, tensors, 'torch', None)
  fields, forced = read_config(path)
  tensors, kind = weights.read_weights(path)
  framework = 'flax' if kind == weights.MSGPACK else 'torch'
  tensors = normalized(tensors, framework)
  return Source('Hugging Face', path, fields, tensors, framework, forced)


def to_params(source: Source, config: network.BartConfig) -> dict[str, Any]:
  """The weights of a foreign model as parameters of the network.

  Args:
    source: from `read_source`.
    config: of the network.

  Returns:
    Nested parameters, float32.

  Raises:
    ValueError: the weights are not those of a BART of this shape.
  """
  tensors = source.tensors
  table = tensors.get('model.shared.weight', tensors.get('model.shared.embedding'))
  if table is not None and len(table) != config.vocab_size:
    raise ValueError(
      f'config.json has vocab_size = {config.vocab_size}, the token table '
      f'{len(table)} rows: they must agree'
    )
  params = mapping.from_hf(
    tensors, source.framework, config.padded_vocab_size, config.scan_layers
  )
  _check_shapes(params, config)
  return params


def gin_file(model: str, checkpoint: pathlib.Path, source: Source) -> str:
  """The text of the gin file that describes an imported model.

  Args:
    model: folder or Hub id, for its first line.
    checkpoint: where the checkpoint will be.
    source: the model.

  Returns:
    Gin, for use from the repository's root.
  """
  bound = dict(source.fields)
  for name in _DROPOUTS:
    if bound[name] == source.fields['dropout_rate']:
      bound[name] = '%DROPOUT_RATE'
  text = _GIN.format(
    model=model.replace('\n', ' '),
    origin=source.origin,
    checkpoint=checkpoint,
    dropout_rate=source.fields['dropout_rate'],
    bindings='\n'.join(f'  {name} = {value}' for name, value in bound.items()),
  )
  if source.forced_first_id is not None:
    text += _GIN_FORCED.format(forced_first_id=source.forced_first_id)
  return text


def _local(model: str, revision: str | None) -> pathlib.Path:
  """The path that `model` names, or where the Hub's model of that id came to lie."""
  path = pathlib.Path(model)
  if not path.exists():
    from bart_t5x.hf import hub  # late: it need not be there for a folder

    return hub.download(model, revision)
  if revision:
    raise ValueError(
      f'--revision={revision} belongs to a Hub id; {model} is a folder or file'
    )
  return path


def import_model(
  model: str,
  output_dir: pathlib.Path,
  revision: str | None = None,
  skip_tokenizer: bool = False,
  overwrite: bool = False,
) -> None:
  """Writes a foreign model as a folder that T5X starts from.

  Args:
    model: a folder of Hugging Face's or fairseq's, fairseq's `.pt` file, or an id
      on the Hub.
    output_dir: gets `checkpoint_0`, `config.gin` and the tokenizer; appears whole
      or not at all.
    revision: branch, tag or commit on the Hub; by default its main branch.
    skip_tokenizer: leave the tokenizer where it is.
    overwrite: replace what is in output_dir.

  Raises:
    OSError, ValueError: with what to do about it.
  """
  source = read_source(_local(model, revision))
  config = network.BartConfig(**source.fields)
  tokenizer = None
  if not skip_tokenizer:
    tokenizer = tokenizer_import.read(source.folder, config.vocab_size)
  params = to_params(source, config)
  with folders.new_folder(output_dir, overwrite) as work:
    checkpoints.write_params(work / 'checkpoint_0', params)
    text = gin_file(model, output_dir / 'checkpoint_0', source)
    (work / 'config.gin').write_text(text, encoding='utf-8')
    if tokenizer is not None:
      (work / tokenizer.name).write_bytes(tokenizer.content)
