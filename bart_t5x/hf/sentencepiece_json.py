"""A SentencePiece model as the `tokenizer.json` of Hugging Face's `tokenizers`.

The same ids come out of the same text, `<s>` being 0 and `<pad>` 1 there. Three things
are not as in other conversions, so that nothing is lost or mistaken:

  - Pieces hold a plain space where SentencePiece writes U+2581, and text is not
    rewritten. So a U+2581 in a text is a character like others: it is spelt in bytes,
    as `tokenization` spells it.
  - SentencePiece finds no control symbol and no byte's piece in running text, but the
    Unigram model of `tokenizers` looks for everything in its vocabulary. Text such as
    `<0x41>` is therefore parted behind its `<` before the model sees it.
  - BPE's merges are not in a SentencePiece model. They are all the ways to make a piece
    of two others, in the order of the pieces' scores.
"""

import json

from bart_t5x import tokenization

_NORMAL = 1  # the type of pieces that are text, as the format numbers it
_UNIGRAM, _BPE = 1, 2  # types of models

# Behind a `<` that begins the name of a piece which text must not yield.
_NAMES = r'<(?=(?:0x[0-9A-F]{2}|/?s|pad|unk|mask)>)'


def convert(content: bytes, name: str = tokenization.SENTENCEPIECE_FILE) -> bytes:
  """Makes a tokenizer.json of a SentencePiece model.

  Args:
    content: of a model that `tokenization.SentencePieceTokenizer` reads.
    name: of its file, for messages.

  Returns:
    The content of a tokenizer.json that adds `<s>` … `</s>` and in which `<mask>`
    takes the space before it along, as in BART's own.

  Raises:
    ValueError: the model is neither unigram nor BPE, or it rewrites text.
  """
  import tokenizers
  from tokenizers import decoders, pre_tokenizers, processors

  model = _parse(content, name)
  # In the order of the ids outside: the first two change places.
  pieces = [*model.pieces[1::-1], *model.pieces[2:]]
  spelt = [_spelling(piece) for piece in pieces]
  unigram = model.trainer_spec.model_type == _UNIGRAM
  tokenizer = tokenizers.Tokenizer((_unigram if unigram else _bpe)(pieces, spelt))
  if unigram:
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
      tokenizers.Regex(_NAMES), 'merged_with_previous'
    )
  tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
  *others, mask = tokenization.HF_SPECIALS
  mask = tokenizers.AddedToken(mask, lstrip=True, special=True, normalized=False)
  tokenizer.add_special_tokens([*others, mask])
  bos, eos = tokenization.BOS, tokenization.EOS
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f'{bos} $A {eos}',
    pair=f'{bos} $A {eos} {eos} $B {eos}',
    special_tokens=[(token, spelt.index(token)) for token in (bos, eos)],
  )
  # Written anew, so that letters stay readable whatever the library's version does.
  text = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=2)
  return (text + '\n').encode('utf-8')


def _parse(content: bytes, name: str):
  """The model's protocol buffer, if it keeps text as it is."""
  from sentencepiece import sentencepiece_model_pb2

  model = sentencepiece_model_pb2.ModelProto.FromString(content)
  kind = model.trainer_spec.model_type
  if kind not in (_UNIGRAM, _BPE):
    raise ValueError(
      f'{name}: only unigram and BPE models have a counterpart in tokenizer.json, and '
      f'this one is of type {kind}.'
    )
  rules = model.normalizer_spec
  if (
    rules.precompiled_charsmap
    or rules.add_dummy_prefix
    or rules.remove_extra_whitespaces
    or not rules.escape_whitespaces
  ):
    raise ValueError(
      f'{name} rewrites text before it tokenizes (normalization, a space in front or '
      'spaces removed). Train it as `python -m bart_t5x.prepare` does.'
    )
  return model


def _spelling(piece) -> str:
  if piece.type != _NORMAL:
    return piece.piece
  return piece.piece.replace(tokenization.SPACE_PIECE, ' ')


def _unigram(pieces, spelt: list[str]):
  from tokenizers import models

  scores = [piece.score for piece in pieces]
  return models.Unigram(
    list(zip(spelt, scores, strict=True)), tokenization.UNK_ID, byte_fallback=True
  )


def _bpe(pieces, spelt: list[str]):
  from tokenizers import models

  scores = {
    text: piece.score
    for text, piece in zip(spelt, pieces, strict=True)
    if piece.type == _NORMAL
  }
  merges = []
  for text, score in scores.items():
    for i in range(1, len(text)):
      left, right = text[:i], text[i:]
      if left in scores and right in scores:
        merges.append((-score, left, right))
  # Python's sort is stable: ways to make the same piece stay beside each other.
  merges.sort(key=lambda merge: merge[0])
  return models.BPE(
    {text: i for i, text in enumerate(spelt)},
    [(left, right) for _, left, right in merges],
    unk_token=tokenization.UNK,
    byte_fallback=True,
  )
