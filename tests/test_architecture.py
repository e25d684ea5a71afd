"""Directions of imports, and checks of shapes and dtypes while tests run."""

import ast
import dataclasses
import pathlib

import array_types
import jaxtyping
import numpy as np
import pytest
from jaxtyping import Array, Float, TypeCheckError

from bart_t5x import attention

ROOT = pathlib.Path(__file__).parent.parent


def imported(*folders):
  """(file, dotted name) of all imports, late and typing-only ones included."""
  for folder in folders:
    for path in sorted((ROOT / folder).rglob('*.py')):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
          yield from ((path, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
          yield from ((path, f'{node.module}.{alias.name}') for alias in node.names)


def test_the_runtime_does_not_import_the_model():
  found = {
    (path, name)
    for path, name in imported('runtime/src')
    if name.split('.')[0] in ('bart_t5x', 'tasks')
  }
  assert not found


def test_nothing_in_the_runtime_imports_the_facade():
  assert not {path for path, name in imported('runtime/src') if name == 't5x.utils'}


def test_gin_is_not_a_package():
  assert not (ROOT / 'gin' / '__init__.py').exists()  # It would hide gin-config.


QUERY = np.zeros((2, 3, 1, 4), np.float32)


@pytest.mark.parametrize(
  'key',
  [np.zeros((2, 5, 2, 4), np.float32), np.zeros((2, 5, 1, 4), np.int32)],
  ids=['shape', 'dtype'],
)
def test_wrong_arrays_raise(key):
  with pytest.raises(TypeCheckError, match="parameter 'key'"):
    attention.plain_attention(QUERY, key, key)


def test_trees_may_have_anything_in_place_of_arrays():
  @dataclasses.dataclass
  class State:
    moment: Float[Array, ' d']

    def scaled(self, factor: Float[Array, '']):
      return self.moment * factor

  checked = jaxtyping.jaxtyped(State, typechecker=array_types.check)
  assert checked(moment=('embed',)).moment == ('embed',)
  scaled = jaxtyping.jaxtyped(State.scaled, typechecker=array_types.check)
  with pytest.raises(TypeCheckError, match="parameter 'factor'"):
    scaled(State(np.ones(3)), np.ones(3))
