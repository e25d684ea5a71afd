"""What the commands of this package have in common."""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator


def quiet_libraries() -> None:
  """Keeps the start-up lines of TensorFlow's C++ parts from the screen.

  They read the environment when they are loaded, so a command calls this first of all.
  What the user has set already stays.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')


def import_tensorflow() -> None:
  """Imports TensorFlow without what its C++ parts print while they are loaded.

  TensorFlow 2.21 prints lines that TF_CPP_MIN_LOG_LEVEL does not reach, about GPUs that
  are not there. If the import fails, all that was printed is shown.
  """
  if 'tensorflow' not in sys.modules:
    with _hidden_stderr():
      import tensorflow  # noqa: F401  (for later imports to find it)


def quiet_warnings() -> None:
  """Shows what tasks warn of once, and of seqio only errors.

  For commands that read a task several times over, and train nothing.
  """
  logger = logging.getLogger('absl')
  if not any(isinstance(f, _NewAndOurs) for f in logger.filters):
    logger.addFilter(_NewAndOurs())


class _NewAndOurs(logging.Filter):
  """Lets each message through once, and of seqio's only errors."""

  def __init__(self):
    super().__init__()
    self._seen = set()

  def filter(self, record: logging.LogRecord) -> bool:
    if record.levelno >= logging.ERROR:
      return True
    text = record.getMessage()
    known = text in self._seen
    self._seen.add(text)
    return not known and f'{os.sep}seqio{os.sep}' not in record.pathname


@contextlib.contextmanager
def _hidden_stderr() -> Iterator[None]:
  """Holds back what is written to file descriptor 2, shown only if the body raises.

  The runtime has the like for its scripts (`quiet`); upstream T5X, on which these
  commands run too, has none to call.
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


def fail(reason: object) -> int:
  """Tells in one message on stderr why a command cannot do what it was asked for.

  Args:
    reason: names the value, the rule and the mend.

  Returns:
    1, the exit status. (A command line that cannot be read ends with 2, by argparse.)
  """
  print(f'error: {reason}', file=sys.stderr)
  return 1
