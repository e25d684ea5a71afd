"""A training action that pushes checkpoints to the Hub (gin/push_to_hub.gin)."""

import atexit
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import gin
import jax
from absl import logging

from bart_t5x.hf import hub
from t5x import trainer

# In the run's folder: the last export.
EXPORT_FOLDER = 'hub_export'
# Between looks into the run's folder, and after failures, doubled each time.
_POLL_SECONDS = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 30.0, 600.0
# Before each try of the last push, when training has ended.
_LAST_PAUSES = (0.0, 5.0, 10.0)


def newest_checkpoint(model_dir: pathlib.Path) -> pathlib.Path | None:
  """Returns the finished checkpoint with the highest step, if there is one."""
  steps = [
    int(match[1])
    for path in model_dir.glob('checkpoint_*')
    if (match := re.fullmatch('checkpoint_([0-9]+)', path.name))
  ]
  return model_dir / f'checkpoint_{max(steps)}' if steps else None


@gin.configurable
class PushToHub(trainer.BaseAction):
  """Pushes model, card and logs at each save; no training step waits for it.

  A thread of the first host runs `bart_t5x.hf.convert export --push_to_hub` for each
  newest checkpoint, as a process of its own, so that neither the interpreter lock nor a
  crash reaches the training. A push that fails is tried again.
  """

  def __init__(
    self,
    repo_id: str,
    model_dir: str,
    private: bool = False,
    revision: str | None = None,
    corpus_dir: str | None = None,
    last_push_seconds: float = 240.0,
  ):
    """Checks the login and starts the thread.

    Args:
      repo_id: `org/name`.
      model_dir: the run's folder.
      private: whether the repository must be private.
      revision: branch to push to; by default main.
      corpus_dir: has the tokenizer; by default that of the run's task.
      last_push_seconds: how long the end of the run waits for the last push. Other
        hosts give up on the first one after 300.

    Raises:
      hub.LoginError: there is no token, or the Hub refuses it.
      ValueError: model_dir is not on a local disk.
    """
    if '://' in model_dir:
      raise ValueError(
        f'PushToHub reads checkpoints from local folders only. Got: {model_dir!r}. '
        'Leave it out, and push a local copy of a checkpoint with `python -m '
        'bart_t5x.hf.convert export --push_to_hub=…`.'
      )
    self._model_dir = pathlib.Path(model_dir)
    self._last_push_seconds = last_push_seconds
    self._pushed: pathlib.Path | None = None
    self._ended = threading.Event()
    self._thread = None
    if jax.process_index() != 0:
      return
    try:
      hub.check_login(repo_id)
    except hub.LoginError:
      raise
    except hub.HubError as e:
      logging.warning('%s Training starts; pushes will be tried.', e)
    self._command = [sys.executable, '-m', 'bart_t5x.hf.convert', 'export']
    self._command += [f'--output_dir={self._model_dir / EXPORT_FOLDER}', '--overwrite']
    self._command += [f'--push_to_hub={repo_id}', '--with_logs']
    self._command += ['--private'] if private else []
    self._command += [f'--revision={revision}'] if revision else []
    self._command += [f'--corpus_dir={corpus_dir}'] if corpus_dir else []
    self._thread = threading.Thread(
      target=self._follow, name='push_to_hub', daemon=True
    )
    self._thread.start()
    atexit.register(self.close)  # For a t5x that does not close its actions.

  def run(self, train_state: Any, metrics_by_task: Mapping[str, Any]) -> bool:
    """Does nothing and never ends the training: the thread finds checkpoints itself."""
    del train_state, metrics_by_task
    return False

  def close(self) -> None:
    """Waits for the push of the last checkpoint; called when training has ended."""
    self._ended.set()
    if self._thread is not None:
      self._thread.join(self._last_push_seconds)
      if self._thread.is_alive():
        logging.warning('Hub: the last push has not ended; the run no longer waits.')
      self._thread = None

  def _follow(self) -> None:
    pause = _POLL_SECONDS
    while not self._ended.wait(pause):
      if self._push_newest():
        pause = _POLL_SECONDS
      else:
        pause = min(max(_FIRST_PAUSE, 2 * pause), _LONGEST_PAUSE)
    for pause in _LAST_PAUSES:
      time.sleep(pause)
      if self._push_newest():
        return

  def _push_newest(self) -> bool:
    """Pushes the newest checkpoint, if that is new; returns False if it failed."""
    checkpoint = newest_checkpoint(self._model_dir)
    if checkpoint is None or checkpoint == self._pushed:
      return True
    done = subprocess.run(
      [*self._command, f'--checkpoint={checkpoint}'],
      # The accelerator is the run's.
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'HF_HUB_DISABLE_PROGRESS_BARS': '1'},
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      errors='replace',
      start_new_session=True,  # Ctrl-C is for the run.
    )
    if done.returncode != 0:
      error = done.stderr.strip().rpartition('\n')[2] or f'status {done.returncode}'
      logging.warning('Hub: %s was not pushed: %s', checkpoint.name, error)
      return False
    self._pushed = checkpoint
    outcome = done.stdout.strip().rpartition('\n')[2]
    logging.info('Hub: %s %s', checkpoint.name, outcome)
    return True
