"""Imports of Hugging Face models: bit-exact, or an error."""

import copy
import dataclasses
import json
import shutil

import gin
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bart_t5x import checkpoints
from bart_t5x.hf import configs, convert, mapping, weights


@pytest.fixture
def run(default_run):
  return default_run


@pytest.fixture(scope='module')
def exported(default_run, tmp_path_factory):
  folder = tmp_path_factory.mktemp('exported') / 'model'
  assert default_run.export(folder) == 0
  (folder / weights.MSGPACK).unlink()
  return folder


@pytest.fixture
def model(exported, tmp_path):
  """A model folder with only PyTorch's weights."""
  return shutil.copytree(exported, tmp_path / 'model')


def import_command(model, output, *more):
  return convert.main(['import', f'--model={model}', f'--output_dir={output}', *more])


def assert_same(left, right):
  left, right = flatten_dict(left), flatten_dict(right)
  assert left.keys() == right.keys()
  for path in left:
    np.testing.assert_array_equal(left[path], right[path], err_msg=path)


def imported(model, output, *more):
  assert import_command(model, output, *more) == 0
  return checkpoints.read_params(output / 'checkpoint_0')


@pytest.fixture(scope='module')
def expected(exported, tmp_path_factory):
  return imported(exported, tmp_path_factory.mktemp('expected') / 'in')


def export_imported(run, folder, output):
  run = dataclasses.replace(run, checkpoint=folder / 'checkpoint_0', corpus=folder)
  assert run.export(output) == 0


def test_imported_folder(run, model, tmp_path):
  params = imported(model, tmp_path / 'out')
  names = {p.name for p in (tmp_path / 'out').iterdir()}
  assert names == {'checkpoint_0', 'config.gin', 'tokenizer.json'}
  # Padded with zeros, by the default instead of the run's vocab_multiple_of.
  expected = copy.deepcopy(run.params)
  for tree in (params, expected):
    table = tree['token_embedder'].pop('embedding')
    rows = np.concatenate([table, tree.pop('final_logits_bias')[:, None]], axis=1)
    assert tree is expected or (len(rows) == 384 and not rows[301:].any())
    tree['rows'] = rows[:301]
  assert_same(params, expected)


def test_reexported_files_are_byte_equal(run, model, tmp_path):
  imported(model, tmp_path / 'in')
  again = tmp_path / 'again'
  export_imported(run, tmp_path / 'in', again)
  for name in (weights.SAFETENSORS, 'tokenizer.json', 'config.json'):
    assert (again / name).read_bytes() == (model / name).read_bytes()


def test_gin_file_describes_the_model(run, model, tmp_path):
  config = json.loads((model / 'config.json').read_text())
  config |= {'dropout': 0.25, 'attention_dropout': 0.25, 'activation_dropout': 0.0}
  (model / 'config.json').write_text(json.dumps(config))
  imported(model, tmp_path / 'in')
  bound = configs.read_gin(tmp_path / 'in/config.gin').bart_config()
  assert bound.vocab_size == 301 and bound.num_decoder_layers == 3
  assert (bound.dropout_rate, bound.attention_dropout_rate) == (0.25, 0.25)
  assert bound.activation_dropout_rate == 0.0
  text = (tmp_path / 'in/config.gin').read_text()
  assert 'attention_dropout_rate = %DROPOUT_RATE' in text
  assert f'{tmp_path}/in/checkpoint_0' in text
  # Gin reads it. The included file needs tasks and TensorFlow, and adds no shapes.
  assert "include 'gin/models/bart.gin'" in text
  text = text.replace("include 'gin/models/bart.gin'", 'from bart_t5x import network')
  gin.parse_config('from __gin__ import dynamic_registration\n' + text)
  try:
    assert gin.query_parameter('network.BartConfig.emb_dim') == 24
    assert gin.query_parameter('DROPOUT_RATE/macro.value') == 0.25
  finally:
    gin.clear_config()


def without_head(tensors):
  return {
    name.removeprefix('model.'): w
    for name, w in tensors.items()
    if name != 'final_logits_bias'
  }


def rewrite(model, change):
  tensors, _ = weights.read_weights(model)
  weights.write_safetensors(model / weights.SAFETENSORS, change(tensors))


def test_a_model_saved_without_its_head(run, model, tmp_path):
  rewrite(model, without_head)
  params = imported(model, tmp_path / 'in')
  assert not params['final_logits_bias'].any()
  np.testing.assert_array_equal(
    params['token_embedder']['embedding'][:301],
    run.params['token_embedder']['embedding'][:301],
  )


def change_rows(tensors, change):
  for name, axis in (('model.shared.weight', 0), ('final_logits_bias', 1)):
    tensors[name] = change(tensors[name], axis)
  return tensors


def old(tensors):
  tied = dict.fromkeys(mapping.TORCH_ALIASES, tensors.pop('model.shared.weight'))
  return tensors | tied | {'model.encoder.version': np.ones(1, np.float32)}


def with_other_heads(tensors):
  weight = np.ones((2, 24), np.float32)
  return tensors | {
    'classification_head.dense.weight': weight,
    'qa_outputs.weight': weight,
  }


def padded(tensors):
  def pad(tensor, axis):
    return np.concatenate([tensor, np.take(tensor, [5, 6, 7], axis)], axis)

  return change_rows(tensors, pad)


