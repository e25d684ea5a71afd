"""Imports of fairseq checkpoints; PyTorch's reader is replaced (see tests/interop)."""

import argparse
import json

import jax
import numpy as np
import pytest

from bart_t5x import checkpoints, tokenization
from bart_t5x.hf import configs, convert, fairseq, mapping, torch_files

# Weights of a fairseq BART with one layer per side (`models/transformer`,
# `modules/transformer_layer.py`), without the prefix `encoder.` or `decoder.`.
ATTENTION = [
  f'{part}.{leaf}'
  for part in ('k_proj', 'v_proj', 'q_proj', 'out_proj')
  for leaf in ('weight', 'bias')
]
ENCODER = [
    'version', 'embed_tokens.weight', 'embed_positions.weight',
    'layernorm_embedding.weight', 'layernorm_embedding.bias',
    *(f'layers.0.self_attn.{name}' for name in ATTENTION),
    'layers.0.self_attn_layer_norm.weight', 'layers.0.self_attn_layer_norm.bias',
    'layers.0.fc1.weight', 'layers.0.fc1.bias',
    'layers.0.fc2.weight', 'layers.0.fc2.bias',
    'layers.0.final_layer_norm.weight', 'layers.0.final_layer_norm.bias',
]  # fmt: skip
DECODER = [
    *ENCODER, 'output_projection.weight',
    *(f'layers.0.encoder_attn.{name}' for name in ATTENTION),
    'layers.0.encoder_attn_layer_norm.weight', 'layers.0.encoder_attn_layer_norm.bias',
]  # fmt: skip

SETTINGS = {
    'arch': 'bart_base', 'encoder_embed_dim': 24, 'decoder_embed_dim': 24,
    'encoder_attention_heads': 3, 'decoder_attention_heads': 3,
    'encoder_layers': 1, 'decoder_layers': 1,
    'encoder_ffn_embed_dim': 40, 'decoder_ffn_embed_dim': 40,
    'max_source_positions': 32, 'max_target_positions': 32,
    'dropout': 0.1, 'attention_dropout': 0.2, 'activation_dropout': 0.0,
    'relu_dropout': 0.3, 'encoder_normalize_before': False,
    'decoder_normalize_before': False, 'encoder_learned_pos': True,
    'decoder_learned_pos': True, 'share_all_embeddings': True,
    'no_scale_embedding': True, 'layernorm_embedding': True, 'activation_fn': 'gelu',
}  # fmt: skip


@pytest.fixture(scope='module')
def run(make_run, tmp_path_factory):
  """A model with the shape of SETTINGS and zero logits bias."""
  run = make_run(
    tmp_path_factory.mktemp('ours') / 'a',
    num_encoder_layers=1,
    num_decoder_layers=1,
    max_positions=32,
  )
  run.params['final_logits_bias'][:] = 0
  return run


def fairseq_weights(run):
  hf = mapping.to_hf(run.params, run.config, 'torch')
  state = {}
  for side, names in (('encoder', ENCODER), ('decoder', DECODER)):
    for name in names:
      if name == 'version':
        state[f'{side}.{name}'] = np.full(1, 3, np.float32)
      elif name in ('embed_tokens.weight', 'output_projection.weight'):
        state[f'{side}.{name}'] = hf['model.shared.weight']
      else:
        state[f'{side}.{name}'] = hf[f'model.{side}.{name}']
  return state


def as_args(settings):
  return {'args': argparse.Namespace(**settings)}


def as_cfg(settings):
  return {'args': None, 'cfg': {'_name': None, 'model': settings}}


def as_cfg_of_namespaces(settings):
  return {'args': None, 'cfg': {'model': argparse.Namespace(**settings)}}


@pytest.fixture
def write(tmp_path, monkeypatch):
  """Writes a folder with a model.pt of this content."""

  def write(state, settings=SETTINGS, stored=as_args, symbols=None):
    folder = tmp_path / 'fairseq'
    folder.mkdir(exist_ok=True)
    (folder / fairseq.MODEL).touch()
    tree = {**stored(settings), 'model': state, 'extra_state': {'epoch': 3}}
    monkeypatch.setattr(torch_files, 'read', lambda path, allowed_classes: tree)
    if symbols is not None:
      lines = ''.join(f'{s} {9 - i % 9}\n' for i, s in enumerate(symbols))
      (folder / fairseq.DICTIONARY).write_text(lines, encoding='utf-8')
    return folder

  return write


