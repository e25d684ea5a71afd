"""What a run's `config.gin` says, read as text: nothing is imported or run.

T5X writes the bindings that a run used into `MODEL_DIR/config.gin`. They refer to
the script that ran (`__main__.train`), so the file cannot be evaluated elsewhere;
its plain values, macros resolved, are all that the bridge needs.
"""

import dataclasses
import pathlib
from typing import Any

from gin import config_parser


@dataclasses.dataclass(frozen=True)
class Reference:
  """`@name` or `@name()`: kept by name."""

  name: str


@dataclasses.dataclass(frozen=True)
class _Macro:
  name: str


class _Names(config_parser.ParserDelegate):
  """Leaves references and macros unresolved."""

  def configurable_reference(self, scoped_configurable_name, evaluate):
    del evaluate
    return Reference(scoped_configurable_name)

  def macro(self, macro_name):
    return _Macro(macro_name)


class RunConfig:
  """The bindings of a run: `config.value('network.BartConfig', 'emb_dim')`."""

  def __init__(self, text: str):
    self._bindings: dict[tuple[str, str], Any] = {}
    for statement in config_parser.ConfigParser(text, _Names()):
      if isinstance(statement, config_parser.BindingStatement):
        selector = '/'.join(filter(None, (statement.scope, statement.selector)))
        self._bindings[selector, statement.arg_name or ''] = statement.value

  def _resolved(self, value: Any) -> Any:
    if isinstance(value, _Macro):
      if (value.name, '') not in self._bindings:
        raise ValueError(
          f'config.gin uses the macro {value.name}, which it does not define: it '
          'is no whole config.gin of a run'
        )
      return self._resolved(self._bindings[value.name, ''])
    if isinstance(value, dict):
      return {key: self._resolved(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
      return type(value)(self._resolved(item) for item in value)
    return value

  def bindings_of(self, selector: str) -> dict[str, Any]:
    """All values bound on a configurable; the module's name may be left out.

    Args:
      selector: for instance 'BartConfig', which also finds
        'bart_t5x.network.BartConfig', or 'train/DatasetConfig' with its scope.

    Returns:
      Parameter name to value, macros resolved, references as `Reference`.
    """
    *scope, name = selector.split('/')
    found = {}
    for (bound, parameter), value in self._bindings.items():
      *bound_scope, bound_name = bound.split('/')
      same_name = bound_name == name or bound_name.endswith('.' + name)
      if parameter and same_name and bound_scope == scope:
        found[parameter] = self._resolved(value)
    return found

  def macro(self, name: str) -> Any:
    """A macro's value; None where the run has no such macro."""
    return self._resolved(self._bindings.get((name, '')))


def read(path: str | pathlib.Path) -> RunConfig:
  """Reads `config.gin`.

  Raises:
    FileNotFoundError: there is none; says where it is expected.
    ValueError: it is not Gin.
  """
  path = pathlib.Path(path)
  try:
    text = path.read_text(encoding='utf-8')
  except FileNotFoundError as e:
    raise FileNotFoundError(
      f'no {path}: the bridge reads the shape of the model from it. It lies '
      'beside the checkpoints of every run; name another with --config=FILE.'
    ) from e
  try:
    return RunConfig(text)
  except SyntaxError as e:
    raise ValueError(f'{path} is no valid Gin file: {e}') from e
