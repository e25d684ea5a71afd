"""Predictions or scores for every example of a task, one JSON object a line.

  python -m t5x.infer --gin_file=MODEL.gin --gin_file=t5x/configs/runs/infer.gin \\
    --gin.CHECKPOINT_PATH="'runs/mine/checkpoint_1000'" \\
    --gin.INFER_OUTPUT_DIR="'runs/predictions'" \\
    --gin.MIXTURE_OR_TASK_NAME="'my_task'" \\
    --gin.TASK_FEATURE_LENGTHS="{'inputs': 512, 'targets': 114}"

`--gin.infer.mode` is 'predict' (text), 'score' (log-likelihood of the task's targets)
or 'predict_with_aux' (text with scores). Results are written every
`--gin.infer.checkpoint_period` batches; the same command, given again after an
interruption, goes on behind the last of them. A big split is shared out among jobs with
`--gin.infer.num_shards` and `--shard_id`.
"""

if __name__ == '__main__':
  from t5x import launch

  launch.prepare(__doc__, multiprocess=True, shard=True)

import dataclasses
import functools
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from t5x import (
  checkpoint_utils,
  checkpoints,
  data,
  gin_utils,
  infer_settings,
  infer_writer,
  inference,
  launch,
  models,
  multihost,
  partitioning,
  restore,
  run_setup,
  task_vocabularies,
)
from t5x.infer_writer import (
  FailFastThreadPoolExecutor,
  Inferences,
  MergeFn,
  WriteFn,
  merge_chunks_to_file,
  write_inferences_to_file,
)
from t5x.tfexample_task import create_task_from_tfexample_file

__all__ = [
  'FailFastThreadPoolExecutor', 'SummarizeConfigFn', 'create_task_from_tfexample_file',
  'infer', 'merge_chunks_to_file', 'update_measurement_series',
  'write_inferences_to_file',
]  # fmt: skip

gfile = tf.io.gfile


class SummarizeConfigFn(Protocol):
  """What writes the configuration down."""

  def __call__(self, model_dir: str, summary_writer: Any, step: int) -> None: ...


def update_measurement_series(series_name: str, step: int, value: float) -> None:
  """Called with every timing; a hook that does nothing here.

  Args:
    series_name: `inference_total_sec`, `writing_examples_per_sec` and the like.
    step: number of the chunk.
    value: seconds, or examples a second.
  """
  del series_name, step, value


def _in_order(result: Any) -> Inferences:
  """Sorts what an inference function returned by the examples' indices.

  Args:
    result: [(index, output), ...], or that and a tree of lists of auxiliary outputs,
      parallel to it.

  Returns:
    The outputs and the auxiliary outputs, both in the examples' order.
  """
  pairs, aux = result if isinstance(result, tuple) else (result, {})
  order = np.argsort([index for index, _ in pairs])

  def sort(leaf):
    return [leaf[i] for i in order]

  def is_leaf(value):
    return isinstance(value, list | np.ndarray)

  return [pairs[i][1] for i in order], jax.tree.map(sort, aux, is_leaf=is_leaf)


def _in_memory(examples: Sequence[Any], spec: Any) -> tf.data.Dataset:
  """A dataset of a list of examples, which may differ in length."""
  return tf.data.Dataset.from_generator(
    lambda: iter(examples), output_signature=spec
  ).apply(tf.data.experimental.assert_cardinality(len(examples)))


class _ExampleReader:
  """Reads a task's examples in chunks, from where an earlier run stopped."""

  def __init__(self, dataset: tf.data.Dataset, chunk_size: int):
    """Opens the dataset.

    Args:
      dataset: pairs of (task features, model features) of one example.
      chunk_size: examples in a chunk; the last may be smaller.
    """
    self._dataset = dataset
    self._chunk_size = chunk_size
    self._iterator = iter(dataset)

  def save(self, stem: str) -> None:
    """Writes the position behind the last chunk read."""
    tf.train.Checkpoint(iterator=self._iterator).write(stem)

  def go_to(self, chunk: int, stem: str | None) -> None:
    """Makes `chunk` the next to be read.

    Args:
      chunk: number of the chunk.
      stem: where the position before it was saved; None: the examples before it are
        read and dropped.
    """
    if stem is not None:
      tf.train.Checkpoint(iterator=self._iterator).read(stem).assert_consumed()
    elif chunk:
      self._iterator = iter(self._dataset.skip(chunk * self._chunk_size))

  def chunks(self) -> Iterator[tuple[tf.data.Dataset, tf.data.Dataset]]:
    """Yields (task features, model features) of the chunks that are left."""
    task_spec, model_spec = self._dataset.element_spec
    while pairs := list(itertools.islice(self._iterator, self._chunk_size)):
      pairs = jax.tree.map(lambda tensor: tensor.numpy(), pairs)
      yield (
        _in_memory([task for task, _ in pairs], task_spec),
        _in_memory([model for _, model in pairs], model_spec),
      )


