"""Speed of the noise and of other implementations' algorithms, on one core.

    python -m bart_t5x.prepare --source=… --output_dir=data/no
    python benchmarks/denoising.py --corpus_dir=data/no

Runs on pieces of a prepared corpus of 1,022 and of 130 tokens. The baselines, in NumPy,
follow the descriptions of fairseq's noise (one example at a time) and of Hugging Face's
data collator for BART (a batch at a time, with its loops over masked positions). Times
are CPU seconds of the process, pinned to one core; the best of three runs. Results:
denoising.md.
"""

import argparse
import math
import os
import platform
import time

# Before TensorFlow counts the cores.
if hasattr(os, 'sched_setaffinity'):
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import numpy as np
import tensorflow as tf

from bart_t5x import noise, preprocessors
from bart_t5x.data import CorpusSource
from bart_t5x.vocabularies import load_vocabulary

MASK = 4


def read_pieces(corpus_dir: str, length: int, count: int) -> list[tuple]:
  """Returns (tokens, sentence starts) of `length` tokens, across documents."""
  documents = CorpusSource(corpus_dir).get_dataset(shuffle=False)
  pieces, tokens, starts = [], [], []
  for document in documents.as_numpy_iterator():
    starts += [len(tokens) + s for s in document['sentence_starts'].tolist()]
    tokens += document['tokens'].tolist()
    while len(tokens) >= length:
      inside = sorted({0, *(s for s in starts if s < length)})
      pieces.append((np.array(tokens[:length], np.int32), np.array(inside, np.int32)))
      starts = [s - length for s in starts if s >= length]
      tokens = tokens[length:]
      if len(pieces) == count:
        return pieces
  raise SystemExit(f'The corpus has fewer than {count} pieces of {length} tokens.')


def fairseq_like(tokens, starts, random, ratio=0.3, mean=3.5):
  """Permutation and infilling of one example, as fairseq describes them."""
  ends = [*starts[1:], len(tokens)]
  order = random.permutation(len(starts))
  text = np.concatenate([tokens[starts[i] : ends[i]] for i in order])
  budget = math.ceil(ratio * len(text))
  lengths = random.poisson(mean, budget)
  while lengths.sum() < budget:
    lengths = np.concatenate([lengths, random.poisson(mean, budget)])
  sums = np.cumsum(lengths)
  last = int(np.searchsorted(sums, budget))
  lengths = lengths[: last + 1].copy()
  lengths[last] -= sums[last] - budget
  inserts = int((lengths == 0).sum())
  lengths = lengths[lengths > 0]
  begins = random.permutation(len(text))[: len(lengths)]
  keep = np.ones(len(text), bool)
  text[begins] = MASK
  at, left = begins, lengths - 1
  while at.size:
    going = (left > 0) & (at + 1 < len(text))
    at, left = at[going] + 1, left[going] - 1
    keep[at] = False
  text = text[keep]
  places = random.integers(0, len(text) + 1, inserts)
  return np.insert(text, np.sort(places), MASK)


def collator_like(batch, random, ratio=0.3, mean=3.0, pad=0):
  """Hugging Face's collator on [rows, length] with padding after each sentence."""
  out = batch.copy()
  for row in range(len(batch)):
    ends = [*(np.flatnonzero(batch[row] == pad) + 1), batch.shape[1]]
    begins = [0, *ends[:-1]]
    movable = random.permutation(len(ends) - 1)
    order = [*movable, len(ends) - 1]
    out[row] = np.concatenate([batch[row][begins[i] : ends[i]] for i in order])
  # The labels' special tokens are looked up too, token by token.
  for text in (batch, out):
    special = np.array([[token in (0, 1, 2) for token in row] for row in text.tolist()])
  budget = math.ceil((~special).sum() * ratio)
  lengths = random.poisson(mean, budget)
  lengths = lengths[lengths > 0]
  lengths = lengths[: np.argmin(np.abs(np.cumsum(lengths) - budget)) + 1]
  places = np.argwhere(~special)
  places = places[random.permutation(len(places))[: len(lengths)]]
  masked = np.zeros(out.shape, bool)
  going = np.ones(len(lengths), bool)
  while going.any():
    for row, column in places:
      masked[row, column] = True
    lengths = lengths - 1
    going = (lengths > 0) & (places[:, 1] + 1 < out.shape[1])
    places[going, 1] += 1
  masked &= ~special
  out[masked] = MASK
  drop = masked & np.roll(masked, 1, axis=1)
  result = np.full_like(out, pad)
  for row in range(len(out)):
    left = out[row][~drop[row]]
    result[row, : len(left)] = left
  return result


