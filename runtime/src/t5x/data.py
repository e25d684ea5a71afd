"""Builds batches of model features from seqio tasks and mixtures."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gin
import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from t5x import gin_utils, multihost

# Fields that configure AirIO pipelines, with the values that mean unset.
_AIRIO_FIELDS = {
  'runtime_preprocessors': (None, ()),
  'num_prefetch_threads': (None,),
  'num_workers': (None, 0),
}

TaskOrMixture = seqio.Task | seqio.Mixture
FeatureConverterClass = Callable[..., seqio.FeatureConverter]


@dataclasses.dataclass
class DatasetConfig:
  """Selects a task and how to batch it."""

  mixture_or_task_name: str | TaskOrMixture
  # In tokens; None, in evaluation only: those of the longest example.
  task_feature_lengths: Mapping[str, int] | None
  split: str  # a TFDS source also takes slices such as 'train[:1%]'
  batch_size: int  # over all hosts, in rows
  shuffle: bool
  seed: int | None  # None: random, the same on all hosts
  use_cached: bool = False
  pack: bool = False
  use_custom_packing_ops: bool = False
  module: str | None = None  # imported first; registers tasks
  use_memory_cache: bool = True  # for evaluation batches
  trim_output_features: bool = True
  runtime_preprocessors: Sequence[Any] | None = None
  num_prefetch_threads: int | None = None
  num_workers: int | None = 0

  def __post_init__(self):
    for field, unset in _AIRIO_FIELDS.items():
      if getattr(self, field) not in unset:
        raise ValueError(
          f'DatasetConfig.{field} is {getattr(self, field)!r}, but it is for AirIO '
          f'pipelines, which are not supported. Leave it at {unset[0]!r}.'
        )
    # Unset macros are None or gin.REQUIRED here; those raise elsewhere.
    size = self.batch_size
    if isinstance(size, str | float) or (isinstance(size, int) and size <= 0):
      raise ValueError(
        f'DatasetConfig.batch_size must be an integer, at least 1. Got: {size!r}.'
      )
    if isinstance(size, int) and size >= 2**31:
      raise ValueError(
        f'DatasetConfig.batch_size must be below 2**31 rows. Got: {size}.'
      )

  @property
  def task_name(self) -> str:
    """Name of the task or mixture, even if the field holds the object."""
    return str(getattr(self.mixture_or_task_name, 'name', self.mixture_or_task_name))


# `get_dataset_fn`, `train_eval_get_dataset_fn`, `inference_evaluator_cls` of `train`.
GetDatasetCallable = Callable[..., Any]
GetEvalDatasetCallable = Callable[..., Mapping[str, Any]]
EvaluatorConstructor = Callable[..., seqio.Evaluator]


# ---- Tasks ----


def import_module(module: str) -> None:
  """Imports a module for the tasks it registers.

  Raises:
    ImportError: the module is not found or fails to import.
  """
  if module not in sys.modules:
    logging.info('Importing module %s for its tasks.', module)
  try:
    # Gin is locked by now, but the module may register configurables.
    with gin.unlock_config():
      importlib.import_module(module)
  except ModuleNotFoundError as error:
    if not f'{module}.'.startswith(f'{error.name}.'):
      raise  # Missing is a module that this one imports.
    raise ModuleNotFoundError(
      f'MIXTURE_OR_TASK_MODULE names {module!r}, which Python cannot find. It must be '
      'in the working folder, on PYTHONPATH or in an installed package.',
      name=error.name,
    ) from error


def find_task(name: str | TaskOrMixture) -> TaskOrMixture:
  """Looks up a task or mixture by name; returns an object as it is.

  Raises:
    ValueError: no task or mixture has that name.
  """
  if isinstance(name, seqio.DatasetProviderBase):
    return name
  known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  if name not in known:
    raise ValueError(
      f'No task or mixture is called {name!r}.{gin_utils.nearest(str(name), known)} '
      'Correct the name, or import the module that registers it in a gin file.'
    )
  return seqio.get_mixture_or_task(name)


def find_provider(cfg: DatasetConfig) -> TaskOrMixture:
  """Imports the config's module and looks up its task or mixture."""
  if cfg.module:
    import_module(cfg.module)
  return find_task(cfg.mixture_or_task_name)


