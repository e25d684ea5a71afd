"""The tokenizer's files, as `AutoTokenizer` reads them."""

import json

import pytest

from bart_t5x import tokenization, tokenizer_training
from bart_t5x.hf import tokenizer_files

TEXTS = [f'Ås har {i} bjørner, og {i * 3} går på ski.' for i in range(200)]


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  path = tmp_path_factory.mktemp('corpus') / 'tokenizer.json'
  path.write_bytes(tokenizer_training.train('bytelevel', TEXTS, len(TEXTS), 300, 2))
  return path


def test_three_files(source, tmp_path):
  tokenizer_files.write(source, tmp_path, 64)
  assert sorted(path.name for path in tmp_path.iterdir()) == [
      'special_tokens_map.json', 'tokenizer.json', 'tokenizer_config.json'
  ]  # fmt: skip
  assert (tmp_path / 'tokenizer.json').read_bytes() == source.read_bytes()
  config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  assert config['model_max_length'] == 64
  assert config['tokenizer_class'] == 'PreTrainedTokenizerFast'
  # The mask takes the space before it along, as in BART's own tokenizer.
  assert config['mask_token']['content'] == '<mask>' and config['mask_token']['lstrip']
  special = json.loads((tmp_path / 'special_tokens_map.json').read_text())
  for name in ('bos_token', 'eos_token', 'unk_token', 'pad_token', 'cls_token'):
    assert special[name] == config[name]
  assert '__type' not in special['mask_token'] and 'id' not in special['mask_token']


def test_written_tokenizer_gives_our_ids_between_s_and_s(source, tmp_path):
  """What transformers calls, `tokenizers` itself, against ours."""
  import tokenizers

  tokenizer_files.write(source, tmp_path, 64)
  theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  ours = tokenization.read_tokenizer(str(source))
  for text in [*TEXTS[:9], '', ' ', '\n\tå', '😀 e\u0301', 'Ås <mask> på <mask>.']:
    expected = [1, *ours.encode_template(text), 2]
    assert theirs.encode(text).ids == tokenization.to_hf_ids(expected).tolist()


def test_json_keeps_norwegian_letters(tmp_path):
  tokenizer_files.write_json(tmp_path / 'a.json', {'æ': 'ø'})
  assert '"æ": "ø"' in (tmp_path / 'a.json').read_text(encoding='utf-8')
