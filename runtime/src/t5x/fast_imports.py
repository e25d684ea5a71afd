"""Imports TensorFlow and seqio without Keras, which neither the runtime nor seqio uses.

Keras itself imports pandas, scikit-learn, SciPy's statistics and Pillow where they are
installed: together about half of the time to the first training step. Whoever does use
`tf.keras` or `tensorflow_text.keras` gets it at the first use.
"""

import contextlib
import gc
import importlib
import os
import sys
import types
from collections.abc import Iterator
from importlib import util as importlib_util
from typing import Any

# Modules that import Keras while seqio and clu are imported, with the names in them
# that are looked up at once though nobody may ever call them.
_KERAS_USERS = {
  'tensorflow_text.python.keras': (),
  'tensorboard.plugins.hparams._keras': ('Callback',),
}


class _AtFirstUse(types.ModuleType):
  """Stands for a module until one of its public names is used."""

  def __init__(self, name: str, called_later: tuple[str, ...]):
    """Imports nothing.

    Args:
      name: the module's.
      called_later: names in it that are given out without importing it; calling what
        was given out does.
    """
    super().__init__(name)
    self._called_later = called_later

  def __getattr__(self, name: str) -> Any:
    # TensorFlow looks for marks such as _tf_decorator on everything it exports.
    if name.startswith('_'):
      raise AttributeError(name)
    if name in self._called_later:
      return lambda *args, **kwargs: self._real(name)(*args, **kwargs)
    return self._real(name)

  def _real(self, name: str) -> Any:
    if sys.modules.get(self.__name__) is self:
      del sys.modules[self.__name__]
    return getattr(importlib.import_module(self.__name__), name)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
  """Sets an environment variable inside the `with` block."""
  before = os.environ.get(name)
  os.environ[name] = value
  try:
    yield
  finally:
    if before is None:
      del os.environ[name]
    else:
      os.environ[name] = before


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
  """Imports make many objects and no garbage; looking for it takes a tenth longer."""
  gc.disable()
  try:
    yield
  finally:
    gc.enable()
    gc.freeze()


def import_tensorflow_and_seqio() -> None:
  """Imports both, once; hides accelerators, which are JAX's, from TensorFlow."""
  if 'tensorflow' in sys.modules:
    return
  # With this set TensorFlow does not look for Keras while it is imported. `tf.keras`
  # reads the variable again when it is used, and then finds Keras.
  with _environment('TF_USE_LEGACY_KERAS', '1'), _without_garbage_collection():
    import tensorflow as tf

    for name, called_later in _KERAS_USERS.items():
      if importlib_util.find_spec(name.partition('.')[0]):
        sys.modules.setdefault(name, _AtFirstUse(name, called_later))
    import seqio  # noqa: F401  (for later imports to find it)

    tf.config.set_visible_devices([], 'GPU')
