"""Runs FlaxBart on given weights and inputs, in a Python that has transformers 4.

Usage: flax_peer.py IN.npz OUT.npz. IN holds `config` (JSON of a BartConfig),
`param:NAME` for every parameter by its flat dotted name, and `input_ids`,
`attention_mask`, `decoder_input_ids` with Hugging Face's ids. OUT gets `encoded`,
`logits` and `num_parameters`.
"""

import json
import sys

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import BartConfig, FlaxBartForConditionalGeneration


def main():
  given = dict(np.load(sys.argv[1]))
  config = BartConfig(**json.loads(str(given['config'])))
  model = FlaxBartForConditionalGeneration(config, _do_init=False)
  params = unflatten_dict(
    {
      tuple(name.removeprefix('param:').split('.')): array
      for name, array in given.items()
      if name.startswith('param:')
    }
  )
  expected = flatten_dict(
    jax.eval_shape(lambda: model.init_weights(jax.random.key(0), (1, 4)))
  )
  shapes = {name: leaf.shape for name, leaf in expected.items()}
  got = {name: leaf.shape for name, leaf in flatten_dict(params).items()}
  if shapes != got:
    raise ValueError(f'FlaxBart wants {shapes}, got {got}')
  inputs = {
    name: given[name] for name in ('input_ids', 'attention_mask', 'decoder_input_ids')
  }
  output = model(**inputs, params=params)
  np.savez(
    sys.argv[2],
    encoded=output.encoder_last_hidden_state,
    logits=output.logits,
    num_parameters=sum(np.prod(shape) for shape in shapes.values()),
  )


if __name__ == '__main__':
  main()
