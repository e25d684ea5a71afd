"""What the commands of this package have in common."""

import os
import sys


def quiet_libraries() -> None:
  """Keeps the start-up lines of TensorFlow's C++ parts from the screen.

  They read the environment when they are loaded, so a command calls this first of all.
  What the user has set already stays.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')


def fail(reason: object) -> int:
  """Tells in one message on stderr why a command cannot do what it was asked for.

  Args:
    reason: names the value, the rule and the mend.

  Returns:
    1, the exit status. (A command line that cannot be read ends with 2, by argparse.)
  """
  print(f'error: {reason}', file=sys.stderr)
  return 1
