"""Trains tokenizers on a stream of text; the same text gives the same file.

Tokenizers of all kinds are lossless, have the special ids of `tokenization`, and have
exactly the requested size, on which a model's shape depends.
"""

import io
import itertools
import re
import sys
from collections.abc import Iterable, Iterator

from bart_t5x import sentences, tokenization

BYTE_LEVEL = tokenization.ByteLevelTokenizer.kind
SENTENCEPIECE_KINDS = ('unigram', 'bpe')
KINDS = (BYTE_LEVEL, *SENTENCEPIECE_KINDS)

# Every tokenizer has 256 bytes and the special tokens.
SMALLEST_VOCABULARY = 256 + len(tokenization.HF_SPECIALS)

_BATCH = 512
# Characters of a word that counts: time is quadratic in the longest.
_LONGEST_WORD = 10_000
_WORD = re.compile(r'\w++|\s++|[^\w\s]++')
_SCORE_UNIT = 2.0**-8  # see `_rounded`
_SENTENCEPIECE_THREADS = 16  # fixed, because the result depends on it
_LONGEST_SENTENCE = 1 << 16  # bytes; SentencePiece drops longer ones


def train(
  kind: str, texts: Iterable[str], num_texts: int, vocab_size: int, min_frequency: int
) -> bytes:
  """Trains a tokenizer and returns its file (tokenizer.json or SentencePiece model).

  Args:
    kind: 'bytelevel' (byte-level BPE, as BART's), 'unigram' or 'bpe' (SentencePiece).
    texts: documents, read once.
    num_texts: for the progress bar.
    vocab_size: of the result, special tokens included.
    min_frequency: of a pair to be merged; byte-level only.

  Raises:
    ValueError: too little text, or too many characters, for the vocabulary size.
  """
  if kind == BYTE_LEVEL:
    return _train_byte_level(texts, num_texts, vocab_size, min_frequency)
  return _train_sentencepiece(kind, texts, vocab_size)


def _train_byte_level(
  texts: Iterable[str], num_texts: int, vocab_size: int, min_frequency: int
) -> bytes:
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, processors, trainers

  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  mask = tokenizers.AddedToken(tokenization.MASK, lstrip=True, special=True)
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=min_frequency,
    special_tokens=[*tokenization.HF_SPECIALS[:-1], mask],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=sys.stderr.isatty(),
  )
  tokenizer.train_from_iterator(_batched(texts), trainer, length=num_texts)
  size = tokenizer.get_vocab_size()
  if size != vocab_size:
    raise ValueError(
      f'The training text yields only {size} tokens, fewer than '
      f'--vocab_size={vocab_size}. Use more text, or a vocabulary of at most {size}.'
    )
  tokenizer.post_processor = processors.RobertaProcessing(
    (tokenization.EOS, tokenizer.token_to_id(tokenization.EOS)),
    (tokenization.BOS, tokenizer.token_to_id(tokenization.BOS)),
    add_prefix_space=False,
  )
  return tokenizer.to_str(pretty=True).encode('utf-8')


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
  texts = map(_without_endless_words, texts)
  while batch := list(itertools.islice(texts, _BATCH)):
    yield batch


def _without_endless_words(text: str) -> str:
  if len(text) <= _LONGEST_WORD:
    return text
  return _WORD.sub(lambda m: m[0] if len(m[0]) <= _LONGEST_WORD else '', text)


def _train_sentencepiece(kind: str, texts: Iterable[str], vocab_size: int) -> bytes:
  import sentencepiece

  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_training_sentences(texts),
      model_writer=model,
      model_type=kind,
      vocab_size=vocab_size,
      pad_id=tokenization.PAD_ID,
      bos_id=tokenization.BOS_ID,
      eos_id=tokenization.EOS_ID,
      unk_id=tokenization.UNK_ID,
      # Unlike user-defined symbols, control symbols are never found in text.
      control_symbols=[tokenization.MASK],
      byte_fallback=True,
      # Lossless: no normalization of characters or spaces.
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      max_sentence_length=_LONGEST_SENTENCE,
      num_threads=_SENTENCEPIECE_THREADS,
      minloglevel=2,
    )
  except RuntimeError as e:
    reason = str(e).rpartition('] ')[2]  # without the source location
    raise ValueError(
      f'SentencePiece cannot train --vocab_size={vocab_size} on this text: {reason}'
    ) from e
  content = model.getvalue()
  return _rounded(content) if kind == 'unigram' else content


def _rounded(content: bytes) -> bytes:
  """Rounds a unigram model's scores so that their sums are exact in float32.

  SentencePiece sums in float32, Hugging Face's `tokenizers` in float64; unrounded, they
  break ties between segmentations differently. Sums are exact down to -65,536, a
  document of about 7,000 tokens.
  """
  from sentencepiece import sentencepiece_model_pb2

  model = sentencepiece_model_pb2.ModelProto.FromString(content)
  for piece in model.pieces:
    piece.score = round(piece.score / _SCORE_UNIT) * _SCORE_UNIT
  return model.SerializeToString(deterministic=True)


def _training_sentences(texts: Iterable[str]) -> Iterator[str]:
  for text in texts:
    for sentence in sentences.split_sentences(text):
      # SentencePiece reads lines and has no piece with a newline.
      yield from filter(None, sentence.split('\n'))
