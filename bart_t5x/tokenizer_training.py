"""Trains a tokenizer on a stream of text; the same text gives the same file.

All kinds lose nothing of the text, number the special tokens as `tokenization` wants
them, and have exactly the size asked for: a model's shape depends on it.
"""

import io
import itertools
import re
import sys
from collections.abc import Iterable, Iterator

from bart_t5x import sentences, tokenization

BYTE_LEVEL = 'bytelevel'
UNIGRAM = 'unigram'
SENTENCEPIECE_KINDS = (UNIGRAM, 'bpe')
KINDS = (BYTE_LEVEL, *SENTENCEPIECE_KINDS)

# 256 bytes and the specials: what every tokenizer holds before it learned anything.
SMALLEST_VOCABULARY = 256 + len(tokenization.HF_SPECIALS)

_BATCH = 512
# Unigram scores (natural logarithms) are whole multiples of this. See `_rounded`.
_SCORE_UNIT = 2.0**-8
# SentencePiece's result depends on it, so it does not follow the machine.
_SENTENCEPIECE_THREADS = 16
_LONGEST_SENTENCE = 1 << 16  # bytes; SentencePiece leaves longer ones out


class VocabularyTooLarge(ValueError):
  """The text does not yield as many tokens as were asked for."""

  def __init__(self, asked: int, possible: int | None):
    super().__init__(
      f'The training text yields only {possible or "fewer"} tokens, and '
      f'--vocab_size={asked} asks for more. '
      + (f'Ask for at most {possible}, or use' if possible else 'Ask for less, or use')
      + ' more text.'
    )


def file_name(kind: str) -> str:
  """The name a tokenizer of this kind has in a corpus folder."""
  if kind == BYTE_LEVEL:
    return tokenization.BYTE_LEVEL_FILE
  return tokenization.SENTENCEPIECE_FILE


def train(
  kind: str, texts: Iterable[str], num_texts: int, vocab_size: int, min_frequency: int
) -> bytes:
  """Trains a tokenizer.

  Args:
    kind: 'bytelevel' (byte-level BPE, as BART's), 'unigram' or 'bpe' (SentencePiece).
    texts: documents, read once.
    num_texts: how many, for the progress bar.
    vocab_size: of the result, specials included.
    min_frequency: of a pair to be merged; byte-level only.

  Returns:
    The content of `tokenizer.json`, or of a SentencePiece model.

  Raises:
    VocabularyTooLarge: the text is too little for it.
    ValueError: the vocabulary has no room for the text's characters.
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
  tokenizer.train_from_iterator(_batched(texts, _BATCH), trainer, length=num_texts)
  size = tokenizer.get_vocab_size()
  if size != vocab_size:
    raise VocabularyTooLarge(vocab_size, size)

  def special(token: str) -> tuple[str, int]:
    return token, tokenizer.token_to_id(token)

  tokenizer.post_processor = processors.RobertaProcessing(
    special(tokenization.EOS), special(tokenization.BOS), add_prefix_space=False
  )
  return tokenizer.to_str(pretty=True).encode('utf-8')


def _batched(texts: Iterable[str], size: int) -> Iterator[list[str]]:
  texts = iter(texts)
  while batch := list(itertools.islice(texts, size)):
    yield batch


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
      # A control symbol is never found in text, a user-defined one would be.
      control_symbols=[tokenization.MASK],
      byte_fallback=True,
      # Nothing is lost: every character and every space stays what and where it is.
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      max_sentence_length=_LONGEST_SENTENCE,
      num_threads=_SENTENCEPIECE_THREADS,
      minloglevel=2,
    )
  except RuntimeError as e:
    if needed := re.search(r'required_chars\D*\d+ vs (\d+)', str(e)):
      raise ValueError(
        f'The bytes, specials and characters of the text alone are {needed[1]} tokens, '
        f'and --vocab_size={vocab_size} allows for fewer. Ask for more.'
      ) from e
    if 'ocab' not in str(e):
      raise
    most = re.search(r'<= (\d+)', str(e))
    raise VocabularyTooLarge(vocab_size, int(most[1]) if most else None) from e
  content = model.getvalue()
  return _rounded(content) if kind == UNIGRAM else content


def _rounded(content: bytes) -> bytes:
  """Rounds a unigram model's scores, so that sums of them are exact in float32.

  SentencePiece adds them up in float32, Hugging Face's `tokenizers` in float64. Where
  two ways to cut a text are equally likely, rounding would decide, and not alike. The
  sums are exact down to -65,536, which is a document of some 7,000 tokens.
  """
  from sentencepiece import sentencepiece_model_pb2

  model = sentencepiece_model_pb2.ModelProto.FromString(content)
  for piece in model.pieces:
    piece.score = round(piece.score / _SCORE_UNIT) * _SCORE_UNIT
  return model.SerializeToString(deterministic=True)


def _training_sentences(texts: Iterable[str]) -> Iterator[str]:
  for text in texts:
    for sentence in sentences.split_sentences(text):
      # SentencePiece reads lines, and has no piece that holds a line's end.
      yield from filter(None, sentence.split('\n'))
