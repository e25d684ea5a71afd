"""The chunked loss against a plain implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bart_t5x import loss

BATCH, LENGTH, WIDTH, REAL, ROWS = 4, 7, 6, 19, 24


def _arrays(dtype, seed=0):
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(BATCH, LENGTH, WIDTH)).astype(dtype)
  table = rng.normal(size=(ROWS, WIDTH)).astype(dtype)
  bias = rng.normal(size=ROWS).astype(dtype)
  targets = rng.integers(0, REAL, (BATCH, LENGTH))
  weights = rng.integers(0, 3, (BATCH, LENGTH)).astype(dtype)
  return hidden, table, bias, targets, weights


def _plain(settings, hidden, table, bias, targets, weights):
  """Smoothed cross-entropy and z-loss over real ids, from full logits."""
  logits = (hidden @ table.T + bias)[..., : settings.vocab_size]
  log_z = jax.scipy.special.logsumexp(logits, axis=-1)
  smoothing = settings.label_smoothing
  spread = smoothing / (settings.vocab_size - 1)
  goal = jax.nn.one_hot(targets, settings.vocab_size, dtype=logits.dtype)
  goal = goal * (1 - smoothing) + (1 - goal) * spread
  entropy = -jnp.sum(jnp.where(goal > 0, goal * jnp.log(goal), 0), -1)
  cross = -jnp.sum(goal * (logits - log_z[..., None]), -1) - entropy
  z_loss = settings.z_loss * log_z**2
  likelihood = log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
  correct = logits.argmax(-1) == targets
  total = jnp.sum(weights * (cross + z_loss))
  return total, loss.TokenLosses(cross, z_loss, likelihood, correct)


def _with_gradients(function, settings, arrays, factor=1.0):
  hidden, table, *rest = arrays

  def scaled(hidden, table):
    total, tokens = function(settings, hidden, table, *rest)
    return total * factor, tokens

  run = jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)
  return jax.jit(run)(hidden, table)


SETTINGS = [
  loss.LossSettings(REAL, smoothing, z_loss, chunk, groups)
  for smoothing, z_loss in ((0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-2))
  for chunk, groups in ((None, 1), (1, 1), (3, 2), (7, 4), (100, 1))
]


@pytest.mark.parametrize('settings', SETTINGS)
def test_equals_the_plain_loss_in_float64(settings):
  with jax.enable_x64(True):
    arrays = _arrays(np.float64)
    (total, tokens), gradients = _with_gradients(
      loss.chunked_loss, settings, arrays, 0.25
    )
    (plain_total, plain_tokens), plain_gradients = _with_gradients(
      _plain, settings, arrays, 0.25
    )
    assert total.dtype == jnp.float64
    np.testing.assert_allclose(total, plain_total, rtol=1e-13)
    for ours, theirs in zip(tokens, plain_tokens, strict=True):
      np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients, plain_gradients, strict=True):
      np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize('settings', SETTINGS[-5:])
def test_equals_the_plain_loss_in_float32(settings):
  arrays = _arrays(np.float32)
  (total, tokens), gradients = _with_gradients(loss.chunked_loss, settings, arrays)
  (plain_total, plain_tokens), plain_gradients = _with_gradients(
    _plain, settings, arrays
  )
  np.testing.assert_allclose(total, plain_total, rtol=1e-6)
  np.testing.assert_array_equal(tokens.correct, plain_tokens.correct)
  for ours, theirs in zip(gradients, plain_gradients, strict=True):
    assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)


def test_evaluation_equals_training():
  settings = loss.LossSettings(REAL, 0.1, 1e-3, 2)
  arrays = _arrays(np.float32)
  alone = loss.chunked_loss(settings, *arrays)
  trained, _ = _with_gradients(loss.chunked_loss, settings, arrays)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), alone, trained)


def test_padded_rows_are_neither_predicted_nor_trained():
  hidden, table, bias, targets, weights = _arrays(np.float32)
  table[REAL:] = 100 * np.sign(hidden[0, 0])  # The best by far, if not masked.
  settings = loss.LossSettings(REAL, 0.1, 1e-3, 2)
  arrays = hidden, table, bias, targets, weights
  (total, _), (_, d_table) = _with_gradients(loss.chunked_loss, settings, arrays)
  assert np.isfinite(total)
  np.testing.assert_array_equal(d_table[REAL:], 0)
  logits = loss.masked_logits(hidden, table, bias, REAL)
  np.testing.assert_array_equal(logits[..., REAL:], loss.PADDED_LOGIT)


def test_bias_and_weights_have_no_gradient():
  settings = loss.LossSettings(REAL)
  hidden, table, bias, targets, weights = _arrays(np.float32)

  def total(bias, weights):
    return loss.chunked_loss(settings, hidden, table, bias, targets, weights)[0]

  for gradient in jax.grad(total, argnums=(0, 1))(bias, weights):
    np.testing.assert_array_equal(gradient, 0)


def test_bfloat16_products_keep_float32_sums():
  settings = loss.LossSettings(REAL, chunk_length=2)
  hidden, table, *rest = _arrays(np.float32)
  hidden = jnp.asarray(hidden, jnp.bfloat16)
  (total, _), (d_hidden, d_table) = _with_gradients(
    loss.chunked_loss, settings, (hidden, table, *rest)
  )
  (plain, _), _ = _with_gradients(_plain, settings, _arrays(np.float32))
  assert total.dtype == jnp.float32
  assert d_hidden.dtype == jnp.bfloat16 and d_table.dtype == jnp.float32
  np.testing.assert_allclose(total, plain, rtol=2e-2)


def test_full_logits_are_never_stored():
  settings = loss.LossSettings(1000, chunk_length=2)
  shapes = [(4, 16, 8), (1024, 8), (1024,), (4, 16), (4, 16)]
  dtypes = [jnp.float32] * 3 + [jnp.int32, jnp.float32]
  arguments = [jax.ShapeDtypeStruct(*x) for x in zip(shapes, dtypes, strict=True)]
  lowered = jax.jit(
    jax.value_and_grad(lambda *a: loss.chunked_loss(settings, *a)[0], argnums=(0, 1))
  ).lower(*arguments)
  memory = lowered.compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * 16 * 1024 * 4
