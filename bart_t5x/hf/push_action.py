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

# The last export, in the run's folder.
EXPORT_FOLDER = 'hub_export'
# Seconds between polls; after a failure, doubled each time.
_POLL_SECONDS = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 30.0, 600.0
# Before each try of the last push, after training.
_LAST_PAUSES = (0.0, 5.0, 10.0)


def newest_checkpoint(model_dir: pathlib.Path) -> pathlib.Path | None:
  """Returns the finished checkpoint with the highest step, or None."""
  steps = [
    int(match[1])
    for path in model_dir.glob('checkpoint_*')
    if (match := re.fullmatch('checkpoint_([0-9]+)', path.name))
  ]
  return model_dir / f'checkpoint_{max(steps)}' if steps else None


@gin.configurable
class PushToHub(trainer.BaseAction):
  """Pushes model, card and logs after each save, without delaying training steps.

  A thread of the first host runs `bart_t5x.hf.convert export --push_to_hub` for the
  newest checkpoint in a separate process, so that neither the GIL nor a crash affects
  training. Failed pushes are tried again.
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
      model_dir: the run's folder, on a local disk.
      private: whether the repository must be private.
      revision: branch to push to; by default main.
      corpus_dir: the tokenizer's folder; needed for tasks other than those of `tasks`.
      last_push_seconds: how long the end of the run waits for the last push; less
        than 300, after which other hosts give up on the first.

    Raises:
      hub.LoginError: the token is missing or invalid.
      ValueError: model_dir is not local.
    """
    if '://' in model_dir:
      raise ValueError(
        f'PushToHub needs a local model_dir. Got: {model_dir!r}. Push a local copy of '
        'a checkpoint with `python -m bart_t5x.hf.convert export --push_to_hub=…`.'
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
      logging.warning('%s Training starts; pushes will be tried again.', e)
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
    """Returns False, never ending the training: the thread does the work."""
    del train_state, metrics_by_task
    return False

  def close(self) -> None:
    """Waits for the push of the last checkpoint, after training."""
    self._ended.set()
    if self._thread is not None:
      self._thread.join(self._last_push_seconds)
      if self._thread.is_alive():
        logging.warning('Hub: gave up waiting for the last push.')
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
    """Pushes the newest checkpoint unless it was pushed; returns False on failure."""
    checkpoint = newest_checkpoint(self._model_dir)
    if checkpoint is None or checkpoint == self._pushed:
      return True
    done = subprocess.run(
      [*self._command, f'--checkpoint={checkpoint}'],
      # The run holds the accelerator.
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
