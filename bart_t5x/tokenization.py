"""Tokenizers in plain Python, and their special ids; `vocabularies` is for seqio.

Imports no TensorFlow, so that workers of `prepare` start quickly.

seqio and T5X pad with id 0; BART tokenizers have `<s>` 0 and `<pad>` 1. So ids 0 and 1
are exchanged on import and export (`to_hf_ids`, `from_hf_ids`); internal ids are those
after the exchange.

`<s>` or `<mask>` in text is tokenized like any other characters. Only `encode_template`
turns `<mask>` into the mask token.
"""

import functools
import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Int, Int32

PAD_ID = 0
BOS_ID = 1
EOS_ID = 2
UNK_ID = 3

BOS = '<s>'
PAD = '<pad>'
EOS = '</s>'
UNK = '<unk>'
MASK = '<mask>'
# In order of their Hugging Face ids; <mask> may have another in imported tokenizers.
HF_SPECIALS = (BOS, PAD, EOS, UNK, MASK)

SPACE_PIECE = '\u2581'  # how SentencePiece writes a space

BYTE_LEVEL_FILE = 'tokenizer.json'
SENTENCEPIECE_FILE = 'tokenizer.model'


def to_hf_ids(ids: Int[np.ndarray, '...']) -> Int[np.ndarray, '...']:
  """Converts internal ids to Hugging Face ids: exchanges 0 and 1."""
  ids = np.asarray(ids)
  return np.where((ids == 0) | (ids == 1), 1 - ids, ids).astype(ids.dtype)


def from_hf_ids(ids: Int[np.ndarray, '...']) -> Int[np.ndarray, '...']:
  """Converts Hugging Face ids to internal ids: exchanges 0 and 1."""
  return to_hf_ids(ids)


