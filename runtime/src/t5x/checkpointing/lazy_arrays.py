"""Arrays whose shape is known and whose values are read when asked for."""

import abc
import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent import futures
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

ArrayLike = Any  # numpy or JAX array, or a number.


class LazyArray(abc.ABC):
  """A shape, a dtype, and a function that gets the values.

  Attributes:
    shape: the array's.
    dtype: what the values are cast to.
  """

  def __init__(
    self, shape: Sequence[int] | None, dtype: Any, get_fn: Callable[[], Any]
  ):
    self._shape = None if shape is None else tuple(shape)
    self._dtype = None if dtype is None else jnp.dtype(dtype)
    self._get_fn = get_fn

  @property
  def shape(self) -> tuple[int, ...] | None:
    """The array's shape."""
    return self._shape

  @property
  def dtype(self) -> Any:
    """What the values will be cast to."""
    return self._dtype

  @property
  def nbytes(self) -> int:
    """Size of the values once they are read."""
    return int(np.prod(self._shape, dtype=np.int64)) * self._dtype.itemsize

  def astype(self, dtype: Any) -> Self:
    """The same array, cast to another dtype once it is read."""
    return type(self)(self._shape, dtype, self._get_fn)

  def _cast(self, values: ArrayLike) -> ArrayLike:
    return values if values.dtype == self._dtype else values.astype(self._dtype)

  @abc.abstractmethod
  async def get_async(self) -> ArrayLike:
    """Reads the values without blocking the event loop."""

  @abc.abstractmethod
  def get(self) -> ArrayLike:
    """Reads the values."""

  def __repr__(self) -> str:
    return f'{type(self).__name__}({self._shape}, {self._dtype})'


class LazyThreadPoolArray(LazyArray):
  """For a function that blocks."""

  executor = futures.ThreadPoolExecutor()

  async def get_async(self) -> ArrayLike:
    """Reads the values in a thread."""
    return await asyncio.wrap_future(self.executor.submit(self.get))

  def get(self) -> ArrayLike:
    """Reads the values in this thread."""
    return self._cast(self._get_fn())


class LazyAwaitableArray(LazyArray):
  """For a function that returns an awaitable. `get` needs a thread without a loop."""

  async def get_async(self) -> ArrayLike:
    """Reads the values."""
    return self._cast(await self._get_fn())

  def get(self) -> ArrayLike:
    """Reads the values in an event loop of their own."""
    return asyncio.run(self.get_async())

  @classmethod
  def from_tensor_store_spec(
    cls,
    ts_spec: Any,
    get_fn: Callable[[], Awaitable[ArrayLike]],
    dtype: Any = None,
  ) -> Self:
    """Takes shape and dtype from a `tensorstore.Spec`.

    Args:
      ts_spec: the specification of a zarr array, with its metadata.
      get_fn: reads it.
      dtype: what to cast to; None for the specification's own.
    """
    described = ts_spec.to_json()
    if dtype is None:
      dtype = described['dtype']
      if dtype == 'uint16':
        # The second version of the layout kept bfloat16's bits under this name.
        dtype = jnp.bfloat16
    return cls(described['metadata']['shape'], dtype, get_fn)

  @classmethod
  def from_array(
    cls,
    array: ArrayLike,
    get_fn: Callable[[], Awaitable[ArrayLike]],
    dtype: Any = None,
  ) -> Self:
    """Takes shape and, unless given, dtype from an array."""
    return cls(array.shape, array.dtype if dtype is None else dtype, get_fn)

  @classmethod
  def from_tensor_store_spec_or_array(
    cls,
    maybe_ts_spec: Any,
    get_fn: Callable[[], Awaitable[ArrayLike]],
    dtype: Any = None,
  ) -> Self:
    """One of the above, whichever applies."""
    is_spec = hasattr(maybe_ts_spec, 'to_json')
    make = cls.from_tensor_store_spec if is_spec else cls.from_array
    return make(maybe_ts_spec, get_fn, dtype=dtype)