def _has_split(provider: TaskOrMixture, split: str) -> bool:
  # 'train[:5%]+test' names train and test.
  names = {part.split('[')[0].strip() for part in split.split('+')}
  return names <= set(provider.splits)


def _check_lengths(
  provider: TaskOrMixture,
  lengths: Mapping[str, int] | None,
  converter_cls: FeatureConverterClass,
) -> None:
  features = {*provider.output_features}
  needed = {*getattr(converter_cls, 'TASK_FEATURES', ())}
  if lengths is None or needed & features - set(lengths):
    raise ValueError(
      f"task_feature_lengths needs a length per feature of '{provider.name}', such as "
      f'{{{", ".join(f"{name!r}: 512" for name in sorted(features))}}}. '
      f'Got: {lengths}.'
    )
  for name, length in lengths.items():
    if name not in features | needed:
      raise ValueError(
        f"task_feature_lengths has '{name}', not a feature of '{provider.name}'."
        f'{gin_utils.nearest(name, features | needed)}'
      )
    if not isinstance(length, int | np.integer) or length <= 0:
      raise ValueError(
        f"task_feature_lengths['{name}'] must be an integer above 0. Got: {length!r}."
      )


def check_dataset_config(
  cfg: DatasetConfig, num_shards: int, feature_converter_cls: FeatureConverterClass
) -> TaskOrMixture:
  """Checks a config before anything is read; returns its task or mixture.

  Raises:
    ValueError: the task, the split or a feature does not exist, `num_shards` does not
      divide the batch size, or a task is not cached and `use_cached` is set.
  """
  provider = find_provider(cfg)
  if cfg.batch_size % num_shards:
    raise ValueError(
      f'DatasetConfig.batch_size must be a multiple of the {num_shards} data shards. '
      f'Got: {cfg.batch_size}.'
    )
  if not _has_split(provider, cfg.split):
    raise ValueError(
      f"'{provider.name}' has no split '{cfg.split}'; it has "
      f'{", ".join(sorted(provider.splits))}.'
    )
  _check_lengths(provider, cfg.task_feature_lengths, feature_converter_cls)
  for task in seqio.get_subtasks(provider) if cfg.use_cached else ():
    if not task.cache_dir:
      searched = ', '.join(map(str, seqio.utils.get_global_cache_dirs())) or 'no folder'
      raise ValueError(
        f"USE_CACHED_TASKS is True, and the task '{task.name}' is not cached "
        f'(searched: {searched}). Set USE_CACHED_TASKS = False, or cache the task with '
        'seqio_cache_tasks and name the folder with --seqio_additional_cache_dirs.'
      )
  return provider


def describe_source(cfg: DatasetConfig) -> dict[str, str]:
  """Describes the data of a config, for comparison with a saved dataset state.

  Returns:
    `task`, `split`, and `files`: a digest of the names and sizes of all files that
    seqio knows. Folders do not count: a corpus may be moved.
  """
  try:
    tasks = seqio.get_subtasks(find_provider(cfg))
  except ValueError:  # Not a task: the name belongs to a user's `get_dataset_fn`.
    tasks = []
  lines = [f'{task.name} {line}' for task in tasks for line in _names_sizes(task, cfg)]
  digest = hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16]
  return {'task': cfg.task_name, 'split': cfg.split, 'files': digest}


def _names_sizes(task: seqio.Task, cfg: DatasetConfig) -> Iterator[str]:
  def size(path: str) -> str:
    try:
      return str(tf.io.gfile.stat(path).length)
    except tf.errors.OpError:  # Not a file: a function, or a TFDS dataset.
      return ''

  if cfg.use_cached and task.cache_dir:
    # Written last; has the counts of everything cached.
    paths = [seqio.utils.get_cached_info_path(task.cache_dir, cfg.split)]
  else:
    paths = task.source.list_shards(cfg.split)
  with concurrent.futures.ThreadPoolExecutor(32) as threads:
    for path, length in zip(paths, threads.map(size, paths), strict=True):
      yield f'{os.path.basename(path)} {length}'


# ---- Datasets ----


