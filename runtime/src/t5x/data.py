"""From a seqio task or mixture to batches of model features.

What a `DatasetConfig` names is looked up, checked against the task, and turned
into a `tf.data.Dataset` of this host's share of every batch. Iterating over it
is the subject of `data_iterators`.

TensorFlow and seqio take seconds to import, so the functions that need them
import them; reading a configuration does not.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from absl import logging

from t5x import multihost, task_lookup

if TYPE_CHECKING:
  import seqio
  import tensorflow as tf

# Fields that configure AirIO pipelines, with the values that ask for nothing.
_AIRIO_FIELDS = {
  'runtime_preprocessors': (None, ()),
  'num_prefetch_threads': (None,),
  'num_workers': (None, 0),
}


@dataclasses.dataclass
class DatasetConfig:
  """Which task to read, and how to batch it.

  The fields bear T5X's names, because gin files bind them.

  Attributes:
    mixture_or_task_name: name in seqio's registries, or the Task or Mixture.
    task_feature_lengths: maximal length of each task feature, in tokens.
    split: split name; a TFDS source also takes slices such as 'train[:1%]'.
    batch_size: examples (rows, if packed) in a batch over all hosts.
    shuffle: whether to shuffle files and examples.
    seed: seed of shuffling and of random preprocessors. None draws one, the
      same for all hosts.
    use_cached: whether to read what `seqio_cache_tasks` wrote.
    pack: whether to pack several examples into a row.
    use_custom_packing_ops: handed to the feature converter.
    module: module to import first, for its tasks. Deprecated.
    use_memory_cache: whether evaluation batches are kept in memory.
    trim_output_features: whether features are cut to `task_feature_lengths`.
    runtime_preprocessors: AirIO only; refused if set.
    num_prefetch_threads: AirIO only; refused if set.
    num_workers: AirIO only; refused if set.
  """

  mixture_or_task_name: str | seqio.Task | seqio.Mixture
  task_feature_lengths: Mapping[str, int]
  split: str
  batch_size: int
  shuffle: bool
  seed: int | None
  use_cached: bool = False
  pack: bool = False
  use_custom_packing_ops: bool = False
  module: str | None = None
  use_memory_cache: bool = True
  trim_output_features: bool = True
  runtime_preprocessors: Sequence[Any] | None = None
  num_prefetch_threads: int | None = None
  num_workers: int | None = 0

  def __post_init__(self):
    for field, unset in _AIRIO_FIELDS.items():
      if getattr(self, field) not in unset:
        raise ValueError(
          f'DatasetConfig.{field} is {getattr(self, field)!r}, but it steers AirIO '
          f'pipelines only and this runtime reads seqio. Leave it at {unset[0]!r}.'
        )
    # Unset macros arrive here as None or as gin.REQUIRED; those raise elsewhere.
    size = self.batch_size
    if isinstance(size, str | float) or (isinstance(size, int) and size <= 0):
      raise ValueError(
        f'DatasetConfig.batch_size is {size!r}; it must be a whole number, at least 1.'
      )

  @property
  def task_name(self) -> str:
    """Name of the task or mixture, also where the field holds the object."""
    return str(getattr(self.mixture_or_task_name, 'name', self.mixture_or_task_name))


class GetDatasetCallable(Protocol):
  """What `train` takes as `get_dataset_fn`."""

  def __call__(
    self,
    cfg: DatasetConfig,
    shard_id: int,
    num_shards: int,
    feature_converter_cls: Callable[..., seqio.FeatureConverter],
    num_epochs: int | None = None,
    continue_from_last_checkpoint: bool = True,
  ) -> Any: ...


class GetEvalDatasetCallable(Protocol):
  """What `train` takes as `train_eval_get_dataset_fn`."""

  def __call__(
    self,
    cfg: DatasetConfig,
    shard_id: int,
    num_shards: int,
    eval_steps: int,
    feature_converter_cls: Callable[..., seqio.FeatureConverter],
  ) -> Mapping[str, Any]: ...


class EvaluatorConstructor(Protocol):
  """What builds a `seqio.Evaluator` from the runtime's call."""

  def __call__(
    self,
    mixture_or_task_name: str,
    feature_converter: seqio.FeatureConverter,
    eval_split: str,
    use_cached: bool,
    seed: int | None,
    sequence_length: Mapping[str, int] | None,
    log_dir: str | None,
    use_memory_cache: bool,
  ) -> seqio.Evaluator: ...


