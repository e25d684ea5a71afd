"""The beam dimension against NumPy."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x import beams

BATCH, BEAMS = 3, 4


def numbers(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('offset', [0, 1])
def test_beams_are_added_flattened_and_split_again(offset):
  x = numbers(*([2] * offset), BATCH, 5)
  added = beams.add_beam_dim(x, BEAMS, offset)
  np.testing.assert_array_equal(added, np.stack([x] * BEAMS, axis=offset + 1))
  flat = beams.flatten_beam_dim(added, offset)
  np.testing.assert_array_equal(flat, np.repeat(x, BEAMS, axis=offset))
  np.testing.assert_array_equal(beams.flat_batch_beam_expand(x, BEAMS, offset), flat)
  split = beams.unflatten_beam_dim(flat, BATCH, BEAMS, offset)
  np.testing.assert_array_equal(split, added)


def test_splitting_the_wrong_number_of_rows_is_refused():
  with pytest.raises(ValueError, match=r'shape \(5, 2\), batch size 3, beam size 4'):
    beams.unflatten_beam_dim(numbers(5, 2), BATCH, BEAMS)


def cache_of(wrap):
  return wrap(
    {
      'decoder': {
        'layers_0': {
          'cached_key': jnp.ones((2, 3)),
          'cached_bias': jnp.ones((1, 3)),
          'cache_index': jnp.array(1),
        },
        'position_embedder': {'position_embedder_index': jnp.array(1)},
      }
    }
  )


@pytest.mark.parametrize('wrap', [dict, flax.core.freeze])
@pytest.mark.parametrize('apply_to_index', [False, True])
def test_cache_map_leaves_what_has_no_batch_axis(wrap, apply_to_index):
  cache = cache_of(wrap)
  mapped = beams.cache_map(lambda x: x + 1, cache, apply_to_index)
  assert type(mapped) is type(cache)
  layer = mapped['decoder']['layers_0']
  assert np.all(layer['cached_key'] == 2)
  assert np.all(layer['cached_bias'] == 1)
  assert layer['cache_index'] == (2 if apply_to_index else 1)
  assert mapped['decoder']['position_embedder']['position_embedder_index'] == 1
  assert np.all(cache['decoder']['layers_0']['cached_key'] == 1)


@pytest.mark.parametrize('offset', [0, 1])
def test_positions_of_prompts_are_repeated_for_the_beams(offset):
  def cache(index):
    return {'position_embedder': {'position_embedder_index': jnp.asarray(index)}}

  expanded = beams.expand_position_indices(cache([1, 4, 2]), 3, 2, offset)
  np.testing.assert_array_equal(
    expanded['position_embedder']['position_embedder_index'], [1, 1, 4, 4, 2, 2]
  )
  # One position for all stays one.
  expanded = beams.expand_position_indices(cache(5), 3, 2, offset)
  assert expanded['position_embedder']['position_embedder_index'] == 5


@pytest.mark.parametrize('one_hot', [False, True])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_])
def test_gathering_beams_is_indexing(one_hot, dtype):
  x = jnp.asarray(numbers(BATCH, BEAMS, 5) * 10, dtype)
  index = np.array([[3, 3], [0, 2], [1, 0]])
  picked = jax.jit(
    lambda x, i: beams.gather_beams([x], i, BATCH, BEAMS, 2, one_hot=one_hot)
  )(x, index)[0]
  assert picked.dtype == x.dtype
  expected = np.asarray(x)[np.arange(BATCH)[:, None], index]
  np.testing.assert_array_equal(np.asarray(picked), expected)


@pytest.mark.parametrize('one_hot', [False, True])
@pytest.mark.parametrize('offset', [0, 1])
def test_gathering_a_cache_keeps_its_layers_apart(one_hot, offset):
  x = numbers(*([2] * offset), BATCH, BEAMS, 5)
  index = np.array([[3, 3], [0, 2], [1, 0]])
  cache = {'cached_key': x, 'cache_index': jnp.array(7)}
  picked = beams.cache_gather_beams(cache, index, BATCH, BEAMS, 2, one_hot, offset)
  layers = x if offset else x[None]
  expected = layers[:, np.arange(BATCH)[:, None], index]
  np.testing.assert_array_equal(
    picked['cached_key'], expected if offset else expected[0]
  )
  assert picked['cache_index'] == 7


def test_gathering_with_wrong_sizes_is_refused():
  index = np.zeros((BATCH, 2), np.int32)
  x = numbers(BATCH, BEAMS)
  with pytest.raises(ValueError, match='0 or 1 axes'):
    beams.cache_gather_beams({'a': x}, index, BATCH, BEAMS, 2, offset=2)
  with pytest.raises(ValueError, match=r'\(3, 3\), batch and beams'):
    beams.gather_beams(x, index, BATCH, 3, 2)
  with pytest.raises(ValueError, match=r'\(3, 3\) at axis 0'):
    beams.cache_gather_beams({'a': x}, index, BATCH, 3, 2)
  with pytest.raises(ValueError, match='Beam indices'):
    beams.gather_beams(x, index, BATCH, BEAMS, 4)


def test_the_best_beams_are_kept_the_best_last():
  scores = numbers(BATCH, 6)
  kept, values = beams.gather_topk_beams((scores, 2 * scores), scores, BATCH, 2)
  np.testing.assert_array_equal(kept, np.sort(scores, axis=1)[:, -2:])
  np.testing.assert_array_equal(values, 2 * kept)


@pytest.mark.parametrize('batch', [1, 8, 9])
@pytest.mark.parametrize('samples', [50, 5000, 8192])
def test_top_k_two_stage_is_top_k(batch, samples):
  x = numbers(batch, samples)
  # Ties: of equal values the first is taken.
  x = np.round(x, 1)
  found, where = jax.jit(lambda x: beams.top_k_two_stage(x, 3))(x)
  expected, expected_where = jax.lax.top_k(x, 3)
  np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(where, expected_where)
