"""Data given by hand: from examples to datasets, tasks and gin configurations.

Reached as functions of `interactive_model`.
"""

import enum
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import seqio
import tensorflow as tf

from t5x import checkpoints_utils

if TYPE_CHECKING:
  from t5x import interactive_model as interactive_model_lib

# An input alone, or a mapping with the keys `input` and `target`.
Example = str | Mapping[str, Any]
# One batch of examples, or several.
BatchesType = Sequence[Example] | Sequence[Sequence[Example]]
Preprocessors = Sequence[Callable[..., tf.data.Dataset]]

# Names of a pair of texts outside and inside of tasks.
_FEATURE_OF_KEY = {'input': 'inputs', 'target': 'targets'}


class T5XScriptType(enum.Enum):
  """The script that a gin configuration is for."""

  FINETUNING = 1
  INFERENCE = 2
  EVALUATION = 3
  PRETRAINING = 4


def _as_pair(example: Example) -> dict[str, Any]:
  """An example as features; a target that is not given is empty.

  Raises:
    ValueError: if the example has other keys.
  """
  if not isinstance(example, Mapping):
    example = {'input': example}
  if 'input' not in example or set(example) - set(_FEATURE_OF_KEY):
    raise ValueError(
      "An example is a text, or a mapping with 'input' and, if there is one,"
      f" 'target'. Got: {example!r}."
    )
  empty = '' if isinstance(example['input'], str | bytes) else []
  return {feature: example.get(key, empty) for key, feature in _FEATURE_OF_KEY.items()}


def _pairs_dataset(examples: Sequence[Example]) -> tf.data.Dataset:
  """Texts, or lists of token ids, as they are.

  Raises:
    ValueError: there are none, so that their type cannot be told.
  """
  pairs = [_as_pair(example) for example in examples]
  if not pairs:
    raise ValueError('There are no examples: give one at least.')
  columns = {}
  for feature in _FEATURE_OF_KEY.values():
    values = [pair[feature] for pair in pairs]
    if isinstance(values[0], str | bytes):
      columns[feature] = tf.constant(values, tf.string)
    else:
      columns[feature] = tf.ragged.constant(values, tf.int32, ragged_rank=1)
  return tf.data.Dataset.from_tensor_slices(columns).map(
    lambda pair: {name: tf.convert_to_tensor(x) for name, x in pair.items()}
  )


def _task_of(
  name: str,
  examples: Sequence[Example],
  preprocessors: Preprocessors,
  features: Mapping[str, seqio.Feature],
  **options,
) -> seqio.Task:
  """A task over the examples; both of its splits hold all of them."""

  def read(split, shuffle_files=False, seed=None):
    del split, shuffle_files, seed  # A handful of examples, in the order given.
    return _pairs_dataset(examples)

  return seqio.Task(
    name,
    source=seqio.FunctionDataSource(read, splits=('train', 'validation')),
    preprocessors=list(preprocessors),
    output_features=dict(features),
    **options,
  )


def get_dataset_from_natural_text_examples(
  examples: Sequence[Example],
  preprocessors: Preprocessors,
  task_feature_lengths: Mapping[str, int] | None,
  features: Mapping[str, seqio.Feature],
) -> tf.data.Dataset:
  """Preprocesses examples as a task would.

  Args:
    examples: texts, or mappings with `input` and `target`.
    preprocessors: functions from dataset to dataset; `sequence_length` and
      `output_features` are passed to those that take them.
    task_feature_lengths: longer features are cut; None cuts nothing.
    features: what must come out.

  Returns:
    A dataset of task features.

  Raises:
    ValueError: if a feature is missing or of another type or rank.
  """
  task = _task_of('natural_text_examples', examples, preprocessors, features)
  return task.get_dataset(
    sequence_length=task_feature_lengths, split='train', shuffle=False
  )


def get_equal_length_batches(
  batches: BatchesType | None, length: int
) -> list[Sequence[Example] | None]:
  """Repeats or cuts batches to a number of batches; None where there are none."""
  one_by_one = as_batches(batches) or [None]
  return list(itertools.islice(itertools.cycle(one_by_one), length))


def as_batches(batches: BatchesType | None) -> list[Sequence[Example]]:
  """A list of batches, whether one batch is given or several."""
  if not batches:
    return []
  if isinstance(batches[0], str | bytes | Mapping):
    return [batches]
  return list(batches)


def get_batches_from_seqio(
  task_or_mixture_name: str,
  split: str,
  batch_size: int,
  num_batches: int,
  get_pretokenized_examples: bool = True,
  sequence_length: Mapping[str, int] | None = None,
  **get_dataset_kwargs,
) -> Sequence[Sequence[Mapping[str, Any]]]:
  """Reads the first batches of a task, to look at them or to train on them.

  Args:
    task_or_mixture_name: what to read.
    split: which part of it.
    batch_size: examples in a batch.
    num_batches: number of batches.
    get_pretokenized_examples: whether to read texts; token ids if not.
    sequence_length: lengths to which seqio cuts features.
    **get_dataset_kwargs: more arguments for seqio's `get_dataset`.

  Returns:
    Batches of examples, each with `input` and `target`.

  Raises:
    ValueError: if there are too few examples.
  """
  wanted = batch_size * num_batches
  dataset = seqio.get_mixture_or_task(task_or_mixture_name).get_dataset(
    sequence_length=sequence_length, split=split, **get_dataset_kwargs
  )
  suffix = '_pretokenized' if get_pretokenized_examples else ''
  examples = [
    {key: _plain(example[feature + suffix]) for key, feature in _FEATURE_OF_KEY.items()}
    for example in dataset.take(wanted).as_numpy_iterator()
  ]
  if len(examples) < wanted:
    raise ValueError(
      f'{num_batches} batches of {batch_size} need {wanted} examples;'
      f' {task_or_mixture_name!r} has {len(examples)} in its split {split!r}.'
    )
  return [examples[i : i + batch_size] for i in range(0, wanted, batch_size)]


