"""A file of inputs for a model to answer: the split `input_file` of text tasks.

    input_file.dataset.path = 'reviews.txt'   # one input per line
    input_file.dataset.path = 'reviews.jsonl' # one object with "inputs" per line
    input_file.dataset.prompt = 'stemning: '  # what the task puts before a text

gin/finetune_infer.gin binds them to INPUT_FILE and PROMPT.
"""

import functools
import os
from collections.abc import Iterator

import gin
from absl import logging

from bart_t5x import text_sources

SPLIT = 'input_file'


@gin.configurable(module='tasks.input_file')
def dataset(path: str = '', prompt: str = '') -> dict[str, list[str]]:
  """Reads `inputs` from a file, in its order, with empty `targets`.

  Args:
    path: a text file with one input per line, or JSON lines with the text as "inputs".
      Empty inputs are left out and counted in the log.
    prompt: put before each input.
  """
  if not path:
    raise ValueError(
      'no input file is set. Name a file with one input per line: '
      '--gin.INPUT_FILE="\'sentences.txt\'"'
    )
  # An integer would be a file descriptor, and a pipe can be read only once.
  if not isinstance(path, str) or not os.path.isfile(path):
    raise FileNotFoundError(
      f'the input file {path!r} (INPUT_FILE) does not exist on a local disk, or is not '
      'a regular file'
    )
  texts = list(_texts(path))
  kept = [text for text in texts if text.strip()]
  if len(kept) < len(texts):
    _warn(
      f'{path}: {len(texts) - len(kept)} of {len(texts)} inputs are empty and left out.'
    )
  if not kept:
    raise ValueError(f'the input file {path!r} (INPUT_FILE) has no inputs')
  return {'inputs': [prompt + text for text in kept], 'targets': [''] * len(kept)}


@functools.cache  # warn once, though a script reads the file several times
def _warn(message: str):
  logging.warning('%s', message)


def _texts(path: str) -> Iterator[str]:
  if not path.endswith('.jsonl'):
    yield from text_sources.read_lines(path)
    return
  for place, record in text_sources.read_json_lines(path):
    if not isinstance(record.get('inputs'), str):
      raise ValueError(
        f'{place} must have its text as "inputs", such as '
        f'{{"inputs": "…"}}. Got: {sorted(record)}'
      )
    yield record['inputs']
