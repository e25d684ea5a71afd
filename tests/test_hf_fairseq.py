"""fairseq's checkpoints: as its source names things, read and refused."""

import argparse
import json

import numpy as np
import pytest

from bart_t5x import tokenization
from bart_t5x.hf import checkpoints, convert, fairseq, mapping, run_config

# What a BART of fairseq with one layer a side consists of, written out by hand after
# its source (`models/transformer`, `modules/transformer_layer.py`): under `encoder.`
# and under `decoder.`.
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


@pytest.fixture
def run(make_run, tmp_path):
  """A model of ours in the shape of SETTINGS, whose bias on the logits is zero."""
  run = make_run(
    tmp_path / 'ours', num_encoder_layers=1, num_decoder_layers=1, max_positions=32
  )
  run.params['final_logits_bias'][:] = 0
  return run


def fairseq_state(run):
  """The model's weights under fairseq's names."""
  hf = mapping.to_hf(run.params, 301, 'torch')
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


def as_args(settings, torch_format, monkeypatch):
  return {'args': argparse.Namespace(**settings)}


def as_plain_cfg(settings, torch_format, monkeypatch):
  model = argparse.Namespace(**settings)
  return {'args': None, 'cfg': {'_name': None, 'model': model}}


def as_omegaconf(settings, torch_format, monkeypatch):
  """Objects as pickle stores omegaconf's: their classes and their attributes."""
  torch_format.add_module(monkeypatch, 'omegaconf', [])
  nodes = torch_format.add_module(monkeypatch, 'omegaconf.nodes', ['AnyNode'])
  dicts = torch_format.add_module(monkeypatch, 'omegaconf.dictconfig', ['DictConfig'])

  def with_attributes(made, **attributes):
    made.__dict__ |= attributes
    return made

  def config(content):
    return with_attributes(dicts.DictConfig(), _content=content, _metadata=None)

  values = {
    name: with_attributes(nodes.AnyNode(), _val=item, _parent=None)
    for name, item in settings.items()
  }
  return {'args': None, 'cfg': config({'model': config(values)})}


@pytest.fixture
def write(tmp_path, torch_format, monkeypatch):
  """Writes a folder with model.pt; returns it."""

  def write(state, settings=SETTINGS, stored=as_args, symbols=None):
    folder = tmp_path / 'fairseq'
    folder.mkdir(exist_ok=True)
    tree = {
      **stored(settings, torch_format, monkeypatch),
      'model': torch_format.tree_of(state),
      'extra_state': {'epoch': 3},
    }
    torch_format.write_zip(folder / fairseq.MODEL, state, tree)
    if symbols is not None:
      lines = ''.join(f'{s} {9 - i % 9}\n' for i, s in enumerate(symbols))
      (folder / fairseq.DICTIONARY).write_text(lines, encoding='utf-8')
    return folder

  return write


def import_command(model, output, *more):
  return convert.main(['import', f'--model={model}', f'--output_dir={output}', *more])


@pytest.mark.parametrize('stored', [as_args, as_plain_cfg, as_omegaconf])
def test_every_weight_and_setting(run, write, tmp_path, stored):
  folder = write(fairseq_state(run), stored=stored)
  assert import_command(folder, tmp_path / 'in', '--skip_tokenizer') == 0
  params = checkpoints.read_params(tmp_path / 'in/checkpoint_0')
  ours, theirs = (mapping.to_hf(tree, 301, 'torch') for tree in (run.params, params))
  assert ours.keys() == theirs.keys()
  for name in ours:
    np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
  read = run_config.read(tmp_path / 'in/config.gin')
  bound = read.bindings_of('BartConfig')
  assert bound['num_heads'] == 3 and bound['max_positions'] == 32
  assert bound['vocab_size'] == 301 and bound['mlp_dim'] == 40
  assert bound['dropout_rate'] == 0.1 and bound['attention_dropout_rate'] == 0.2
  assert bound['activation_dropout_rate'] == 0.3
  assert 'imported from fairseq' in (tmp_path / 'in/config.gin').read_text()


def test_a_pt_file_may_be_named(run, write, tmp_path):
  file = write(fairseq_state(run)) / fairseq.MODEL
  file = file.rename(file.with_name('checkpoint_best.pt'))
  assert import_command(file, tmp_path / 'in', '--skip_tokenizer') == 0


def test_half_precision_and_classifiers_are_taken(run, write, tmp_path):
  state = {k: w.astype(np.float16) for k, w in fairseq_state(run).items()}
  state['classification_heads.mnli.dense.weight'] = np.zeros((2, 2), np.float16)
  folder = write(state)
  assert import_command(folder, tmp_path / 'in', '--skip_tokenizer') == 0
  params = checkpoints.read_params(tmp_path / 'in/checkpoint_0')
  kernel = params['encoder']['layers_0']['mlp']['wi']['kernel']
  assert kernel.dtype == np.float32
  expected = state['encoder.layers.0.fc1.weight'].astype(np.float32).T
  np.testing.assert_array_equal(kernel, expected)