def import_command(model, output, *more):
  return convert.main(['import', f'--model={model}', f'--output_dir={output}', *more])


@pytest.mark.parametrize('stored', [as_args, as_cfg, as_cfg_of_namespaces])
def test_every_weight_and_setting(run, write, tmp_path, stored):
  folder = write(fairseq_weights(run), stored=stored)
  assert import_command(folder, tmp_path / 'in', '--skip_tokenizer') == 0
  params = checkpoints.read_params(tmp_path / 'in/checkpoint_0')
  gin = configs.read_gin(tmp_path / 'in/config.gin')
  config = gin.bart_config()
  theirs = mapping.to_hf(params, config, 'torch')
  for name, tensor in mapping.to_hf(run.params, run.config, 'torch').items():
    np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)
  assert config.num_heads == 3 and config.max_positions == 32
  assert config.vocab_size == 301 and config.mlp_dim == 40
  assert config.dropout_rate == 0.1 and config.attention_dropout_rate == 0.2
  assert config.activation_dropout_rate == 0.3
  assert 'imported from fairseq' in (tmp_path / 'in/config.gin').read_text()


def test_weights_of_other_releases(run, write, tmp_path):
  """Fused projections of 0.8; the copies of 0.12; a classifier."""
  state = fairseq_weights(run)
  folder = write(dict(state))
  assert import_command(folder, tmp_path / 'new', '--skip_tokenizer') == 0
  for module in ('encoder', 'decoder'):
    for leaf in ('weight', 'bias'):
      attention = f'{module}.layers.0.self_attn.'
      parts = [state.pop(f'{attention}{part}_proj.{leaf}') for part in 'qkv']
      state[f'{attention}in_proj_{leaf}'] = np.concatenate(parts)
  for name in ('in_proj_weight', 'in_proj_bias', 'out_proj_weight', 'fc1_bias'):
    state[f'encoder.layers.0.{name}'] = np.zeros(3, np.float32)
  state['classification_heads.mnli.dense.weight'] = np.zeros((2, 2), np.float32)
  assert import_command(write(state), tmp_path / 'old', '--skip_tokenizer') == 0
  new, old = (
    checkpoints.read_params(tmp_path / n / 'checkpoint_0') for n in ('new', 'old')
  )
  jax.tree.map(np.testing.assert_array_equal, new, old)


def test_pt_file_in_half_precision(run, write, tmp_path):
  state = {k: w.astype(np.float16) for k, w in fairseq_weights(run).items()}
  file = write(state) / fairseq.MODEL
  file = file.rename(file.with_name('checkpoint_best.pt'))
  assert import_command(file, tmp_path / 'in', '--skip_tokenizer') == 0
  params = checkpoints.read_params(tmp_path / 'in/checkpoint_0')
  kernel = params['encoder']['layers_0']['mlp']['wi']['kernel']
  assert kernel.dtype == np.float32
  expected = state['encoder.layers.0.fc1.weight'].astype(np.float32).T
  np.testing.assert_array_equal(kernel, expected)


VARIANTS = {
  'encoder_normalize_before is True': {'encoder_normalize_before': True},
  "activation_fn is 'relu'": {'activation_fn': 'relu'},
  'decoder_ffn_embed_dim is 48': {'decoder_ffn_embed_dim': 48},
  'mlp_dim = 48, the weights 40': {
    'encoder_ffn_embed_dim': 48,
    'decoder_ffn_embed_dim': 48,
  },
}


@pytest.mark.parametrize('message', VARIANTS)
def test_variants_are_rejected(run, write, tmp_path, capsys, message):
  folder = write(fairseq_weights(run), {**SETTINGS, **VARIANTS[message]})
  assert import_command(folder, tmp_path / 'out/in', '--skip_tokenizer') == 1
  assert message in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


