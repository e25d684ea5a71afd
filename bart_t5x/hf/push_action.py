"""A training action that keeps a model on the Hub up to date (gin/push_to_hub.gin)."""

import atexit
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import gin
import jax
from absl import logging

from bart_t5x.hf import hub
from t5x import trainer

# Beside the checkpoints: what was pushed when, and what went wrong.
LOG_FILE = 'push_to_hub.log'


def _start_follower(arguments: list[str], log_file: pathlib.Path) -> subprocess.Popen:
  """Starts `follow_run` beside this process, until its stdin is closed."""
  module = 'bart_t5x.hf.follow_run'
  with log_file.open('ab') as log:
    return subprocess.Popen(
      [sys.executable, '-m', module, *arguments, '--until_stdin_closes'],
      stdin=subprocess.PIPE,
      stdout=log,
      stderr=log,
      env={
        **os.environ,
        'JAX_PLATFORMS': 'cpu',  # The accelerator is the run's.
        'HF_HUB_DISABLE_PROGRESS_BARS': '1',
      },
      # Ctrl-C is for the run; the follower ends when the run has ended.
      start_new_session=True,
    )


@gin.configurable
class PushToHub(trainer.BaseAction):
  """Pushes model and logs at each save, without holding the steps up.

  The work is done by `follow_run`, a process of its own, started with the run on the
  first host. A Hub that is away costs the run nothing: the push is tried again.
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
    """Starts the follower.

    Args:
      repo_id: `org/name`.
      model_dir: the run's folder.
      private: whether the repository must be private.
      revision: branch to push to; by default main.
      corpus_dir: with the tokenizer; by default that of the run's task.
      last_push_seconds: how long the end of the run waits for the last push, which
        goes on by itself after that. Other hosts give up on the first one after 300.

    Raises:
      hub.LoginError: there is no token, or the Hub refuses it.
      ValueError: model_dir is not on a local disk.
    """
    if '://' in model_dir:
      raise ValueError(
        'PushToHub reads checkpoints from local folders only. Got: model_dir='
        f'{model_dir!r}. Leave it out, and push a local copy of a checkpoint with '
        '`python -m bart_t5x.hf.convert export --push_to_hub=…`.'
      )
    self._follower = None
    self._last_push_seconds = last_push_seconds
    if jax.process_index() != 0:
      return
    try:
      hub.check_login(repo_id)
    except hub.LoginError:
      raise
    except hub.HubError as e:
      logging.warning('%s Training goes on; pushes will be tried.', e)
    arguments = [f'--model_dir={model_dir}', f'--push_to_hub={repo_id}']
    arguments += ['--private'] if private else []
    arguments += [f'--revision={revision}'] if revision else []
    arguments += [f'--corpus_dir={corpus_dir}'] if corpus_dir else []
    folder = pathlib.Path(model_dir)
    folder.mkdir(parents=True, exist_ok=True)
    self._log = folder / LOG_FILE
    self._told = self._log.stat().st_size if self._log.exists() else 0
    self._follower = _start_follower(arguments, self._log)
    atexit.register(self.close)  # For a t5x that does not close its actions.

  def run(self, train_state: Any, metrics_by_task: Mapping[str, Any]) -> bool:
    """Tells in the run's log what has been pushed; never ends the training."""
    del train_state, metrics_by_task
    if self._follower is not None:
      self._tell()
      if self._follower.poll() is not None:
        logging.warning('Nothing is pushed any more; %s says why.', self._log)
        self._follower = None
    return False

  def close(self) -> None:
    """Waits for the last checkpoint's push; called when training has ended."""
    follower, self._follower = self._follower, None
    if follower is None:
      return
    follower.stdin.close()
    try:
      follower.wait(self._last_push_seconds)
    except subprocess.TimeoutExpired:
      logging.warning('The last push goes on by itself; see %s.', self._log)
    self._tell()

  def _tell(self) -> None:
    """Passes on what the follower has written since the last time."""
    with self._log.open('rb') as log:
      log.seek(self._told)
      written = b''.join(line for line in log if line.endswith(b'\n'))
    self._told += len(written)
    for line in written.decode(errors='replace').splitlines():
      logging.info('Hub: %s', line)