@dataclasses.dataclass(frozen=True)
class _TaskInference:
  """What `infer` does with one task: everything that does not change between chunks."""

  infer_fn: Callable[..., Any]
  read: Callable[[seqio.Task], tf.data.Dataset]
  convert: Callable[[tf.data.Dataset], tf.data.Dataset]
  mode: str
  chunk_size: int
  write_fn: WriteFn
  merge_fn: MergeFn | None
  vocabulary_feature: str
  saves_position: bool
  is_share: bool
  step: int | None

  def __call__(self, task: seqio.Task, output: infer_writer.TaskOutput) -> None:
    """Infers the chunks of a task that are not there yet, and joins all of them."""
    first = jax.process_index() == 0
    done = output.is_complete()
    if multihost.broadcast(done):
      logging.info('%s is complete, nothing to do.', output.name)
      return
    if first:
      output.claim()
    multihost.sync(f'{output.name}:claimed')
    chunk = multihost.broadcast_int(output.chunks_done())
    reader = self._reader(task)
    position = None
    if self.saves_position and output.has_position(chunk - 1):
      position = output.position_path(chunk - 1)
    reader.go_to(chunk, position)
    if chunk:
      logging.info('%s goes on behind chunk %d.', output.name, chunk - 1)
    else:
      logging.info('%s: starting.', output.name)
    writer = FailFastThreadPoolExecutor(max_workers=1)
    try:
      for chunk, (examples, features) in enumerate(reader.chunks(), start=chunk):
        inferences = self._infer_chunk(chunk, features)
        if first:
          if self.saves_position:
            reader.save(output.position_path(chunk))
          writer.submit(self._write_chunk, task, output, chunk, inferences, examples)
        multihost.sync(f'{output.name}:chunk{chunk:05}')
    finally:
      writer.shutdown(wait=True)
    if first:
      if self.is_share and not output.chunks_done():
        logging.warning('%s: this share of the split has no example.', output.name)
        self._write_chunk(task, output, 0, ([], {}), self.read(task).take(0))
      output.finish(self.merge_fn, self.step)
    multihost.sync(f'{output.name}:complete')

  def _reader(self, task: seqio.Task) -> _ExampleReader:
    examples = self.read(task)
    pairs = tf.data.Dataset.zip((examples, self.convert(examples)))
    reader = _ExampleReader(pairs.prefetch(tf.data.AUTOTUNE), self.chunk_size)
    launch.keep_to_the_end(reader)
    return reader

  def _infer_chunk(self, chunk: int, features: tf.data.Dataset) -> Inferences:
    start = time.monotonic()
    rng = jax.random.fold_in(jax.random.PRNGKey(0), chunk)
    inferences = _in_order(self.infer_fn(features.enumerate(), rng=rng))
    _measure('inference', chunk, len(inferences[0]), time.monotonic() - start)
    return inferences

  def _write_chunk(self, task, output, chunk, inferences, examples) -> None:
    start = time.monotonic()
    vocabulary = task.output_features[self.vocabulary_feature].vocabulary
    path = output.chunk_path(chunk)
    self.write_fn(path, inferences, examples, self.mode, vocabulary)
    output.finish_chunk(chunk)
    _measure('writing', chunk, len(inferences[0]), time.monotonic() - start)


def _measure(what: str, chunk: int, examples: int, seconds: float) -> None:
  """Reports how long a chunk took."""
  rate = examples / max(seconds, 1e-9)
  update_measurement_series(f'{what}_total_sec', chunk, seconds)
  update_measurement_series(f'{what}_examples_per_sec', chunk, rate)
  if what == 'inference':
    logging.info(
      'Chunk %d: %d examples in %.1f s (%.1f a second).', chunk, examples, seconds, rate
    )


