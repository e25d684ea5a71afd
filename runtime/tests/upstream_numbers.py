"""Computes losses, states and axes with the `t5x` on the path, upstream's or ours.

Usage: upstream_numbers.py OUTPUT.npz
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import PartitionSpec

SHAPES = {
  'block': {'kernel': (4, 2, 3), 'stacked': (2, 3, 5), 'biases': (2, 5)},
  'wide': (130, 140),
  'small': (7, 9),
  'scale': (5,),
}
AXES = {
  'block': {
    'kernel': PartitionSpec('embed', 'heads', 'kv'),
    'stacked': PartitionSpec('layers', 'embed', 'mlp'),
    'biases': PartitionSpec('layers', 'mlp'),
  },
  'wide': PartitionSpec('embed', 'mlp'),
  'small': PartitionSpec('mlp', 'embed'),
  'scale': PartitionSpec('embed'),
}
ADAFACTORS = {
  'default': {},
  'momentum': {'beta1': 0.9},
  'decayed': {'weight_decay_rate': 0.01, 'global_norm_clip_threshold': 1.0},
  'absolute': {
    'weight_decay_rate_lr_exponent': 2.0,
    'multiply_by_parameter_scale': False,
  },
  'offset': {'decay_rate': 0.9, 'step_offset': -3, 'clipping_threshold': None},
}
BATCH = {
  'decoder_target_tokens': [[4, 5, 6, 7, 8, 0], [1, 2, 3, 0, 0, 0]],
  'decoder_loss_weights': [[1.0, 3, 1, 1, 2, 0], [1, 1, 1, 0, 0, 0]],
  'decoder_segment_ids': [[1, 1, 2, 2, 3, 0], [1, 1, 2, 0, 0, 0]],
  'decoder_positions': [[0, 1, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]],
}


def random_tree(rng):
  """Cubed normal numbers, for long tails."""
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=shape) ** 3, jnp.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def optimizer_numbers(rule, params, grads):
  """Yields a state after some updates, and its axes, by path."""
  optimizer = rule.create(params)
  for g in grads:
    optimizer = optimizer.apply_gradient(g)
  saved = traverse_util.flatten_dict(optimizer.state_dict(), sep='/')
  axes = rule.derive_logical_axes(optimizer, AXES).state_dict()
  axes = traverse_util.flatten_dict(axes, sep='/')
  yield from saved.items()
  yield from ((f'axes/{name}', str(spec)) for name, spec in axes.items())


def numbers():
  """Yields (name, value)."""
  from t5x import adafactor, losses, optimizers

  rng = np.random.default_rng(0)
  params, *grads = (random_tree(rng) for _ in range(5))
  rules = {name: getattr(optimizers, name)(0.1) for name in ('adamw', 'lion', 'lamb')}
  for name, settings in ADAFACTORS.items():
    rules[name] = adafactor.Adafactor(
      0.1,
      logical_factor_rules=adafactor.standard_logical_factor_rules(),
      **settings,
    )
    rules[name].set_param_axes(AXES)
  for name, rule in rules.items():
    for path, value in optimizer_numbers(rule, params, grads):
      yield f'{name}/{path}', value

  logits = jnp.asarray(rng.normal(size=(3, 4, 11)) * 4, jnp.float32)
  targets = jnp.asarray(rng.integers(0, 11, (3, 4)))
  for smoothing, z_loss in ((0.0, 0.0), (0.1, 0.0), (0.3, 1e-2)):

    def loss(x, smoothing=smoothing, z_loss=z_loss):
      return losses.compute_weighted_cross_entropy(
        x, targets, None, smoothing, z_loss, 5.0
      )[0]

    value, gradient = jax.value_and_grad(loss)(logits)
    yield f'loss/{smoothing}/{z_loss}', value
    yield f'gradient/{smoothing}/{z_loss}', gradient
  batch = {name: jnp.asarray(value) for name, value in BATCH.items()}
  for member in losses.SpecialLossNormalizingFactor:
    for features in (1, 2, 4):
      some = dict(list(batch.items())[:features])
      factor, weights = losses.get_loss_normalizing_factor_and_weights(member, some)
      yield f'factor/{member.name}/{features}', np.float32(factor)
      yield f'weights/{member.name}/{features}', weights


if __name__ == '__main__':
  np.savez(sys.argv[1], **{name: np.asarray(value) for name, value in numbers()})
