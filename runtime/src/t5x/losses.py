"""Cross-entropy with label smoothing and z-loss.

With logits x, a target distribution t over C classes and log Z = logsumexp(x), the loss
of one position is

    -sum_c t_c (x_c - log Z)  +  z_loss * (log Z)**2

The second term, from Mesh TensorFlow's T5, keeps log Z near 0, where logits in bfloat16
are precise.
"""

import enum
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from t5x import gin_utils


def _sum_dtype(logits: Float[Array, '*d']) -> jnp.dtype:
  # bfloat16 is too coarse for a sum over 50,000 classes.
  return jnp.promote_types(logits.dtype, jnp.float32)


def _losses(
  logits: Float[Array, '*b c'],
  distribution: Float[Array, '*b c'],
  z_loss: Float[Array, ''] | float,
) -> tuple[Float[Array, '*b'], Float[Array, '*b'], Float[Array, '*b']]:
  """Returns the whole loss, its z-loss part, and log Z."""
  log_z = jax.scipy.special.logsumexp(logits.astype(_sum_dtype(logits)), axis=-1)
  z_term = z_loss * log_z**2
  cross_entropy = (distribution * (log_z[..., None] - logits)).sum(-1)
  return cross_entropy + z_term, z_term, log_z


def _d_logits(
  logits: Float[Array, '*b c'],
  distribution: Float[Array, '*b c'],
  log_z: Float[Array, '*b'],
  z_loss: Float[Array, ''] | float,
  cotangents: tuple[Float[Array, '*b'], Float[Array, '*b']],
) -> Float[Array, '*b c']:
  d_loss, d_z_term = cotangents
  # Recomputed: cheaper than keeping another [..., c] array from the forward pass.
  softmax = jnp.exp(logits - log_z[..., None])
  # The softmax is the gradient of log Z.
  d_log_z = d_loss * distribution.sum(-1) + (d_loss + d_z_term) * 2 * z_loss * log_z
  d_logits = d_log_z[..., None] * softmax - d_loss[..., None] * distribution
  return d_logits.astype(logits.dtype)


@jax.custom_vjp
def cross_entropy_with_logits(
  logits: Float[Array, '*b c'], targets: Float[Array, '*b c'], z_loss: float
) -> tuple[Float[Array, '*b'], Float[Array, '*b']]:
  """Computes cross-entropy and z-loss per position against dense targets.

  `z_loss`, the weight of (log Z)**2, gets no gradient.

  Returns:
    (loss in nats including the z-loss; the z-loss alone).
  """
  loss, z_term, _ = _losses(logits, targets, z_loss)
  return loss, z_term


def _dense_forward(logits, targets, z_loss):
  loss, z_term, log_z = _losses(logits, targets, z_loss)
  return (loss, z_term), (logits, targets, log_z, z_loss)


def _dense_backward(residuals, cotangents):
  logits, targets, log_z, z_loss = residuals
  d_targets = cotangents[0][..., None] * (log_z[..., None] - logits)
  d_logits = _d_logits(logits, targets, log_z, z_loss, cotangents)
  return d_logits, d_targets.astype(targets.dtype), None


cross_entropy_with_logits.defvjp(_dense_forward, _dense_backward)


def _smooth(
  targets: Int[Array, '*b'], logits: Float[Array, '*b c'], smoothing: float
) -> Float[Array, '*b c']:
  """Puts 1 - smoothing on the target and spreads the rest evenly."""
  classes, dtype = logits.shape[-1], _sum_dtype(logits)
  elsewhere = smoothing / (classes - 1) if classes > 1 else 0.0
  on_target = 1.0 - smoothing if classes > 1 else 1.0
  # Unlike a gather or scatter, a comparison with an iota fuses into its consumer and
  # stays local where the vocabulary is sharded over devices.
  hit = targets[..., None] == jnp.arange(classes, dtype=targets.dtype)
  return jnp.where(hit, jnp.asarray(on_target, dtype), jnp.asarray(elsewhere, dtype))


@jax.custom_vjp
def _cross_entropy_with_ids(logits, targets, z_loss, smoothing):
  # `cross_entropy_with_logits` would keep dense float32 targets for the backward pass.
  return _ids_forward(logits, targets, z_loss, smoothing)[0]


def _ids_forward(logits, targets, z_loss, smoothing):
  distribution = _smooth(targets, logits, smoothing)
  loss, z_term, log_z = _losses(logits, distribution, z_loss)
  return (loss, z_term), (logits, targets, log_z, z_loss, smoothing)


def _ids_backward(residuals, cotangents):
  logits, targets, log_z, z_loss, smoothing = residuals
  distribution = _smooth(targets, logits, smoothing)
  d_logits = _d_logits(logits, distribution, log_z, z_loss, cotangents)
  return d_logits, None, None, None


_cross_entropy_with_ids.defvjp(_ids_forward, _ids_backward)


def _smoothing_entropy(classes: int, smoothing: float) -> Float[Array, ''] | float:
  """Returns the entropy in nats of a smoothed target: the minimum cross-entropy."""
  if classes == 1:
    return 0.0
  xlogy = jax.scipy.special.xlogy
  return -xlogy(1 - smoothing, 1 - smoothing) - xlogy(
    smoothing, smoothing / (classes - 1)
  )


