"""The encoder length that each recipe of noise needs.

    python benchmarks/encoder_lengths.py --corpus_dir=data/no

Prints `noise.longest_source` for each file in gin/noise, as the task checks it; and,
with a corpus, the longest source of its pieces.
"""

import argparse
import os
import pathlib

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import gin
import tensorflow as tf

from bart_t5x import noise, preprocessors
from bart_t5x.data import EPOCH, SEED, CorpusSource
from bart_t5x.vocabularies import load_vocabulary

RECIPES = pathlib.Path(__file__).parent.parent / 'gin' / 'noise'
LENGTHS = (64, 128, 256, 512, 1024)


def real_sources(corpus_dir: str, recipe: noise.Recipe, length: int, pieces: int):
  """The longest source of the corpus's first pieces."""
  ids = noise.Ids.of(load_vocabulary(corpus_dir))
  documents = CorpusSource(corpus_dir).get_dataset(shuffle=False)
  stamp = {k: tf.constant(0, tf.int64) for k in (SEED, EPOCH)}
  documents = documents.map(lambda document: {**document, **stamp}).ragged_batch(64)
  lengths = {'inputs': length, 'targets': length}
  cut = preprocessors.split_documents(documents, lengths).take(pieces)

  def sizes(piece):
    noised = noise.corrupt(
      piece['tokens'],
      piece['sentence_starts'],
      preprocessors.piece_seed(piece),
      recipe,
      ids,
    )
    return tf.size(noised.source)

  return max(cut.map(sizes, tf.data.AUTOTUNE).as_numpy_iterator())


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--corpus_dir')
  parser.add_argument('--pieces', type=int, default=20_000)
  args = parser.parse_args()
  os.chdir(RECIPES.parent.parent)  # gin files include each other from there
  header = ''.join(f'{length:>8,}' for length in LENGTHS)
  real = f'   longest of {args.pieces:,} real ones at 1,024' if args.corpus_dir else ''
  print(f'targets of {header}{real}')
  for path in sorted(RECIPES.glob('*.gin')):
    gin.clear_config()
    gin.parse_config_file(str(path))
    recipe = noise.Recipe()
    line = ''.join(f'{noise.longest_source(recipe, n):>8,}' for n in LENGTHS)
    if args.corpus_dir:
      line += f'   {real_sources(args.corpus_dir, recipe, 1024, args.pieces):,}'
    print(f'{path.stem:11}{line}', flush=True)


if __name__ == '__main__':
  main()