def get_dataset(
  cfg: DatasetConfig,
  shard_id: int,
  num_shards: int,
  feature_converter_cls: FeatureConverterClass,
  num_epochs: int | None = None,
  continue_from_last_checkpoint: bool = False,
) -> tf.data.Dataset:
  """Builds this host's dataset.

  Args:
    num_epochs: None repeats the data forever.
    continue_from_last_checkpoint: for users' functions that restore their own state;
      must be False here.

  Returns:
    A dataset of dicts of [batch_size / num_shards, ...] tensors.

  Raises:
    ValueError: see `check_dataset_config`.
  """
  if continue_from_last_checkpoint:
    raise ValueError(
      'get_dataset does not support continue_from_last_checkpoint. Set '
      'CheckpointConfig.save.save_dataset = True to resume the data.'
    )
  rows = cfg.batch_size // num_shards
  return _open(cfg, shard_id, num_shards, feature_converter_cls, num_epochs, rows)


def _open(
  cfg: DatasetConfig,
  shard_id: int,
  num_shards: int,
  feature_converter_cls: FeatureConverterClass,
  num_epochs: int | None,
  rows: int,
) -> tf.data.Dataset:
  """As `get_dataset`; `rows` per batch are for the log only."""
  provider = check_dataset_config(cfg, num_shards, feature_converter_cls)
  seed = cfg.seed
  if seed is None:
    seed = multihost.broadcast_int(time.time_ns() // 1000 % (2**31 - 1))
  logging.info(
    "Reading '%s' (%s): %d %s per batch on this host, seed %d.",
    provider.name,
    cfg.split,
    rows,
    'row' if rows == 1 else 'rows',
    seed,
  )
  shard = seqio.ShardInfo(index=shard_id, num_shards=num_shards)
  return get_dataset_inner(cfg, shard, feature_converter_cls, seed, num_epochs)


def get_dataset_inner(
  cfg: DatasetConfig,
  shard_info: seqio.ShardInfo,
  feature_converter_cls: FeatureConverterClass,
  seed: int | None = None,
  num_epochs: int | None = None,
) -> tf.data.Dataset:
  """Builds the dataset of a shard with `seed`, not `cfg.seed`; see `get_dataset`.

  Raises:
    ValueError: the seed is not the same on all hosts.
  """
  if seed is not None:
    multihost.assert_same(np.asarray(seed), 'The data seed (DatasetConfig.seed)')
  return seqio.get_dataset(
    mixture_or_task_name=find_provider(cfg),
    task_feature_lengths=cfg.task_feature_lengths,
    dataset_split=cfg.split,
    shuffle=cfg.shuffle,
    num_epochs=num_epochs,
    feature_converter=feature_converter_cls(
      pack=cfg.pack, use_custom_packing_ops=cfg.use_custom_packing_ops
    ),
    shard_info=shard_info,
    verbose=False,
    use_cached=cfg.use_cached,
    seed=seed,
    trim_output_features=cfg.trim_output_features,
    batch_size=cfg.batch_size // shard_info.num_shards,
  )


def get_training_eval_datasets(
  cfg: DatasetConfig,
  shard_id: int,
  num_shards: int,
  eval_steps: int,
  feature_converter_cls: FeatureConverterClass,
  deterministic: bool = False,
  model_dir: str | None = None,
  start_step: int = 0,
) -> Mapping[str, tf.data.Dataset]:
  """Builds the datasets for evaluation with teacher forcing.

  A mixture has a dataset for each task with the split and one for itself. Every host
  reads all data and takes each `num_shards`-th row, so that no host runs short.

  Args:
    eval_steps: batches in each dataset; short data is repeated.
    deterministic, model_dir, start_step: T5X's parameters; not supported here.

  Returns:
    {task or mixture name: dataset of dicts of [batch_size / num_shards, ...] tensors}.

  Raises:
    ValueError: see `check_dataset_config`; or `deterministic` is set.
  """
  del model_dir, start_step
  if deterministic:
    raise ValueError('deterministic=True is not supported; leave it False.')
  provider = find_provider(cfg)
  if cfg.batch_size % num_shards:
    raise ValueError(
      f'The evaluation batch size must be a multiple of the {num_shards} data shards. '
      f'Got: {cfg.batch_size}.'
    )
  sources = list(seqio.get_subtasks(provider))
  if isinstance(provider, seqio.Mixture):
    sources.append(provider)

  size = cfg.batch_size // num_shards
  datasets = {}
  for source in sources:
    if not _has_split(source, cfg.split):
      logging.info("'%s' has no split '%s': not evaluated.", source.name, cfg.split)
      continue
    rows = _open(
      # Single rows, which are distributed over the hosts below.
      dataclasses.replace(cfg, mixture_or_task_name=source, module=None, batch_size=1),
      shard_id=0,
      num_shards=1,
      feature_converter_cls=feature_converter_cls,
      # Finite: a task whose examples are all filtered out would loop forever.
      num_epochs=eval_steps * cfg.batch_size,
      rows=size,
    )
    rows = rows.unbatch().repeat().shard(num_shards, shard_id)
    batches = rows.batch(size, drop_remainder=True).take(eval_steps)
    datasets[source.name] = batches.cache() if cfg.use_memory_cache else batches
  return datasets


# ---- Vocabularies ----


def get_vocabulary(
  cfg: DatasetConfig,
) -> tuple[seqio.Vocabulary, seqio.Vocabulary]:
  """Returns the vocabularies of a task's inputs and targets.

  If the task lacks one of these, all of its features must share a vocabulary;
  pass-through vocabularies count only if there is no other.

  Raises:
    ValueError: they do not share one.
  """
  provider = find_provider(cfg)
  features = provider.output_features
  if 'inputs' in features and 'targets' in features:
    return features['inputs'].vocabulary, features['targets'].vocabulary
  found = [feature.vocabulary for feature in features.values()]
  real = [v for v in found if not isinstance(v, seqio.PassThroughVocabulary)]
  found = real or found
  if not found or any(other != found[0] for other in found[1:]):
    raise ValueError(
      f"'{provider.name}' needs the features 'inputs' and 'targets', or features that "
      f'share a vocabulary. Got: {sorted(features)}.'
    )
  return found[0], found[0]


def verify_matching_vocabs(cfg: DatasetConfig, model: Any) -> None:
  """Raises ValueError if the model's vocabularies are not the task's."""
  task_side = get_vocabulary(cfg)
  model_side = (model.input_vocabulary, model.output_vocabulary)
  for role, in_task, in_model in zip(('input', 'output'), task_side, model_side):
    if in_task != in_model:
      raise ValueError(
        f"The {role} vocabulary of task '{cfg.task_name}' is {in_task}, that of the "
        f"model is {in_model}. Set the model's to the task's."
      )


def round_vocab_size_to_multiple(
  vocabulary: seqio.Vocabulary, divisor: int = 128
) -> int:
  """Returns the vocabulary's size, rounded up to a multiple of `divisor`."""
  return -(-vocabulary.vocab_size // divisor) * divisor


# ---- Files without a task ----


def create_task_from_tfexample_file(
  paths: Sequence[str],
  file_type: str,
  inputs_key: str,
  targets_key: str | None,
  features: Mapping[str, seqio.Feature],
  task_id: str | None = None,
) -> str:
  """Registers a task that reads files of tf.train.Example; its split is 'infer'.

  Args:
    paths: files or patterns.
    file_type: 'tfrecord'.
    inputs_key: the feature with the input text, UTF-8.
    targets_key: the feature with the target text, for scoring, or None.
    features: 'inputs' and 'targets'; their vocabularies tokenize the text.
    task_id: suffix of the task's name; by default a hash of paths and keys.

  Returns:
    The task's name.

  Raises:
    ValueError: no file matches, or the file type is not supported.
  """
  paths = [paths] if isinstance(paths, str) else list(paths)
  if not tf.io.gfile.glob(paths):
    raise ValueError(f'No file matches {", ".join(paths)}.')
  if file_type != 'tfrecord':
    raise ValueError(f"file_type must be 'tfrecord'. Got: {file_type!r}.")
  keys = {'inputs': inputs_key}
  if targets_key:
    keys['targets'] = targets_key
  if task_id is None:
    identity = '\n'.join([*paths, inputs_key, targets_key or ''])
    task_id = hashlib.sha256(identity.encode()).hexdigest()[:12]
  name = f'infer_{task_id}'
  if name in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove(name)
  text = tf.io.FixedLenFeature([], tf.string)
  seqio.TaskRegistry.add(
    name,
    source=seqio.TFExampleDataSource(
      {'infer': paths},
      feature_description=dict.fromkeys(keys.values(), text),
      reader_cls=tf.data.TFRecordDataset,
    ),
    preprocessors=[
      # A task needs every output feature; missing targets become empty.
      functools.partial(seqio.preprocessors.rekey, key_map={'targets': None, **keys}),
      seqio.preprocessors.tokenize_and_append_eos,
    ],
    output_features=features,
  )
  return name