class Tokenizer:
  """Base class of the two kinds of tokenizer."""

  content: bytes  # of the tokenizer's file
  file_name: str  # of that file in a corpus folder
  kind: str  # 'bytelevel', 'unigram' or 'bpe'
  vocab_size: int  # special tokens included
  mask_id: int
  lossless: bool  # whether the bytes of a text's tokens are the text

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text, which are never special."""
    raise NotImplementedError

  def piece(self, token_id: int) -> str:
    """Returns an id's token as spelled in the tokenizer's file."""
    raise NotImplementedError

  def _decode_ordinary(self, ids: list[int]) -> str:
    raise NotImplementedError

  def _starts_with_space(self, piece: str) -> bool:
    raise NotImplementedError

  def _byte_length(self, piece: str) -> int:
    raise NotImplementedError

  @property
  def special_ids(self) -> tuple[int, ...]:
    return tuple(sorted((PAD_ID, BOS_ID, EOS_ID, UNK_ID, self.mask_id)))

  def encode(self, text: str) -> list[int]:
    return self.encode_batch([text])[0]

  def encode_template(self, text: str) -> list[int]:
    """Encodes text in which `<mask>` is the mask token; other specials are text.

    Drops white space before a mask, as BART's tokenizer does (`lstrip`).
    """
    *parts, last = text.split(MASK)
    ids, *rest = self.encode_batch([part.rstrip() for part in parts] + [last])
    for part in rest:
      ids = [*ids, self.mask_id, *part]
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """Decodes ids; special tokens are dropped, except `<mask>`."""
    parts: list[list[int]] = [[]]
    for token_id in map(int, ids):
      if token_id == self.mask_id:
        parts.append([])
      elif token_id not in (PAD_ID, BOS_ID, EOS_ID, UNK_ID):
        parts[-1].append(token_id)
    return MASK.join(map(self._decode_ordinary, parts))

  @functools.cached_property
  def word_start_table(self) -> Bool[np.ndarray, ' vocab_size']:
    """Whether a token begins a word.

    As in whole-word masking with GPT-2's BPE, a word begins with white space; other
    tokens, punctuation included, continue it. Special tokens are words of their own.
    Callers count the first token of a document, which has no space, as a start.
    """
    pieces = map(self.piece, range(self.vocab_size))
    table = np.array([self._starts_with_space(piece or '') for piece in pieces])
    table[list(self.special_ids)] = True
    table.setflags(write=False)
    return table

  @functools.cached_property
  def byte_lengths(self) -> Int32[np.ndarray, ' vocab_size']:
    """Length of each token in bytes of UTF-8; 0 for special tokens."""
    pieces = map(self.piece, range(self.vocab_size))
    table = np.array([self._byte_length(piece or '') for piece in pieces], np.int32)
    table[list(self.special_ids)] = 0
    return table


def _check_specials(find: Callable[[str], int | None], order: tuple, name: str) -> int:
  """Checks the ids of the special tokens and returns that of `<mask>`."""
  for wanted, token in enumerate(order):
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
  """Byte-level BPE from a tokenizer.json; `backend` is a `tokenizers.Tokenizer`."""

  file_name = BYTE_LEVEL_FILE
  kind = 'bytelevel'

  def __init__(self, content: bytes, name: str = BYTE_LEVEL_FILE):
    import tokenizers

    self.content = content
    try:
      self.backend = tokenizers.Tokenizer.from_str(content.decode('utf-8'))
    except Exception as e:  # tokenizers raises nothing narrower
      raise ValueError(f'{name} is not a tokenizer.json of `tokenizers`: {e}') from e
    if not isinstance(self.backend.decoder, tokenizers.decoders.ByteLevel):
      raise ValueError(
        f'{name} is not a byte-level BPE, the only supported kind of tokenizer.json. '
        f'For a SentencePiece tokenizer, use its original model ({SENTENCEPIECE_FILE}).'
      )
    self.mask_id = _check_specials(self.backend.token_to_id, (BOS, PAD, EOS, UNK), name)
    # Ids may have gaps.
    self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
    # Special tokens in text are text.
    self.backend.encode_special_tokens = True
    self.backend.no_padding()
    self.backend.no_truncation()

  @functools.cached_property
  def lossless(self) -> bool:
    """Whether a text with every byte of UTF-8 and every added word comes back."""
    if self.backend.normalizer is not None:
      return False
    added = self.backend.get_added_tokens_decoder().values()
    steps = (1, 0x801), (0x1000, 0x11000), (0x40000, 0x110000)
    codes = [code for step, end in steps for code in range(0, end, step)]
    words = [token.content for token in added]
    text = ' '.join(['Å', *words, ''.join(map(chr, codes))])
    ids = self.encode(text)
    length = self.byte_lengths[ids].sum()
    return length == len(text.encode('utf-8')) and self.decode(ids) == text

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    # The batched call uses every core, which is slower for a single text.
    if len(texts) == 1:
      encodings = [self.backend.encode(texts[0], add_special_tokens=False)]
    else:
      encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
    # Text never yields ids 0 and 1, so there are none to exchange.
    return [e.ids for e in encodings]

  def piece(self, token_id: int) -> str:
    return self.backend.id_to_token(1 - token_id if token_id < 2 else token_id)

  def _decode_ordinary(self, ids: list[int]) -> str:
    return self.backend.decode(ids, skip_special_tokens=False)

  def _starts_with_space(self, piece: str) -> bool:
    return piece[:1] in tuple('ĠĊčĉ')  # space, newline, return and tab

  def _byte_length(self, piece: str) -> int:
    return len(piece)  # one character of the alphabet per byte


class SentencePieceTokenizer(Tokenizer):
  """SentencePiece model, with internal ids.

  Models trained by `prepare` are lossless: no normalization, and a piece for each byte.
  U+2581, SentencePiece's own symbol for a space, is encoded as bytes (`space_bytes`,
  empty if not lossless). Imported models may be lossy, and may have pieces beyond
  `vocab_size`, which become `<unk>`.
  """

  file_name = SENTENCEPIECE_FILE

  def __init__(self, content: bytes, name: str = SENTENCEPIECE_FILE):
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    self.content = content
    self._model = sentencepiece.SentencePieceProcessor()
    try:
      self._model.LoadFromSerializedProto(content)
    except RuntimeError as e:
      raise ValueError(f'{name} is not a SentencePiece model: {e}') from e

    def find(token: str) -> int | None:
      token_id = self._model.PieceToId(token)
      return token_id if self._model.IdToPiece(token_id) == token else None

    self.mask_id = _check_specials(find, (PAD, BOS, EOS, UNK), name)
    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    self.kind = trainer.ModelType.Name(trainer.model_type).lower()
    self.vocab_size = min(
      self._model.GetPieceSize(), trainer.vocab_size or len(proto.pieces)
    )
    self.lossless = trainer.byte_fallback and not (
      normalizer.precompiled_charsmap
      or normalizer.add_dummy_prefix
      or normalizer.remove_extra_whitespaces
    )
    self.space_bytes = []
    if self.lossless:
      self.space_bytes = [find(f'<0x{byte:02X}>') for byte in SPACE_PIECE.encode()]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self._encode(text) for text in texts]

  def _encode(self, text: str) -> list[int]:
    if SPACE_PIECE in text and self.lossless:
      first, *rest = map(self._encode, text.split(SPACE_PIECE))
      return first + [i for part in rest for i in (*self.space_bytes, *part)]
    ids = self._model.EncodeAsIds(text)
    return [i if i < self.vocab_size else UNK_ID for i in ids]

  def piece(self, token_id: int) -> str:
    return self._model.IdToPiece(int(token_id))

  def _decode_ordinary(self, ids: list[int]) -> str:
    return self._model.DecodeIds(ids)

  def _starts_with_space(self, piece: str) -> bool:
    return piece[:1] == SPACE_PIECE or piece in ('<0x0A>', '<0x0D>', '<0x09>')

  def _byte_length(self, piece: str) -> int:
    if len(piece) == 6 and piece.startswith('<0x'):
      return 1
    return len(piece.replace(SPACE_PIECE, ' ').encode('utf-8'))


def read_tokenizer(path: str, content: bytes | None = None) -> Tokenizer:
  """Reads a tokenizer.json or a SentencePiece model.

  Args:
    path: of the file, or the folder of a corpus or imported model.
    content: of the file, if already read.

  Raises:
    ValueError: the content is not a tokenizer, or its special ids are not BART's.
  """
  if content is None:
    if os.path.isdir(path):
      folder, path = path, find_tokenizer_file(path)
      if path is None:
        raise ValueError(
          f'The folder {folder!r} has neither {BYTE_LEVEL_FILE} nor '
          f'{SENTENCEPIECE_FILE}.'
        )
    elif os.path.exists(path) and not os.path.isfile(path):  # a pipe would block
      raise ValueError(f'The tokenizer {path!r} is not a regular file. Copy it to one.')
    with open(path, 'rb') as f:
      content = f.read()
  kind = ByteLevelTokenizer if is_json(content) else SentencePieceTokenizer
  return kind(content, path)


def is_json(content: bytes) -> bool:
  """Whether a tokenizer's file is JSON; a SentencePiece model begins with 0x0A."""
  return content[:64].lstrip(b' \t\r').startswith(b'{')


def find_tokenizer_file(
  corpus_dir: str, exists: Callable[[str], bool] = os.path.exists
) -> str | None:
  """Returns the path of the tokenizer in a corpus folder, None if not found."""
  for name in (BYTE_LEVEL_FILE, SENTENCEPIECE_FILE):
    path = f'{os.fspath(corpus_dir).rstrip("/")}/{name}'
    if exists(path):
      return path
  return None
