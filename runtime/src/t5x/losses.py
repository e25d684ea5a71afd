"""Cross-entropy with label smoothing and a penalty on the softmax normaliser.

The functions and their parameters are those of T5X's `losses`. With logits x, a target
distribution t over C classes and log Z = logsumexp(x), the loss of one position is

    -sum_c t_c (x_c - log Z)  +  z_loss * (log Z)**2

The second term is the z-loss of Mesh TensorFlow's T5: it keeps log Z near 0, so that
logits stay where bfloat16 is still fine-grained.
"""

import difflib
import enum
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num


def _log_normalizer(logits: Float[Array, '*b c']) -> Float[Array, '*b']:
  return jax.scipy.special.logsumexp(logits.astype(_sum_dtype(logits)), axis=-1)


def _sum_dtype(logits: Float[Array, '*d']) -> jnp.dtype:
  # A sum over 50,000 classes has no digits left in bfloat16.
  return jnp.promote_types(logits.dtype, jnp.float32)


def _losses(
  logits: Float[Array, '*b c'],
  distribution: Float[Array, '*b c'],
  z_loss: Float[Array, ''] | float,
) -> tuple[Float[Array, '*b'], Float[Array, '*b'], Float[Array, '*b']]:
  """Returns the whole loss, its z-loss part, and log Z."""
  log_z = _log_normalizer(logits)
  surprise = log_z[..., None] - logits
  z_term = z_loss * log_z**2
  return (distribution * surprise).sum(-1) + z_term, z_term, log_z


def _logits_gradient(
  logits: Float[Array, '*b c'],
  distribution: Float[Array, '*b c'],
  log_z: Float[Array, '*b'],
  z_loss: Float[Array, ''] | float,
  cotangents: tuple[Float[Array, '*b'], Float[Array, '*b']],
) -> Float[Array, '*b c']:
  """Pulls both outputs' cotangents back to the logits.

  The softmax is rebuilt from the logits and log Z: a fused pass over numbers that the
  caller holds anyway is cheaper than keeping another [..., c] array until here.
  """
  to_loss, to_z_term = cotangents
  softmax = jnp.exp(logits - log_z[..., None])
  # d log Z / dx is the softmax; the cross-entropy part has sum(t) of it (1 if t is a
  # distribution), the z-term 2 z log Z.
  through_log_z = (
    to_loss * distribution.sum(-1) + (to_loss + to_z_term) * 2 * z_loss * log_z
  )
  gradient = through_log_z[..., None] * softmax - to_loss[..., None] * distribution
  return gradient.astype(logits.dtype)


@jax.custom_vjp
def cross_entropy_with_logits(
  logits: Float[Array, '*b c'], targets: Float[Array, '*b c'], z_loss: float
) -> tuple[Float[Array, '*b'], Float[Array, '*b']]:
  """Cross-entropy and z-loss of each position, against dense targets.

  Args:
    logits: unnormalised log probabilities, last axis the classes.
    targets: a distribution over the classes (one-hot, or smoothed).
    z_loss: weight of the (log Z)**2 term; 0 for none. A constant: it has no gradient.

  Returns:
    (loss in nats, with the z-loss in it; the z-loss alone), each of shape [*b].
  """
  loss, z_term, _ = _losses(logits, targets, z_loss)
  return loss, z_term


def _dense_forward(logits, targets, z_loss):
  loss, z_term, log_z = _losses(logits, targets, z_loss)
  return (loss, z_term), (logits, targets, log_z, z_loss)


def _dense_backward(residuals, cotangents):
  logits, targets, log_z, z_loss = residuals
  to_targets = cotangents[0][..., None] * (log_z[..., None] - logits)
  to_logits = _logits_gradient(logits, targets, log_z, z_loss, cotangents)
  return to_logits, to_targets.astype(targets.dtype), None


cross_entropy_with_logits.defvjp(_dense_forward, _dense_backward)


def _spread(
  targets: Int[Array, '*b'], logits: Float[Array, '*b c'], smoothing: float
) -> Float[Array, '*b c']:
  """Class ids as distributions: 1 - smoothing on the target, the rest spread evenly."""
  classes, dtype = logits.shape[-1], _sum_dtype(logits)
  # One class has nothing to spread over.
  elsewhere = smoothing / (classes - 1) if classes > 1 else 0.0
  on_target = 1.0 - smoothing if classes > 1 else 1.0
  # A comparison with an iota fuses into its consumer and splits with a vocabulary that
  # is sharded over devices; a gather or scatter of the target's column does neither.
  hit = targets[..., None] == jnp.arange(classes, dtype=targets.dtype)
  return jnp.where(hit, jnp.asarray(on_target, dtype), jnp.asarray(elsewhere, dtype))


