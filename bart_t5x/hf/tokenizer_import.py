"""The tokenizer of a foreign BART as a file that `tokenization` reads.

Byte-level BPE becomes a `tokenizer.json`, SentencePiece a `tokenizer.model`. Where a
`dict.txt` stands beside them, it has the ids: fairseq writes one with every model,
and a few models of Hugging Face (BARTpho's tokenizer) kept it.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from bart_t5x import tokenization
from bart_t5x.hf import fairseq, tokenizer_files
from bart_t5x.tokenization import BOS, EOS, MASK, PAD, UNK

# Names that SentencePiece models bear in model folders.
_SENTENCEPIECE = (
  'sentencepiece.bpe.model',
  'spiece.model',
  'spm.model',
  tokenization.SENTENCEPIECE_FILE,
)
_GPT2 = ('encoder.json', 'vocab.bpe')
_BYTE_LEVEL = ('vocab.json', 'merges.txt')

# What a model's tokenizer may consist of; the Hub is asked for these.
FILES = (
  tokenization.BYTE_LEVEL_FILE,
  *_BYTE_LEVEL,
  *_SENTENCEPIECE,
  *_GPT2,
  fairseq.DICTIONARY,
)
_SKIP = 'or import the weights alone: --skip_tokenizer'


class TokenizerFile(NamedTuple):
  """A file for a corpus folder: its name there, and its content."""

  name: str
  content: bytes


def read(folder: pathlib.Path, vocab_size: int) -> TokenizerFile:
  """The tokenizer of a model folder, ready to be written.

  Looked for in this order: 1. SentencePiece with a dict.txt or by itself; 2.
  tokenizer.json; 3. vocab.json and merges.txt; 4. encoder.json, vocab.bpe and
  dict.txt of fairseq's GPT-2 BPE.

  Args:
    folder: the model's, of Hugging Face or of fairseq.
    vocab_size: the model's number of ids.

  Returns:
    The file.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged, of another kind, or has another number of ids.
  """
  dictionary = folder / fairseq.DICTIONARY
  symbols = fairseq.read_dictionary(dictionary) if dictionary.exists() else None
  piece_models = [folder / n for n in _SENTENCEPIECE if (folder / n).exists()]

  def has(names: Sequence[str]) -> bool:
    return all((folder / name).exists() for name in names)

  if piece_models:
    found = _sentencepiece(piece_models[0], symbols, vocab_size)
  elif (folder / tokenization.BYTE_LEVEL_FILE).exists():
    found = _tokenizer_json(folder / tokenization.BYTE_LEVEL_FILE)
  elif has(_BYTE_LEVEL):
    vocabulary = tokenizer_files.read_json(folder / _BYTE_LEVEL[0])
    found = _byte_level(vocabulary, folder / _BYTE_LEVEL[1])
  elif symbols is not None and has(_GPT2):
    vocabulary = _gpt2_vocabulary(folder / _GPT2[0], symbols)
    found = _byte_level(vocabulary, folder / _GPT2[1])
  else:
    raise FileNotFoundError(
      f'{folder} holds no tokenizer: neither tokenizer.json, nor vocab.json with '
      'merges.txt, nor a SentencePiece model, nor dict.txt with encoder.json and '
      f'vocab.bpe. Put them there, {_SKIP}'
    )
  size = tokenization.read_tokenizer(found.name, found.content).vocab_size
  if size != vocab_size:
    raise ValueError(
      f'the tokenizer in {folder} has {size} ids, the model {vocab_size}. Take the '
      f'tokenizer that belongs to the model, {_SKIP}'
    )
  return found


# ---- byte-level BPE ----------------------------------------------------------


def _tokenizer_json(path: pathlib.Path) -> TokenizerFile:
  """A tokenizer.json as it is, if it is byte-level BPE."""
  if '"ByteLevel"' not in json.dumps(
    tokenizer_files.read_json(path).get('pre_tokenizer')
  ):
    raise ValueError(
      f'{path} is no byte-level BPE, and its SentencePiece model does not lie beside '
      f'it. Put it there, {_SKIP}'
    )
  return TokenizerFile(tokenization.BYTE_LEVEL_FILE, path.read_bytes())


def _gpt2_vocabulary(path: pathlib.Path, symbols: Sequence[str]) -> dict[str, int]:
  """Ids by token, where dict.txt spells GPT-2's tokens as their numbers.

  Args:
    path: GPT-2's encoder.json, numbers by token.
    symbols: of dict.txt: a number each, fillers and `<mask>` excepted.

  Raises:
    ValueError: a token has no id in dict.txt.
  """
  numbers = tokenizer_files.read_json(path)
  ids = _with_specials(symbols)
  lacking = [token for token, number in numbers.items() if str(number) not in ids]
  if lacking:
    raise ValueError(
      f'{path.parent / fairseq.DICTIONARY} lacks {len(lacking)} of the '
      f'{len(numbers)} tokens of {path.name}, {lacking[0]!r} for one: text with '
      f'them could not be written. Take the dict.txt of the whole vocabulary, {_SKIP}'
    )
  tokens = {str(number): token for token, number in numbers.items()}
  return {tokens.get(symbol, symbol): i for symbol, i in ids.items()}


def _with_specials(symbols: Sequence[str]) -> dict[str, int]:
  """Ids outside of a dictionary's symbols, specials included."""
  ordered = [BOS, PAD, EOS, UNK, *symbols]
  # fairseq's denoising task adds the mask where the dictionary has none.
  if MASK not in ordered:
    ordered.append(MASK)
  return {symbol: i for i, symbol in enumerate(ordered)}


