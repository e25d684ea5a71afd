"""Imports a BART of Hugging Face or fairseq as a T5X checkpoint with its gin file."""

import pathlib
import re
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from bart_t5x import checkpoints, files, network, tokenization
from bart_t5x.hf import configs, export, fairseq, mapping, tokenizers, weights

# Entries of old PyTorch files that are not parameters.
_VERSIONS = re.compile(r'(model\.)?(encoder|decoder)\.version')
# Name prefixes of a model saved without its head.
_HEADLESS = re.compile(r'(shared|encoder|decoder)\.')
# Name prefixes of other heads.
_HEADS = re.compile(r'(classification_heads?|qa_outputs)\.')

_GIN = """\
# {model}, imported from {origin}.
#
# Pass this file after that of a run, instead of one of gin/models. The checkpoint is
#   {checkpoint}
# Bind it to CHECKPOINT_PATH (gin/eval.gin, gin/infer.gin) or INITIAL_CHECKPOINT_PATH
# (gin/finetune.gin; to continue pre-training, with gin/from_checkpoint.gin). The task
# must use the tokenizer in this folder: bind the folder as the corpus folder.
include 'gin/models/bart.gin'

DROPOUT_RATE = {dropout_rate}
network.BartConfig:
{bindings}
"""
_GIN_FORCED = """
# Generation forces this first token.
model.BartModel.forced_first_id = {forced_first_id}
"""


class Source(NamedTuple):
  """A model as published."""

  origin: str  # 'Hugging Face' or 'fairseq'
  folder: pathlib.Path  # with the tokenizer
  fields: dict[str, Any]  # of BartConfig
  tensors: weights.Weights  # by Hugging Face's names
  framework: mapping.Framework
  forced_first_id: int | None  # in this project's ids


def read_source(path: pathlib.Path) -> Source:
  """Reads a model folder of Hugging Face or fairseq, or a fairseq `.pt` file.

  Raises:
    FileNotFoundError, ValueError: it is missing, damaged, or not a BART.
  """
  if checkpoint := fairseq.find(path):
    fields, tensors = fairseq.read(checkpoint)
    tensors = _normalized(tensors, 'torch')
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
  """Renames tensors to those of BartForConditionalGeneration.

  A model saved without its head lacks the prefix `model.` and the logits bias. Other
  heads are dropped. The token table may be saved under any of its tied names.
  """
  if heads := [name for name in tensors if _HEADS.match(name)]:
    logging.warning('Dropped a head that this network lacks: %s', ', '.join(heads))
  tensors = {
    f'model.{name}' if _HEADLESS.match(name) else name: tensor
    for name, tensor in tensors.items()
    if not _VERSIONS.fullmatch(name) and name not in heads
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


def _fit_tokenizer(source: Source, vocab_size: int, mask_id: int) -> Source:
  """Adds a missing row for the mask, or drops rows beyond the tokenizer's ids.

  Models fine-tuned by fairseq have no row for `<mask>`.

  Raises:
    ValueError: model and tokenizer differ in more than the mask or padding.
  """
  rows = source.fields['vocab_size']
  table = mapping.hf_name('token_embedder/embedding', source.framework)
  tensors = {
    name: tensor.reshape(-1) if name == 'final_logits_bias' else tensor
    for name, tensor in source.tensors.items()
    if name in (table, 'final_logits_bias')
  }
  if rows == mask_id == vocab_size - 1:
    logging.warning('The model has no row for <mask>: it gets the mean of all rows.')
    for name, tensor in tensors.items():
      mean = tensor.astype(np.float32).mean(axis=0, keepdims=True)
      tensors[name] = np.concatenate([tensor, mean])
  elif rows == vocab_size or (rows % 8 == 0 and vocab_size < rows < vocab_size + 128):
    if rows > vocab_size:  # padded to a multiple of up to 128
      logging.warning('Rows beyond the tokenizer are dropped: %d.', rows - vocab_size)
    tensors = {name: tensor[:vocab_size] for name, tensor in tensors.items()}
  else:
    raise ValueError(
      f'the tokenizer in {source.folder} has {vocab_size} ids, the model {rows}. Use '
      f"the model's own tokenizer, {tokenizers.SKIP}"
    )
  return source._replace(
    fields=source.fields | {'vocab_size': vocab_size}, tensors=source.tensors | tensors
  )


def gin_file(model: str, checkpoint: pathlib.Path, source: Source) -> str:
  """Returns the gin file of an imported model; `model` is its folder or Hub id."""
  rate = source.fields['dropout_rate']
  bindings = [
    # Dropout rates that are equal share one macro.
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
    model: a folder of Hugging Face or fairseq, a fairseq `.pt` file, or a Hub id.
    output_dir: the folder to make; it appears whole or not at all.
    revision: branch, tag or commit on the Hub; by default main.
    skip_tokenizer: import the weights alone.
    overwrite: replace an earlier model in output_dir.

  Raises:
    OSError, ValueError: the model cannot be read, or output_dir may not be replaced.
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
  tokenizer = None if skip_tokenizer else tokenizers.read(source.folder)
  if tokenizer:
    source = _fit_tokenizer(source, tokenizer.vocab_size, tokenizer.mask_id)
  config = network.BartConfig(**source.fields)
  params = mapping.from_hf(source.tensors, config, source.framework)
  with files.whole_folder(output_dir, overwrite, export.is_model_folder) as folder:
    checkpoints.write_params(folder / 'checkpoint_0', params)
    text = gin_file(model, output_dir / 'checkpoint_0', source)
    (folder / 'config.gin').write_text(text, encoding='utf-8')
    if tokenizer:
      (folder / tokenizer.file_name).write_bytes(tokenizer.content)
