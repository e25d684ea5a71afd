"""That the checks of shapes and dtypes are on, and of what they say nothing."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from bart_t5x import attention

QUERY = np.zeros((2, 3, 1, 4), np.float32)


@pytest.mark.parametrize(
  'key',
  [np.zeros((2, 5, 2, 4), np.float32), np.zeros((2, 5, 1, 4), np.int32)],
  ids=['shape', 'dtype'],
)
def test_wrong_arrays_are_told(key):
  with pytest.raises(TypeCheckError, match="parameter 'key'"):
    attention.plain_attention(QUERY, key, key)


def test_arrays_of_numpy_and_of_jax_pass():
  for key in (np.zeros((2, 5, 1, 4), np.float32), jnp.zeros((2, 5, 1, 4))):
    assert attention.plain_attention(QUERY, key, key).shape == QUERY.shape


def test_the_function_itself_is_still_there():
  key = np.zeros((2, 5, 1, 4), np.int32)
  assert inspect.unwrap(attention.plain_attention)(QUERY, key, QUERY[:, :1]) is not None