@pytest.mark.parametrize('change', [old, with_other_heads, padded])
def test_other_forms_of_the_same_weights(model, expected, tmp_path, change):
  rewrite(model, change)
  change_config(vocab_size=304 if change is padded else 301)(model)
  assert_same(imported(model, tmp_path / 'in'), expected)


def test_flax_weights(run, model, expected, tmp_path):
  (model / weights.SAFETENSORS).unlink()
  weights.write_msgpack(
    model / weights.MSGPACK, mapping.to_hf(run.params, run.config, 'flax')
  )
  assert_same(imported(model, tmp_path / 'flax'), expected)


def test_models_without_a_row_for_the_mask(run, model, tmp_path):
  """As fairseq's fine-tuned models are; the mask is then the last id."""
  path = model / 'tokenizer.json'
  tokenizer = json.loads(path.read_text())
  vocabulary = tokenizer['model']['vocab']
  last = next(token for token, i in vocabulary.items() if i == 300)
  vocabulary['<mask>'], vocabulary[last] = 300, 4
  tokenizer['added_tokens'][4]['id'] = 300
  path.write_text(json.dumps(tokenizer))
  change_config(vocab_size=300)(model)
  rewrite(model, lambda t: change_rows(t, lambda w, axis: np.delete(w, 300, axis)))
  params = imported(model, tmp_path / 'in')
  table = params['token_embedder']['embedding']
  expected = run.params['token_embedder']['embedding'][:300]
  np.testing.assert_array_equal(table[:300], expected)
  np.testing.assert_allclose(table[300], expected.mean(axis=0), atol=1e-6)
  assert not table[301:].any()


def test_forced_first_token_is_bound_and_exported_again(run, model, tmp_path):
  path = model / 'generation_config.json'
  generation = json.loads(path.read_text())
  path.write_text(json.dumps(generation | {'forced_bos_token_id': 0}))
  imported(model, tmp_path / 'in')
  bound = configs.read_gin(tmp_path / 'in/config.gin').bindings_of('BartModel')
  assert bound == {'forced_first_id': 1}
  export_imported(run, tmp_path / 'in', tmp_path / 'again')
  for name in ('config.json', 'generation_config.json'):
    exported = json.loads((tmp_path / 'again' / name).read_text())
    assert exported['forced_bos_token_id'] == 0


def untied(tensors):
  return tensors | {'lm_head.weight': tensors['model.shared.weight'] + 1}


def lacking(tensors):
  del tensors['model.decoder.layers.2.fc1.bias']
  return tensors


def misshapen(tensors):
  return tensors | {'model.encoder.layers.0.fc1.bias': np.ones(41, np.float32)}


def diverged(tensors):
  tensors['model.encoder.layers.0.fc1.bias'][3] = np.nan
  return tensors


def narrow(tensors):
  return tensors | {'model.shared.weight': np.ones((300, 24), np.float32)}


WRONG_WEIGHTS = {
  'this network has one token table': untied,
  'layers.2.fc1.bias': lacking,
  'mlp_dim = 40, the weights 41': misshapen,
  'model.encoder.layers.0.fc1.bias has values that are NaN': diverged,
  'vocab_size = 301, the token table 300 rows': narrow,
}


def fails(model, tmp_path, capsys, message):
  assert import_command(model, tmp_path / 'parent/in') == 1
  error = capsys.readouterr().err
  assert error.startswith('error: ') and message in error
  assert not (tmp_path / 'parent').exists()


@pytest.mark.parametrize('message', WRONG_WEIGHTS)
def test_other_weights_are_rejected(model, tmp_path, capsys, message):
  rewrite(model, WRONG_WEIGHTS[message])
  fails(model, tmp_path, capsys, message)


def change_config(**changes):
  def change(model):
    path = model / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  return change


def remove(name):
  return lambda model: (model / name).unlink()


FAULTS = {
  "'mbart'": change_config(model_type='mbart'),
  'extra_pos_embeddings = 0': change_config(extra_pos_embeddings=0),
  'num_heads must divide emb_dim': change_config(
    encoder_attention_heads=5, decoder_attention_heads=5
  ),
  'has 301 ids, the model 300': change_config(vocab_size=300),
  'neither config.json': remove('config.json'),
  'config.json is damaged': lambda model: (model / 'config.json').write_text('{'),
  'config.json has no JSON object': lambda model: (model / 'config.json').write_text(
    '[]'
  ),
  'num_encoder_layers = 1000000000000, the weights 2': change_config(
    encoder_layers=10**12
  ),
  'emb_dim = 240, the weights 24': change_config(d_model=240),
  'has no tokenizer': remove('tokenizer.json'),
  'has no weights': remove(weights.SAFETENSORS),
}


@pytest.mark.parametrize('message', FAULTS)
def test_bad_input_is_one_error_and_writes_nothing(model, tmp_path, capsys, message):
  FAULTS[message](model)
  fails(model, tmp_path, capsys, message)


def test_folder_is_replaced_only_with_overwrite(model, tmp_path, capsys):
  imported(model, tmp_path / 'in')
  assert import_command(model, tmp_path / 'in') == 1
  assert '--overwrite' in capsys.readouterr().err
  (model / 'tokenizer.json').unlink()
  imported(model, tmp_path / 'in', '--overwrite', '--skip_tokenizer')
  assert not (tmp_path / 'in/tokenizer.json').exists()


def test_revision_of_a_folder_is_rejected(model, tmp_path, capsys):
  assert import_command(model, tmp_path / 'in', '--revision=main') == 1
  assert 'is for Hub ids' in capsys.readouterr().err
