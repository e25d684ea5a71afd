"""Exports tokenizers to Hugging Face folders and imports those of other BARTs.

Byte-level BPE is a `tokenizer.json` on both sides. A SentencePiece model is exported
with an equivalent `tokenizer.json`, and imported with its pieces reordered to the ids
of the model, which a `dict.txt` determines if the folder has one (fairseq).
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import tokenizers
from google.protobuf import message
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, pre_tokenizers, processors

from bart_t5x import tokenization
from bart_t5x.hf import configs, fairseq
from bart_t5x.tokenization import BOS, EOS, MASK, PAD, UNK

_MASK = tokenizers.AddedToken(MASK, lstrip=True, special=True, normalized=False)

# ---- export ---------------------------------------------------------------------


def write(source: pathlib.Path, folder: pathlib.Path, max_length: int) -> None:
  """Writes the files that AutoTokenizer of transformers 4 and 5 reads.

  Args:
    source: the corpus's tokenizer.json or SentencePiece model.
    folder: to write into.
    max_length: longest input of the model, in tokens.

  Raises:
    ValueError: a SentencePiece model has no equivalent tokenizer.json.
  """
  content = source.read_bytes()
  if not tokenization.is_json(content):
    (folder / tokenization.SENTENCEPIECE_FILE).write_bytes(content)
    content = sentencepiece_to_json(content, str(source))
  (folder / tokenization.BYTE_LEVEL_FILE).write_bytes(content)
  added = json.loads(content)['added_tokens']
  mask = next(dict(token) for token in added if token['content'] == MASK)
  del mask['id']
  config = {
    # BartTokenizerFast would rebuild parts of tokenizer.json and lose its
    # post-processor.
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'model_max_length': max_length,
    'model_input_names': ['input_ids', 'attention_mask'],
    # Needed for decode(encode(text)) == text.
    'clean_up_tokenization_spaces': False,
    'bos_token': BOS,
    'eos_token': EOS,
    'unk_token': UNK,
    'sep_token': EOS,
    'pad_token': PAD,
    'cls_token': BOS,
    'mask_token': {'__type': 'AddedToken', **mask},
  }
  configs.write_json(folder / 'tokenizer_config.json', config)


_NORMAL = sentencepiece_model_pb2.ModelProto.SentencePiece.NORMAL
_UNIGRAM = sentencepiece_model_pb2.TrainerSpec.UNIGRAM
_BPE = sentencepiece_model_pb2.TrainerSpec.BPE

# A `<` that begins the name of a piece that text must not be encoded as.
_NAMES = r'<(?=(?:0x[0-9A-F]{2}|/?s|pad|unk|mask)>)'


def sentencepiece_to_json(content: bytes, name: str) -> bytes:
  """Converts a SentencePiece model to a tokenizer.json with the same ids for all text.

  Where other conversions lose something:

    - Pieces contain a space where SentencePiece writes U+2581. A U+2581 in text is
      encoded as bytes, as `tokenization` does.
    - SentencePiece never matches control and byte pieces in text; the Unigram model of
      `tokenizers` would. So text such as `<0x41>` is first split after its `<`.
    - Merges, which SentencePiece does not store, are all pairs of pieces that form a
      piece, in the order of scores.

  Args:
    content: of a model that `tokenization.SentencePieceTokenizer` reads.
    name: of its file, for messages.

  Raises:
    ValueError: the model is neither unigram nor BPE, or it normalizes text.
  """
  model = _parse(content, name)
  kind, rules = model.trainer_spec.model_type, model.normalizer_spec
  if kind not in (_UNIGRAM, _BPE):
    raise ValueError(
      f'{name} is of type {kind}. Only unigram and BPE models can be exported.'
    )
  if (
    rules.precompiled_charsmap
    or rules.add_dummy_prefix
    or rules.remove_extra_whitespaces
    or not rules.escape_whitespaces
  ):
    raise ValueError(
      f'{name} normalizes text or adds or removes spaces, which tokenizer.json cannot '
      'reproduce. Train it with `python -m bart_t5x.prepare`.'
    )
  # Hugging Face swaps the first two ids.
  pieces = [*model.pieces[1::-1], *model.pieces[2:]]
  spelt = [
    p.piece.replace(tokenization.SPACE_PIECE, ' ') if p.type == _NORMAL else p.piece
    for p in pieces
  ]
  if kind == _UNIGRAM:
    scores = [(text, piece.score) for text, piece in zip(spelt, pieces, strict=True)]
    tokenizer = tokenizers.Tokenizer(
      models.Unigram(scores, tokenization.UNK_ID, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
      tokenizers.Regex(_NAMES), 'merged_with_previous'
    )
  else:
    ids = {text: i for i, text in enumerate(spelt)}
    tokenizer = tokenizers.Tokenizer(
      models.BPE(ids, _merges(pieces, spelt), unk_token=UNK, byte_fallback=True)
    )
  tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
  tokenizer.add_special_tokens([BOS, PAD, EOS, UNK, _MASK])
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f'{BOS} $A {EOS}',
    pair=f'{BOS} $A {EOS} {EOS} $B {EOS}',
    special_tokens=[(token, spelt.index(token)) for token in (BOS, EOS)],
  )
  # Independent of whether the library's version escapes letters.
  text = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=2)
  return (text + '\n').encode('utf-8')


def _merges(pieces, spelt: Sequence[str]) -> list[tuple[str, str]]:
  scores = {
    text: piece.score
    for text, piece in zip(spelt, pieces, strict=True)
    if piece.type == _NORMAL
  }
  merges = [
    (score, text[:i], text[i:])
    for text, score in scores.items()
    for i in range(1, len(text))
    if text[:i] in scores and text[i:] in scores
  ]
  # A stable sort keeps the pairs that form one piece together.
  return [(left, right) for _, left, right in sorted(merges, key=lambda m: -m[0])]


def _parse(content: bytes, name: str):
  try:
    return sentencepiece_model_pb2.ModelProto.FromString(content)
  except message.DecodeError as e:
    raise ValueError(f'{name} is not a valid SentencePiece model: {e}') from e


# ---- import ----------------------------------------------------------------------

_SENTENCEPIECE = (
  'sentencepiece.bpe.model',
  'spiece.model',
  'spm.model',
  tokenization.SENTENCEPIECE_FILE,
)
_GPT2 = ('encoder.json', 'vocab.bpe')
_BYTE_LEVEL = ('vocab.json', 'merges.txt')

# Tokenizer files to download.
FILES = (
  tokenization.BYTE_LEVEL_FILE,
  *_BYTE_LEVEL,
  *_SENTENCEPIECE,
  *_GPT2,
  fairseq.DICTIONARY,
)
SKIP = 'or import the weights alone: --skip_tokenizer'


def read(folder: pathlib.Path) -> tokenization.Tokenizer:
  """Reads the tokenizer of a Hugging Face or fairseq model.

  Precedence: 1. SentencePiece, with or without dict.txt; 2. tokenizer.json;
  3. vocab.json and merges.txt; 4. fairseq's encoder.json, vocab.bpe and dict.txt.

  Raises:
    FileNotFoundError: no tokenizer found.
    ValueError: it is damaged or of another kind.
  """
  dictionary = folder / fairseq.DICTIONARY
  symbols = fairseq.read_dictionary(dictionary) if dictionary.exists() else None
  piece_models = [folder / n for n in _SENTENCEPIECE if (folder / n).exists()]

  def has(*names: str) -> bool:
    return all((folder / name).exists() for name in names)

  if piece_models:
    content = _sentencepiece(piece_models[0], symbols)
  elif has(tokenization.BYTE_LEVEL_FILE):
    content = (folder / tokenization.BYTE_LEVEL_FILE).read_bytes()
  elif has(*_BYTE_LEVEL):
    vocabulary = configs.read_json(folder / _BYTE_LEVEL[0])
    content = _byte_level(vocabulary, folder / _BYTE_LEVEL[1])
  elif symbols is not None and has(*_GPT2):
    vocabulary = _gpt2_vocabulary(folder / _GPT2[0], symbols)
    content = _byte_level(vocabulary, folder / _GPT2[1])
  else:
    raise FileNotFoundError(
      f'{folder} has no tokenizer. Add tokenizer.json, vocab.json with merges.txt, a '
      f'SentencePiece model, or dict.txt with encoder.json and vocab.bpe, {SKIP}'
    )
  return tokenization.read_tokenizer(str(folder), content)


def _gpt2_vocabulary(path: pathlib.Path, symbols: Sequence[str]) -> dict[str, int]:
  """Ids by token, given a dict.txt of encoder.json's numbers."""
  numbers = configs.read_json(path)
  ids = _with_specials(symbols)
  lacking = [token for token, number in numbers.items() if str(number) not in ids]
  if lacking:
    raise ValueError(
      f'{path.parent / fairseq.DICTIONARY} lacks {len(lacking)} of the {len(numbers)} '
      f'tokens of {path.name}, such as {lacking[0]!r}. Use a complete dict.txt, {SKIP}'
    )
  tokens = {str(number): token for token, number in numbers.items()}
  return {tokens.get(symbol, symbol): i for symbol, i in ids.items()}


