"""How fast training data comes: from shards to packed batches, as T5X asks for it.

    BART_T5X_DATA=data python benchmarks/input_pipeline.py --task=norwegian_denoising

Prints the time to the first batch, target tokens a second (by the clock and by CPU
second), how full the rows are, and the memory of the process along the way; with our
feature converter and with seqio's.
"""

import argparse
import os
import time

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import gin
import numpy as np
import seqio

import tasks  # noqa: F401  registers them
from bart_t5x.features import BartFeatureConverter

# What a TPU v3-8 takes at 0.65 s a step of 256 rows of 1024.
TARGET = 256 * 1024 / 0.65


def resident() -> float:
  """MiB of memory that the process holds."""
  with open('/proc/self/statm') as f:
    pages = int(f.read().split()[1])
  return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


def measure(args, converter) -> None:
  lengths = {'inputs': args.length, 'targets': args.length}
  begin = time.perf_counter()
  dataset = seqio.get_dataset(
    args.task,
    lengths,
    converter(pack=True),
    shuffle=True,
    num_epochs=None,
    seed=0,
    batch_size=args.batch_size,
    verbose=False,
  )
  built = time.perf_counter()
  batches = dataset.as_numpy_iterator()
  next(batches)
  first = time.perf_counter()
  print(
    f'{converter.__name__}: graph built in {built - begin:.1f} s, first batch '
    f'{first - built:.1f} s later'
  )
  cpu, real, inputs, slots, rows = time.process_time(), 0, 0, 0, 0
  marks = []
  while time.perf_counter() - first < args.seconds:
    batch = next(batches)
    real += np.count_nonzero(batch['decoder_target_tokens'])
    inputs += np.count_nonzero(batch['encoder_input_tokens'])
    slots += batch['decoder_target_tokens'].size
    rows += len(batch['decoder_target_tokens'])
    if time.perf_counter() - first > len(marks) * args.seconds / 6:
      marks.append(f'{resident():,.0f}')
  seconds, cpu = time.perf_counter() - first, time.process_time() - cpu
  print(f'  target tokens a second, by the clock   {real / seconds:>12,.0f}')
  print(f'  target tokens a CPU second             {real / cpu:>12,.0f}')
  print(f'  CPU seconds a second                   {cpu / seconds:>12.2f}')
  print(f'  slots filled, targets                  {real / slots:>12.2%}')
  print(f'  slots filled, inputs                   {inputs / slots:>12.2%}')
  print(f'  rows of {args.length:<6}                         {rows:>12,}')
  print(f'  resident MiB along the way             {" ".join(marks)}')


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--task', default='norwegian_denoising')
  parser.add_argument('--length', type=int, default=1024)
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--seconds', type=float, default=30)
  parser.add_argument('--gin_file', default='gin/denoising.gin')
  args = parser.parse_args()
  gin.parse_config_file(args.gin_file)
  print(
    f'wanted: {TARGET:,.0f} target tokens a second on 2 cores, rows 97 % full, '
    'first batch within 3 s'
  )
  for converter in (BartFeatureConverter, seqio.EncDecFeatureConverter):
    measure(args, converter)


if __name__ == '__main__':
  main()
