"""A T5X checkpoint as a folder that transformers loads."""

import dataclasses
import json
import pathlib
import re
from typing import Any

import ml_dtypes
import numpy as np

from bart_t5x import cli, tokenization
from bart_t5x.hf import (
  checkpoints,
  configs,
  folders,
  mapping,
  model_card,
  run_config,
  tokenizer_files,
  weights,
)
from bart_t5x.network import BartConfig

_DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}


def bart_config(run: run_config.RunConfig) -> BartConfig:
  """The network's configuration as a run used it.

  Raises:
    ValueError: the run was none of this project's model.
  """
  bound = run.bindings_of('BartConfig')
  if 'vocab_size' not in bound:
    raise ValueError(
      'config.gin binds no network.BartConfig.vocab_size: the run trained another '
      'model than bart_t5x.network'
    )
  unknown = bound.keys() - {field.name for field in dataclasses.fields(BartConfig)}
  if unknown:
    raise ValueError(
      f'config.gin binds {", ".join(sorted(unknown))} of BartConfig, which it does '
      'not have here: the run was made by another version of bart-t5x'
    )
  return BartConfig(**bound)


def task_corpus_dir(run: run_config.RunConfig) -> pathlib.Path:
  """The corpus folder of the task that a run trained on."""
  cli.import_tensorflow()
  import tasks  # noqa: F401  (late, as it imports TensorFlow; registers the tasks)
  from bart_t5x import vocabularies

  name = run.macro('MIXTURE_OR_TASK_NAME')
  if name is None:
    raise ValueError('config.gin has no MIXTURE_OR_TASK_NAME: give --corpus_dir')
  module = run.macro('MIXTURE_OR_TASK_MODULE')
  return pathlib.Path(vocabularies.task_vocabulary(name, module=module).path)


def _recipe(run: run_config.RunConfig) -> dict[str, Any]:
  """The settings of a run that a card tells."""
  names = (
      'MIXTURE_OR_TASK_NAME', 'TASK_FEATURE_LENGTHS', 'BATCH_SIZE', 'TRAIN_STEPS',
      'WARMUP_STEPS', 'LEARNING_RATE', 'WEIGHT_DECAY', 'DROPOUT_RATE', 'COMPUTE_DTYPE',
  )  # fmt: skip
  values = {name: run.macro(name) for name in names}
  noise = run.bindings_of('noise.Recipe')
  values |= {f'noise: {name}': value for name, value in sorted(noise.items())}
  return {name: value for name, value in values.items() if value is not None}


def _step_of(checkpoint: pathlib.Path) -> int:
  """The step in a checkpoint's name."""
  match = re.fullmatch('checkpoint_([0-9]+)', checkpoint.name)
  if not match:
    raise ValueError(
      f'--checkpoint={checkpoint} names no checkpoint: give MODEL_DIR/checkpoint_N'
    )
  return int(match[1])


def _tokenizer_file(corpus_dir: pathlib.Path, vocab_size: int) -> pathlib.Path:
  """The tokenizer that goes along, of as many ids as the model.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is another model's.
  """
  path = tokenization.find_tokenizer_file(corpus_dir)
  if path is None:
    raise FileNotFoundError(f'no tokenizer in {corpus_dir}; name it: --corpus_dir=…')
  found = tokenization.read_tokenizer(path).vocab_size
  if found != vocab_size:
    raise ValueError(
      f'the tokenizer {path} has {found} ids, the model {vocab_size}: it is not '
      'the one the model was trained with'
    )
  return pathlib.Path(path)


def _corpus_facts(corpus_dir: pathlib.Path) -> dict[str, Any]:
  """The content of corpus.json; empty for a folder that holds only a tokenizer."""
  path = corpus_dir / 'corpus.json'
  return json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}


def export(
  checkpoint: pathlib.Path,
  output_dir: pathlib.Path,
  command: str,
  config_file: pathlib.Path | None = None,
  corpus_dir: pathlib.Path | None = None,
  dtype: str = 'float32',
  overwrite: bool = False,
  model_name: str | None = None,
) -> None:
  """Writes a model folder for transformers 4 (Flax) and 5 (PyTorch).

  Args:
    checkpoint: MODEL_DIR/checkpoint_<step>.
    output_dir: the folder to make; appears whole or not at all.
    command: for the card: how this was called.
    config_file: the run's config.gin; by default the one beside the checkpoint.
    corpus_dir: with the tokenizer; by default that of the run's task.
    dtype: of the stored weights, 'float32' or 'bfloat16'.
    overwrite: replace what is in output_dir.
    model_name: for the card; by default the name of output_dir.

  Raises:
    FileNotFoundError, FileExistsError, ValueError: with what to do about it.
  """
  step = _step_of(checkpoint)
  run = run_config.read(config_file or checkpoint.parent / 'config.gin')
  config = bart_config(run)
  corpus_dir = corpus_dir or task_corpus_dir(run)
  tokenizer_file = _tokenizer_file(corpus_dir, config.vocab_size)
  with folders.new_folder(output_dir, overwrite) as folder:
    forced = _forced_bos_id(run)
    num_parameters = _write_model(folder, checkpoint, config, dtype, forced)
    tokenizer_files.write(tokenizer_file, folder, config.max_positions)
    facts = model_card.CardFacts(
      name=model_name or output_dir.absolute().name,
      config=config,
      num_parameters=num_parameters,
      step=step,
      corpus=_corpus_facts(corpus_dir),
      recipe=_recipe(run),
      training=_training(run),
      start=run.macro('INITIAL_CHECKPOINT_PATH') or None,
      metrics=model_card.run_metrics(checkpoint.parent, step),
      command=command,
    )
    (folder / 'README.md').write_text(model_card.render(facts), encoding='utf-8')


def _forced_bos_id(run: run_config.RunConfig) -> int | None:
  """The id outside with which the run's model begins every text, or None."""
  inside = run.bindings_of('BartModel').get('forced_first_id')
  return None if inside is None else int(tokenization.to_hf_ids(np.asarray(inside)))


def _training(run: run_config.RunConfig) -> str:
  """What kind of training a run was, for the card."""
  if run.bindings_of('noise.Recipe'):
    return 'pre-trained'
  return 'fine-tuned' if run.macro('MIXTURE_OR_TASK_NAME') else 'imported'


def _write_model(
  folder: pathlib.Path,
  checkpoint: pathlib.Path,
  config: BartConfig,
  dtype: str,
  forced_bos_id: int | None,
) -> int:
  """Writes weights and configurations; returns the number of parameters."""
  params = checkpoints.read_params(checkpoint)
  torch_weights = mapping.to_hf(params, config.vocab_size, 'torch')
  weights.write_safetensors(
    folder / weights.SAFETENSORS,
    {name: w.astype(_DTYPES[dtype]) for name, w in torch_weights.items()},
  )
  # Flax reads parameters as they are stored, and trains in float32.
  flax_weights = mapping.to_hf(params, config.vocab_size, 'flax')
  weights.write_msgpack(
    folder / weights.MSGPACK,
    {name: w.astype(np.float32) for name, w in flax_weights.items()},
  )
  tokenizer_files.write_json(
    folder / 'config.json', configs.to_hf(config, dtype, forced_bos_id)
  )
  tokenizer_files.write_json(
    folder / 'generation_config.json', configs.generation_to_hf(config, forced_bos_id)
  )
  # The bias on the logits is a buffer, no parameter.
  return sum(w.size for w in torch_weights.values()) - config.vocab_size
