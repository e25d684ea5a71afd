"""Our BART against FlaxBart, every parameter away from its initial value."""

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.flax_peer


@pytest.mark.parametrize('scan_layers', [False, True])
def test_logits_equal_flax_bart(flax_peer, make_case, scan_layers):
  """Row by row with padding, and all rows packed into one."""
  case = make_case(scan_layers=scan_layers, max_positions=40)
  answer = flax_peer(case.for_peer('flax'))
  for logits in (case.logits(), case.packed_logits()):
    np.testing.assert_allclose(
      case.hf_columns(logits), answer['logits'], rtol=0, atol=1e-5
    )
  # The comparison means something: logits vary by far more than the tolerance.
  assert answer['logits'].std() > 0.3


@pytest.mark.slow
def test_logits_of_other_shapes_equal_flax_bart(flax_peer, make_case, shape):
  case = make_case(seed=6, **shape)
  answer = flax_peer(case.for_peer('flax'))
  np.testing.assert_allclose(
    case.hf_columns(case.logits()), answer['logits'], rtol=0, atol=1e-5
  )


def test_encoder_states_equal_flax_bart_at_padding_too(flax_peer, make_case):
  case = make_case(seed=1)
  answer = flax_peer(case.for_peer('flax'))
  encoded = case.module.apply(
    {'params': case.params}, case.inputs, enable_dropout=False, method='encode'
  )
  np.testing.assert_allclose(encoded, answer['encoded'], rtol=0, atol=1e-5)


def test_cached_decoding_equals_flax_bart(flax_peer, make_case):
  """Step by step with a cache: the same logits as FlaxBart's full pass."""
  case = make_case(seed=2)
  answer = flax_peer(case.for_peer('flax'))
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
  np.testing.assert_allclose(
    case.hf_columns(np.concatenate(steps, axis=1)),
    answer['logits'],
    rtol=0,
    atol=1e-5,
  )


def test_number_of_parameters_equals_flax_bart(flax_peer, make_case):
  case = make_case(vocab_multiple_of=1)
  answer = flax_peer(case.for_peer('flax'))
  ours = sum(leaf.size for leaf in jax.tree.leaves(case.params))
  assert ours == answer['num_parameters']
