"""Type checks of the runtime, and a small run."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
# Last: modules of this folder take precedence.
sys.path.append(str(pathlib.Path(__file__).parents[2] / 'tests'))

import array_types  # noqa: E402 - found through the path above.

# Before anything imports these modules.
array_types.install(
  f't5x.{name}'
  for name in (
    'adafactor', 'decoding', 'losses', 'metrics', 'models', 'optimizers',
    'trainer',
  )
)  # fmt: skip


@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory):
  """The folder of a run with checkpoints of steps 0, 5 and 10."""
  import tiny

  from t5x import train

  folder = tmp_path_factory.mktemp('tiny_run')
  train.train(**tiny.train_arguments(folder))
  return folder
