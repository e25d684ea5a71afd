"""The tasks of benchmarks/transfer.py, which names their folder in TRANSFER_DIR."""

import os

from tasks.pretrain import add_denoising_task
from tasks.text_to_text import add_text_to_text_task

FOLDER = os.environ.get('TRANSFER_DIR', 'runs/transfer')
CORPUS = os.path.join(FOLDER, 'corpus')
PRETRAINING = 'transfer_pretraining'
TASKS = ('transfer_lemma', 'transfer_order')
SPLITS = ('train', 'validation')


def to_text(row):
  """The files hold inputs and targets as they are."""
  return {'inputs': row['inputs'], 'targets': row['targets']}


def path_of(task: str, split: str) -> str:
  """The file of a task's split."""
  return os.path.join(FOLDER, task, f'{split}.jsonl')


add_denoising_task(PRETRAINING, CORPUS)
for name in TASKS:
  add_text_to_text_task(
    name,
    to_text,
    files={split: path_of(name, split) for split in SPLITS},
    corpus_dir=CORPUS,
  )
