"""The tokenizer's files of a Hugging Face model folder.

A byte-level `tokenizer.json` is the corpus's own: its ids are Hugging Face's, and its
post-processor adds `<s> … </s>`. Of a SentencePiece model one is made that does the
same (`sentencepiece_json`). Beside it stand the two small files by which
`AutoTokenizer` finds the class and the special tokens.
"""

import json
import pathlib
from typing import Any

from bart_t5x import tokenization
from bart_t5x.hf import sentencepiece_json

_SPECIAL_TOKENS = {
  'bos_token': tokenization.BOS,
  'eos_token': tokenization.EOS,
  'unk_token': tokenization.UNK,
  'sep_token': tokenization.EOS,
  'pad_token': tokenization.PAD,
  'cls_token': tokenization.BOS,
}


def tokenizer_config(tokenizer_json: dict[str, Any], max_length: int) -> dict[str, Any]:
  """`tokenizer_config.json` for `AutoTokenizer` of transformers 4 and 5.

  Args:
    tokenizer_json: the parsed tokenizer.json.
    max_length: longest input of the model, in tokens.

  Returns:
    The JSON object. The class is the generic `PreTrainedTokenizerFast`, which
    takes everything from tokenizer.json: BartTokenizerFast would rebuild parts of
    it, and lose its post-processor.
  """
  mask = next(
    token
    for token in tokenizer_json['added_tokens']
    if token['content'] == tokenization.MASK
  )
  return {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'model_max_length': max_length,
    'model_input_names': ['input_ids', 'attention_mask'],
    # What makes decode(encode(text)) the text: no spaces are tidied away.
    'clean_up_tokenization_spaces': False,
    **_SPECIAL_TOKENS,
    'mask_token': {
      '__type': 'AddedToken',
      **{k: v for k, v in mask.items() if k != 'id'},
    },
  }


def write(source: pathlib.Path, folder: pathlib.Path, max_length: int) -> None:
  """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json.

  A SentencePiece model goes along as it is: the import takes it back, transformers
  read the tokenizer.json that was made of it.

  Args:
    source: the tokenizer of the corpus, tokenizer.json or a SentencePiece model.
    folder: where to write.
    max_length: longest input of the model, in tokens.
  """
  content = source.read_bytes()
  if not tokenization.is_json(content):
    (folder / tokenization.SENTENCEPIECE_FILE).write_bytes(content)
    content = sentencepiece_json.convert(content, str(source))
  text = content.decode('utf-8')
  config = tokenizer_config(json.loads(text), max_length)
  (folder / tokenization.BYTE_LEVEL_FILE).write_text(text, encoding='utf-8')
  write_json(folder / 'tokenizer_config.json', config)
  special_tokens = _SPECIAL_TOKENS | {
    'mask_token': {k: v for k, v in config['mask_token'].items() if k != '__type'}
  }
  write_json(folder / 'special_tokens_map.json', special_tokens)


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  """Writes JSON as people read it: indented, æøå as they are."""
  text = json.dumps(content, ensure_ascii=False, indent=2) + '\n'
  path.write_text(text, encoding='utf-8')


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    ValueError: the file holds none.
  """
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as e:
    raise ValueError(f'{path} is damaged: {e}. Download it again.') from e
  if not isinstance(content, dict):
    raise ValueError(f'{path} holds no JSON object but a {type(content).__name__}')
  return content
