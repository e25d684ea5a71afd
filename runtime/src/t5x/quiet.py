"""Logs that a person can read: our own lines, and not the libraries' chatter."""

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator

from absl import logging as absl_logging

# Libraries whose notes and warnings are about themselves; their errors still show.
_CHATTY = (
  'absl', 'clu', 'etils', 'flax', 'gin', 'grain', 'jax', 'orbax', 'seqio', 'tensorflow',
  'tensorflow_datasets', 'tensorstore', 'tf_keras',
)  # fmt: skip

# seqio's PyLoggingLogger is asked for in gin: what it logs are the results.
_WANTED_FILES = (os.path.join('seqio', 'loggers.py'),)


class _OwnLines(logging.Filter):
  """Lets through what our code and the user's says, and libraries' errors."""

  def filter(self, record: logging.LogRecord) -> bool:
    if record.levelno >= logging.ERROR or record.pathname.endswith(_WANTED_FILES):
      return True
    _, installed, inside = record.pathname.rpartition(f'-packages{os.sep}')
    if installed:
      return inside.partition(os.sep)[0] not in _CHATTY
    # Code outside of the installed packages writes to the logger of absl.
    return record.name == 'absl' or record.name.partition('.')[0] not in _CHATTY


class _Line(logging.Formatter):
  """`12:34:56 message`, with the level's name where it is a warning or worse."""

  def __init__(self, process: str = ''):
    super().__init__(datefmt='%H:%M:%S')
    self._process = process

  def format(self, record: logging.LogRecord) -> str:
    level = f'{record.levelname}: ' if record.levelno > logging.INFO else ''
    clock = self.formatTime(record, self.datefmt)
    line = f'{clock} {self._process}{level}{record.getMessage()}'
    if record.exc_info:
      line += '\n' + self.formatException(record.exc_info)
    return line


def set_up_logging(verbose: bool) -> None:
  """Sends log lines to stderr, ours only unless `verbose`.

  Args:
    verbose: show everything, in absl's own format with file and line.
  """
  handler = absl_logging.get_absl_handler()
  absl_logging.use_absl_handler()
  absl_logging.use_python_logging(quiet=True)
  if verbose:
    return
  absl_logging.set_verbosity(absl_logging.INFO)
  # Read by the C++ parts when they are loaded.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('GRPC_VERBOSITY', 'NONE')
  handler.setFormatter(_Line())
  handler.addFilter(_OwnLines())
  for library in _CHATTY:
    if library != 'absl':
      warnings.filterwarnings('ignore', module=rf'{library}(\.|$)')


def name_process(index: int, count: int) -> None:
  """Puts `[index/count]` before every line, where several processes share a log.

  Args:
    index: this process, from 0.
    count: how many there are. 1 changes nothing.
  """
  handler = absl_logging.get_absl_handler().python_handler
  if count > 1 and isinstance(handler.formatter, _Line):
    handler.setFormatter(_Line(f'[{index}/{count}] '))


@contextlib.contextmanager
def hidden_stderr() -> Iterator[None]:
  """Keeps what C++ code prints while it is loaded off the screen.

  Nothing is lost if it fails: the text is then printed after all.
  """
  sys.stderr.flush()
  screen = os.dup(2)
  with tempfile.TemporaryFile() as kept:
    os.dup2(kept.fileno(), 2)
    try:
      yield
    except BaseException:
      kept.seek(0)
      os.write(screen, kept.read())
      raise
    finally:
      sys.stderr.flush()
      os.dup2(screen, 2)
      os.close(screen)
