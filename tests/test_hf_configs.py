"""config.json, generation_config.json and config.gin of runs."""

import dataclasses

import pytest

from bart_t5x import network
from bart_t5x.hf import configs

CONFIG = network.BartConfig(
    vocab_size=61, emb_dim=24, num_heads=3, num_encoder_layers=2,
    num_decoder_layers=4, mlp_dim=40, max_positions=20, dropout_rate=0.3,
    attention_dropout_rate=0.2, activation_dropout_rate=0.0,
)  # fmt: skip

# Keys of facebook/bart-base and bart-large besides sizes.
PUBLISHED = {
    'add_bias_logits': False, 'add_final_layer_norm': False,
    'activation_function': 'gelu', 'classif_dropout': 0.1, 'early_stopping': True,
    'extra_pos_embeddings': 2, 'forced_bos_token_id': 0,
    'gradient_checkpointing': False,
    'normalize_before': False, 'normalize_embedding': True, 'scale_embedding': False,
    'static_position_embeddings': False, 'no_repeat_ngram_size': 3, 'num_beams': 4,
    'id2label': {'0': 'LABEL_0'}, 'task_specific_params': {'summarization': {}},
}  # fmt: skip


def hf_config(**changes):
  return configs.to_hf(CONFIG, 'float32') | changes


def test_round_trip():
  assert network.BartConfig(**configs.from_hf(hf_config())) == CONFIG
  assert hf_config()['vocab_size'] == 61  # the real ids, not the padded rows


def test_published_configs_are_accepted():
  assert configs.from_hf(hf_config(**PUBLISHED)) == configs.from_hf(hf_config())


def test_absent_keys_have_defaults_of_transformers():
  hf = hf_config()
  for key in ('scale_embedding', 'tie_word_embeddings', 'bos_token_id', 'dropout'):
    del hf[key]
  assert configs.from_hf(hf)['dropout_rate'] == 0.1


def test_first_token_is_forced_only_if_the_run_forces_it():
  assert 'forced_bos_token_id' not in hf_config()
  assert 'forced_bos_token_id' not in configs.generation_to_hf(CONFIG)
  forced = configs.to_hf(dataclasses.replace(CONFIG, init_std=0.05), 'float32', 7)
  assert (forced['forced_bos_token_id'], forced['init_std']) == (7, 0.05)
  assert configs.generation_to_hf(CONFIG, 7)['forced_bos_token_id'] == 7


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('model_type', 'mbart'),
    ('normalize_before', True),
    ('activation_function', 'relu'),
    ('pad_token_id', 0),
    ('decoder_ffn_dim', 12),
  ],
)
def test_other_models_and_variants_are_rejected(key, value):
  with pytest.raises(ValueError, match=f'{key} =? ?{value!r}'):
    configs.from_hf(hf_config(**{key: value}))


def test_incomplete_config_is_rejected():
  hf = hf_config()
  del hf['d_model']
  with pytest.raises(ValueError, match='no .d_model'):
    configs.from_hf(hf)


@pytest.mark.parametrize(
  ('hf', 'generation', 'expected'),
  [
    ({}, {}, None),
    ({'forced_bos_token_id': 0}, None, 0),
    ({'forced_bos_token_id': 0}, {}, None),
    ({'forced_bos_token_id': 7}, {'forced_bos_token_id': 0}, 0),
    ({'force_bos_token_to_be_generated': True}, None, 0),
    ({'force_bos_token_to_be_generated': False}, None, None),
    ({'force_bos_token_to_be_generated': True}, {}, None),
  ],
)
def test_generation_config_takes_precedence(hf, generation, expected):
  assert configs.forced_bos(hf, generation) == expected


GIN = """
from __gin__ import dynamic_registration
import __main__ as train_script
import tasks
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


def test_bindings_of_a_run():
  run = configs.RunConfig(GIN)
  values = {'emb_dim': 32, 'dropout_rate': 0.25, 'vocab_size': 512}
  assert run.bindings_of('BartConfig') == values
  assert run.bindings_of('network.BartConfig') == values
  assert run.bindings_of('Config') == {}
  assert run.bindings_of('train/DatasetConfig') == {'batch_size': 8}
  assert run.bindings_of('DatasetConfig') == {'seed': 0}
  assert run.bindings_of('Transformer') == {'config': '@network.BartConfig()'}
  assert run.macro('LENGTHS') == {'inputs': 32, 'targets': [32, 1]}
  assert run.macro('NONE_SUCH') is None
  assert 'tasks' in run.imports


def test_invalid_gin_file(tmp_path):
  (tmp_path / 'config.gin').write_text('network.BartConfig: = (')
  with pytest.raises(ValueError, match='config.gin is not a valid'):
    configs.read_gin(tmp_path / 'config.gin')
