"""Our BART against PyTorch's, every parameter away from its initial value."""

import numpy as np
import pytest

pytestmark = pytest.mark.torch_peer


def test_logits_equal_torch_bart(torch_peer, make_case):
  """Row by row with padding, and all rows packed into one."""
  case = make_case(seed=3, max_positions=40)
  answer = torch_peer(case.for_peer('torch'))
  for logits in (case.logits(), case.packed_logits()):
    np.testing.assert_allclose(
      case.hf_columns(logits), answer['logits'], rtol=0, atol=2e-5
    )
  assert answer['logits'].std() > 0.3


def test_logits_of_other_shapes_equal_torch_bart(torch_peer, make_case, shape):
  case = make_case(seed=6, **shape)
  answer = torch_peer(case.for_peer('torch'))
  np.testing.assert_allclose(
    case.hf_columns(case.logits()), answer['logits'], rtol=0, atol=2e-5
  )


def test_encoder_states_equal_torch_bart(torch_peer, make_case):
  """At real tokens; what is computed at padding is nobody's business."""
  case = make_case(seed=4)
  answer = torch_peer(case.for_peer('torch'))
  encoded = case.module.apply(
    {'params': case.params}, case.inputs, enable_dropout=False, method='encode'
  )
  real = case.inputs != 0
  np.testing.assert_allclose(
    np.asarray(encoded)[real], answer['encoded'][real], rtol=0, atol=2e-5
  )
