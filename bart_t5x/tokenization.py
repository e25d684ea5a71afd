"""Text to token ids and back, in plain Python: what `vocabularies` wraps for seqio.

Imports no TensorFlow, so that `prepare`, its worker processes and the Hugging Face
bridge start at once.

Ids inside this code base and outside it differ in one place. seqio and T5X take
id 0 for padding everywhere; a BART tokenizer has `<s>` 0 and `<pad>` 1. So 0 and 1
change places at the border (`to_hf_ids`, `from_hf_ids`), and nothing else knows.

A literal `<s>` or `<mask>` in running text is text: it is tokenized like any other
characters. Only `templates=True` turns the string `<mask>` into the mask token.
"""

import functools
import json
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

PAD_ID = 0
BOS_ID = 1
EOS_ID = 2
UNK_ID = 3

BOS = '<s>'
PAD = '<pad>'
EOS = '</s>'
UNK = '<unk>'
MASK = '<mask>'
# As a Hugging Face BART tokenizer numbers them, <mask> in those trained here.
HF_SPECIALS = (BOS, PAD, EOS, UNK, MASK)

# How SentencePiece writes a space.
SPACE_PIECE = '\u2581'

BYTE_LEVEL_FILE = 'tokenizer.json'
SENTENCEPIECE_FILE = 'tokenizer.model'


def to_hf_ids(ids: Int[np.ndarray, '...']) -> Int[np.ndarray, '...']:
  """Inside ids to those of a Hugging Face tokenizer: 0 and 1 change places.

  Args:
    ids: any integer array (or sequence), any shape.

  Returns:
    An array of the same shape and dtype.
  """
  ids = np.asarray(ids)
  return np.where((ids == 0) | (ids == 1), 1 - ids, ids).astype(ids.dtype)


def from_hf_ids(ids: Int[np.ndarray, '...']) -> Int[np.ndarray, '...']:
  """Ids of a Hugging Face tokenizer to those inside: the same exchange."""
  return to_hf_ids(ids)


def _swapped(ids: Iterable[int]) -> list[int]:
  return [1 - i if i < 2 else i for i in ids]


class Tokenizer:
  """What both kinds of tokenizer share; a subclass reads one kind of file.

  Attributes:
    vocab_size: number of ids, specials included, nothing padded.
    mask_id: the id of `<mask>`.
    lossless: whether the tokens of every text add up to it, byte by byte.
  """

  vocab_size: int
  mask_id: int
  lossless: bool = True

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Inside ids of each text; no special token is ever among them."""
    raise NotImplementedError

  def piece(self, token_id: int) -> str:
    """How the tokenizer's own file spells an (inside) id."""
    raise NotImplementedError

  def _decode_run(self, ids: list[int]) -> str:
    """Text of ids among which there is no special one."""
    raise NotImplementedError

  def _starts_with_space(self, token_id: int) -> bool:
    raise NotImplementedError

  def _byte_length(self, piece: str) -> int:
    raise NotImplementedError

  @property
  def kind(self) -> str:
    """'bytelevel', 'unigram' or 'bpe', as `prepare` calls it."""
    raise NotImplementedError

  @property
  def special_ids(self) -> tuple[int, ...]:
    return tuple(sorted((PAD_ID, BOS_ID, EOS_ID, UNK_ID, self.mask_id)))

  def encode(self, text: str) -> list[int]:
    return self.encode_batch([text])[0]

  def encode_template(self, text: str) -> list[int]:
    """Encodes text in which `<mask>` is the token; other specials stay text.

    White space before a mask belongs to it (`lstrip`), as in BART's tokenizer.
    """
    *parts, last = text.split(MASK)
    encoded = self.encode_batch([p.rstrip() for p in parts] + [last])
    ids = encoded[0]
    for part in encoded[1:]:
      ids = ids + [self.mask_id] + part
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """Text of (inside) ids: specials vanish, `<mask>` stays, spelt out."""
    dropped = {PAD_ID, BOS_ID, EOS_ID, UNK_ID}
    runs: list[list[int]] = [[]]
    for token_id in ids:
      token_id = int(token_id)
      if token_id == self.mask_id:
        runs.append([])
      elif token_id not in dropped:
        runs[-1].append(token_id)
    return MASK.join(self._decode_run(run) for run in runs)

  def word_start_table(self) -> np.ndarray:
    """Whether a token begins a word: bool [vocab_size].

    A word begins with white space, as in GPT-2's whole-word masking; tokens without
    it, punctuation included, go with what is before them. Specials stand alone. The
    first token of a document has no space before it: callers count it as a start.
    """
    table = np.zeros(self.vocab_size, np.bool_)
    for token_id in range(self.vocab_size):
      table[token_id] = self._starts_with_space(token_id)
    table[list(self.special_ids)] = True
    return table

  @functools.cached_property
  def byte_lengths(self) -> np.ndarray:
    """How many bytes of UTF-8 each token stands for: int32 [vocab_size].

    0 for specials. The tokenizers lose nothing, so the lengths of a text's tokens add
    up to that of the text, and say where each token begins in it.
    """
    lengths = [self._byte_length(self.piece(i)) for i in range(self.vocab_size)]
    table = np.array(lengths, np.int32)
    table[list(self.special_ids)] = 0
    return table