def _check_arguments(
  mode: str,
  dataset_cfg: data.DatasetConfig,
  period: int,
  shard_id: int,
  num_shards: int,
) -> None:
  """Stops at arguments that cannot be meant.

  Raises:
    ValueError: one of them.
  """
  if mode not in infer_writer.MODES:
    known = ', '.join(infer_writer.MODES)
    raise ValueError(f'infer.mode must be one of {known}. Got: {mode!r}.')
  if period is None or period < 1:
    raise ValueError(
      f'infer.checkpoint_period must be at least 1 batch. Got: {period!r}.'
    )
  if not 0 <= shard_id < num_shards:
    raise ValueError(
      f'infer.shard_id must be from 0 to num_shards - 1 = {num_shards - 1}. '
      f'Got: {shard_id}.'
    )
  for field in ('pack', 'shuffle'):
    if getattr(dataset_cfg, field):
      raise ValueError(
        f'infer keeps the examples apart and in order: DatasetConfig.{field} must be '
        'False. Got: True.'
      )


def _infer_step(model: models.BaseTransformerModel, mode: str) -> Callable[..., Any]:
  return {
    'predict': model.predict_batch,
    'predict_with_aux': model.predict_batch_with_aux,
    'score': model.score_batch,
  }[mode]


def _checkpoint(cfg: restore.RestoreCheckpointConfig) -> str:
  """The one checkpoint that a configuration means.

  Raises:
    ValueError: it means several, or none.
  """
  if isinstance(cfg.path, str) and checkpoint_utils.whole_checkpoint(cfg.path):
    return cfg.path  # Whatever the mode: T5X looks at the path alone.
  _, paths = restore.get_first_valid_restore_config_and_paths([cfg])
  if len(paths) != 1:
    raise ValueError(
      f'infer takes one checkpoint. Got {len(paths)}: '
      f'RestoreCheckpointConfig.path = {cfg.path!r}, mode = {cfg.mode!r}.'
    )
  return paths[0]


