"""What the two kinds of models share."""

from unittest import mock

import numpy as np
import pytest

from t5x import base_model

MODEL = mock.Mock(output_vocabulary=mock.Mock(eos_id=5))


def test_options_get_defaults_and_are_not_edited():
  given = {'alpha': 1.0}
  assert base_model.decode_options(MODEL, None, given) == {'alpha': 1.0, 'eos_id': 5}
  assert given == {'alpha': 1.0}
  assert base_model.decode_options(MODEL, 'key', {'eos_id': 7}) == {
    'decode_rng': 'key',
    'eos_id': 7,
  }
  # A key that is None is none.
  assert base_model.decode_options(MODEL, 4, {'decode_rng': None})['decode_rng'] == 4
  with pytest.raises(ValueError, match='both: 4 / 3'):
    base_model.decode_options(MODEL, 4, {'decode_rng': 3})
  without_end = mock.Mock(output_vocabulary=mock.Mock(eos_id=None))
  assert base_model.decode_options(without_end, None, None) == {'eos_id': 1}


def test_the_best_decode_is_the_last():
  decodes, scores = np.arange(24).reshape(2, 3, 4), np.arange(6.0).reshape(2, 3)
  every, aux = base_model.select_decodes(decodes, scores, True)
  assert every is decodes and aux['scores'] is scores
  best, aux = base_model.select_decodes(decodes, scores, False)
  np.testing.assert_array_equal(best, decodes[:, 2])
  np.testing.assert_array_equal(aux['scores'], [2, 5])


@pytest.mark.parametrize(('scan', 'offset'), [(True, 1), (False, 0), (None, 0)])
def test_scanned_layers_shift_the_batch_axis_of_the_cache(scan, offset):
  module = mock.Mock(spec=['scan_layers']) if scan is not None else mock.Mock(spec=[])
  if scan is not None:
    module.scan_layers = scan
  assert base_model.cache_offset(module) == offset


def test_a_converter_can_be_replaced_in_a_subclass_and_in_an_instance():
  class Model:
    CONVERTER = base_model.SeqioConverter('no_such_converter')

  class Sub(Model):
    CONVERTER = 'mine'

  model = Model()
  model.CONVERTER = 'given'
  assert model.CONVERTER == 'given' and Sub.CONVERTER == 'mine'