def without(state, name):
  return {k: w for k, w in state.items() if k != name}


FAULTS = {
  'encoder_normalize_before is True': {'encoder_normalize_before': True},
  'no_scale_embedding is False': {'no_scale_embedding': False},
  'layernorm_embedding is False': {'layernorm_embedding': False},
  "activation_fn is 'relu'": {'activation_fn': 'relu'},
  'encoder_ffn_embed_dim = 40 and decoder_ffn_embed_dim = 48': {
    'decoder_ffn_embed_dim': 48
  },
  'do not fit config.json in': {'encoder_ffn_embed_dim': 48,
                                'decoder_ffn_embed_dim': 48},
}  # fmt: skip


@pytest.mark.parametrize('message', FAULTS)
def test_variants_are_refused(run, write, tmp_path, capsys, message):
  folder = write(fairseq_state(run), {**SETTINGS, **FAULTS[message]})
  assert import_command(folder, tmp_path / 'out/in', '--skip_tokenizer') == 1
  assert message in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


def test_other_checkpoints_are_refused(run, write, tmp_path, capsys):
  state = fairseq_state(run)
  untied = {**state, 'decoder.output_projection.weight': np.ones((301, 24), 'f')}
  cases = {
    'holds no model with encoder.embed_tokens': without(
      state, 'encoder.embed_tokens.weight'
    ),
    'has several token tables': untied,
    'Missing 1: ': without(state, 'decoder.layers.0.encoder_attn.q_proj.bias'),
    'unexpected 1: ': {**state, 'encoder.layer_norm.bias': np.ones(24, 'f')},
  }
  for message, changed in cases.items():
    folder = write(changed)
    assert import_command(folder, tmp_path / 'out/in', '--skip_tokenizer') == 1
    assert message in capsys.readouterr().err
  lacking = {k: v for k, v in SETTINGS.items() if k != 'encoder_attention_heads'}
  folder = write(state, lacking)
  assert import_command(folder, tmp_path / 'out/in', '--skip_tokenizer') == 1
  assert 'settings lack encoder_attention_heads' in capsys.readouterr().err
  whole = (folder / fairseq.MODEL).read_bytes()
  (folder / fairseq.MODEL).write_bytes(whole[:-200])
  assert import_command(folder, tmp_path / 'out/in', '--skip_tokenizer') == 1
  assert 'cannot be read as a PyTorch file' in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


# ---- dictionaries ----


def test_dictionary_of_gpt2_numbers(run, write, tmp_path):
  """GPT-2's tokens by number, in the dictionary's own order, with a filler."""
  own = json.loads((run.corpus / 'tokenizer.json').read_text())
  tokens = [t for t in own['model']['vocab'] if not t.startswith('<')]
  random = np.random.default_rng(0)
  numbers = dict(zip(tokens, random.permutation(len(tokens)).tolist(), strict=True))
  order = [str(n) for n in random.permutation(len(tokens))]
  symbols = [*order[:100], 'madeupword0000', *order[100:]]
  vocab_size = 4 + len(symbols) + 1
  state = fairseq_state(run)
  table = np.resize(state['encoder.embed_tokens.weight'], (vocab_size, 24))
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
  template = found.encode_template('På <mask> bor')
  assert template.count(vocab_size - 1) == 1


def test_dictionary_that_lacks_tokens(run, write, tmp_path, capsys):
  folder = write(fairseq_state(run), symbols=['0', '1'])
  (folder / 'encoder.json').write_text('{"a": 0, "b": 1, "c": 2}')
  (folder / 'vocab.bpe').write_text('')
  assert import_command(folder, tmp_path / 'in') == 1
  assert "lacks 1 of the 3 tokens of encoder.json, 'c'" in capsys.readouterr().err


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('a 1\nb c\n', "line 2: 'b c' is no symbol"),
    ('a 1\na 2\n', "the symbol 'a' twice"),
    ('a 1\n\nb 1\n', "line 2: ''"),
  ],
)
def test_damaged_dictionaries(tmp_path, text, message):
  path = tmp_path / 'dict.txt'
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    fairseq.read_dictionary(path)


def test_symbols_with_odd_characters(tmp_path):
  path = tmp_path / 'dict.txt'
  path.write_text('\u2028 7\nå 5\n\u3000x 1\n12 \n7 3\n', encoding='utf-8')
  assert fairseq.read_dictionary(path) == ['\u2028', 'å', '\u3000x', '12', '7']