def infer(
  *,
  mode: str,
  model: models.BaseTransformerModel,
  dataset_cfg: data.DatasetConfig,
  restore_checkpoint_cfg: restore.RestoreCheckpointConfig,
  partitioner: partitioning.BasePartitioner,
  output_dir: str,
  checkpoint_period: int,
  shard_id: int = 0,
  num_shards: int = 1,
  merge_chunked_results: bool = True,
  write_fn: WriteFn = write_inferences_to_file,
  checkpoint_ds_iter: bool = True,
  train_state_initializer_cls: type[
    restore.TrainStateInitializer
  ] = restore.TrainStateInitializer,
  fallback_init_rng: int | None = None,
  merge_fn: MergeFn = merge_chunks_to_file,
  summarize_config_fn: SummarizeConfigFn = gin_utils.summarize_gin_config,
  verify_matching_vocabs_fn: Callable[
    [data.DatasetConfig, models.BaseTransformerModel], None
  ]
  | None = task_vocabularies.verify_matching_vocabs,
  output_vocab_feature_name: str = 'targets',
  file_extension: str = 'jsonl',
  keep_aux_as_numpy: bool = False,
  use_orbax: bool = True,
) -> None:
  """Infers every example of a task, or of each task of a mixture, and writes it.

  Args:
    mode: 'predict', 'score' or 'predict_with_aux'.
    model: the model.
    dataset_cfg: which task and split; neither packed nor shuffled.
    restore_checkpoint_cfg: which checkpoint; a single one.
    partitioner: lays parameters and data over the devices.
    output_dir: where `<task>-<mode>.<extension>-<shard>-of-<shards>` is written.
    checkpoint_period: batches in a chunk; chunks are what a restart does not repeat.
    shard_id: which share of the examples, from 0.
    num_shards: how many shares there are.
    merge_chunked_results: whether the chunks are joined at the end. They stay in
      `tmp-<task>-<shard>-of-<shards>/` if not.
    write_fn: writes a chunk.
    checkpoint_ds_iter: whether the position in the data is saved with each chunk.
      Without, a restart reads the examples again up to there. Pipelines that keep state
      outside TensorFlow cannot save it.
    train_state_initializer_cls: builds the state that is restored.
    fallback_init_rng: seed of parameters that the checkpoint lacks, where
      `RestoreCheckpointConfig.fallback_to_scratch` allows that.
    merge_fn: joins the chunks.
    summarize_config_fn: writes the configuration down.
    verify_matching_vocabs_fn: checks the task's vocabularies against the model's.
    output_vocab_feature_name: the task's feature whose vocabulary decodes predictions.
    file_extension: of the files.
    keep_aux_as_numpy: whether auxiliary outputs stay NumPy arrays for `write_fn`.
    use_orbax: see `restore.create_checkpoint_manager_and_restore`.

  Raises:
    ValueError: an argument makes no sense, the checkpoint is not there, or results of
      other settings are.
  """
  # ---- Arguments ----
  _check_arguments(mode, dataset_cfg, checkpoint_period, shard_id, num_shards)
  checkpoint = _checkpoint(restore_checkpoint_cfg)
  # Two slashes would make another name of the same folder (but gs:// is meant).
  output_dir = re.sub(r'(?<!:)/{2,}', '/', output_dir)
  provider = data.check_dataset_config(
    dataset_cfg,
    partitioner.get_data_layout(dataset_cfg.batch_size).num_shards,
    model.FEATURE_CONVERTER_CLS,
  )
  run_setup.open_folder('output_dir', output_dir)
  if shard_id == 0:
    summarize_config_fn(model_dir=output_dir, summary_writer=None, step=0)
  if verify_matching_vocabs_fn is not None:
    verify_matching_vocabs_fn(dataset_cfg, model)

  # ---- Data ----
  converter = model.FEATURE_CONVERTER_CLS(pack=False)

  def read(task_or_mixture: seqio.Task | seqio.Mixture) -> tf.data.Dataset:
    return task_or_mixture.get_dataset(
      sequence_length=dataset_cfg.task_feature_lengths,
      split=dataset_cfg.split,
      shuffle=False,
      num_epochs=1,
      shard_info=seqio.ShardInfo(index=shard_id, num_shards=num_shards),
      use_cached=dataset_cfg.use_cached,
      seed=dataset_cfg.seed,
      trim_output_features=dataset_cfg.trim_output_features,
    )

  def convert(examples: tf.data.Dataset) -> tf.data.Dataset:
    return converter(examples, task_feature_lengths=dataset_cfg.task_feature_lengths)

  element_spec = convert(read(provider)).element_spec
  batch_size = dataset_cfg.batch_size

  # ---- Parameters ----
  initializer = train_state_initializer_cls(
    optimizer_def=None,  # Its state is not needed.
    init_fn=model.get_initial_variables,
    input_shapes={
      name: (batch_size, *spec.shape) for name, spec in element_spec.items()
    },
    input_types={
      name: jnp.dtype(spec.dtype.as_numpy_dtype) for name, spec in element_spec.items()
    },
    partitioner=partitioner,
  )
  if shard_id == 0:
    restore.log_model_info(
      os.path.join(output_dir, 'model-info.txt'),
      initializer.global_train_state_shape,
      partitioner,
    )
  train_state, _ = restore.create_checkpoint_manager_and_restore(
    initializer,
    partitioner,
    # The optimizer's state in the checkpoint has no counterpart here.
    dataclasses.replace(restore_checkpoint_cfg, strict=False),
    checkpoint,
    None if fallback_init_rng is None else jax.random.PRNGKey(fallback_init_rng),
    use_orbax=use_orbax,
  )
  if train_state is None:
    raise ValueError(f'There is no checkpoint at {checkpoint}.')

  # ---- Inference ----
  infer_fn = inference.get_infer_fn(
    infer_step=_infer_step(model, mode),
    batch_size=batch_size,
    train_state_axes=initializer.train_state_axes,
    partitioner=partitioner,
    keep_aux_as_numpy=keep_aux_as_numpy,
  )
  infer_task = _TaskInference(
    infer_fn=functools.partial(infer_fn, train_state=train_state),
    read=read,
    convert=convert,
    mode=mode,
    chunk_size=batch_size * checkpoint_period,
    write_fn=write_fn,
    merge_fn=merge_fn if merge_chunked_results else None,
    vocabulary_feature=output_vocab_feature_name,
    saves_position=checkpoint_ds_iter,
    is_share=num_shards > 1,
    step=int(checkpoints.get_local_data(train_state.step)),
  )
  settings = {
    **infer_settings.describe(dataset_cfg, checkpoint),
    'mode': mode,
    'checkpoint_period': checkpoint_period,
  }
  for task in seqio.get_subtasks(provider):
    share = f'{shard_id:05}-of-{num_shards:05}'
    infer_task(
      task,
      infer_writer.TaskOutput(
        output_dir,
        os.path.join(output_dir, f'tmp-{task.name}-{share}'),
        f'{task.name}-{mode}.{file_extension}-{share}',
        settings,
      ),
    )
  logging.info('Done.')


if __name__ == '__main__':
  shard = launch.FLAGS.shard_id
  launch.run(infer, **({} if shard is None else {'shard_id': shard}))
