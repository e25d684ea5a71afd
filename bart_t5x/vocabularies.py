"""Tokenizers as seqio vocabularies, with BART's special ids.

The file is read when it is first needed, so tasks can be registered before their corpus
is prepared. Vocabularies with the same content are equal.
"""

import functools
import os
from collections.abc import Callable, Sequence

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_text as tf_text
from jaxtyping import Bool

from bart_t5x import byte_bpe, corpus_format, data, tokenization
from bart_t5x.tensors import do_not_convert
from bart_t5x.tokenization import BOS_ID, EOS_ID, PAD_ID, UNK_ID


@functools.lru_cache(maxsize=8)
def _tokenizer(content: bytes, name: str) -> tokenization.Tokenizer:
  return tokenization.read_tokenizer(name, content)


@functools.lru_cache(maxsize=8)
def _byte_bpe_tables(tokenizer: tokenization.ByteLevelTokenizer):
  return byte_bpe.build_tables(tokenizer.backend)


class BartVocabulary(seqio.Vocabulary):
  """A vocabulary with BART's special tokens, read lazily.

  Args:
    path: a tokenizer's file, or the corpus folder that contains it.
    templates: whether `<mask>` in text is the mask token. If not, as in corpora, text
      never yields special ids.
  """

  def __init__(self, path: str, templates: bool = False):
    super().__init__(extra_ids=0)
    self.path = os.fspath(path)
    self.templates = templates
    self._content: bytes | None = None

  def _file(self) -> str | None:
    if self.path.endswith(('.json', '.model')):
      return self.path if tf.io.gfile.exists(self.path) else None
    return tokenization.find_tokenizer_file(self.path, tf.io.gfile.exists)

  @property
  def available(self) -> bool:
    """Whether the file exists; does not read it."""
    return self._file() is not None

  def _read(self) -> bytes:
    if self._content is None:
      path = self._file()
      if path is None:
        raise FileNotFoundError(
          f'No tokenizer at {self.path!r}. Make it with: python -m bart_t5x.prepare '
          '--source=… --output_dir=… (see --help), or set the environment variable '
          'BART_T5X_DATA to the folder of your corpora.'
        )
      with tf.io.gfile.GFile(path, 'rb') as f:
        content = f.read()
      corpus = corpus_format.read(
        os.path.dirname(path), tf.io.gfile.exists, tf.io.gfile.GFile
      )
      corpus_format.check_tokenizer(corpus, content, path)
      self._content = content
    return self._content

  @property
  def tokenizer(self) -> tokenization.Tokenizer:
    return _tokenizer(self._read(), self.path)

  @property
  def pad_id(self) -> int:
    return PAD_ID

  @property
  def bos_id(self) -> int:
    return BOS_ID

  @property
  def eos_id(self) -> int:
    return EOS_ID

  @property
  def unk_id(self) -> int:
    return UNK_ID

  @property
  def mask_id(self) -> int:
    return self.tokenizer.mask_id

  @property
  def special_ids(self) -> tuple[int, ...]:
    """Sorted ids that neither text nor random replacement yields."""
    return self.tokenizer.special_ids

  @property
  def _base_vocab_size(self) -> int:
    return self.tokenizer.vocab_size

  @property
  def word_start_table(self) -> Bool[np.ndarray, ' vocab_size']:
    return self.tokenizer.word_start_table

  def _encode(self, s: str) -> list[int]:
    tokenizer = self.tokenizer
    return tokenizer.encode_template(s) if self.templates else tokenizer.encode(s)

  def _decode(self, ids: Sequence[int]) -> str:
    return self.tokenizer.decode(ids)

  @do_not_convert
  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
    """Encodes a scalar string to int32 [n], strings [k] to ragged int32 [k, (n)].

    Runs in the graph, so that a `tf.data` iterator can be saved, except for templates
    and for byte-level tokenizers that `byte_bpe.build_tables` rejects: a run that
    tokenizes with these on the fly restarts its data when resumed.
    """
    if s.shape.rank != 1:
      return self._encode_tf(tf.reshape(s, [1])).values
    encode = None if self.templates else self._graph_encoder()
    return self._encode_in_python(s) if encode is None else encode(s)

  def _graph_encoder(self) -> Callable[[tf.Tensor], tf.RaggedTensor] | None:
    """Returns a function from strings [k] to ids [k, (n)], None if impossible."""
    if isinstance(self.tokenizer, tokenization.SentencePieceTokenizer):
      return self._encode_pieces
    tables = _byte_bpe_tables(self.tokenizer)
    return tables and functools.partial(byte_bpe.encode, tables=tables)

  def _encode_pieces(self, texts: tf.Tensor) -> tf.RaggedTensor:
    tokenizer = self.tokenizer
    model = tf_text.SentencepieceTokenizer(model=self._read())

    def with_unk(ids):  # imported models may have pieces beyond the vocabulary
      return tf.where(ids < tokenizer.vocab_size, ids, UNK_ID)

    if not tokenizer.lossless:
      return tf.ragged.map_flat_values(with_unk, model.tokenize(texts))
    parts = tf.strings.split(texts, tokenization.SPACE_PIECE)
    rows = tf.ragged.map_flat_values(with_unk, model.tokenize(parts))
    return _join_rows(rows, tokenizer.space_bytes)

  def _encode_in_python(self, texts: tf.Tensor) -> tf.RaggedTensor:
    def encode(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
      rows = [self._encode(text.decode('utf-8')) for text in texts]
      flat = np.array([i for row in rows for i in row], np.int32)
      return flat, np.array([len(row) for row in rows], np.int64)

    flat, lengths = tf.numpy_function(encode, [texts], [tf.int32, tf.int64])
    flat.set_shape([None])
    return tf.RaggedTensor.from_row_lengths(
      flat, tf.ensure_shape(lengths, texts.shape), validate=False
    )

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    """Decodes ids [..., n] to strings [...]; runs in Python."""

    def decode(rows: np.ndarray) -> np.ndarray:
      flat = rows.reshape(-1, rows.shape[-1])
      texts = [self.decode(row.tolist()).encode('utf-8') for row in flat]
      return np.array(texts, object).reshape(rows.shape[:-1])

    ids = tf.convert_to_tensor(ids)
    text = tf.numpy_function(decode, [ids], tf.string)
    text.set_shape(ids.shape[:-1])
    return text

  def _identity(self) -> tuple:
    if self._content is None and not self.available:
      return (self.templates, self.path)
    return (self.templates, self._read())

  def __eq__(self, other) -> bool:
    if not isinstance(other, BartVocabulary):
      return NotImplemented
    return self._identity() == other._identity()

  def __hash__(self) -> int:
    # Must not change when the file appears.
    return hash((BartVocabulary, self.templates))

  def __getstate__(self) -> dict:
    return self.__dict__ | {'_content': None}

  def __repr__(self) -> str:
    return f'{type(self).__name__}({self.path!r}, templates={self.templates})'


def _join_rows(rows: tf.RaggedTensor, separator: list[int]) -> tf.RaggedTensor:
  """[n, parts, tokens] -> [n, tokens], with `separator` between the parts."""
  separator = tf.constant(separator, tf.int32)
  rows = tf.cast(rows, tf.int32)
  filler = tf.RaggedTensor.from_row_lengths(
    tf.tile(separator, [rows.values.nrows()]),
    tf.fill([rows.values.nrows()], tf.size(separator, tf.int64)),
  )
  joined = rows.with_values(tf.concat([filler, rows.values], axis=1))
  # Drop the separator before the first part.
  return joined.merge_dims(1, 2)[:, tf.size(separator) :]


def load_vocabulary(corpus_dir: str, templates: bool = False) -> BartVocabulary:
  """Returns the vocabulary of a corpus folder, which need not exist yet."""
  return BartVocabulary(corpus_dir, templates)


def task_vocabulary(
  mixture_or_task_name: str, feature: str = 'targets', module: str | None = None
) -> seqio.Vocabulary:
  """Returns the vocabulary of a registered task or mixture, for gin files.

  Args:
    mixture_or_task_name: as registered with seqio.
    feature: name of the feature with the vocabulary.
    module: module to import first, if it registers the task.

  Raises:
    ValueError: no such task or feature.
  """
  features = data.find_task(mixture_or_task_name, module).output_features
  if feature not in features:
    raise ValueError(
      f'{mixture_or_task_name!r} has no feature {feature!r}. Got: {list(features)}'
    )
  return features[feature].vocabulary
