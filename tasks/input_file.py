"""A file of inputs, for a model to answer: the split `input_file` of text tasks.

    input_file.dataset.path = 'reviews.txt'   # an input a line
    input_file.dataset.path = 'reviews.jsonl' # an object with "inputs" a line
    input_file.dataset.prompt = 'stemning: '  # what the task puts before a text

gin/finetune_infer.gin binds them, as INPUT_FILE and PROMPT.
"""

import functools
import os
from collections.abc import Iterator

import gin
import tensorflow as tf
from absl import logging

from tasks import readers

SPLIT = 'input_file'


@gin.configurable(module='tasks.input_file')
def dataset(path: str = '', prompt: str = '') -> tf.data.Dataset:
  """The inputs of a file as examples {'inputs', 'targets'}; targets are empty.

  Args:
    path: a text file with an input a line, or JSON lines with the text under
      "inputs". Empty ones are left out, counted and logged.
    prompt: put before each input.

  Returns:
    A dataset of scalar strings, in the order of the file.

  Raises:
    ValueError: no path is bound, a line is wrong, or there is no input in the file.
    FileNotFoundError: there is no such file.
  """
  if not path:
    raise ValueError(
      'no input file is named. Write one input a line into a file and name it: '
      '--gin.INPUT_FILE="\'sentences.txt\'"'
    )
  if not os.path.exists(path):
    raise FileNotFoundError(
      f'the input file {path!r} (INPUT_FILE) does not exist on a local disk'
    )
  texts = list(_texts(path))
  kept = [text for text in texts if text.strip()]
  if len(kept) < len(texts):
    _warn(
      f'{path}: {len(texts) - len(kept)} of {len(texts)} inputs are empty and left out.'
    )
  if not kept:
    raise ValueError(f'the input file {path!r} (INPUT_FILE) holds no input')
  inputs = [prompt + text for text in kept]
  return tf.data.Dataset.from_tensor_slices(
    {'inputs': inputs, 'targets': [''] * len(inputs)}
  )


@functools.cache
def _warn(message: str):
  """Once for each message: a script asks for the data set several times."""
  logging.warning('%s', message)


def _texts(path: str) -> Iterator[str]:
  if path.endswith('.jsonl'):
    for number, record in enumerate(readers.read_jsonl(path), 1):
      if not isinstance(record.get('inputs'), str):
        raise ValueError(
          f'{path}, object {number} must hold its text under "inputs", such as '
          f'{{"inputs": "…"}}. Got: {sorted(record)}'
        )
      yield record['inputs']
    return
  with readers.open_text(path) as f:
    for line in f:
      yield line.rstrip('\r\n')
