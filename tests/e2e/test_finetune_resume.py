"""An interrupted fine-tuning run is bit for bit equal to an uninterrupted one."""

import signal

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.slow

STEPS, PERIOD = 200, 50


@pytest.fixture(scope='module')
def train(helpers, data_root):
  """Starts `python -m t5x.train` with gin/finetune.gin on a tiny model in a folder."""
  folder = data_root / 'finetune' / 'nb_nn'
  folder.mkdir(parents=True)
  sentences = [text.partition(': ')[2][:80] for text in helpers.made_up_norwegian(64)]
  pairs = [f'{text}\t{text.replace("en", "a")}' for text in sentences]
  # 7.5 batches per epoch.
  for split, rows in (('train', pairs[:60]), ('validation', pairs[60:])):
    (folder / f'{split}.tsv').write_text('\n'.join(['nb\tnn', *rows]) + '\n')

  def start(model_dir):
    bindings = helpers.tiny_training(
      model_dir,
      MIXTURE_OR_TASK_NAME='nb_nn_mini',
      INITIAL_CHECKPOINT_PATH=[],
      TRAIN_STEPS_RELATIVE=STEPS,
      EVAL_PERIOD=PERIOD,
      EVAL_STEPS=1,
      NUM_BEAMS=1,
      PATIENCE=9,
    )
    for name in [n for n in bindings if n == 'TRAIN_STEPS' or '.eval_' in n]:
      del bindings[name]
    files = ('gin/finetune.gin', 'gin/models/tiny.gin')
    return helpers.Process(data_root, 't5x.train', *helpers.gin_flags(files, bindings))

  return start


def test_interrupted_fine_tuning_is_exact(train, helpers, tmp_path):
  whole, run = tmp_path / 'whole', tmp_path / 'run'
  outcome = train(whole).end()
  assert outcome.code == 0, outcome.text

  saved = helpers.interrupt(
    train, run, signal.SIGTERM, lambda text: f'step 120 of {STEPS}' in text
  )
  assert saved % PERIOD  # It saved where it stopped.
  assert (
    helpers.scalars(run / 'train')[STEPS] == helpers.scalars(whole / 'train')[STEPS]
  )
  folders = [folder / f'checkpoint_{STEPS}' for folder in (run, whole)]
  ours, theirs = map(helpers.saved_state, folders)
  assert set(theirs) == {'state', 'target'}
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
