"""Writes predictions or scores for every example of a task as JSON lines.

  python -m t5x.infer --gin_file=MODEL.gin --gin_file=t5x/configs/runs/infer.gin \\
    --gin.CHECKPOINT_PATH="'runs/mine/checkpoint_1000'" \\
    --gin.INFER_OUTPUT_DIR="'runs/predictions'" \\
    --gin.MIXTURE_OR_TASK_NAME="'my_task'" \\
    --gin.TASK_FEATURE_LENGTHS="{'inputs': 512, 'targets': 114}"

`--gin.infer.mode` is 'predict' (text), 'score' (log-likelihood of the task's targets)
or 'predict_with_aux' (text with scores). Results are written every
`--gin.infer.checkpoint_period` batches; after an interruption, the same command resumes
from there. `--gin.infer.num_shards` and `--shard_id` divide a large split among jobs.
"""

if __name__ == '__main__':
  from t5x import launch

  launch.prepare(__doc__, multiprocess=True, shard=True)

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from t5x import (
  checkpoints,
  data,
  gin_utils,
  inference,
  launch,
  models,
  multihost,
  partitioning,
  restore,
  whole_files,
)

gfile = tf.io.gfile

# (prediction or score per example, {name: auxiliary output per example})
Inferences = tuple[Sequence[Any], Mapping[str, Any]]
WriteFn = Callable[
  [str, Inferences, tf.data.Dataset, str, seqio.Vocabulary | None], None
]
MergeFn = Callable[[str, str, str, int | None], None]

MODES = ('predict', 'score', 'predict_with_aux')
# Marks complete chunks and complete results; for results, it contains the settings.
DONE_MARK = '.COMPLETED'

# Gin files name it `infer_script.create_task_from_tfexample_file`.
create_task_from_tfexample_file = data.create_task_from_tfexample_file


# ---- Writing ----


def _plain(value: Any) -> Any:
  """Converts bytes, arrays and nested dicts and lists of them to JSON types."""
  if isinstance(value, bytes):
    return value.decode('utf-8', errors='replace')
  if isinstance(value, Mapping):
    return {key: _plain(one) for key, one in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(one) for one in value]
  if isinstance(value, np.generic | np.ndarray | jax.Array):
    array = np.asarray(value)
    if array.dtype == jnp.bfloat16:
      array = array.astype(np.float32)
    return _plain(array.tolist())
  return value


def _for_each(function: Callable[[list], Any], ids: list) -> Any:
  """Applies `function` to [length] token ids, or to each row of [n, length]."""
  if ids and isinstance(ids[0], list):
    return [_for_each(function, one) for one in ids]
  return function(ids)


def write_inferences_to_file(
  path: str,
  inferences: Inferences,
  task_ds: tf.data.Dataset,
  mode: str,
  vocabulary: seqio.Vocabulary | None = None,
  json_encoder_cls: type[json.JSONEncoder] = seqio.TensorAndNumpyEncoder,
  include_all_inputs: bool = False,
  input_fields_to_include: Sequence[str] | None = None,
  output_ids: bool = False,
) -> None:
  """Writes one JSON object per example, with its inputs and the model's output.

  The keys are `inputs` and, by mode, `prediction` (and `prediction_tokens`), `score`,
  `aux`. The file appears when it is complete.

  Args:
    inferences: (outputs, aux). Outputs are [length] or [decodes, length] token ids per
      example; in mode 'score', numbers. Aux maps names to one value per example.
    task_ds: the task's examples in the same order.
    mode: 'predict', 'score' or 'predict_with_aux'.
    vocabulary: decodes token ids; required except in mode 'score'.
    include_all_inputs: write every field of the example, not only `*_pretokenized`.
    input_fields_to_include: write these fields and their `*_pretokenized` versions.
    output_ids: also write the predicted ids, without padding.

  Raises:
    ValueError: unknown mode, missing vocabulary, or both ways of choosing fields.
  """
  if mode not in MODES:
    raise ValueError(f'mode must be one of {", ".join(MODES)}. Got: {mode!r}.')
  predicts = mode != 'score'
  if predicts and vocabulary is None:
    raise ValueError(f'mode {mode!r} needs a vocabulary to decode ids.')
  if include_all_inputs and input_fields_to_include is not None:
    raise ValueError(
      'include_all_inputs and input_fields_to_include exclude each other. Got: '
      f'True, {input_fields_to_include!r}.'
    )
  outputs, aux = inferences
  suffix = '_pretokenized'
  chosen = input_fields_to_include

  def is_shown(name):
    if include_all_inputs or (chosen is not None and name in chosen):
      return True
    stem = name.removesuffix(suffix)
    return name.endswith(suffix) and (chosen is None or stem in chosen)

  def is_leaf(x):
    return isinstance(x, list | np.ndarray)

  with whole_files.whole_file(path) as file:
    for i, example in enumerate(task_ds.as_numpy_iterator()):
      row = {'inputs': _plain({k: v for k, v in example.items() if is_shown(k)})}
      output = _plain(outputs[i])
      if predicts:
        row['prediction'] = _for_each(lambda x: _plain(vocabulary.decode(x)), output)
        if output_ids:
          row['prediction_tokens'] = _for_each(
            lambda x: x[: x.index(0)] if 0 in x else x, output
          )
      else:
        row['score'] = output
      if aux or mode == 'predict_with_aux':
        row['aux'] = _plain(
          jax.tree.map(lambda leaf, i=i: leaf[i], aux, is_leaf=is_leaf)
        )
      file.write(json.dumps(row, cls=json_encoder_cls, ensure_ascii=False) + '\n')


