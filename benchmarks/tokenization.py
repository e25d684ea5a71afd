"""Speed of tokenization inside `tf.data`: in the graph, and by `tokenizers`.

    python -m bart_t5x.prepare --source=… --output_dir=data/no
    python benchmarks/tokenization.py --corpus_dir=data/no --input 'texts/*.jsonl.zst'

Cuts texts into pieces of 30, 130 and 1,000 tokens and runs them through
`preprocessors.tokenize_for_bart` on one core, byte-level BPE in the graph and in
Python (`tokenizers` inside `tf.numpy_function`). Prints tokens per CPU second, the time
of a pipeline that only passes the texts on, and the time to the first example.
"""

import argparse
import itertools
import os
import time
from unittest import mock

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

LENGTHS = (30, 130, 1000)
TOKENS = 300_000  # of each length


def pieces(vocabulary, texts, length: int) -> list[str]:
  """Texts of about so many tokens."""
  made, total = [], 0
  for text in texts:
    ids = vocabulary.encode(text)
    for begin in range(0, len(ids) - length + 1, length):
      made.append(vocabulary.decode(ids[begin : begin + length]))
      total += length
    if total >= TOKENS:
      return made
  return made


def seconds(dataset, feature: str) -> tuple[float, int]:
  """CPU seconds to run through a dataset, and how many tokens it had."""
  import numpy as np
  import tensorflow as tf

  begin = time.process_time()
  tokens = dataset.reduce(
    np.int64(0), lambda total, e: total + tf.size(e[feature], tf.int64)
  ).numpy()
  return time.process_time() - begin, int(tokens)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--corpus_dir', required=True)
  parser.add_argument('--input', required=True)
  args = parser.parse_args()
  # Before TensorFlow counts the cores.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])

  import seqio
  import tensorflow as tf

  from bart_t5x import preprocessors, text_sources, vocabularies

  vocabulary = vocabularies.load_vocabulary(args.corpus_dir)
  features = {'inputs': seqio.Feature(vocabulary)}
  begin = time.process_time()
  texts = tf.data.Dataset.from_tensors({'inputs': 'En tekst.'})
  next(iter(preprocessors.tokenize_for_bart(texts, features)))
  print(f'first example after {time.process_time() - begin:.2f} CPU s, tables included')

  in_python = mock.patch.object(
    vocabularies.BartVocabulary, '_graph_encoder', lambda self: None
  )
  documents = text_sources.jsonl_source([args.input]).documents
  print(
    'tokens per text | µs per text, only passed on | tokens per CPU s: graph | Python'
  )
  for length in LENGTHS:
    rows = pieces(vocabulary, itertools.islice(documents(), 200_000), length)
    dataset = tf.data.Dataset.from_tensor_slices({'inputs': rows})
    handed, _ = seconds(
      dataset.map(dict, num_parallel_calls=tf.data.AUTOTUNE), 'inputs'
    )
    spent, tokens = seconds(
      preprocessors.tokenize_for_bart(dataset, features), 'inputs'
    )
    with in_python:
      other = preprocessors.tokenize_for_bart(dataset, features)
    other, _ = seconds(other, 'inputs')
    print(
      f'{length:>15} | {handed / len(rows) * 1e6:>26.0f} | {tokens / spent:>21,.0f} | '
      f'{tokens / other:,.0f}'
    )


if __name__ == '__main__':
  main()