def find_provider(cfg: DatasetConfig) -> seqio.Task | seqio.Mixture:
  """Looks the config's task or mixture up.

  Args:
    cfg: its `module` is imported first, if set.

  Returns:
    The registered task or mixture, or the object that the config holds.

  Raises:
    ImportError: there is no such module.
    ValueError: nothing of that name is registered.
  """
  if cfg.module:
    task_lookup.import_module(cfg.module)
  return task_lookup.find(cfg.mixture_or_task_name)


def _split_names(split: str) -> list[str]:
  """Names inside a split expression: 'train[:5%]+test' gives train, test."""
  return [part.split('[')[0].strip() for part in split.split('+')]


def _has_split(provider: seqio.Task | seqio.Mixture, split: str) -> bool:
  return set(_split_names(split)) <= set(provider.splits)


def check_dataset_config(
  cfg: DatasetConfig,
  num_shards: int,
  feature_converter_cls: Callable[..., seqio.FeatureConverter],
) -> seqio.Task | seqio.Mixture:
  """Checks a config before anything is read.

  Args:
    cfg: the config.
    num_shards: into how many shares each batch is cut.
    feature_converter_cls: converter whose task features are known names too.

  Returns:
    The task or mixture it names.

  Raises:
    ValueError: the task, the split or a feature does not exist, the batch cannot be
      cut evenly, or a task is to be cached and is not.
  """
  provider = find_provider(cfg)
  if cfg.batch_size % num_shards:
    raise ValueError(
      f'Batch size {cfg.batch_size} cannot be cut into {num_shards} equal shards of '
      f'data; take a multiple of {num_shards}.'
    )
  if not _has_split(provider, cfg.split):
    raise ValueError(
      f"'{provider.name}' has no split '{cfg.split}'; it has "
      f'{", ".join(sorted(provider.splits))}.'
    )
  task_lookup.check_lengths(provider, cfg.task_feature_lengths, feature_converter_cls)
  if cfg.use_cached:
    task_lookup.check_cached(provider)
  return provider


