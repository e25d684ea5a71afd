"""config.json: to, from, and what is refused."""

import dataclasses

import pytest

from bart_t5x import network
from bart_t5x.hf import configs

CONFIG = network.BartConfig(
    vocab_size=61, emb_dim=24, num_heads=3, num_encoder_layers=2,
    num_decoder_layers=4, mlp_dim=40, max_positions=20, dropout_rate=0.3,
    attention_dropout_rate=0.2, activation_dropout_rate=0.0,
)  # fmt: skip

# What facebook/bart-base and bart-large say beside their sizes.
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


def test_there_and_back():
  assert network.BartConfig(**configs.from_hf(hf_config())) == CONFIG


def test_published_configs_are_taken():
  assert configs.from_hf(hf_config(**PUBLISHED)) == configs.from_hf(hf_config())


def test_exported_config_forces_no_first_token():
  assert 'forced_bos_token_id' not in hf_config()
  assert 'forced_bos_token_id' not in configs.generation_to_hf(CONFIG)
  assert hf_config()['vocab_size'] == 61  # the real ids, not the padded rows
  assert hf_config()['forced_eos_token_id'] == 2


def test_what_a_run_forces_and_begins_with_is_exported():
  forced = configs.to_hf(dataclasses.replace(CONFIG, init_std=0.05), 'float32', 7)
  assert (forced['forced_bos_token_id'], forced['init_std']) == (7, 0.05)
  assert configs.generation_to_hf(CONFIG, 7)['forced_bos_token_id'] == 7


def test_keys_that_are_absent_have_bart_s_defaults():
  hf = hf_config()
  for key in ('scale_embedding', 'tie_word_embeddings', 'bos_token_id', 'dropout'):
    del hf[key]
  assert configs.from_hf(hf)['dropout_rate'] == 0.1


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('scale_embedding', True),
    ('normalize_before', True),
    ('add_final_layer_norm', True),
    ('normalize_embedding', False),
    ('tie_word_embeddings', False),
    ('activation_function', 'relu'),
    ('static_position_embeddings', True),
    ('pad_token_id', 0),
    ('decoder_start_token_id', 0),
  ],
)
def test_variants_are_refused_with_the_reason(key, value):
  with pytest.raises(ValueError, match=f'{key} = {value!r}, BART has'):
    configs.from_hf(hf_config(**{key: value}))


@pytest.mark.parametrize('kind', ['mbart', 't5', None])
def test_other_models_are_refused(kind):
  with pytest.raises(ValueError, match=f'model_type {kind!r}. Only "bart"'):
    configs.from_hf(hf_config(model_type=kind))


@pytest.mark.parametrize('key', ['attention_heads', 'ffn_dim'])
def test_sides_must_agree(key):
  with pytest.raises(ValueError, match=f'encoder_{key} = .* must agree'):
    configs.from_hf(hf_config(**{f'decoder_{key}': 12}))


@pytest.mark.parametrize(
  'key', ['vocab_size', 'd_model', 'encoder_attention_heads', 'decoder_ffn_dim']
)
def test_half_a_config_is_refused(key):
  hf = hf_config()
  del hf[key]
  with pytest.raises(ValueError, match=f'no {key!r}'):
    configs.from_hf(hf)


def test_no_object_is_refused():
  with pytest.raises(ValueError, match='holds no JSON object'):
    configs.from_hf(['bart'])


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
def test_forced_bos(hf, generation, expected):
  """Where there is a generation_config.json it alone counts, as in transformers."""
  assert configs.forced_bos({'vocab_size': 9, **hf}, generation) == expected


@pytest.mark.parametrize('wrong', [1, 9, -1, '0'])
def test_forced_bos_that_is_no_id(wrong):
  with pytest.raises(ValueError, match=f'forced_bos_token_id = {wrong!r} is no id'):
    configs.forced_bos({'vocab_size': 9, 'forced_bos_token_id': wrong}, None)