def _byte_level(vocabulary: dict[str, int], merges: pathlib.Path) -> TokenizerFile:
  """A tokenizer.json as BART's tokenizer would be written.

  Args:
    vocabulary: ids outside by token, specials included.
    merges: a file with a pair of tokens a line, the first maybe a comment.

  Raises:
    ValueError: merges and vocabulary do not fit together.
  """
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, processors

  lines = merges.read_text(encoding='utf-8').split('\n')
  if lines[0].startswith('#version'):
    lines = lines[1:]
  pairs = [tuple(line.split(' ')) for line in lines if line.strip()]
  if any(len(pair) != 2 for pair in pairs):
    raise ValueError(f'{merges} is no list of merges: two tokens a line')
  try:
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
  except Exception as e:  # tokenizers raises nothing narrower
    raise ValueError(f'{merges} does not fit its vocabulary: {e}') from e
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  mask = tokenizers.AddedToken(MASK, lstrip=True, special=True, normalized=False)
  tokenizer.add_special_tokens([BOS, PAD, EOS, UNK, mask])
  tokenizer.post_processor = processors.RobertaProcessing(
    (EOS, tokenizer.token_to_id(EOS)),
    (BOS, tokenizer.token_to_id(BOS)),
    add_prefix_space=False,
  )
  content = tokenizer.to_str(pretty=True).encode('utf-8')
  return TokenizerFile(tokenization.BYTE_LEVEL_FILE, content)


# ---- SentencePiece -----------------------------------------------------------


def _sentencepiece(
  path: pathlib.Path, symbols: Sequence[str] | None, vocab_size: int
) -> TokenizerFile:
  """A SentencePiece model whose pieces bear the ids inside.

  Args:
    path: the model's file.
    symbols: of dict.txt, which then has the ids. Without it a model is taken as it
      is if its specials have the ids inside, as those trained by `prepare`, or its
      pieces behind `<unk>`, `<s>`, `</s>` follow on the four specials, with
      `<mask>` as the last id, as in XLM-R's tokenizer.
    vocab_size: the model's number of ids.

  Raises:
    ValueError: it is no model of SentencePiece, or neither holds.
  """
  content = path.read_bytes()
  proto = _parse(content, path)
  pieces = [piece.piece for piece in proto.pieces]
  if symbols is None and pieces[:4] == [PAD, BOS, EOS, UNK] and MASK in pieces:
    return TokenizerFile(tokenization.SENTENCEPIECE_FILE, content)
  source = path if symbols is None else path.parent / fairseq.DICTIONARY
  if symbols is None:
    symbols = [p for p in pieces if p not in (BOS, PAD, EOS, UNK, MASK)]
  order = list(_with_specials(symbols))
  if len(order) != vocab_size:
    raise ValueError(
      f'{source} gives {len(order)} ids with the specials, the model has '
      f'{vocab_size}. Take the tokenizer that belongs to the model, {_SKIP}'
    )
  order[0], order[1] = order[1], order[0]
  return TokenizerFile(
    tokenization.SENTENCEPIECE_FILE, _reordered(proto, order).SerializeToString()
  )


def _parse(content: bytes, path: pathlib.Path):
  """The model as its protocol buffer."""
  from google.protobuf import message
  from sentencepiece import sentencepiece_model_pb2

  try:
    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
  except message.DecodeError as e:
    raise ValueError(f'{path} is no SentencePiece model, or damaged: {e}') from e
  if not proto.pieces:
    raise ValueError(f'{path} is no SentencePiece model: it has no pieces')
  return proto


def _reordered(proto, order: Sequence[str]):
  """The same model with its pieces in another order.

  Pieces that the order lacks stay behind the others: text is cut as before, and what
  would become one of them is unknown (`SentencePieceTokenizer.vocab_size`).
  """
  made = type(proto)()
  made.CopyFrom(proto)
  del made.pieces[:]
  kinds = made.SentencePiece
  known = {piece.piece: piece for piece in proto.pieces}
  for symbol in order:
    piece = made.pieces.add(piece=symbol, score=0.0)
    if symbol == UNK:
      piece.type = kinds.UNKNOWN
    elif symbol in (BOS, PAD, EOS, MASK):
      piece.type = kinds.CONTROL
    elif symbol in known:
      piece.CopyFrom(known[symbol])
    else:
      piece.type = kinds.UNUSED  # a filler, which text never yields
  placed = {*order, BOS, PAD, EOS, UNK, MASK}
  made.pieces.extend(piece for name, piece in known.items() if name not in placed)
  spec = made.trainer_spec
  spec.vocab_size = len(order)
  spec.pad_id, spec.bos_id, spec.eos_id, spec.unk_id = 0, 1, 2, 3
  spec.pad_piece, spec.bos_piece, spec.eos_piece, spec.unk_piece = PAD, BOS, EOS, UNK
  return made
