"""Speed of the input pipeline, from shards to packed batches, as T5X reads them.

    python -m bart_t5x.prepare --source=… --output_dir=data/no
    python benchmarks/input_pipeline.py --corpus_dir=data/no

Prints the time to the first batch (after imports: vocabulary, graph, shuffle buffers),
target tokens per second and per CPU second, how full the rows are, and the memory of
the process over time; with our feature converter and with seqio's.
"""

import argparse
import json
import os
import time

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

# For a TPU v3-8 at 0.65 s per step of 256 rows of 1024, somewhat faster than
# benchmarks/tpu_plan.md estimates.
TARGET = 256 * 1024 / 0.65
TASK = 'benchmark_input_pipeline'
MARKS = 8


def resident() -> float:
  """Resident memory of the process in MiB."""
  with open('/proc/self/statm') as f:
    pages = int(f.read().split()[1])
  return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


def measure(args, converter) -> None:
  import numpy as np
  import seqio

  lengths = {'inputs': args.length, 'targets': args.length}
  begin, cpu = time.perf_counter(), time.process_time()
  dataset = seqio.get_dataset(
    TASK,
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
    f'{converter.__name__}: first batch after {first - begin:.2f} s, of which graph '
    f'{built - begin:.2f} s (CPU {time.process_time() - cpu:.2f} s)'
  )
  cpu, real, inputs, slots, rows = time.process_time(), 0, 0, 0, 0
  marks = [resident()]
  while time.perf_counter() - first < args.seconds:
    batch = next(batches)
    real += np.count_nonzero(batch['decoder_target_tokens'])
    inputs += np.count_nonzero(batch['encoder_input_tokens'])
    slots += batch['decoder_target_tokens'].size
    rows += len(batch['decoder_target_tokens'])
    if time.perf_counter() - first > len(marks) * args.seconds / MARKS:
      marks.append(resident())
  seconds, cpu = time.perf_counter() - first, time.process_time() - cpu
  with open(os.path.join(args.corpus_dir, 'corpus.json'), encoding='utf-8') as f:
    epoch = json.load(f)['splits']['train']['tokens']
  print(f'  target tokens per second               {real / seconds:>12,.0f}')
  print(f'  target tokens per CPU second           {real / cpu:>12,.0f}')
  print(f'  CPU seconds per second                 {cpu / seconds:>12.2f}')
  print(f'  slots filled, targets                  {real / slots:>12.2%}')
  print(f'  slots filled, inputs                   {inputs / slots:>12.2%}')
  print(f'  rows of {args.length:<6}                         {rows:>12,}')
  print(f'  epochs                                 {real / epoch:>12.2f}')
  print(f'  resident MiB over time       {" ".join(f"{m:,.0f}" for m in marks)}')


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--corpus_dir', required=True)
  parser.add_argument('--length', type=int, default=1024)
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--seconds', type=float, default=60)
  parser.add_argument('--cores', type=int, default=2)
  parser.add_argument('--gin_file', default='gin/noise/default.gin')
  args = parser.parse_args()
  # Before TensorFlow counts the cores.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])

  import gin
  import seqio

  from bart_t5x.features import BartFeatureConverter
  from tasks import pretrain

  gin.parse_config_file(args.gin_file)
  pretrain.add_denoising_task(TASK, args.corpus_dir)
  print(
    f'wanted: {TARGET:,.0f} target tokens per second on 2 cores, rows 97 % full, '
    'first batch within 3 s'
  )
  for converter in (BartFeatureConverter, seqio.EncDecFeatureConverter):
    measure(args, converter)


if __name__ == '__main__':
  main()