def with_padding(pieces, rows, length):
  """Returns batches in the collator's format."""
  batches, padded = [], []
  for tokens, starts in pieces:
    row = np.insert(tokens, starts[1:], 0)[:length]
    padded.append(np.pad(row, (0, length - len(row)), constant_values=2))
    if len(padded) == rows:
      batches.append(np.stack(padded))
      padded = []
  return batches


def speed_of(name, tokens, run):
  """Prints the best of three runs."""
  seconds = math.inf
  for _ in range(3):
    begin = time.process_time()
    run()
    seconds = min(seconds, time.process_time() - begin)
  print(f'  {name:44} {tokens / seconds / 1e6:8.2f}', flush=True)


def measure_ours(name, pieces, recipe, ids, repeats):
  """The noise inside tf.data, one thread, on examples that are in memory."""
  length = len(pieces[0][0])
  starts = tf.ragged.constant([s.tolist() for _, s in pieces], dtype=tf.int32)
  memory = tf.data.Dataset.from_tensor_slices(
    (np.stack([t for t, _ in pieces]), starts, np.arange(len(pieces), dtype=np.int64))
  )
  memory = memory.map(lambda tokens, starts, i: (tokens, starts[:], i)).cache()
  for _ in memory:
    pass

  def corrupt(tokens, starts, i):
    stamps = {k: tf.zeros_like(i) for k in ('seed', 'epoch', 'piece')}
    seed = preprocessors.piece_seed({'example_id': i, **stamps})
    noised = noise.corrupt(tokens, starts, seed, recipe, ids, length + 66)
    return tf.size(noised.source) + tf.size(noised.target) + tf.reduce_max(noised.codes)

  options = tf.data.Options()
  options.threading.private_threadpool_size = 1
  options.threading.max_intra_op_parallelism = 1
  dataset = memory.repeat(repeats).map(corrupt).with_options(options)

  def run(dataset=dataset):
    # Summed in the graph: passing results to Python would be measured too.
    dataset.reduce(np.int32(0), lambda a, b: a + b).numpy()

  run(dataset.take(1))
  speed_of(name, length * len(pieces) * repeats, run)


def cpu_name() -> str:
  for line in open('/proc/cpuinfo', encoding='utf-8'):
    if line.startswith('model name'):
      return line.split(':')[1].strip()
  return platform.machine()


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--corpus_dir', required=True)
  parser.add_argument('--pieces', type=int, default=512)
  args = parser.parse_args()
  print(f'{cpu_name()}, TensorFlow {tf.__version__}, NumPy {np.__version__}')
  ids = noise.Ids.of(load_vocabulary(args.corpus_dir))
  random = np.random.default_rng(0)
  recipes = {
    'ours, infilling only': noise.Recipe(permute_ratio=0),
    'ours, paper': noise.Recipe(),
    'ours, default': noise.Recipe(whole_words=True, random_ratio=0.1),
    'ours, fairseq': noise.Recipe(
      whole_words=True, random_ratio=0.1, overlap=True, span_mean=3.5
    ),
    'ours, hf_compat': noise.Recipe(
      permute_last=False, insertions=False, overlap=True, merge_adjacent=True
    ),
  }
  for length, repeats in ((1022, 4), (130, 16)):
    pieces = read_pieces(args.corpus_dir, length, args.pieces)
    tokens = length * len(pieces)
    print(f'examples of {length:,} tokens: million tokens per second on one core')
    batches = with_padding(pieces, 32, length)
    speed_of(
      "Hugging Face's collator, its algorithm",
      32 * length * len(batches),
      lambda batches=batches: [collator_like(b, random) for b in batches],
    )
    speed_of(
      "fairseq's algorithm in NumPy, without words",
      tokens,
      lambda pieces=pieces: [fairseq_like(t.copy(), s, random) for t, s in pieces],
    )
    for name, recipe in recipes.items():
      measure_ours(name, pieces, recipe, ids, repeats)


if __name__ == '__main__':
  main()
