"""Helpers of the command lines."""

import contextlib
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator


class UsageError(ValueError):
  """The arguments are invalid."""


def fail(reason: object) -> int:
  """Prints an error to stderr and returns the exit status, 1."""
  print(f'error: {reason}', file=sys.stderr)
  return 1


def set_up_libraries() -> None:
  """Keeps libraries quiet and off accelerators, which a run may hold; call it first.

  Variables that the user has set stay.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')


_importing = threading.Lock()


def import_tensorflow() -> None:
  """Imports TensorFlow, hiding messages that ignore TF_CPP_MIN_LOG_LEVEL."""
  with _importing:
    if 'tensorflow' not in sys.modules:
      with _hidden_stderr():
        import tensorflow  # noqa: F401


def quiet_warnings() -> None:
  """Logs each warning once, and none of seqio."""
  logger = logging.getLogger('absl')
  if not any(isinstance(f, _OnceAndNotSeqio) for f in logger.filters):
    logger.addFilter(_OnceAndNotSeqio())


class _OnceAndNotSeqio(logging.Filter):
  def __init__(self):
    super().__init__()
    self._seen = set()

  def filter(self, record: logging.LogRecord) -> bool:
    if record.levelno >= logging.ERROR:
      return True
    text = record.getMessage()
    seen = text in self._seen
    self._seen.add(text)
    return not seen and f'{os.sep}seqio{os.sep}' not in record.pathname


@contextlib.contextmanager
def _hidden_stderr() -> Iterator[None]:
  """Hides writes to file descriptor 2; shows them if the body raises."""
  sys.stderr.flush()
  screen = os.dup(2)
  with tempfile.TemporaryFile() as hidden:
    os.dup2(hidden.fileno(), 2)
    try:
      yield
    except BaseException:
      hidden.seek(0)
      os.write(screen, hidden.read())
      raise
    finally:
      sys.stderr.flush()
      os.dup2(screen, 2)
      os.close(screen)