def test_other_checkpoints_are_rejected(run, write, tmp_path, capsys):
  state = fairseq_weights(run)
  no_table = {k: w for k, w in state.items() if k != 'encoder.embed_tokens.weight'}
  untied = {**state, 'decoder.output_projection.weight': np.ones((301, 24), 'f')}
  cases = {
    'is not a fairseq BART': no_table,
    'one token table': untied,
    'unexpected 1: ': {**state, 'encoder.layer_norm.bias': np.ones(24, 'f')},
  }
  for message, changed in cases.items():
    folder = write(changed)
    assert import_command(folder, tmp_path / 'in', '--skip_tokenizer') == 1
    assert message in capsys.readouterr().err
  folder = write(state, {k: v for k, v in SETTINGS.items() if k != 'encoder_layers'})
  assert import_command(folder, tmp_path / 'in', '--skip_tokenizer') == 1
  assert 'lack encoder_layers' in capsys.readouterr().err


@pytest.mark.parametrize('mask_row', [True, False])
def test_dictionary_of_gpt2_numbers(run, write, tmp_path, mask_row):
  """The dictionary has GPT-2's numbers of tokens in its own order, and a filler."""
  own = json.loads((run.corpus / 'tokenizer.json').read_text())
  tokens = [t for t in own['model']['vocab'] if not t.startswith('<')]
  random = np.random.default_rng(0)
  numbers = dict(zip(tokens, random.permutation(len(tokens)).tolist(), strict=True))
  order = [str(n) for n in random.permutation(len(tokens))]
  symbols = [*order[:100], 'madeupword0000', *order[100:]]
  vocab_size = 4 + len(symbols) + 1
  state = fairseq_weights(run)
  rows = vocab_size if mask_row else vocab_size - 1
  table = np.resize(state['encoder.embed_tokens.weight'], (rows, 24))
  for name in ('encoder.embed_tokens', 'decoder.embed_tokens',
               'decoder.output_projection'):  # fmt: skip
    state[f'{name}.weight'] = table
  folder = write(state, symbols=symbols)
  (folder / 'encoder.json').write_text(json.dumps(numbers))
  merges = [' '.join(pair) for pair in own['model']['merges']]
  (folder / 'vocab.bpe').write_text('\n'.join(['#version: 0.2', *merges, '']))
  assert import_command(folder, tmp_path / 'in') == 0

  found = tokenization.read_tokenizer(str(tmp_path / 'in/tokenizer.json'))
  assert found.vocab_size == vocab_size and found.mask_id == vocab_size - 1
  ours = tokenization.read_tokenizer(str(run.corpus / 'tokenizer.json'))
  text = 'På fjellet nr. 7 bor det «ærlige» bjørner 😀  Åja!'
  expected = [4 + symbols.index(str(numbers[ours.piece(i)])) for i in ours.encode(text)]
  assert found.encode(text) == expected
  assert found.decode(expected) == text
  assert found.encode_template('På <mask> bor').count(vocab_size - 1) == 1


def test_dictionary_that_lacks_tokens(run, write, tmp_path, capsys):
  folder = write(fairseq_weights(run), symbols=['0', '1'])
  (folder / 'encoder.json').write_text('{"a": 0, "b": 1, "c": 2}')
  (folder / 'vocab.bpe').write_text('')
  assert import_command(folder, tmp_path / 'in') == 1
  assert "such as 'c'" in capsys.readouterr().err


def test_lines_of_a_dictionary(tmp_path):
  path = tmp_path / 'dict.txt'
  path.write_text('\u2028 7\nå 5\n\u3000x 1\n7 3\n', encoding='utf-8')
  assert fairseq.read_dictionary(path) == ['\u2028', 'å', '\u3000x', '7']
  # The later of two lines counts; the earlier one keeps its id.
  path.write_text('a 1\nb 1\na 2 #fairseq:overwrite\n')
  assert fairseq.read_dictionary(path) == ['<overwritten 3>', 'b', 'a']
  for text, message in (
    ('a 1\nb c\n', "line 2: 'b c'"),
    ('a 1\n\nb 1\n', "line 2: ''"),
  ):
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
      fairseq.read_dictionary(path)
