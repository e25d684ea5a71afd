"""Seconds per training step, of this model and of transformers' FlaxBart.

    FLAX_PEER_PYTHON=.venv-flax-peer/bin/python python benchmarks/train_step.py

Both run the same size (width 256, 4 + 4 layers, 1,024 inside, 8 heads, vocabulary
16,000), the same batch of 8 rows of 256 tokens, all dropout rates 0.1, AdamW, and the
same JAX, in separate processes that take turns. Prints the fastest step and the CPU
seconds per step, on which other processes have less effect.
"""

import argparse
import json
import os
import subprocess
import sys
import time

ROWS, LENGTH, VOCABULARY, WIDTH, HEADS, LAYERS, INSIDE = 8, 256, 16_000, 256, 8, 4, 1024
RATE = 0.1


def _batch():
  """Random tokens; decoder inputs are the targets shifted right."""
  import numpy as np

  rng = np.random.default_rng(0)
  inputs, targets = rng.integers(4, VOCABULARY, (2, ROWS, LENGTH), np.int32)
  moved = np.concatenate([np.zeros((ROWS, 1), np.int32), targets[:, :-1]], axis=1)
  return inputs, moved, targets


def our_bart(config, **arguments):
  """Returns our model of this size; `config` has further fields of BartConfig."""
  import seqio

  from bart_t5x import model, network

  config = network.BartConfig(
    vocab_size=VOCABULARY,
    emb_dim=WIDTH,
    num_heads=HEADS,
    num_encoder_layers=LAYERS,
    num_decoder_layers=LAYERS,
    mlp_dim=INSIDE,
    **config,
  )
  vocabulary = seqio.PassThroughVocabulary(VOCABULARY, eos_id=2)
  transformer = network.Transformer(config)
  return model.BartModel(transformer, vocabulary, vocabulary, None, **arguments)


def peer_config(**fields):
  """Returns transformers' configuration of this size with further fields."""
  import transformers

  return transformers.BartConfig(
    vocab_size=VOCABULARY,
    d_model=WIDTH,
    encoder_layers=LAYERS,
    decoder_layers=LAYERS,
    encoder_attention_heads=HEADS,
    decoder_attention_heads=HEADS,
    encoder_ffn_dim=INSIDE,
    decoder_ffn_dim=INSIDE,
    **fields,
  )


def _ours(dtype, attention_impl):
  """Returns the parameters, and the loss as a function of parameters and a key."""
  import jax
  import jax.numpy as jnp

  config = {
    'max_positions': LENGTH,
    'dtype': dtype,
    'attention_impl': attention_impl,
  }
  bart = our_bart(config, loss_normalizing_factor=ROWS * LENGTH)
  inputs, moved, targets = _batch()
  batch = {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': moved,
    'decoder_target_tokens': targets,
    'decoder_loss_weights': jnp.ones(targets.shape),
  }
  params = bart.get_initial_variables(
    jax.random.key(0), {name: array.shape for name, array in batch.items()}
  )['params']
  return params, lambda params, key: bart.loss_fn(params, batch, key)[0]


def _flax_bart(dtype, _):
  """The same for FlaxBart, with the loss of transformers' example script."""
  import jax
  import jax.numpy as jnp
  import optax
  import transformers

  config = peer_config(
    max_position_embeddings=LENGTH,
    dropout=RATE,
    attention_dropout=RATE,
    activation_dropout=RATE,
  )
  bart = transformers.FlaxBartForConditionalGeneration(
    config, input_shape=(1, 8), dtype=jnp.dtype(dtype)
  )
  inputs, moved, targets = _batch()
  ones = jnp.ones(targets.shape, jnp.int32)

  def loss(params, key):
    logits = bart(
      inputs,
      attention_mask=ones,
      decoder_input_ids=moved,
      decoder_attention_mask=ones,
      params=params,
      dropout_rng=key,
      train=True,
    ).logits
    goal = jax.nn.one_hot(targets, VOCABULARY)
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), goal).mean()

  return bart.params, loss


def _measure(implementation, dtype, attention_impl, steps):
  """Runs steps and prints one line of JSON."""
  import jax
  import optax

  make = {'ours': _ours, 'flax': _flax_bart}[implementation]
  params, loss = make(dtype, attention_impl)
  optimizer = optax.adamw(1e-4)

  def step(params, state, key):
    value, gradients = jax.value_and_grad(loss)(params, key)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value

  run = jax.jit(step, donate_argnums=(0, 1))
  state = jax.jit(optimizer.init)(params)
  start = time.perf_counter()
  walls, cpus = [], []
  for index in range(steps + 1):
    before = time.perf_counter(), sum(os.times()[:2])
    params, state, value = run(params, state, jax.random.PRNGKey(index))
    value.block_until_ready()
    walls.append(time.perf_counter() - before[0])
    cpus.append(sum(os.times()[:2]) - before[1])
  found = {
    'seconds': min(walls[1:]),
    'cpu_seconds': min(cpus[1:]),
    'first': time.perf_counter() - start - sum(walls[1:]),
    'loss': float(value),
  }
  print(json.dumps(found))


def _in_turns(dtypes, attention_impl, steps, rounds):
  """Measures both in separate processes; prints the best of the rounds."""
  peer = os.environ.get('FLAX_PEER_PYTHON')
  pythons = {'ours': sys.executable, **({'flax': peer} if peer else {})}
  best = {}
  for _ in range(rounds):
    for dtype in dtypes:
      for name, python in pythons.items():
        command = [python, __file__, f'--run={name}', f'--dtypes={dtype}']
        command += [f'--attention_impl={attention_impl}', f'--steps={steps}']
        output = subprocess.run(command, capture_output=True, text=True, check=False)
        if output.returncode:
          sys.exit(f'{" ".join(command)} failed:\n{output.stderr[-2000:]}')
        found = json.loads(output.stdout.splitlines()[-1])
        before = best.setdefault((name, dtype), found)
        best[name, dtype] = {key: min(before[key], found[key]) for key in found}
  print('| | dtype | seconds per step | CPU seconds per step | first step |')
  print('|---|---|---|---|---|')
  for (name, dtype), found in best.items():
    figures = (f'{found[key]:.2f}' for key in ('seconds', 'cpu_seconds', 'first'))
    print(f'| {name} | {dtype} | {" | ".join(figures)} |', flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--run', choices=('ours', 'flax'), help='run only this one, in this process'
  )
  parser.add_argument('--dtypes', default='float32', help='float32,bfloat16')
  parser.add_argument('--attention_impl', default='auto', help='of ours')
  parser.add_argument('--steps', type=int, default=5)
  parser.add_argument('--rounds', type=int, default=2)
  args = parser.parse_args()
  if args.run:
    _measure(args.run, args.dtypes, args.attention_impl, args.steps)
  else:
    _in_turns(args.dtypes.split(','), args.attention_impl, args.steps, args.rounds)


if __name__ == '__main__':
  main()
