"""Checks shapes and dtypes in signatures at run time; ignores other annotations.

NumPy arrays may be passed for `Array`, as in JAX.
"""

import collections.abc
import functools
import operator
import types
import typing

import jax
import jaxtyping
from beartype import beartype

# Types that are kept in annotations; all others, except arrays, become `Any`.
_CONTAINERS = (tuple, list, dict, collections.abc.Mapping, collections.abc.Sequence)
_PLAIN = (int, float, bool, str, type(None), Ellipsis)


def install(modules) -> None:
  """Checks all functions of modules and packages that are not yet imported."""
  jaxtyping.install_import_hook(list(modules), 'array_types.check')


def check(function):
  """Wraps a function to check shapes and dtypes."""
  if function.__name__ == '__init__':
    # A dataclass that is a tree may hold axes or shapes instead of arrays.
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
  """Replaces parts of a hint that are neither arrays nor plain by `Any`."""
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