def merge_chunks_to_file(
  output_dir: str, output_fname: str, tmp_dir: str, step: int | None
) -> None:
  """Joins the chunks `<tmp_dir>/<output_fname>-chunk00000` and so on into one file.

  Raises:
    FileNotFoundError: there is no chunk.
  """
  del step
  stem = os.path.join(tmp_dir, output_fname)
  if not gfile.exists(f'{stem}-chunk00000'):
    raise FileNotFoundError(
      f'No results in {tmp_dir}: the split is empty, or all examples were filtered out.'
    )
  path = os.path.join(output_dir, output_fname)
  with whole_files.whole_file(path, 'wb') as joined:
    number = 0
    while gfile.exists(f'{stem}-chunk{number:05}'):
      with gfile.GFile(f'{stem}-chunk{number:05}', 'rb') as file:
        shutil.copyfileobj(file, joined)
      number += 1
  logging.info('Results: %s', path)


# ---- Settings ----


def _digest(path: str) -> str:
  if not os.path.isfile(path):
    return ''
  with open(path, 'rb') as file:
    return f' (sha256 {hashlib.file_digest(file, "sha256").hexdigest()[:16]})'


def _describe_settings(cfg: data.DatasetConfig, checkpoint: str) -> dict[str, Any]:
  """Settings that identify an inference run, with digests of files they name."""
  settings = {}
  # No longer than that: gin draws rulers of this length.
  for line in gin.config_str(max_line_length=10_000).splitlines():
    name, bound, value = line.partition(' = ')
    # Devices and the output folder do not change the results.
    if bound and not name.startswith(('INFER_OUTPUT_DIR', 'partitioning.')):
      settings[name] = value + _digest(value.strip('\'"'))
  # Contains the time at which Orbax saved the checkpoint.
  saved_at = _digest(os.path.join(checkpoint, '_CHECKPOINT_METADATA'))
  return {
    **settings,
    **data.describe_source(cfg),
    'batch_size': cfg.batch_size,
    'task_feature_lengths': dict(cfg.task_feature_lengths),
    'checkpoint': checkpoint + saved_at,
  }


def _check_settings(path: str, settings: Mapping[str, Any]) -> bool:
  """Returns whether the file exists; raises if its settings differ."""
  if not gfile.exists(path):
    return False
  with gfile.GFile(path) as file:
    text = file.read()
  # Upstream T5X writes an empty file.
  earlier = json.loads(text) if text else settings
  changed = [
    f'{name} was {earlier.get(name)} and is {settings.get(name)}'
    for name in dict.fromkeys([*earlier, *settings])
    if earlier.get(name) != settings.get(name)
  ]
  if changed:
    raise ValueError(
      f'{path} belongs to results of other settings: {"; ".join(changed[:5])}. Restore '
      'the settings, change INFER_OUTPUT_DIR, or delete these results.'
    )
  return True


# ---- Inference ----


def _in_memory(examples: Sequence[Any], spec: Any) -> tf.data.Dataset:
  """Makes a dataset of examples, which may differ in shape."""
  return tf.data.Dataset.from_generator(
    lambda: iter(examples), output_signature=spec
  ).apply(tf.data.experimental.assert_cardinality(len(examples)))


def _chunks(
  pairs: tf.data.Dataset, iterator: Any, size: int
) -> Iterator[tuple[tf.data.Dataset, tf.data.Dataset]]:
  """Yields datasets of (task features, model features), the last one shorter."""
  task_spec, model_spec = pairs.element_spec
  while chunk := list(itertools.islice(iterator, size)):
    chunk = jax.tree.map(lambda tensor: tensor.numpy(), chunk)
    yield (
      _in_memory([task for task, _ in chunk], task_spec),
      _in_memory([model for _, model in chunk], model_spec),
    )


