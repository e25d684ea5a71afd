"""Every public name of T5X is here, with its parameters, or API.md says why not.

surface.txt lists them: a name a line, and its parameters in order.
"""

import dataclasses
import importlib
import inspect
import pathlib

import pytest

HERE = pathlib.Path(__file__).parent

# What this runtime does not have; API.md, "Absent", gives the reasons.
ABSENT = {
  'checkpoint_utils.get_restore_parameters',
  'checkpoints.fake_param_info',
  'checkpoints.register_ts_spec_for_serialization',
  'config_utils.config_with_fiddle',
  'config_utils.direct_summarize_fiddle_config',
  'config_utils.prepare_to_summarize',
  'config_utils.sanitize_summary_getter',
  'optimizers.amos',
}


def read_surface():
  """{'module.name' or 'module.Class.method': parameters; None where unknown}."""
  surface = {}
  for line in (HERE / 'surface.txt').read_text().splitlines():
    if line.startswith('#'):
      continue
    name, _, parameters = line.partition(' ')
    listed = [one for one in parameters.split(',') if one]
    surface[name] = None if parameters == '-' else listed
  return surface


SURFACE = read_surface()


def find(name):
  """The object that a dotted name in t5x stands for, as found in its owner."""
  module, *path = name.split('.')
  owner, found = None, importlib.import_module(f't5x.{module}')
  for part in path:
    owner, found = found, getattr(found, part)
  if inspect.isclass(owner):
    static = inspect.getattr_static(owner, path[-1])
    return static if isinstance(static, property) else found
  return found


def parameters_of(found):
  """Parameters but self, with whether each may be left out."""
  variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
  return {
    parameter.name: parameter.default is not parameter.empty
    for parameter in inspect.signature(found).parameters.values()
    if parameter.kind not in variadic and parameter.name not in ('self', 'cls')
  }


@pytest.mark.parametrize('name', sorted(SURFACE.keys() - ABSENT))
def test_the_name_is_there_with_its_parameters(name):
  found, expected = find(name), SURFACE[name]
  if not expected or isinstance(found, property) or not callable(found):
    return
  if inspect.isclass(found) and not dataclasses.is_dataclass(found):
    assert set(expected) <= set(dir(found)) | set(inspect.get_annotations(found))
    return
  try:
    actual = parameters_of(found)
  except ValueError:  # Built in C: nothing to compare.
    return
  if not actual and name.endswith('Callable.__call__'):
    return  # A protocol that leaves its parameters open.
  assert [one for one in actual if one in expected] == expected
  further = {one: optional for one, optional in actual.items() if one not in expected}
  assert all(further.values()), f'{name} asks for more than T5X does: {further}'


def test_what_is_absent_is_explained():
  text = (HERE.parent / 'API.md').read_text()
  for name in ABSENT:
    assert name.partition('.')[2] in text
    with pytest.raises(AttributeError):
      find(name)
