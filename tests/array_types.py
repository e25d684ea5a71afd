"""Checks the shapes and dtypes in array functions' signatures at run time.

Other annotations are ignored. For `Array`, tests may pass NumPy arrays, as JAX does.
"""

import collections.abc
import functools
import operator
import types
import typing

import jax
import jaxtyping
from beartype import beartype

# Types that are checked, besides arrays; all others become `Any`.
_CONTAINERS = (tuple, list, dict, collections.abc.Mapping, collections.abc.Sequence)
_PLAIN = (int, float, bool, str, type(None), Ellipsis)


def install(modules) -> None:
  """Checks all functions in these modules (and within packages), not yet imported."""
  jaxtyping.install_import_hook(list(modules), 'array_types.check')


def check(function):
  """Wraps a function to check shapes and dtypes; `inspect.unwrap` undoes it."""
  if function.__name__ == '__init__':
    # A dataclass that is a tree may have axes or shapes in place of its arrays.
    return function
  hints = getattr(function, '__annotations__', {})
  function.__annotations__ = {
    name: _arrays_of(hint) for name, hint in hints.items() if _has_arrays(hint)
  }
  return beartype(function) if function.__annotations__ else function


def _is_array(hint) -> bool:
  return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def _has_arrays(hint) -> bool:
  return _is_array(hint) or any(map(_has_arrays, typing.get_args(hint)))


def _arrays_of(hint):
  """The hint, with `Any` for what is neither an array nor plain."""
  if _is_array(hint):
    if hint.array_type is jax.Array:
      hint.array_type = typing.Any
    return hint
  parts = tuple(map(_arrays_of, typing.get_args(hint)))
  origin = typing.get_origin(hint)
  if origin in (typing.Union, types.UnionType):
    return functools.reduce(operator.or_, parts)
  if origin in _CONTAINERS:
    return origin[parts]
  return hint if hint in _PLAIN else typing.Any