def _check_specials(find, swap: bool, name: str) -> int:
  """Checks that the special tokens have the ids the code counts on.

  Args:
    find: token -> its id in the file, or None.
    swap: whether the file numbers them as Hugging Face does.
    name: of the file, for the message.

  Returns:
    The id of `<mask>`, which may be any.

  Raises:
    ValueError: where one is missing or has another id.
  """
  expected = {BOS: BOS_ID, PAD: PAD_ID, EOS: EOS_ID, UNK: UNK_ID}
  for token, inside in expected.items():
    wanted = 1 - inside if swap and inside < 2 else inside
    if find(token) != wanted:
      raise ValueError(
        f'{name}: {token} must have id {wanted}, but has {find(token)}. Use a '
        'tokenizer trained by `python -m bart_t5x.prepare` or one of BART.'
      )
  mask_id = find(MASK)
  if mask_id is None or mask_id < 4:
    raise ValueError(f'{name}: {MASK} must be a token, but has id {mask_id}.')
  return mask_id


class ByteLevelTokenizer(Tokenizer):
  """Byte-level BPE from the bytes of a `tokenizer.json`.

  Attributes:
    backend: the `tokenizers.Tokenizer` that does the work.
  """

  def __init__(self, content: bytes, name: str = BYTE_LEVEL_FILE):
    import tokenizers

    try:
      self.backend = tokenizers.Tokenizer.from_str(content.decode('utf-8'))
    except Exception as e:  # tokenizers raises nothing narrower
      raise ValueError(f'{name} is no tokenizer of `tokenizers`: {e}') from e
    if not isinstance(self.backend.decoder, tokenizers.decoders.ByteLevel):
      raise ValueError(
        f'{name} is no byte-level BPE, the only kind of tokenizer.json that works '
        'here. Of a SentencePiece tokenizer, use the model that it was made of '
        f'({SENTENCEPIECE_FILE}).'
      )
    self.mask_id = _check_specials(self.backend.token_to_id, True, name)
    self.vocab_size = self.backend.get_vocab_size(with_added_tokens=True)
    settings = json.loads(content)
    prefixed = '"add_prefix_space": true' in json.dumps(settings.get('pre_tokenizer'))
    self.lossless = settings.get('normalizer') is None and not prefixed
    # Specials in running text are text, and nothing is added, cut or filled up.
    self.backend.encode_special_tokens = True
    self.backend.no_padding()
    self.backend.no_truncation()

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    # The batched call uses every core and pays for it where texts are few.
    if len(texts) == 1:
      encodings = [self.backend.encode(texts[0], add_special_tokens=False)]
    else:
      encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
    # Text never yields ids 0 and 1, so there is nothing to swap.
    return [e.ids for e in encodings]

  @property
  def kind(self) -> str:
    return 'bytelevel'

  def piece(self, token_id: int) -> str:
    return self.backend.id_to_token(_swapped([token_id])[0])

  def _decode_run(self, ids: list[int]) -> str:
    return self.backend.decode(ids, skip_special_tokens=False)

  def _starts_with_space(self, token_id: int) -> bool:
    # Byte-level alphabets spell space, newline, return and tab like this.
    return (self.piece(token_id) or '')[:1] in ('Ġ', 'Ċ', 'č', 'ĉ')

  def _byte_length(self, piece: str) -> int:
    return len(piece or '')  # a character of the alphabet a byte


class _SentencePieceSettings(NamedTuple):
  """What a model's file says of itself."""

  vocab_size: int
  lossless: bool