def _checkpoint(cfg: restore.RestoreCheckpointConfig) -> str:
  """Returns the path of the single checkpoint that a configuration selects."""
  if isinstance(cfg.path, str) and checkpoints.is_checkpoint(cfg.path):
    return cfg.path  # In any mode, as in T5X.
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
  summarize_config_fn: Callable[..., None] = gin_utils.summarize_gin_config,
  verify_matching_vocabs_fn: Callable[
    [data.DatasetConfig, models.BaseTransformerModel], None
  ]
  | None = data.verify_matching_vocabs,
  output_vocab_feature_name: str = 'targets',
  file_extension: str = 'jsonl',
  keep_aux_as_numpy: bool = False,
  use_orbax: bool = True,
) -> None:
  """Runs inference on every example of a task, or of each task of a mixture.

  Writes `<output_dir>/<task>-<mode>.<file_extension>-<shard>-of-<shards>`.

  Args:
    mode: 'predict', 'score' or 'predict_with_aux'.
    dataset_cfg: neither packed nor shuffled.
    restore_checkpoint_cfg: selects a single checkpoint.
    checkpoint_period: batches per chunk; a restart resumes after the last whole chunk.
    merge_chunked_results: join the chunks at the end; otherwise they stay in
      `tmp-<task>-<shard>-of-<shards>/`.
    checkpoint_ds_iter: save the dataset state with each chunk; otherwise a restart
      reads the examples up to there again. Impossible for pipelines with state outside
      TensorFlow.
    fallback_init_rng: seed of parameters that the checkpoint lacks, if
      `RestoreCheckpointConfig.fallback_to_scratch` allows that.
    output_vocab_feature_name: the feature whose vocabulary decodes predictions.
    keep_aux_as_numpy: pass auxiliary outputs to `write_fn` as lists of arrays.

  Raises:
    ValueError: an argument is invalid, the checkpoint does not exist, or the output
      folder has results of other settings.
    OSError: `output_dir` cannot be written to, or another run writes to it.
  """
  # ---- Arguments ----
  steps = {
    'predict': model.predict_batch,
    'predict_with_aux': model.predict_batch_with_aux,
    'score': model.score_batch,
  }
  if mode not in steps:
    raise ValueError(f'infer.mode must be one of {", ".join(steps)}. Got: {mode!r}.')
  if checkpoint_period < 1:
    raise ValueError(
      f'infer.checkpoint_period must be at least 1 batch. Got: {checkpoint_period}.'
    )
  if not 0 <= shard_id < num_shards:
    raise ValueError(
      f'infer.shard_id must be from 0 to num_shards - 1 = {num_shards - 1}. '
      f'Got: {shard_id}.'
    )
  if dataset_cfg.pack or dataset_cfg.shuffle:
    raise ValueError('infer needs DatasetConfig.pack = False and .shuffle = False.')
  checkpoint = _checkpoint(restore_checkpoint_cfg)
  batch_size = dataset_cfg.batch_size
  provider = data.check_dataset_config(
    dataset_cfg,
    partitioner.get_data_layout(batch_size).num_shards,
    model.FEATURE_CONVERTER_CLS,
  )
  whole_files.open_folder('output_dir', output_dir)
  if shard_id == 0:
    summarize_config_fn(model_dir=output_dir, summary_writer=None, step=0)
  if verify_matching_vocabs_fn is not None:
    verify_matching_vocabs_fn(dataset_cfg, model)

  # ---- Data ----
  converter = model.FEATURE_CONVERTER_CLS(pack=False)

  def read(task_or_mixture: data.TaskOrMixture) -> tf.data.Dataset:
    """Returns (task features, model features) of this shard's examples."""
    examples = task_or_mixture.get_dataset(
      sequence_length=dataset_cfg.task_feature_lengths,
      split=dataset_cfg.split,
      shuffle=False,
      num_epochs=1,
      shard_info=seqio.ShardInfo(index=shard_id, num_shards=num_shards),
      use_cached=dataset_cfg.use_cached,
      seed=dataset_cfg.seed,
      trim_output_features=dataset_cfg.trim_output_features,
    )
    features = converter(
      examples, task_feature_lengths=dataset_cfg.task_feature_lengths
    )
    return tf.data.Dataset.zip((examples, features)).prefetch(tf.data.AUTOTUNE)

  _, element_spec = read(provider).element_spec

  # ---- Parameters ----
  initializer = train_state_initializer_cls(
    optimizer_def=None,
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
    # Ignore the checkpoint's optimizer state.
    dataclasses.replace(restore_checkpoint_cfg, strict=False),
    checkpoint,
    None if fallback_init_rng is None else jax.random.PRNGKey(fallback_init_rng),
    use_orbax=use_orbax,
  )
  if train_state is None:
    raise ValueError(f'No checkpoint found at {checkpoint}.')

  # ---- Inference ----
  infer_fn = inference.get_infer_fn(
    infer_step=steps[mode],
    batch_size=batch_size,
    train_state_axes=initializer.train_state_axes,
    partitioner=partitioner,
    keep_aux_as_numpy=keep_aux_as_numpy,
  )
  settings = _describe_settings(dataset_cfg, checkpoint)
  settings |= {'mode': mode, 'checkpoint_period': checkpoint_period}
  settings = json.loads(json.dumps(settings))  # Comparable with those of a file.
  first = jax.process_index() == 0
  chunk_size = batch_size * checkpoint_period
  share = f'{shard_id:05}-of-{num_shards:05}'

  def infer_task(task: seqio.Task, name: str) -> None:
    mark = os.path.join(output_dir, name + DONE_MARK)
    if multihost.broadcast(_check_settings(mark, settings)):
      logging.info('%s is complete, nothing to do.', name)
      return

    # Modes share this folder; the names of all files in it start with the result's.
    tmp_dir = os.path.join(output_dir, f'tmp-{task.name}-{share}')
    stem = os.path.join(tmp_dir, name)
    begun = _check_settings(f'{stem}-settings.json', settings)
    multihost.sync(f'{name}:checked')
    if first and not begun:
      gfile.makedirs(tmp_dir)
      with whole_files.whole_file(f'{stem}-settings.json') as file:
        file.write(json.dumps(settings))
    done = 0
    while gfile.exists(f'{stem}-chunk{done:05}{DONE_MARK}'):
      done += 1
    done = multihost.broadcast_int(done)
    logging.info(
      '%s: %s.', name, f'resuming after {done} chunks' if done else 'starting'
    )

    pairs = read(task)
    saved = f'{stem}-state{done - 1:05}'
    has_state = done and gfile.exists(saved + '.index')
    skips = done and not has_state
    iterator = iter(pairs.skip(done * chunk_size) if skips else pairs)
    launch.keep_to_the_end(iterator)
    state = tf.train.Checkpoint(iterator=iterator)
    if has_state:
      state.read(saved).assert_consumed()

    vocabulary = task.output_features[output_vocab_feature_name].vocabulary

    def write(chunk, inferences, examples):
      path = f'{stem}-chunk{chunk:05}'
      write_fn(path, inferences, examples, mode, vocabulary)
      with whole_files.whole_file(path + DONE_MARK):
        pass

    with concurrent.futures.ThreadPoolExecutor(1) as writer:
      writing = None
      chunks = _chunks(pairs, iterator, chunk_size)
      for chunk, (examples, features) in enumerate(chunks, done):
        start = time.monotonic()
        rng = jax.random.fold_in(jax.random.PRNGKey(0), chunk)
        result = infer_fn(features.enumerate(), train_state, rng=rng)
        results, aux = result if isinstance(result, tuple) else (result, {})
        seconds = time.monotonic() - start
        rate = len(results) / seconds
        logging.info(
          'Chunk %d: %d examples in %.1f s (%.1f per second).',
          chunk, len(results), seconds, rate,
        )  # fmt: skip
        if first:
          if writing is not None:
            writing.result()  # Raises the writer's exception.
          if checkpoint_ds_iter:
            state.write(f'{stem}-state{chunk:05}')
          inferences = [output for _, output in results], aux
          writing = writer.submit(write, chunk, inferences, examples)
        multihost.sync(f'{name}:chunk{chunk:05}')
      if writing is not None:
        writing.result()

    if first:
      if num_shards > 1 and not gfile.exists(f'{stem}-chunk00000'):
        logging.warning('%s: this shard of the split is empty.', name)
        write(0, ([], {}), pairs.map(lambda task, _: task).take(0))
      if merge_chunked_results:
        step = int(checkpoints.get_local_data(train_state.step))
        merge_fn(output_dir, name, tmp_dir, step)
      with whole_files.whole_file(mark) as file:
        file.write(json.dumps(settings))
      if merge_chunked_results:
        for file_name in gfile.listdir(tmp_dir):
          if file_name.startswith(name + '-'):
            gfile.remove(os.path.join(tmp_dir, file_name))
        if not gfile.listdir(tmp_dir):
          gfile.rmtree(tmp_dir)
    multihost.sync(f'{name}:complete')

  for task in seqio.get_subtasks(provider):
    name = f'{task.name}-{mode}.{file_extension}-{share}'
    with whole_files.lock('output_dir', output_dir, f'.{name}.lock'):
      infer_task(task, name)
  logging.info('Done.')


if __name__ == '__main__':
  shard = launch.FLAGS.shard_id
  launch.run(infer, **({} if shard is None else {'shard_id': shard}))
