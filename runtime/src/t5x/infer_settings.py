"""What the results of `infer` depend on, noted beside them.

A run that is given again goes on behind the chunks that are there, or finds all done:
only if it would write the same.
"""

import hashlib
import os
from typing import Any

from t5x import data, data_source, gin_utils

# Where results go, and how the work is shared out.
_OF_NO_EFFECT = ('INFER_OUTPUT_DIR', '__main__.infer.', 't5x.partitioning.')
# Orbax notes in it when a checkpoint was saved.
_SAVED_AT = '_CHECKPOINT_METADATA'


def describe(dataset_cfg: data.DatasetConfig, checkpoint: str) -> dict[str, Any]:
  """Describes data, checkpoint and configuration.

  Args:
    dataset_cfg: what is read.
    checkpoint: path of the one checkpoint.

  Returns:
    JSON values by name: all that gin binds, with a digest of every local file that it
    names (one of inputs, say), and what the arguments say.
  """
  bound = {
    name: value + _content(value.strip('\'"'))
    for name, value in gin_utils.bound_values().items()
    if not name.startswith(_OF_NO_EFFECT)
  }
  return {
    **bound,
    **data_source.describe(dataset_cfg),
    'batch_size': dataset_cfg.batch_size,
    'task_feature_lengths': dict(dataset_cfg.task_feature_lengths),
    'checkpoint': checkpoint + _content(os.path.join(checkpoint, _SAVED_AT)),
  }


def _content(path: str) -> str:
  """A digest of what a file holds; '' for what is no file."""
  if not os.path.isfile(path):
    return ''
  with open(path, 'rb') as file:
    return f' (sha256 {hashlib.file_digest(file, "sha256").hexdigest()[:16]})'