def _plain(value: Any) -> Any:
  return value.tolist() if isinstance(value, np.ndarray) else value


def get_seqio_task_from_examples(
  task_name: str,
  interactive_model: 'interactive_model_lib.InteractiveModel',
  examples: Sequence[Example],
  preprocessors: Preprocessors,
  metric_fns: Sequence[Callable[..., Any]] | None = None,
  add_to_registry: bool = True,
) -> seqio.Task:
  """Makes a task of examples, to go on with the scripts.

  Args:
    task_name: its name.
    interactive_model: the model that says what features there are.
    examples: texts, or mappings with `input` and `target`.
    preprocessors: functions from dataset to dataset.
    metric_fns: metrics of the task.
    add_to_registry: whether seqio shall know the task by its name.

  Returns:
    The task.
  """
  task = _task_of(
    task_name,
    examples,
    preprocessors,
    interactive_model.features,
    metric_fns=list(metric_fns or ()),
  )
  if add_to_registry:
    seqio.TaskRegistry.add_provider(task_name, task)
  return task


def _bindings(scope: str, values: Mapping[str, Any]) -> str:
  """Lines that bind the parameters of one configurable."""
  lines = [f'{scope}.{name} = {value!r}' for name, value in values.items()]
  return '\n'.join(lines)


def get_gin_config_from_interactive_model(
  interactive_model: 'interactive_model_lib.InteractiveModel',
  script_type: T5XScriptType,
  task_name: str,
  partitioner_config_str: str,
  model_config_str: str,
  train_steps: int = 1,
  imports_str: str = '',
) -> str:
  """Writes the gin file with which a script does what the model does here.

  Args:
    interactive_model: the model.
    script_type: which script.
    task_name: the task to run it on.
    partitioner_config_str: gin that binds the partitioner.
    model_config_str: gin that binds MODEL.
    train_steps: the step at which training ends.
    imports_str: gin imports that the two texts need.

  Returns:
    The text of the file.

  Raises:
    ValueError: if inference is asked for and there is no checkpoint.
  """
  here = interactive_model
  restore = here.restore_checkpoint_cfg
  if script_type is T5XScriptType.INFERENCE:
    if restore is None:
      raise ValueError(
        'Inference starts from a checkpoint: give InteractiveModel a checkpoint_path.'
      )
    script, own_blocks = 'infer', _inference_blocks(here, restore)
  else:
    script, own_blocks = 'pretrain', _training_blocks(here, script_type, train_steps)
  if restore is not None:
    chosen = {name: getattr(restore, name) for name in ('path', 'mode', 'dtype')}
    own_blocks.append(_bindings('utils.RestoreCheckpointConfig', chosen))
  data = {
    'MIXTURE_OR_TASK_NAME': task_name,
    'TASK_FEATURE_LENGTHS': dict(here.task_feature_lengths),
  }
  blocks = [
    'from __gin__ import dynamic_registration',
    'from t5x import utils',
    imports_str,
    f"include 't5x/configs/runs/{script}.gin'",
    _macros(data),
    *own_blocks,
    model_config_str,
    partitioner_config_str,
  ]
  return '\n\n'.join(block for block in blocks if block) + '\n'


def _macros(values: Mapping[str, Any]) -> str:
  """Lines that set macros."""
  return '\n'.join(f'{name} = {value!r}' for name, value in values.items())


def _inference_blocks(
  here: 'interactive_model_lib.InteractiveModel', restore: Any
) -> list[str]:
  """What inference needs to know."""
  dataset = {
    # The split that a task made of examples has.
    'split': 'validation',
    'batch_size': here.batch_size,
    'use_cached': False,
    'shuffle': False,
    'seed': 0,
    'pack': False,
  }
  return [
    _macros({'CHECKPOINT_PATH': restore.path, 'INFER_OUTPUT_DIR': here.output_dir}),
    _bindings('utils.DatasetConfig', dataset),
  ]


def _training_blocks(
  here: 'interactive_model_lib.InteractiveModel',
  script_type: T5XScriptType,
  train_steps: int,
) -> list[str]:
  """What training needs to know; evaluating is training for no step."""
  evaluates = script_type is T5XScriptType.EVALUATION
  # The script begins at the newest checkpoint in its folder, where there is one.
  newest = checkpoints_utils.latest_step(here.output_dir)
  first_step = here.step if newest is None else newest
  saving = ('period', 'dtype', 'keep', 'save_dataset')
  blocks = [
    _macros(
      {
        'MODEL_DIR': here.output_dir,
        'TRAIN_STEPS': first_step if evaluates else train_steps,
        'BATCH_SIZE': here.batch_size,
        'USE_CACHED_TASKS': False,
        'SHUFFLE_TRAIN_EXAMPLES': False,
        'DROPOUT_RATE': 0.0,
      }
    ),
    _bindings('train/utils.DatasetConfig', {'pack': False}),
    _bindings('train_eval/utils.DatasetConfig', {'pack': False}),
    _bindings(
      'utils.SaveCheckpointConfig',
      {name: getattr(here.save_checkpoint_cfg, name) for name in saving},
    ),
  ]
  if evaluates:
    now = {'run_eval_before_training': True, 'eval_period': 0}
    script = 'import __main__ as train_script\n'
    blocks.append(script + _bindings('train_script.train', now))
  return blocks
