"""What the commands of this package have in common."""

import os


def quiet_libraries() -> None:
  """Keeps the start-up lines of TensorFlow's C++ parts from the screen.

  They read the environment when they are loaded, so a command calls this first of all.
  What the user has set already stays.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
