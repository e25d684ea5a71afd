"""A seqio task over files that no task knows, for inference."""

import functools
import hashlib
from collections.abc import Mapping, Sequence

import seqio
import tensorflow as tf


def create_task_from_tfexample_file(
  paths: Sequence[str],
  file_type: str,
  inputs_key: str,
  targets_key: str | None,
  features: Mapping[str, seqio.Feature],
  task_id: str | None = None,
) -> str:
  """Registers a task over files of tf.train.Example, with one split, 'infer'.

  Args:
    paths: files or patterns.
    file_type: 'tfrecord'.
    inputs_key: the feature with the input text, UTF-8.
    targets_key: the feature with the target text, to score it; None if there is none.
    features: 'inputs' and 'targets', with the vocabularies that tokenize the text.
    task_id: ends the task's name; by default a hash of paths and keys.

  Returns:
    The task's name.

  Raises:
    ValueError: no such file, another file type, or a feature is missing.
  """
  paths = [paths] if isinstance(paths, str) else list(paths)
  if not tf.io.gfile.glob(paths):
    raise ValueError(f'No file fits {", ".join(paths)}.')
  if file_type != 'tfrecord':
    raise ValueError(f"file_type must be 'tfrecord'. Got: {file_type!r}.")
  keys = {'inputs': inputs_key}
  if targets_key:
    keys['targets'] = targets_key
  missing = [name for name in keys if name not in features]
  if missing:
    raise ValueError(f'features lacks {", ".join(missing)}. Got: {sorted(features)}.')
  if task_id is None:
    identity = '\n'.join([*paths, inputs_key, targets_key or ''])
    task_id = hashlib.sha256(identity.encode()).hexdigest()[:12]
  name = f'infer_{task_id}'
  if name in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove(name)
  task = seqio.TaskRegistry.add(
    name,
    source=seqio.TFExampleDataSource(
      {'infer': paths},
      feature_description={
        key: tf.io.FixedLenFeature([], tf.string) for key in keys.values()
      },
      reader_cls=tf.data.TFRecordDataset,
    ),
    preprocessors=[
      # A task needs every output feature; without targets theirs is empty.
      functools.partial(seqio.preprocessors.rekey, key_map={'targets': None, **keys}),
      seqio.preprocessors.tokenize_and_append_eos,
    ],
    output_features=features,
  )
  return task.name
