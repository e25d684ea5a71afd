"""The network against FlaxBart and PyTorch's BART, with random parameters."""

import jax
import numpy as np
import pytest

TOLERANCE = {'flax': 1e-5, 'torch': 2e-5}
SHAPES = {
  'small': {
    'num_heads': 1,
    'num_encoder_layers': 1,
    'num_decoder_layers': 1,
    'vocab_size': 67,
  },
  'deep': {
    'emb_dim': 8,
    'num_heads': 4,
    'num_encoder_layers': 12,
    'num_decoder_layers': 2,
  },
  'wide': {
    'emb_dim': 80,
    'num_heads': 5,
    'mlp_dim': 333,
    'max_positions': 1024,
    'vocab_size': 1009,
    'scan_layers': True,
  },
}


@pytest.fixture
def ask(ask_peer, tmp_path):
  return lambda framework, case: ask_peer(
    framework, 'logits', **case.for_peer(tmp_path)
  )


def assert_close(ours, theirs, framework):
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE[framework])


@pytest.mark.parametrize('scan_layers', [False, True])
def test_outputs_padded_and_packed(ask, framework, make_case, scan_layers):
  case = make_case(scan_layers=scan_layers, max_positions=40)
  answer = ask(framework, case)
  assert_close(case.logits(), answer['logits'], framework)
  assert_close(case.packed_logits(), answer['logits'], framework)
  encoded = case.module.apply(
    {'params': case.params}, case.inputs, enable_dropout=False, method='encode'
  )
  # PyTorch's states at padding differ.
  compared = case.inputs != 0 if framework == 'torch' else case.inputs >= 0
  assert_close(np.asarray(encoded)[compared], answer['encoded'][compared], framework)
  # Logits vary by far more than the tolerance.
  assert answer['logits'].std() > 0.3
  # Rows of padding have a logits bias too, which PyTorch does not count.
  padding = case.config.padded_vocab_size - case.config.vocab_size
  ours = sum(leaf.size for leaf in jax.tree.leaves(case.params))
  ours -= padding * (case.config.emb_dim + 1)
  bias = case.config.vocab_size if framework == 'torch' else 0
  assert ours == answer['num_parameters'] + bias


@pytest.mark.torch_peer
@pytest.mark.parametrize('shape', SHAPES)
def test_logits_of_other_shapes(ask, make_case, shape):
  case = make_case(seed=6, **SHAPES[shape])
  answer = ask('torch', case)
  assert_close(case.logits(), answer['logits'], 'torch')


@pytest.mark.flax_peer
def test_cached_decoding(ask, make_case):
  """Logits of decoding step by step equal those of FlaxBart's full pass."""
  case = make_case(seed=2)
  answer = ask('flax', case)
  module, variables = case.module, {'params': case.params}
  encoded = module.apply(variables, case.inputs, enable_dropout=False, method='encode')
  _, made = module.apply(
      variables, np.ones_like(case.inputs), np.ones_like(case.decoder_inputs),
      np.ones_like(case.decoder_inputs), enable_dropout=False, decode=True,
      mutable=['cache'],
  )  # fmt: skip

  @jax.jit
  def step(cache, token):
    logits, changed = module.apply(
        {**variables, 'cache': cache}, encoded, case.inputs, token, token,
        enable_dropout=False, decode=True, mutable=['cache'], method='decode',
    )  # fmt: skip
    return logits, changed['cache']

  cache, steps = made['cache'], []
  for position in range(case.decoder_inputs.shape[1]):
    logits, cache = step(cache, case.decoder_inputs[:, position : position + 1])
    steps.append(case.hf_columns(logits))
  logits = np.concatenate(steps, axis=1)
  assert_close(logits, answer['logits'], 'flax')
