"""Parameters away from their initial values: biases not 0, scales not 1."""

import numpy as np
from flax.traverse_util import unflatten_dict

from bart_t5x import network, restack
from bart_t5x.hf import mapping


def random_params(config: network.BartConfig, random: np.random.Generator) -> dict:
  """Returns nested float32 parameters, stacked with scan_layers."""
  flat = {}
  for path, shape in mapping.parameter_shapes(config).items():
    if path.endswith('scale'):
      leaf = random.uniform(0.5, 1.5, shape)
    else:
      std = shape[-2] ** -0.5 if path.endswith('kernel') else 0.3
      leaf = random.normal(0, std, shape)
    flat[path] = leaf.astype(np.float32)
  params = unflatten_dict(flat, sep='/')
  return restack.stack_layers(params) if config.scan_layers else params
