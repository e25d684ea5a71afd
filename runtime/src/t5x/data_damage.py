"""Which file of a dataset is damaged: TensorFlow's error does not name it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from absl import logging

if TYPE_CHECKING:
  import tensorflow as tf

# What TensorFlow says of a TFRecord file; not of which.
_DAMAGE = re.compile(r'(?:corrupted|truncated) record at \d+')


def said(error: Exception) -> str:
  """What a DataLossError says without the names of operations around it."""
  found = _DAMAGE.search(str(error))
  return found.group() if found else str(error).splitlines()[0]


def _strings_in(dataset: tf.data.Dataset) -> list[str]:
  """The constant strings in a dataset's graph and its functions, each once."""
  import tensorflow as tf

  graph = tf.raw_ops.DatasetToGraphV2(
    input_dataset=tf.data.experimental.to_variant(dataset),
    external_state_policy=1,  # ignore: nothing will run it
  )
  graph = tf.compat.v1.GraphDef.FromString(graph.numpy())
  nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
  found = [
    value.decode('utf-8', 'replace')
    for node in nodes
    if node.op == 'Const' and node.attr['dtype'].type == tf.string.as_datatype_enum
    # Not tf.make_ndarray, which cannot read strings that came from eager tensors.
    for value in tf.reshape(
      tf.io.parse_tensor(node.attr['value'].tensor.SerializeToString(), tf.string), [-1]
    ).numpy()
  ]
  return list(dict.fromkeys(found))


def _data_files(dataset: tf.data.Dataset) -> list[str]:
  """The files that a dataset's graph names; not a vocabulary's words, of no folder."""
  import tensorflow as tf

  def is_file(path):
    try:
      return tf.io.gfile.exists(path) and not tf.io.gfile.isdir(path)
    except tf.errors.OpError:  # no path after all
      return False

  return [path for path in _strings_in(dataset) if '/' in path and is_file(path)]


def damaged_file(dataset: tf.data.Dataset, error: Exception) -> str | None:
  """Which file a dataset failed to read.

  Args:
    dataset: reads TFRecord files.
    error: the DataLossError that it raised.

  Returns:
    The first of the files named in its graph that fails in the same way, read alone;
    None where none does.
  """
  import tensorflow as tf

  files = _data_files(dataset)
  logging.warning('%s: reading %d data files, to find which.', said(error), len(files))
  for path in files:
    try:
      for _ in tf.data.TFRecordDataset(path):
        pass
    except tf.errors.DataLossError as alone:
      if said(alone) == said(error):
        return path
    except tf.errors.OpError:  # a file of another kind, or one that cannot be read
      continue
  return None