def _shared_random_seed() -> int:
  """A seed from the clock that all hosts agree on."""
  return multihost.broadcast_int(time.time_ns() // 1000 % (2**31 - 1))


def get_dataset(
  cfg: DatasetConfig,
  shard_id: int,
  num_shards: int,
  feature_converter_cls: Callable[..., seqio.FeatureConverter],
  num_epochs: int | None = None,
  continue_from_last_checkpoint: bool = False,
) -> tf.data.Dataset:
  """Builds this host's dataset.

  Args:
    cfg: what to read.
    shard_id: which share of the data this host reads.
    num_shards: number of shares.
    feature_converter_cls: makes model features of task features.
    num_epochs: how often to go through the data; None never stops.
    continue_from_last_checkpoint: for dataset functions that find their own
      position; this one cannot.

  Returns:
    A dataset of dicts of [batch_size / num_shards, ...] tensors.

  Raises:
    ValueError: see `check_dataset_config`; or
      `continue_from_last_checkpoint` is set.
  """
  if continue_from_last_checkpoint:
    raise ValueError(
      'continue_from_last_checkpoint=True: get_dataset builds a pipeline from its '
      'start. Set CheckpointConfig.save.save_dataset = True to go on where the '
      'checkpoint stopped.'
    )
  rows = cfg.batch_size // num_shards
  return _opened(cfg, shard_id, num_shards, feature_converter_cls, num_epochs, rows)


def _opened(
  cfg: DatasetConfig,
  shard_id: int,
  num_shards: int,
  feature_converter_cls: Callable[..., seqio.FeatureConverter],
  num_epochs: int | None,
  rows: int,
) -> tf.data.Dataset:
  """As `get_dataset`; tells of `rows` a batch, of which the caller may make batches."""
  import seqio

  provider = check_dataset_config(cfg, num_shards, feature_converter_cls)
  seed = _shared_random_seed() if cfg.seed is None else cfg.seed
  logging.info(
    "Reading '%s' (%s): %d %s a batch on this host, seed %d.",
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
  feature_converter_cls: Callable[..., seqio.FeatureConverter],
  seed: int | None = None,
  num_epochs: int | None = None,
) -> tf.data.Dataset:
  """Builds a dataset for one shard from a seed; see `get_dataset`.

  Args:
    cfg: what to read; its own `seed` is not looked at.
    shard_info: which share of the data to read.
    feature_converter_cls: makes model features of task features.
    seed: must be the same on all hosts.
    num_epochs: how often to go through the data; None never stops.

  Returns:
    A dataset of dicts of [batch_size / num_shards, ...] tensors.

  Raises:
    ValueError: a length is missing.
  """
  import seqio

  provider = find_provider(cfg)
  if seed is not None:
    multihost.assert_same(np.asarray(seed), 'The data seed (DatasetConfig.seed)')
  try:
    return seqio.get_dataset(
      mixture_or_task_name=provider,
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
  except KeyError as error:
    message = _missing_length(error, cfg, provider)
    if message is None:
      raise
    raise ValueError(message) from error


def _missing_length(
  error: KeyError, cfg: DatasetConfig, provider: seqio.Task | seqio.Mixture
) -> str | None:
  """What to tell of a KeyError from seqio; None if it is about something else."""
  missing = error.args[0] if error.args else None
  if missing not in provider.output_features:
    return None
  return (
    f"task_feature_lengths lacks '{missing}', a feature of '{provider.name}'. Got "
    f'lengths for {sorted(cfg.task_feature_lengths)}.'
  )


def get_training_eval_datasets(
  cfg: DatasetConfig,
  shard_id: int,
  num_shards: int,
  eval_steps: int,
  feature_converter_cls: Callable[..., seqio.FeatureConverter],
  deterministic: bool = False,
  model_dir: str | None = None,
  start_step: int = 0,
) -> Mapping[str, tf.data.Dataset]:
  """Builds the datasets that are evaluated with teacher forcing.

  A mixture gives a dataset for each task with the split and one for itself. Every
  host reads all and takes each `num_shards`-th example: no host runs short.

  Args:
    cfg: what to read.
    shard_id: this host's share.
    num_shards: number of shares.
    eval_steps: batches in each dataset; short data is repeated.
    feature_converter_cls: makes model features of task features.
    deterministic: refused, as upstream's code for it was never published.
    model_dir, start_step: only for `deterministic`.

  Returns:
    Name of the task or mixture -> dataset of `eval_steps` batches, dicts of
    [batch_size / num_shards, ...] tensors.

  Raises:
    ValueError: see `check_dataset_config`; or `deterministic` is set.
  """
  if deterministic:
    raise ValueError(
      'deterministic=True needs a reader that was never published; leave it False.'
    )
  del model_dir, start_step
  import seqio

  provider = find_provider(cfg)
  if cfg.batch_size % num_shards:
    raise ValueError(
      f'Evaluation batch size {cfg.batch_size} cannot be cut into {num_shards} equal '
      f'shards of data; take a multiple of {num_shards}.'
    )
  sources = list(seqio.get_subtasks(provider))
  if isinstance(provider, seqio.Mixture):
    sources.append(provider)

  datasets = {}
  for source in sources:
    if not _has_split(source, cfg.split):
      logging.info("'%s' has no split '%s': not evaluated.", source.name, cfg.split)
      continue
    datasets[source.name] = _eval_batches(
      dataclasses.replace(cfg, mixture_or_task_name=source, module=None),
      seqio.ShardInfo(shard_id, num_shards),
      eval_steps,
      feature_converter_cls,
    )
  return datasets


def _eval_batches(
  cfg: DatasetConfig,
  shard_info: seqio.ShardInfo,
  eval_steps: int,
  feature_converter_cls: Callable[..., seqio.FeatureConverter],
) -> tf.data.Dataset:
  """This host's share of `eval_steps` batches of one task or mixture."""
  size = cfg.batch_size // shard_info.num_shards
  rows = _opened(
    # One row at a time: rows are dealt to the hosts below.
    dataclasses.replace(cfg, batch_size=1),
    shard_id=0,
    num_shards=1,
    feature_converter_cls=feature_converter_cls,
    # Finite, or a task whose examples are all filtered out would spin forever.
    num_epochs=eval_steps * cfg.batch_size,
    rows=size,
  )
  rows = rows.unbatch().repeat().shard(shard_info.num_shards, shard_info.index)
  batches = rows.batch(size, drop_remainder=True)
  batches = batches.take(eval_steps)
  return batches.cache() if cfg.use_memory_cache else batches
