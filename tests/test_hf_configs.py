"""config.json, generation_config.json and config.gin of runs."""

import numpy as np
import pytest

from bart_t5x import network
from bart_t5x.hf import configs

CONFIG = network.BartConfig(
    vocab_size=61, emb_dim=24, num_heads=3, num_encoder_layers=2,
    num_decoder_layers=4, mlp_dim=40, max_positions=20, dropout_rate=0.3,
    attention_dropout_rate=0.2, activation_dropout_rate=0.0,
)  # fmt: skip


def hf_config(**changes):
  return configs.to_hf(CONFIG, 'float32') | changes


def test_round_trip():
  assert network.BartConfig(**configs.from_hf(hf_config())) == CONFIG
  assert hf_config()['vocab_size'] == 61  # the real ids, not the padded rows


def test_absent_keys_have_defaults_of_transformers():
  hf = hf_config()
  for key in ('scale_embedding', 'tie_word_embeddings', 'bos_token_id', 'dropout'):
    del hf[key]
  assert configs.from_hf(hf)['dropout_rate'] == 0.1


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


BEAMS = """
model.BartModel.decode_fn = @decoding.beam_search
model.BartModel.predict_batch_with_aux.num_decodes = %NUM_BEAMS
NUM_BEAMS = 4
TASK_FEATURE_LENGTHS = {'inputs': 8, 'targets': 16}
"""


@pytest.mark.parametrize('alpha', [0.0, 0.6, 1.0])
def test_beam_search_has_the_closest_length_penalty(alpha):
  text = f'{BEAMS}decoding.beam_search.alpha = {alpha}'
  search = configs.RunConfig(text).beam_search()
  content = configs.generation_to_hf(CONFIG, search=search)
  assert content['num_beams'] == 4
  # Scores are compared by ratios of penalties, that is by differences of logarithms.
  lengths = np.arange(1, 17)
  ours = alpha * np.log((5 + lengths) / 6)

  def distance(penalty):
    theirs = penalty * np.log(lengths)
    return np.square(np.subtract.outer(ours - theirs, ours - theirs)).sum()

  best = distance(content['length_penalty'])
  assert all(best <= distance(other) for other in np.linspace(0, 1, 21))


def test_greedy_search_has_no_beams():
  sampled = BEAMS.replace('beam_search', 'temperature_sample')
  for text in ('', BEAMS.replace('= 4', '= 1'), sampled):
    assert configs.RunConfig(text).beam_search() is None


@pytest.mark.parametrize(
  'text', [b'network.BartConfig: = (', b'A = (1,', b'A = "\xe5"']
)
def test_invalid_gin_file(tmp_path, text):
  (tmp_path / 'config.gin').write_bytes(text)
  with pytest.raises(ValueError, match='config.gin is not a valid'):
    configs.read_gin(tmp_path / 'config.gin')
