"""Arrays that are read when asked for."""

import asyncio

import jax.numpy as jnp
import numpy as np
import tensorstore

from t5x.checkpointing.lazy_arrays import LazyAwaitableArray, LazyThreadPoolArray


def test_nothing_is_read_before_it_is_asked_for():
  reads = []

  def read():
    reads.append(1)
    return np.ones((2, 3), np.float32)

  lazy = LazyThreadPoolArray((2, 3), np.float32, read)
  assert (lazy.shape, lazy.dtype, lazy.nbytes) == ((2, 3), np.float32, 24)
  half = lazy.astype(jnp.bfloat16)
  assert half.nbytes == 12 and not reads
  assert half.get().dtype == jnp.bfloat16
  assert asyncio.run(lazy.get_async()).dtype == np.float32
  assert len(reads) == 2
  assert repr(lazy) == 'LazyThreadPoolArray((2, 3), float32)'


def test_awaitables():
  async def read():
    return np.arange(3, dtype=np.float32)

  lazy = LazyAwaitableArray.from_array(np.zeros(3, np.float64), read, np.int32)
  assert lazy.get().dtype == np.int32
  spec = tensorstore.Spec(
    {
      'driver': 'zarr',
      'dtype': 'uint16',
      'kvstore': {'driver': 'memory'},
      'metadata': {'shape': [3], 'chunks': [3], 'compressor': None},
    }
  )
  make = LazyAwaitableArray.from_tensor_store_spec_or_array
  # The second version of T5X's layout kept bfloat16 under this name.
  assert make(spec, read).dtype == jnp.bfloat16
  assert make(spec, read, np.float32).get().tolist() == [0, 1, 2]
  assert make(np.zeros(3), read).dtype == np.float64
