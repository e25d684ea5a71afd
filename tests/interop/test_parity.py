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


def ask(run_peer, framework, case):
  return run_peer(framework, f'{framework}_peer.py', case.for_peer(framework))


@pytest.mark.parametrize('scan_layers', [False, True])
def test_logits_padded_and_packed(run_peer, framework, make_case, scan_layers):
  case = make_case(scan_layers=scan_layers, max_positions=40)
  answer = ask(run_peer, framework, case)
  for logits in (case.logits(), case.packed_logits()):
    np.testing.assert_allclose(
      case.hf_columns(logits), answer['logits'], rtol=0, atol=TOLERANCE[framework]
    )
  # Logits vary by far more than the tolerance.
  assert answer['logits'].std() > 0.3


@pytest.mark.parametrize(
  'framework',
  [
    pytest.param('flax', marks=[pytest.mark.flax_peer, pytest.mark.slow]),
    pytest.param('torch', marks=pytest.mark.torch_peer),
  ],
)
@pytest.mark.parametrize('shape', SHAPES)
def test_logits_of_other_shapes(run_peer, framework, make_case, shape):
  case = make_case(seed=6, **SHAPES[shape])
  answer = ask(run_peer, framework, case)
  np.testing.assert_allclose(
    case.hf_columns(case.logits()),
    answer['logits'],
    rtol=0,
    atol=TOLERANCE[framework],
  )


def test_encoder_states(run_peer, framework, make_case):
  case = make_case(seed=1)
  answer = ask(run_peer, framework, case)
  encoded = case.module.apply(
    {'params': case.params}, case.inputs, enable_dropout=False, method='encode'
  )
  # PyTorch's states at padding differ.
  compared = case.inputs != 0 if framework == 'torch' else case.inputs >= 0
  np.testing.assert_allclose(
    np.asarray(encoded)[compared],
    answer['encoded'][compared],
    rtol=0,
    atol=TOLERANCE[framework],
  )


@pytest.mark.flax_peer
def test_cached_decoding(run_peer, make_case):
  """Logits of decoding step by step equal those of FlaxBart's full pass."""
  case = make_case(seed=2)
  answer = ask(run_peer, 'flax', case)
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
    steps.append(np.asarray(logits)[..., : case.config.vocab_size])
  logits = case.hf_columns(np.concatenate(steps, axis=1))
  np.testing.assert_allclose(logits, answer['logits'], rtol=0, atol=1e-5)


@pytest.mark.flax_peer
def test_number_of_parameters(run_peer, make_case):
  case = make_case(vocab_multiple_of=1)
  answer = ask(run_peer, 'flax', case)
  ours = sum(leaf.size for leaf in jax.tree.leaves(case.params))
  assert ours == answer['num_parameters']