def _sentencepiece_settings(content: bytes) -> _SentencePieceSettings:
  """Reads the settings of a model, which must be one."""
  from sentencepiece import sentencepiece_model_pb2

  model = sentencepiece_model_pb2.ModelProto.FromString(content)
  rules = model.normalizer_spec
  rewrites = (
    rules.precompiled_charsmap
    or rules.add_dummy_prefix
    or rules.remove_extra_whitespaces
  )
  return _SentencePieceSettings(
    model.trainer_spec.vocab_size or len(model.pieces),
    model.trainer_spec.byte_fallback and not rewrites,
  )


class SentencePieceTokenizer(Tokenizer):
  """SentencePiece from the bytes of a model trained by `prepare`, or imported.

  Its ids are the inside ones (`--pad_id=0` and so on at training). One trained by
  `prepare` loses nothing: no normalization, every byte a piece, white space kept. The
  one character it would lose, U+2581, which it takes for a space itself, is spelt in
  bytes. An imported one may lose what its makers let go (`lossless` says so), and may
  know pieces that its language model has no id for: those become `<unk>`.

  Attributes:
    space_bytes: ids that spell U+2581; empty where single bytes have no pieces.
  """

  def __init__(self, content: bytes, name: str = SENTENCEPIECE_FILE):
    import sentencepiece

    self._model = sentencepiece.SentencePieceProcessor()
    try:
      self._model.LoadFromSerializedProto(content)
    except RuntimeError as e:
      raise ValueError(f'{name} is no SentencePiece model: {e}') from e
    spec = _sentencepiece_settings(content)
    self.lossless = spec.lossless
    self.vocab_size = min(self._model.GetPieceSize(), spec.vocab_size)

    def find(token):
      token_id = self._model.PieceToId(token)
      return token_id if self._model.IdToPiece(token_id) == token else None

    self.mask_id = _check_specials(find, False, name)
    self.space_bytes = []
    if self.lossless:
      self.space_bytes = [find(f'<0x{b:02X}>') for b in SPACE_PIECE.encode()]

  @property
  def kind(self) -> str:
    from sentencepiece import sentencepiece_model_pb2

    content = self._model.serialized_model_proto()
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    kind = sentencepiece_model_pb2.TrainerSpec.ModelType.Name
    return kind(model.trainer_spec.model_type).lower()

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self._encode_one(text) for text in texts]

  def _encode_one(self, text: str) -> list[int]:
    if SPACE_PIECE not in text or not self.lossless:
      return self._encode_part(text)
    first, *rest = text.split(SPACE_PIECE)
    ids = self._encode_part(first)
    for part in rest:
      ids += self.space_bytes + self._encode_part(part)
    return ids

  def _encode_part(self, text: str) -> list[int]:
    ids = self._model.EncodeAsIds(text)
    return [i if i < self.vocab_size else UNK_ID for i in ids]

  def piece(self, token_id: int) -> str:
    return self._model.IdToPiece(int(token_id))

  def _decode_run(self, ids: list[int]) -> str:
    return self._model.DecodeIds(ids)

  def _starts_with_space(self, token_id: int) -> bool:
    piece = self.piece(token_id)
    return piece[:1] == SPACE_PIECE or piece in ('<0x0A>', '<0x0D>', '<0x09>')

  def _byte_length(self, piece: str) -> int:
    if len(piece) == 6 and piece.startswith('<0x'):
      return 1
    return len(piece.replace(SPACE_PIECE, ' ').encode('utf-8'))


def read_tokenizer(path: str, content: bytes | None = None) -> Tokenizer:
  """Reads a tokenizer of either kind.

  Args:
    path: a file `tokenizer.json` or `….model`.
    content: its bytes, where the caller has read them already.

  Returns:
    The tokenizer.

  Raises:
    ValueError: where the content is none, or its special ids are not BART's.
    FileNotFoundError: where there is no such file.
  """
  if content is None:
    with open(path, 'rb') as f:
      content = f.read()
  kind = ByteLevelTokenizer if is_json(content) else SentencePieceTokenizer
  return kind(content, path)


def is_json(content: bytes) -> bool:
  """Whether a tokenizer's file is JSON, by its first character.

  To parse it takes as long as to read the tokenizer, and no SentencePiece model begins
  like this: theirs start with 0x0A, the first field's key.
  """
  return content[:64].lstrip(b' \t\r').startswith(b'{')


def find_tokenizer_file(corpus_dir: str, exists=os.path.exists) -> str | None:
  """Path of the tokenizer in a corpus folder, or None where there is none."""
  for name in (BYTE_LEVEL_FILE, SENTENCEPIECE_FILE):
    path = f'{os.fspath(corpus_dir).rstrip("/")}/{name}'
    if exists(path):
      return path
  return None
