"""Starting a script. T5X's module of this name also serves Fiddle; this one is gin.

`fiddle` is not a dependency. The names that scripts call are here; those that take or
return a Fiddle configuration are not.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from t5x import gin_utils


def using_fdl() -> bool:
  """Whether a Fiddle configuration was given on the command line: never."""
  return False


def run(main: Callable[[Sequence[str]], Any]) -> None:
  """Runs `main` under absl, with JAX's flags and '--gin.NAME=VALUE' understood."""
  jax.config.parse_flags_with_absl()
  gin_utils.run(main)