def compute_weighted_cross_entropy(
  logits: Float[Array, '*b c'],
  targets: Int[Array, '*b'],
  weights: Num[Array, '*b'] | None = None,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
  loss_normalizing_factor: float | None = None,
) -> tuple[Float[Array, ''], Float[Array, ''], Num[Array, ''] | int]:
  """Sums the loss over a batch.

  Args:
    logits: unnormalised log probabilities.
    targets: class ids.
    weights: one weight per position; None means 1 everywhere.
    label_smoothing: probability spread over the other classes. The entropy of the
      smoothed target is subtracted, so that a perfect prediction costs 0.
    z_loss: weight of the (log Z)**2 term.
    loss_normalizing_factor: divisor of both losses; None for no division.

  Returns:
    (total loss including the z-loss; total z-loss; sum of the weights).

  Raises:
    ValueError: the shapes of logits and targets do not fit.
  """
  if logits.ndim != targets.ndim + 1 or logits.shape[:-1] != targets.shape:
    raise ValueError(
      'logits must have the shape of targets plus a last axis for the classes. Got: '
      f'logits {logits.shape}, targets {targets.shape}.'
    )
  loss, z_term = _cross_entropy_with_ids(logits, targets, z_loss, label_smoothing)
  loss = loss - _smoothing_entropy(logits.shape[-1], label_smoothing)

  weight_sum = math.prod(targets.shape)
  if weights is not None:
    loss, z_term = loss * weights, z_term * weights
    weight_sum = weights.sum()
  if loss_normalizing_factor is not None:
    loss, z_term = loss / loss_normalizing_factor, z_term / loss_normalizing_factor
  return loss.sum(), z_term.sum(), weight_sum


@enum.unique
class SpecialLossNormalizingFactor(enum.Enum):
  """Divisors of the loss that depend on the batch.

  NUM_REAL_TARGET_TOKENS: the sum of the loss weights. The gradients of microbatches
    then do not add up to the gradient of the whole batch.
  NUM_TOTAL_TARGET_TOKENS: batch size times length, padding included.
  AVERAGE_PER_SEQUENCE: the mean over sequences of the mean over their tokens; in packed
    rows each sequence counts.
  """

  NUM_REAL_TARGET_TOKENS = 1
  NUM_TOTAL_TARGET_TOKENS = 2
  AVERAGE_PER_SEQUENCE = 3


def convert_special_loss_normalizing_factor_to_enum(
  x: str,
) -> SpecialLossNormalizingFactor:
  """Parses a member's name, case-insensitively; gin cannot refer to enum members."""
  members = SpecialLossNormalizingFactor.__members__
  if x.upper() not in members:
    raise ValueError(
      f'loss_normalizing_factor must be a number, None or one of {", ".join(members)}. '
      f'Got: {x!r}.{gin_utils.nearest(x.upper(), members)}'
    )
  return members[x.upper()]


def _sum_by_segment(
  weights: Num[Array, 'b l'], segment_ids: Int[Array, 'b l']
) -> Float[Array, 'b l']:
  """Returns for each position the total weight of its segment; 0 for padding."""
  # Segments of a packed row are numbered from 1, at most to l; 0 is padding.
  num_segments = weights.shape[-1] + 1

  def one_row(row, ids):
    return jax.ops.segment_sum(row, ids, num_segments=num_segments).at[0].set(0.0)[ids]

  return jax.vmap(one_row)(weights, segment_ids)


def get_loss_normalizing_factor_and_weights(
  loss_normalizing_factor: float | int | str | SpecialLossNormalizingFactor | None,
  batch: Mapping[str, Array],
) -> tuple[Num[Array, ''] | int | float | None, Num[Array, 'b l'] | None]:
  """Resolves the configured divisor to a number, with the weights to use.

  Args:
    loss_normalizing_factor: a `SpecialLossNormalizingFactor` or its name; a number or
      None is returned unchanged, with the batch's own weights.
    batch: `decoder_target_tokens` [b, l] and optionally `decoder_loss_weights` (by
      default 1 for non-padding targets) and `decoder_segment_ids`.

  Returns:
    (the divisor; the weights, None if the batch has none and the divisor is plain).
  """
  weights = batch.get('decoder_loss_weights')
  kind = loss_normalizing_factor
  if isinstance(kind, str):
    kind = convert_special_loss_normalizing_factor_to_enum(kind)
  if not isinstance(kind, SpecialLossNormalizingFactor):
    return kind, weights

  targets = batch['decoder_target_tokens']
  if weights is None:
    weights = (targets > 0).astype(jnp.float32)
  if kind is SpecialLossNormalizingFactor.NUM_TOTAL_TARGET_TOKENS:
    return float(math.prod(targets.shape)), weights
  if kind is SpecialLossNormalizingFactor.NUM_REAL_TARGET_TOKENS:
    return weights.sum(), weights

  if 'decoder_segment_ids' in batch:
    of_sequence = _sum_by_segment(weights, batch['decoder_segment_ids'])
  else:
    of_sequence = weights.sum(-1, keepdims=True)
  # A sequence without weight (padding) stays at 0.
  weightless = of_sequence == 0
  share = weights / jnp.where(weightless, 1.0, of_sequence)
  weights = jnp.where(weightless, 0.0, share)
  return weights.sum(), weights
