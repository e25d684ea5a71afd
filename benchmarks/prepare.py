"""Speed and memory of making a corpus: `prepare` in its ways, and `datasets.map`.

    python benchmarks/prepare.py --input 'texts/*.jsonl' --runs 3

Each way makes tokens of the same text with the same tokenizer, which is trained first,
in processes of its own, in turn. `datasets` does what Hugging Face's scripts for
pre-training do: tokenize, then cut the joined tokens into blocks. It keeps duplicates,
holds nothing out and has no sentences.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import psutil

BLOCK = 1024
PREPARE = [sys.executable, '-m', 'bart_t5x.prepare', '--source=jsonl', '--input']
BEAM_PROCESSES = '--direct_running_mode=multi_processing,--direct_num_workers=2'


def ways(inputs: list[str], tokenizer: str, folder: str) -> dict[str, list[str]]:
  """Returns the command line of each way."""
  prepare = [
    *PREPARE,
    *inputs,
    f'--tokenizer_file={tokenizer}',
    f'--output_dir={folder}',
  ]
  datasets = [sys.executable, __file__, '--with_datasets', f'--tokenizer={tokenizer}']
  return {
    'prepare, 1 worker': [*prepare, '--num_workers=1'],
    'prepare, 2 workers': [*prepare, '--num_workers=2'],
    'prepare --beam, in one process': [*prepare, '--beam'],
    'prepare --beam, 2 processes': [
      *prepare,
      '--beam',
      f'--pipeline_options={BEAM_PROCESSES}',
    ],
    'datasets.map, 2 processes': [*datasets, f'--folder={folder}', '--input', *inputs],
  }


def with_datasets(inputs: list[str], tokenizer_file: str, folder: str) -> None:
  """Tokenizes and groups by `datasets`."""
  import datasets
  import tokenizers

  tokenizer = tokenizers.Tokenizer.from_file(tokenizer_file)

  def tokenize(batch):
    encodings = tokenizer.encode_batch_fast(batch['text'])
    return {'input_ids': [encoding.ids for encoding in encodings]}

  def group(batch):
    ids = list(itertools.chain.from_iterable(batch['input_ids']))
    return {'input_ids': [ids[i : i + BLOCK] for i in range(0, len(ids), BLOCK)]}

  rows = datasets.load_dataset(
    'json', data_files=inputs, split='train', cache_dir=folder
  )
  names = rows.column_names
  rows = rows.map(tokenize, batched=True, num_proc=2, remove_columns=names)
  rows.map(group, batched=True, num_proc=2)


def measure(command: list[str]) -> tuple[float, float]:
  """Runs a command; returns seconds and the peak of its processes' memory in MiB."""
  begin = time.monotonic()
  environment = {**os.environ, 'TOKENIZERS_PARALLELISM': 'false'}
  process = subprocess.Popen(
    command, env=environment, stderr=subprocess.PIPE, text=True
  )
  peak = 0.0

  def watch():
    nonlocal peak
    while process.poll() is None:
      try:
        root = psutil.Process(process.pid)
        processes = [root, *root.children(recursive=True)]
        # Pages that processes share count in equal parts.
        peak = max(peak, sum(p.memory_full_info().pss for p in processes) / 2**20)
      except psutil.Error:  # one of them has ended
        pass
      time.sleep(0.5)

  watcher = threading.Thread(target=watch)
  watcher.start()
  _, error = process.communicate()
  watcher.join()
  if process.returncode:
    raise RuntimeError(f'{" ".join(command)} failed:\n{error}')
  return time.monotonic() - begin, peak


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--input', nargs='+', required=True, help='jsonl files')
  parser.add_argument('--runs', type=int, default=3)
  parser.add_argument('--only', default='', help='ways with this in their names')
  parser.add_argument('--with_datasets', action='store_true', help=argparse.SUPPRESS)
  parser.add_argument('--tokenizer', help=argparse.SUPPRESS)
  parser.add_argument('--folder', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.with_datasets:
    with_datasets(args.input, args.tokenizer, args.folder)
    return
  megabytes = sum(map(os.path.getsize, args.input)) / 1e6
  found: dict[str, list[tuple[float, float]]] = {}
  with tempfile.TemporaryDirectory() as folder:
    trained = os.path.join(folder, 'trained')
    subprocess.run([*PREPARE, *args.input, f'--output_dir={trained}'], check=True)
    tokenizer = os.path.join(trained, 'tokenizer.json')
    for run in range(args.runs):
      every = ways(args.input, tokenizer, '')
      for number, name in enumerate(name for name in every if args.only in name):
        output = os.path.join(folder, f'{run}-{number}')
        result = measure(ways(args.input, tokenizer, output)[name])
        found.setdefault(name, []).append(result)
        print(f'{name}: {result[0]:.1f} s', flush=True)
  print(f'\n| {megabytes:.0f} MB | s, median (least–most) | MB/s | peak memory, MiB |')
  print('| --- | --- | --- | --- |')
  for name, results in found.items():
    seconds, peaks = zip(*results, strict=True)
    median = statistics.median(seconds)
    print(
      f'| {name} | {median:.1f} ({min(seconds):.1f}–{max(seconds):.1f}) '
      f'| {megabytes / median:.2f} | {statistics.median(peaks):,.0f} |'
    )


if __name__ == '__main__':
  main()
