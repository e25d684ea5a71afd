"""Axis names of parameters, replaced by pattern."""

import flax.core
import numpy as np
import pytest
from flax.linen import partitioning

from t5x import params_axes

AxisMetadata = partitioning.AxisMetadata


@pytest.fixture
def variables():
  return flax.core.freeze(
    {
      'params': {
        'logits': np.zeros((2, 4)),
        'mlp': {'wo': {'kernel': np.zeros((4, 6)), 'bias': np.zeros(6)}},
      },
      'params_axes': {
        'logits_axes': AxisMetadata(names=('vocab', 'embed')),
        'mlp': {'wo': {'kernel_axes': AxisMetadata(names=('embed', 'mlp'))}},
      },
    }
  )


def axes_of(variables, overrides):
  return params_axes.override_params_axes_names(variables, overrides)['params_axes']


def test_the_first_pattern_that_fits_the_whole_name_counts(variables):
  axes = axes_of(
    variables,
    [
      ('wo/kernel', ('a', 'b')),
      ('.*/wo/kernel', ('c', 'd')),
      ('mlp/wo/kernel', ('e', 'f')),
    ],
  )
  assert axes['mlp']['wo']['kernel_axes'].names == ('c', 'd')
  assert axes['logits_axes'].names == ('vocab', 'embed')


def test_names_are_added_where_there_were_none(variables):
  axes = axes_of(variables, [('mlp/wo/bias', ('mlp',))])
  assert axes['mlp']['wo']['bias_axes'].names == ('mlp',)
  assert 'bias_axes' not in variables['params_axes']['mlp']['wo']


def test_wrong_overrides_are_named(variables):
  with pytest.raises(ValueError, match=r"logits has 2 dimensions.*\('a',\)"):
    axes_of(variables, [('logits', ('a',))])
  with pytest.raises(ValueError, match="no collection 'params_axes'.*params"):
    axes_of({'params': variables['params']}, [])
