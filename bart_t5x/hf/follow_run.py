"""Pushes a run's checkpoints to the Hub as they appear, beside the training.

python -m bart_t5x.hf.follow_run --model_dir=runs/NAME --push_to_hub=ORG/NAME

A program of its own: training waits neither for the export nor for the network, and a
fault here cannot end it. `push_action.PushToHub` starts it with a run.
"""

import argparse
import os
import pathlib
import re
import select
import shlex
import sys
import time
from collections.abc import Sequence

from bart_t5x import cli

# The last export lies here, in the run's folder.
EXPORT_FOLDER = 'hub_export'


def newest_checkpoint(model_dir: pathlib.Path) -> pathlib.Path | None:
  """The whole checkpoint with the highest step; None where there is none yet."""
  steps = [
    int(match[1])
    for path in model_dir.glob('checkpoint_*')
    if (match := re.fullmatch('checkpoint_([0-9]+)', path.name))
  ]
  return model_dir / f'checkpoint_{max(steps)}' if steps else None


class RunFollower:
  """Exports and pushes each newest checkpoint once; failures are tried again.

  Args:
    model_dir: the run's folder.
    repo_id: `org/name` on the Hub.
    private: see `hub.push`.
    revision: see `hub.push`.
    corpus_dir: with the tokenizer; by default that of the run's task.
    retry_seconds: pause after a failure; doubles with each, up to ten minutes.
  """

  def __init__(
    self,
    model_dir: pathlib.Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    corpus_dir: pathlib.Path | None = None,
    retry_seconds: float = 30.0,
  ):
    self._model_dir = model_dir
    self._repo_id = repo_id
    self._private = private
    self._revision = revision
    self._corpus_dir = corpus_dir
    self._retry_seconds = retry_seconds
    self._failures = 0
    self._retry_at = 0.0
    # What an earlier start of the run pushed is pushed again: equal files cost nothing.
    self._last_pushed: pathlib.Path | None = None

  def pending(self) -> bool:
    """Whether there is a checkpoint that has not been pushed."""
    newest = newest_checkpoint(self._model_dir)
    return newest is not None and newest != self._last_pushed

  def step(self, now: bool = False) -> None:
    """Pushes the newest checkpoint if that is due.

    Args:
      now: do not wait for the pause after a failure to end, and name no next try.
    """
    if not self.pending() or not (now or time.monotonic() >= self._retry_at):
      return
    checkpoint = newest_checkpoint(self._model_dir)
    try:
      url = self._push(checkpoint)
    except (ImportError, OSError, ValueError) as e:
      pause = min(self._retry_seconds * 2**self._failures, 600.0)
      self._failures += 1
      self._retry_at = time.monotonic() + pause
      following = '' if now else f' Next try in {pause:.0f} s.'
      _say(f'{checkpoint.name} was not pushed: {e}{following}')
    else:
      self._failures, self._last_pushed = 0, checkpoint
      _say(f'{checkpoint.name} pushed to {url}')

  def _push(self, checkpoint: pathlib.Path) -> str:
    from bart_t5x.hf import export, hub  # late: to export imports TensorFlow

    folder = self._model_dir / EXPORT_FOLDER
    export.export(
      checkpoint,
      folder,
      self._command(),
      corpus_dir=self._corpus_dir,
      overwrite=True,
      model_name=self._repo_id,
    )
    return hub.push(
      folder,
      self._repo_id,
      f'Step {checkpoint.name.rpartition("_")[2]}',
      self._private,
      self._revision,
      logs=self._model_dir,
    )

  def _command(self) -> str:
    """What does the same by hand, for the model card."""
    options = {
      'model_dir': self._model_dir,
      'push_to_hub': self._repo_id,
      'revision': self._revision,
      'corpus_dir': self._corpus_dir,
    }
    words = [f'--{name}={value}' for name, value in options.items() if value]
    words += ['--private'] if self._private else []
    return shlex.join(['python', '-m', 'bart_t5x.hf.follow_run', *words])


def _say(message: str) -> None:
  print(f'{time.strftime("%Y-%m-%d %H:%M:%S")} {message}', flush=True)


def _wait(seconds: float, watch_stdin: bool) -> bool:
  """Waits; returns at once with True if stdin is watched and has been closed."""
  if not watch_stdin:
    time.sleep(seconds)
    return False
  ready, _, _ = select.select([sys.stdin], [], [], seconds)
  return bool(ready) and not os.read(sys.stdin.fileno(), 1024)


def follow(
  follower: RunFollower, poll_seconds: float, watch_stdin: bool, last_tries: int = 3
) -> int:
  """Pushes until interrupted, or until stdin is closed and the last one is pushed.

  Args:
    follower: of the run.
    poll_seconds: between looks into the run's folder.
    watch_stdin: whether a closed stdin, the end of the run, ends this too.
    last_tries: how often the last checkpoint is tried once the run has ended.

  Returns:
    0, or 1 where the last checkpoint could not be pushed.
  """
  while not _wait(poll_seconds, watch_stdin):
    follower.step()
  for attempt in range(last_tries):
    if attempt:
      time.sleep(poll_seconds * 2 ** (attempt - 1))
    follower.step(now=True)
    if not follower.pending():
      return 0
  _say('Given up. `python -m bart_t5x.hf.convert export --push_to_hub=…` pushes it.')
  return 1


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m bart_t5x.hf.follow_run', description=__doc__.split('\n')[0]
  )
  parser.add_argument('--model_dir', type=pathlib.Path, required=True)
  parser.add_argument(
    '--push_to_hub',
    metavar='ORG/NAME',
    required=True,
    help='the token is that of `hf auth login` or HF_TOKEN',
  )
  parser.add_argument(
    '--private', action='store_true', help='push to a private repository only'
  )
  parser.add_argument('--revision', help='branch to push to; by default main')
  parser.add_argument(
    '--corpus_dir',
    type=pathlib.Path,
    help="the folder with the tokenizer; by default that of the run's task",
  )
  parser.add_argument(
    '--poll_seconds', type=float, default=5.0, help='between looks into model_dir'
  )
  parser.add_argument(
    '--until_stdin_closes',
    action='store_true',
    help='end when stdin is closed, with the last checkpoint pushed',
  )
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Follows a run; without a login it ends at once, with one message.

  Args:
    argv: the command line, sys.argv by default.

  Returns:
    The exit status.
  """
  cli.quiet_libraries()
  from bart_t5x.hf import hub

  args = _parser().parse_args(argv)
  if not args.model_dir.is_dir():
    return cli.fail(f'--model_dir={args.model_dir} is no local folder')
  follower = RunFollower(
    args.model_dir, args.push_to_hub, args.private, args.revision, args.corpus_dir
  )
  try:
    hub.check_login(args.push_to_hub)
  except hub.LoginError as e:
    return cli.fail(e)
  except hub.HubError as e:
    _say(f'{e} Pushes will be tried all the same.')
  try:
    return follow(follower, args.poll_seconds, args.until_stdin_closes)
  except KeyboardInterrupt:
    return 130


if __name__ == '__main__':
  sys.exit(main())
