"""Imports a BART of Hugging Face or fairseq as a T5X checkpoint with its gin file."""

import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from bart_t5x import checkpoints, files, network, tokenization
from bart_t5x.hf import configs, export, fairseq, mapping, tokenizers, weights

# Entries of old PyTorch files that are not parameters.
_VERSIONS = re.compile(r'(model\.)?(encoder|decoder)\.version')
# How names begin in a model that was saved without its head.
_HEADLESS = re.compile(r'(shared|encoder|decoder)\.')

_GIN = """\
# {model}, imported from {origin}.
#
# Give this file after that of a run, instead of one of gin/models, and as the
# checkpoint
#   {checkpoint}
# It is CHECKPOINT_PATH to gin/eval.gin and gin/infer.gin, INITIAL_CHECKPOINT_PATH to
# gin/finetune.gin, and with gin/from_checkpoint.gin to the files that pre-train. The
# task must use the tokenizer in this folder: name the folder where a corpus folder is
# asked for.
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
  """A model as its makers saved it.

  Attributes:
    origin: whose it is, 'Hugging Face' or 'fairseq'.
    folder: where its tokenizer is.
    fields: of BartConfig, those that the model determines.
    tensors: weights under Hugging Face's names.
    framework: whose names and layout they have.
    forced_first_id: this project's id that its texts begin with, or None.
  """

  origin: str
  folder: pathlib.Path
  fields: dict[str, Any]
  tensors: weights.Weights
  framework: mapping.Framework
  forced_first_id: int | None


def read_source(path: pathlib.Path) -> Source:
  """Reads a model.

  Args:
    path: a folder of Hugging Face's or fairseq's, or fairseq's `.pt` file.

  Raises:
    FileNotFoundError, ValueError: it is missing, damaged, or not a BART.
  """
  if checkpoint := fairseq.find(path):
    fields, tensors = fairseq.read(checkpoint)
    return Source('fairseq', checkpoint.parent, fields, tensors, 'torch', None)
  config_file, generation_file = path / 'config.json', path / 'generation_config.json'
  if not config_file.exists():
    raise FileNotFoundError(
      f'{path} is not a model folder: it has neither config.json (Hugging Face) nor '
      f'{fairseq.MODEL} (fairseq)'
    )
  hf = configs.read_json(config_file)
  fields = configs.from_hf(hf)
  forced = configs.forced_bos(
    hf, configs.read_json(generation_file) if generation_file.exists() else None
  )
  if forced is not None:
    forced = int(tokenization.from_hf_ids(np.asarray(forced)))
  tensors, kind = weights.read_weights(path)
  framework = 'flax' if kind == weights.MSGPACK else 'torch'
  tensors = _normalized(tensors, framework)
  return Source('Hugging Face', path, fields, tensors, framework, forced)


def _normalized(
  tensors: weights.Weights, framework: mapping.Framework
) -> weights.Weights:
  """Gives tensors the names of BartForConditionalGeneration, however they were saved.

  Without its head, a model lacks the prefix `model.` and the bias on the logits. If
  several names share the token table, a file may keep it under any of them.
  """
  tensors = {
    f'model.{name}' if _HEADLESS.match(name) else name: tensor
    for name, tensor in tensors.items()
    if not _VERSIONS.fullmatch(name)
  }
  table = mapping.hf_name('token_embedder/embedding', framework)
  aliases = [name for name in mapping.TORCH_ALIASES if name in tensors]
  if table not in tensors and aliases:
    tensors[table] = tensors[aliases[0]]
  for alias in aliases:
    if not np.array_equal(tensors[alias], tensors[table]):
      raise ValueError(
        f'{alias} differs from {table}, but this network has one token table'
      )
  if table in tensors:
    zeros = np.zeros((1, len(tensors[table])), np.float32)
    tensors.setdefault('final_logits_bias', zeros)
  return tensors


def gin_file(model: str, checkpoint: pathlib.Path, source: Source) -> str:
  """Returns the gin file that describes an imported model.

  Args:
    model: folder or Hub id, for its first line.
    checkpoint: where the checkpoint will be.
    source: the model.
  """
  rate = source.fields['dropout_rate']
  bindings = [
    # One macro changes all rates that agree.
    f'  {name} = {"%DROPOUT_RATE" if "dropout" in name and value == rate else value}'
    for name, value in source.fields.items()
  ]
  text = _GIN.format(
    model=model,
    origin=source.origin,
    checkpoint=checkpoint,
    dropout_rate=rate,
    bindings='\n'.join(bindings),
  )
  if source.forced_first_id is not None:
    text += _GIN_FORCED.format(forced_first_id=source.forced_first_id)
  return text


def import_model(
  model: str,
  output_dir: pathlib.Path,
  revision: str | None = None,
  skip_tokenizer: bool = False,
  overwrite: bool = False,
) -> None:
  """Writes `checkpoint_0`, `config.gin` and the tokenizer of a model.

  Args:
    model: a folder of Hugging Face's or fairseq's, fairseq's `.pt` file, or a Hub id.
    output_dir: the folder to make; it appears whole or not at all.
    revision: branch, tag or commit on the Hub; by default its main branch.
    skip_tokenizer: import the weights alone.
    overwrite: replace an earlier model in output_dir.

  Raises:
    OSError, ValueError: the model cannot be read, or output_dir not be replaced.
  """
  path = pathlib.Path(model)
  downloaded = not path.exists()
  if downloaded:
    from bart_t5x.hf import hub  # Late: folders need no Hub client.

    path = hub.download(model, revision)
  elif revision:
    raise ValueError(f'--revision={revision} is for Hub ids; {model} is a local path')
  source = read_source(path)
  if downloaded:
    source = source._replace(origin=export.HUB_ORIGIN)
  config = network.BartConfig(**source.fields)
  tokenizer = None
  if not skip_tokenizer:
    tokenizer = tokenizers.read(source.folder, config.vocab_size)
  params = mapping.from_hf(source.tensors, config, source.framework)
  with files.whole_folder(output_dir, overwrite, export.is_model_folder) as folder:
    checkpoints.write_params(folder / 'checkpoint_0', params)
    text = gin_file(model, output_dir / 'checkpoint_0', source)
    (folder / 'config.gin').write_text(text, encoding='utf-8')
    if tokenizer is not None:
      (folder / tokenizer.name).write_bytes(tokenizer.content)
