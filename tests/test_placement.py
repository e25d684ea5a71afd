"""What code that is traced knows of its mesh: by hand, on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning

from bart_t5x import placement

RULES = [('batch', 'data'), ('heads', 'model')]


def _mesh():
  return jax.make_mesh((4, 2), ('data', 'model'), (jax.sharding.AxisType.Auto,) * 2)


def _numbered(heads=4):
  """Each element as (its part's first row, its part's first head)."""

  def part(starts, x):
    return jnp.zeros_like(x) + starts[0] * 100 + starts[1]

  x = jnp.zeros((8, heads), jnp.int32)
  sizes = {'batch': 8, 'heads': heads}
  names = ('batch', 'heads')
  return jax.jit(placement.split(part, (names,), names, sizes, names))(x)


def test_without_a_mesh_all_is_one_part():
  assert placement.mesh() is None
  np.testing.assert_array_equal(_numbered(), 0)


def test_every_part_knows_where_it_begins():
  with jax.set_mesh(_mesh()), partitioning.axis_rules(RULES):
    got = _numbered()
  rows, heads = np.indices((8, 4))
  np.testing.assert_array_equal(got, rows // 2 * 200 + heads // 2 * 2)


def test_what_does_not_divide_stays_whole():
  with jax.set_mesh(_mesh()), partitioning.axis_rules(RULES):
    got = _numbered(heads=3)
  np.testing.assert_array_equal(
    got, np.arange(8)[:, None] // 2 * 200 + np.zeros((8, 3))
  )


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_mesh_entered_the_old_way_is_seen():
  """As google-research/t5x enters it."""
  with _mesh(), partitioning.axis_rules(RULES):
    assert placement.mesh().shape['model'] == 2
    assert placement.device().platform == 'cpu'
    got = _numbered()
  assert got[7, 3] == 602