def _with_specials(symbols: Sequence[str]) -> dict[str, int]:
  """Hugging Face's ids of a dictionary's symbols, specials included."""
  # fairseq's denoising task adds the mask if the dictionary has none.
  mask = [] if MASK in symbols else [MASK]
  order = [BOS, PAD, EOS, UNK, *symbols, *mask]
  ids = {symbol: i for i, symbol in enumerate(order)}
  if len(ids) < len(order):
    twice = next(symbol for i, symbol in enumerate(order) if ids[symbol] != i)
    raise ValueError(f'{fairseq.DICTIONARY} has {twice!r} twice')
  return ids


def _byte_level(vocabulary: dict[str, int], merges: pathlib.Path) -> bytes:
  """Makes a tokenizer.json as transformers does for BART."""
  lines = merges.read_text(encoding='utf-8').split('\n')
  if lines[0].startswith('#version'):
    del lines[0]
  pairs = [tuple(line.split(' ')) for line in lines if line.strip()]
  try:
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
  except Exception as e:  # tokenizers raises nothing narrower.
    raise ValueError(f'{merges} does not fit its vocabulary: {e}') from e
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens([BOS, PAD, EOS, UNK, _MASK])
  tokenizer.post_processor = processors.RobertaProcessing(
    (EOS, tokenizer.token_to_id(EOS)),
    (BOS, tokenizer.token_to_id(BOS)),
    add_prefix_space=False,
  )
  return tokenizer.to_str(pretty=True).encode('utf-8')


