"""A BART of Hugging Face as a T5X checkpoint, with the gin file that describes it."""

import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bart_t5x import network, tokenization
from bart_t5x.hf import checkpoints, configs, folders, mapping, weights

# Entries of old PyTorch files that hold no parameter.
_LEFTOVERS = re.compile(r'(model\.)?(encoder|decoder)\.version')
# How a model that was saved without its head begins its names.
_HEADLESS = re.compile(r'(shared|encoder|decoder)\.')
# Dropout's fields, each to be changed by DROPOUT_RATE where they agree.
_DROPOUTS = ('dropout_rate', 'attention_dropout_rate', 'activation_dropout_rate')

_GIN = """\
# {model}, imported from Hugging Face.
#
# Give this file to train, eval and infer instead of one of gin/models, and
#   {checkpoint}
# as CHECKPOINT_PATH, or as INITIAL_CHECKPOINT_PATH to train on. The checkpoint has
# no state of an optimizer: training begins with a fresh one if
# utils.RestoreCheckpointConfig.strict = False. The task must use the tokenizer
# beside this file: name this folder where a corpus folder is asked for.
include 'gin/models/bart.gin'

DROPOUT_RATE = {dropout_rate}
network.BartConfig:
{bindings}
"""


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """The fields of BartConfig that a model folder's config.json determines.

  Raises:
    FileNotFoundError, ValueError: it is not there, damaged, or no BART's.
  """
  path = folder / 'config.json'
  if not path.exists():
    raise FileNotFoundError(f'{folder} is no model folder: it holds no config.json')
  try:
    hf = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as e:
    raise ValueError(f'{path} is damaged: {e}. Download it again.') from e
  return configs.from_hf(hf)


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


def read_params(folder: pathlib.Path, config: network.BartConfig) -> dict[str, Any]:
  """Reads a model folder's weights as parameters of the network.

  Args:
    folder: with weights in any of the three formats.
    config: of the network.

  Returns:
    Nested parameters, float32.

  Raises:
    FileNotFoundError, ValueError: see `weights.read_weights`; or the weights are
      not those of a BART of this shape.
  """
  tensors, kind = weights.read_weights(folder)
  framework = 'flax' if kind == weights.MSGPACK else 'torch'
  tensors = normalized(tensors, framework)
  table = tensors.get('model.shared.weight', tensors.get('model.shared.embedding'))
  if table is not None and len(table) != config.vocab_size:
    raise ValueError(
      f'config.json has vocab_size = {config.vocab_size}, the token table '
      f'{len(table)} rows: they must agree'
    )
  params = mapping.from_hf(
    tensors, framework, config.padded_vocab_size, config.scan_layers
  )
  _check_shapes(params, config)
  return params


def read_tokenizer(folder: pathlib.Path, vocab_size: int) -> str:
  """The text of a model folder's tokenizer.json, if it is one that works here.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is not byte-level BPE, or not of this size.
  """
  path = folder / tokenization.BYTE_LEVEL_FILE
  skip = 'or import the weights alone: --skip_tokenizer'
  if not path.exists():
    raise FileNotFoundError(
      f'{folder} holds no {path.name}. Make it with transformers: '
      f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}'); {skip}"
    )
  text = path.read_text(encoding='utf-8')
  found = tokenization.read_tokenizer(str(path)).vocab_size
  pre_tokenizer = json.dumps(json.loads(text).get('pre_tokenizer'))
  if '"ByteLevel"' not in pre_tokenizer:
    raise ValueError(
      f'{path} is no byte-level BPE, the only kind whose files can be taken over. '
      f'Train a tokenizer of your own, {skip}'
    )
  if found != vocab_size:
    raise ValueError(
      f'{path} has {found} ids, the model {vocab_size}. Take the tokenizer that '
      f'belongs to the model, {skip}'
    )
  return text


def gin_file(model: str, checkpoint: pathlib.Path, fields: dict[str, Any]) -> str:
  """The text of the gin file that describes an imported model.

  Args:
    model: folder or Hub id, for its first line.
    checkpoint: where the checkpoint will be.
    fields: of BartConfig, from `read_config`.

  Returns:
    Gin, for use from the repository's root.
  """
  bound = dict(fields)
  for name in _DROPOUTS:
    if bound[name] == fields['dropout_rate']:
      bound[name] = '%DROPOUT_RATE'
  return _GIN.format(
    model=model.replace('\n', ' '),
    checkpoint=checkpoint,
    dropout_rate=fields['dropout_rate'],
    bindings='\n'.join(f'  {name} = {value}' for name, value in bound.items()),
  )


def import_model(
  model: str,
  output_dir: pathlib.Path,
  revision: str | None = None,
  skip_tokenizer: bool = False,
  overwrite: bool = False,
) -> None:
  """Writes a model of Hugging Face as a folder that T5X starts from.

  Args:
    model: a folder, or an id on the Hub.
    output_dir: gets `checkpoint_0`, `config.gin` and `tokenizer.json`; appears
      whole or not at all.
    revision: branch, tag or commit on the Hub; by default its main branch.
    skip_tokenizer: leave the tokenizer where it is.
    overwrite: replace what is in output_dir.

  Raises:
    OSError, ValueError: with what to do about it.
  """
  folder = pathlib.Path(model)
  if folder.is_dir() and revision:
    raise ValueError(f'--revision={revision} belongs to a Hub id; {model} is a folder')
  if not folder.is_dir():
    from bart_t5x.hf import hub  # late: it need not be there for a folder

    folder = hub.download(model, revision)
  fields = read_config(folder)
  config = network.BartConfig(**fields)
  tokenizer = None if skip_tokenizer else read_tokenizer(folder, config.vocab_size)
  params = read_params(folder, config)
  with folders.new_folder(output_dir, overwrite) as work:
    checkpoints.write_params(work / 'checkpoint_0', params)
    text = gin_file(model, output_dir / 'checkpoint_0', fields)
    (work / 'config.gin').write_text(text, encoding='utf-8')
    if tokenizer is not None:
      path = work / tokenization.BYTE_LEVEL_FILE
      path.write_text(tokenizer, encoding='utf-8')
