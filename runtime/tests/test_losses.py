"""Cross-entropy against values by hand, optax, and autodiff in float64."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x import losses

Factor = losses.SpecialLossNormalizingFactor


def plain_loss(logits, targets, z_loss, smoothing):
  """The formula, for autodiff."""
  classes = logits.shape[-1]
  soft = jnp.full(logits.shape, smoothing / (classes - 1), logits.dtype)
  soft = jnp.where(jax.nn.one_hot(targets, classes) == 1, 1 - smoothing, soft)
  log_z = jax.scipy.special.logsumexp(logits, axis=-1)
  return -(soft * jax.nn.log_softmax(logits)).sum(-1) + z_loss * log_z**2, soft


@pytest.fixture
def example():
  key = np.random.default_rng(0)
  logits = key.normal(size=(2, 3, 5)) * 3
  return logits, key.integers(0, 5, size=(2, 3))


def test_by_hand():
  logits = jnp.log(jnp.array([[[1.0, 2.0, 5.0]]]))  # log Z = log 8
  loss, z_term, count = losses.compute_weighted_cross_entropy(
    logits, jnp.array([[1]]), z_loss=0.5
  )
  z = 0.5 * math.log(8) ** 2
  np.testing.assert_allclose(z_term, z, rtol=1e-6)
  np.testing.assert_allclose(loss, math.log(4) + z, rtol=1e-6)
  assert count == 1


def test_smoothing_by_hand():
  # Predicting exactly the smoothed distribution costs nothing.
  smoothed = jnp.array([[0.05, 0.9, 0.05]])
  loss, _, _ = losses.compute_weighted_cross_entropy(
    jnp.log(smoothed), jnp.array([1]), label_smoothing=0.1
  )
  np.testing.assert_allclose(loss, 0.0, atol=1e-6)
  # A uniform prediction costs log 3 minus the entropy of the target.
  loss, _, _ = losses.compute_weighted_cross_entropy(
    jnp.zeros((1, 3)), jnp.array([1]), label_smoothing=0.1
  )
  entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.05))
  np.testing.assert_allclose(loss, math.log(3) - entropy, rtol=1e-5)


def test_against_optax(example):
  logits, targets = map(jnp.asarray, example)
  want = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  loss, z_term, count = losses.compute_weighted_cross_entropy(logits, targets)
  np.testing.assert_allclose(loss, want.sum(), rtol=1e-6)
  assert z_term == 0 and count == 6
  dense, _ = losses.cross_entropy_with_logits(logits, jax.nn.one_hot(targets, 5), 0.0)
  np.testing.assert_allclose(dense, want, rtol=1e-6)


@pytest.mark.parametrize('z_loss', [0.0, 1e-1])
@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_gradient_against_autodiff(example, z_loss, smoothing):
  with jax.enable_x64(True):
    logits, targets = map(jnp.asarray, example)
    weights = jnp.array([[1.0, 0.0, 2.0], [0.5, 1.0, 1.0]])

    def ours(x):
      return losses.compute_weighted_cross_entropy(
        x, targets, weights, smoothing, z_loss, loss_normalizing_factor=7.0
      )[0]

    def want(x):
      return (plain_loss(x, targets, z_loss, smoothing)[0] * weights).sum() / 7

    np.testing.assert_allclose(jax.grad(ours)(logits), jax.grad(want)(logits), 1e-12)
    dense = functools.partial(
      losses.cross_entropy_with_logits,
      targets=plain_loss(logits, targets, z_loss, smoothing)[1],
      z_loss=z_loss,
    )
    got = jax.grad(lambda x: (dense(x)[0] * weights).sum() / 7)(logits)
    np.testing.assert_allclose(got, jax.grad(want)(logits), 1e-12)


def test_gradients_of_targets_and_z_loss(example):
  with jax.enable_x64(True):
    logits, targets = map(jnp.asarray, example)
    soft = jax.nn.softmax(jnp.sin(logits)) * 1.5  # Deliberately not a distribution.

    def formula(x, t):
      log_z = jax.scipy.special.logsumexp(x, axis=-1)
      z_term = 0.3 * log_z**2
      loss = (t * (log_z[..., None] - x)).sum(-1) + z_term
      return (loss * 2 + z_term * 5).sum()

    def ours(x, t):
      loss, z_term = losses.cross_entropy_with_logits(x, t, 0.3)
      return (loss * 2 + z_term * 5).sum()

    for got, want in zip(
      jax.grad(ours, (0, 1))(logits, soft),
      jax.grad(formula, (0, 1))(logits, soft),
      strict=True,
    ):
      np.testing.assert_allclose(got, want, 1e-12)


def test_bfloat16_logits_are_summed_in_float32():
  logits = jnp.zeros((1, 50_000), jnp.bfloat16)
  loss, _, _ = losses.compute_weighted_cross_entropy(logits, jnp.array([3]))
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, math.log(50_000), rtol=1e-6)
  grad = jax.grad(
    lambda x: losses.compute_weighted_cross_entropy(x, jnp.array([3]))[0]
  )(logits)
  assert grad.dtype == jnp.bfloat16


def test_weights_and_divisor(example):
  logits, targets = map(jnp.asarray, example)
  weights = jnp.array([[1.0, 0.0, 2.0], [0.0, 0.0, 1.0]])
  each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  loss, z_term, count = losses.compute_weighted_cross_entropy(
    logits, targets, weights, z_loss=0.1, loss_normalizing_factor=4.0
  )
  z = 0.1 * jax.scipy.special.logsumexp(logits, axis=-1) ** 2
  np.testing.assert_allclose(z_term, (z * weights).sum() / 4, rtol=1e-5)
  np.testing.assert_allclose(loss, ((each + z) * weights).sum() / 4, rtol=1e-5)
  assert count == 4


def test_one_class_costs_nothing():
  loss, _, _ = losses.compute_weighted_cross_entropy(
    jnp.ones((2, 1)), jnp.zeros(2, jnp.int32), label_smoothing=0.1
  )
  assert loss == 0


def test_mismatched_shapes():
  cross_entropy = inspect.unwrap(losses.compute_weighted_cross_entropy)
  for targets in (jnp.ones((2, 3), jnp.int32), jnp.ones((4,), jnp.int32)):
    with pytest.raises(ValueError, match='logits'):
      cross_entropy(jnp.ones((2, 3)), targets)


def test_backward_keeps_no_dense_targets():
  # The only residual of size [b, c] is the logits.
  logits, targets = jnp.ones((8, 1000)), jnp.zeros(8, jnp.int32)
  _, pullback = jax.vjp(
    lambda x: losses.compute_weighted_cross_entropy(x, targets)[0], logits
  )
  kept = [x for x in jax.tree.leaves(pullback) if getattr(x, 'size', 0) >= 8000]
  assert len(kept) == 1


def test_token_factors():
  normalize = losses.get_loss_normalizing_factor_and_weights
  batch = {'decoder_target_tokens': jnp.array([[4, 5, 0], [6, 0, 0]])}
  assert normalize(3.5, batch) == (3.5, None)
  with pytest.raises(ValueError, match="'NUM_REAL_TARGET_TOKENS'"):
    normalize('num_real_target_token', batch)
  factor, weights = normalize('num_real_target_tokens', batch)
  assert factor == 3
  np.testing.assert_array_equal(weights, [[1, 1, 0], [1, 0, 0]])
  factor, weights = normalize(Factor.NUM_TOTAL_TARGET_TOKENS, batch)
  assert factor == 6
  np.testing.assert_array_equal(weights, [[1, 1, 0], [1, 0, 0]])
  given = jnp.array([[0.5, 1.0, 0.0], [1.0, 0.0, 0.0]])
  factor, weights = normalize(
    Factor.NUM_REAL_TARGET_TOKENS, {**batch, 'decoder_loss_weights': given}
  )
  assert factor == 2.5
  np.testing.assert_array_equal(weights, given)


def test_average_per_sequence():
  normalize = losses.get_loss_normalizing_factor_and_weights
  weights = jnp.array([[1.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
  batch = {
    'decoder_target_tokens': jnp.array([[4, 5, 6, 0], [0, 0, 0, 0]]),
    'decoder_loss_weights': weights,
  }
  factor, got = normalize('AVERAGE_PER_SEQUENCE', batch)
  assert factor == 1
  np.testing.assert_allclose(got, [[0.25, 0.25, 0.5, 0], [0, 0, 0, 0]])

  packed = {
    'decoder_target_tokens': jnp.array([[4, 5, 6, 7, 8, 0]]),
    'decoder_loss_weights': jnp.array([[1.0, 3.0, 0.0, 1.0, 0.0, 5.0]]),
    'decoder_segment_ids': jnp.array([[1, 1, 2, 2, 3, 0]]),
    'decoder_positions': jnp.array([[0, 1, 0, 1, 0, 0]]),
  }
  factor, got = normalize('AVERAGE_PER_SEQUENCE', packed)
  # Segment 3 has no weight and does not count as a sequence, nor does padding.
  assert factor == 2
  np.testing.assert_allclose(got, [[0.25, 0.75, 0, 1, 0, 0]])
