"""A run's config.gin, read as text."""

import pytest

from bart_t5x.hf import run_config

TEXT = """
from __gin__ import dynamic_registration
import __main__ as train_script
from bart_t5x import network
from t5x import utils

# Macros:
WIDTH = 32
RATE = %DROPOUT
DROPOUT = 0.25
LENGTHS = {'inputs': %WIDTH, 'targets': [%WIDTH, 1]}

network.BartConfig.emb_dim = %WIDTH
network.BartConfig:
    dropout_rate = %RATE
    vocab_size = 512
network.Transformer.config = @network.BartConfig()
train_script.train.model_dir = 'x'
train/utils.DatasetConfig.batch_size = 8
train_eval/utils.DatasetConfig.batch_size = 4
utils.DatasetConfig.seed = 0
"""


@pytest.fixture
def config():
  return run_config.RunConfig(TEXT)


def test_values_of_a_configurable_with_macros_resolved(config):
  values = {'emb_dim': 32, 'dropout_rate': 0.25, 'vocab_size': 512}
  assert config.bindings_of('BartConfig') == values
  assert config.bindings_of('network.BartConfig') == values
  assert config.bindings_of('OtherConfig') == {}
  # No part of a name is taken for the name.
  assert config.bindings_of('Config') == {}


def test_scopes_are_kept_apart(config):
  assert config.bindings_of('train/DatasetConfig') == {'batch_size': 8}
  assert config.bindings_of('train_eval/utils.DatasetConfig') == {'batch_size': 4}
  assert config.bindings_of('DatasetConfig') == {'seed': 0}


def test_references_are_names_and_nothing_is_imported(config):
  bound = config.bindings_of('Transformer')
  assert bound == {'config': run_config.Reference('network.BartConfig')}


def test_macros(config):
  assert config.macro('RATE') == 0.25
  assert config.macro('LENGTHS') == {'inputs': 32, 'targets': [32, 1]}
  assert config.macro('NONE_SUCH') is None


def test_bad_files_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'config\.gin: .* --config=FILE'):
    run_config.read(tmp_path / 'config.gin')
  (tmp_path / 'config.gin').write_text('network.BartConfig: = (')
  with pytest.raises(ValueError, match=r'config\.gin is no valid Gin file'):
    run_config.read(tmp_path / 'config.gin')
  (tmp_path / 'config.gin').write_text('A = %B')
  with pytest.raises(ValueError, match='macro B, which .* not define'):
    run_config.read(tmp_path / 'config.gin').macro('A')
