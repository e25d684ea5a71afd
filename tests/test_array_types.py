"""Checks of shapes and dtypes while tests run."""

import dataclasses

import array_types
import jaxtyping
import numpy as np
import pytest
from jaxtyping import Array, Float, TypeCheckError

from bart_t5x import attention

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