def _sentencepiece(path: pathlib.Path, symbols: Sequence[str] | None) -> bytes:
  """Makes a SentencePiece model whose pieces have the ids of this project.

  Without a dictionary, models of `prepare` stay as they are; others get the ids of
  XLM-R's tokenizer: specials, the other pieces, and `<mask>` last.
  """
  content = path.read_bytes()
  model = _parse(content, str(path))
  pieces = [piece.piece for piece in model.pieces]
  if symbols is None:
    if pieces[:4] == [PAD, BOS, EOS, UNK] and MASK in pieces:
      return content
    symbols = [p for p in pieces if p not in (BOS, PAD, EOS, UNK, MASK)]
  order = list(_with_specials(symbols))
  order[0], order[1] = order[1], order[0]
  return _reordered(model, order).SerializeToString()


def _reordered(model, order: Sequence[str]) -> Any:
  """Reorders the pieces of a model.

  Pieces that `order` lacks come last, so that text is split as before; their ids count
  as unknown (`SentencePieceTokenizer.vocab_size`).
  """
  made = type(model)()
  made.CopyFrom(model)
  del made.pieces[:]
  kinds = made.SentencePiece
  known = {piece.piece: piece for piece in model.pieces}
  for symbol in order:
    piece = made.pieces.add(piece=symbol, score=0.0)
    if symbol == UNK:
      piece.type = kinds.UNKNOWN
    elif symbol in (BOS, PAD, EOS, MASK):
      piece.type = kinds.CONTROL
    elif symbol in known:
      piece.CopyFrom(known[symbol])
    else:
      piece.type = kinds.UNUSED  # a filler
  placed = {*order, BOS, PAD, EOS, UNK, MASK}
  made.pieces.extend(piece for name, piece in known.items() if name not in placed)
  spec = made.trainer_spec
  spec.vocab_size = len(order)
  spec.pad_id, spec.bos_id, spec.eos_id, spec.unk_id = 0, 1, 2, 3
  spec.pad_piece, spec.bos_piece, spec.eos_piece, spec.unk_piece = PAD, BOS, EOS, UNK
  return made