@jax.custom_vjp
def _cross_entropy_with_ids(logits, targets, z_loss, smoothing):
  """As `cross_entropy_with_logits`, for class ids.

  Its own gradient rule, because the dense function would keep the dense targets (as
  large as the logits, in float32) from the forward to the backward pass.
  """
  return _ids_forward(logits, targets, z_loss, smoothing)[0]


def _ids_forward(logits, targets, z_loss, smoothing):
  distribution = _spread(targets, logits, smoothing)
  loss, z_term, log_z = _losses(logits, distribution, z_loss)
  return (loss, z_term), (logits, targets, log_z, z_loss, smoothing)


def _ids_backward(residuals, cotangents):
  logits, targets, log_z, z_loss, smoothing = residuals
  distribution = _spread(targets, logits, smoothing)
  gradient = _logits_gradient(logits, distribution, log_z, z_loss, cotangents)
  return gradient, None, None, None


_cross_entropy_with_ids.defvjp(_ids_forward, _ids_backward)


def _smoothing_entropy(classes: int, smoothing: float) -> Float[Array, ''] | float:
  """Entropy in nats of a smoothed target, the least that its cross-entropy can be."""
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
    logits: unnormalised log probabilities, last axis the classes.
    targets: class ids.
    weights: what each position counts for; None is 1 everywhere.
    label_smoothing: mass taken from the target and spread over the other classes. The
      entropy of the smoothed target is subtracted, so a perfect prediction costs 0.
    z_loss: weight of the (log Z)**2 term.
    loss_normalizing_factor: what both sums are divided by; None for no division.

  Returns:
    (total loss, with the z-loss in it; total z-loss; sum of the weights).

  Raises:
    ValueError: the logits do not have one axis more than the targets.
  """
  if logits.ndim != targets.ndim + 1 or logits.shape[:-1] != targets.shape:
    raise ValueError(
      'logits must have the shape of the targets and one last axis, the classes. Got '
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

  NUM_REAL_TARGET_TOKENS: the sum of the loss weights. The sum of the gradients of
    microbatches is then not the gradient of their union.
  NUM_TOTAL_TARGET_TOKENS: the number of target slots, batch size times length.
  AVERAGE_PER_SEQUENCE: mean over sequences of each one's mean over its tokens; a packed
    row counts every sequence in it.
  """

  NUM_REAL_TARGET_TOKENS = 1
  NUM_TOTAL_TARGET_TOKENS = 2
  AVERAGE_PER_SEQUENCE = 3


def convert_special_loss_normalizing_factor_to_enum(
  x: str,
) -> SpecialLossNormalizingFactor:
  """Reads a member's name, in any case: gin files cannot name a member of an enum.

  Raises:
    ValueError: no member is called so.
  """
  members = SpecialLossNormalizingFactor.__members__
  if x.upper() in members:
    return members[x.upper()]
  near = difflib.get_close_matches(x.upper(), members, n=1)
  hint = f' Did you mean {near[0]!r}?' if near else ''
  raise ValueError(
    f'loss_normalizing_factor must be a number, None or one of {", ".join(members)}. '
    f'Got: {x!r}.{hint}'
  )


def _sum_by_segment(
  weights: Num[Array, 'b l'], segment_ids: Int[Array, 'b l']
) -> Float[Array, 'b l']:
  """Gives each position the summed weight of its segment in its row; padding 0."""
  # A packed row numbers its segments from 1, so at most to l; 0 is padding.
  most = weights.shape[-1] + 1

  def one_row(row, ids):
    return jax.ops.segment_sum(row, ids, num_segments=most).at[0].set(0.0)[ids]

  return jax.vmap(one_row)(weights, segment_ids)


def get_loss_normalizing_factor_and_weights(
  loss_normalizing_factor: float | int | str | SpecialLossNormalizingFactor | None,
  batch: Mapping[str, Array],
) -> tuple[Num[Array, ''] | int | float | None, Num[Array, 'b l'] | None]:
  """Turns the configured divisor into a number and the weights that go with it.

  Args:
    loss_normalizing_factor: a number or None, which are returned as they are, or a
      `SpecialLossNormalizingFactor` or its name.
    batch: `decoder_target_tokens` [b, l] and, where it has them,
      `decoder_loss_weights` and `decoder_segment_ids`. Without weights a special
      divisor takes every non-padding target.

  Returns:
    (the divisor; the weights, None only where a plain divisor meets a batch without).
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
  # A sequence without weight (padding, for one) stays at 0. Dividing by 1 there keeps
  # NaN out of the gradient too, should the weights ever have one.
  weightless = of_sequence == 0
  share = weights / jnp.where(weightless, 1.0, of_sequence)
  weights = jnp.where(weightless, 0.0, share)
  return weights.sum(), weights
