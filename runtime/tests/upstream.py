"""How the tests here run a script on google-research/t5x, or on our t5x."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

STAND_INS = pathlib.Path(__file__).with_name('upstream_stand_ins')

MARKS = [
  pytest.mark.upstream,
  pytest.mark.slow,
  pytest.mark.skipif(
    'UPSTREAM_T5X' not in os.environ, reason='UPSTREAM_T5X is not set'
  ),
]


def run(script, *args, out, on_upstream):
  """Runs a script, whose last argument is the .npz file that it writes; returns it."""
  python, environment = sys.executable, dict(os.environ)
  if on_upstream:
    python = os.environ['UPSTREAM_PYTHON']
    environment['PYTHONPATH'] = os.pathsep.join(
      [os.environ['UPSTREAM_T5X'], str(STAND_INS)]
    )
  subprocess.run([python, script, *args, out], env=environment, check=True)
  return dict(np.load(out))
