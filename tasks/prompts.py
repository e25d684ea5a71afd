"""Converts records of the registered tasks to inputs and targets."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bart_t5x import metrics
from tasks.readers import Record

SENTIMENTS = ('negativ', 'nøytral', 'positiv')
_SENTIMENT_OF = dict(zip(('negative', 'neutral', 'positive'), SENTIMENTS, strict=True))
_SENTIMENT_OF['fair'] = 'nøytral'  # as NorBench calls it

ACCEPTABILITY = ('riktig', 'feil')
_ACCEPTABILITY_OF = dict(zip(('correct', 'incorrect'), ACCEPTABILITY, strict=True))

ENTITY_TYPES = ('PER', 'ORG', 'LOC', 'PROD', 'EVT', 'DRV', 'MISC')
_ENTITY_TYPE_OF = {'GPE_LOC': 'LOC', 'GPE_ORG': 'ORG'}


def _prompt(task: str, text: str) -> str:
  # An empty text stays empty, so that it is left out and counted.
  return f'{task}: {text}' if text.strip() else ''


def sentiment_to_text(record: Record) -> dict[str, str]:
  """Converts a review (`text` or `review`) and its sentiment.

  The sentiment is `label` (negative, neutral or fair, positive), `sentiment` (0
  negative, 1 fair, 2 positive) or `rating` (1 to 6).
  """
  if 'label' in record:
    label = _named(record['label'], _SENTIMENT_OF, SENTIMENTS)
  elif 'sentiment' in record:
    sentiment = int(record['sentiment'])
    if not 0 <= sentiment <= 2:
      raise ValueError(f'sentiment must be 0, 1 or 2. Got: {sentiment}')
    label = SENTIMENTS[sentiment]
  else:
    rating = int(record['rating'])
    if not 1 <= rating <= 6:
      raise ValueError(f'rating must be 1 to 6. Got: {rating}')
    label = SENTIMENTS[(rating - 1) // 2]
  text = _first_of(record, ('text', 'review'))
  return {'inputs': _prompt('stemning', text), 'targets': label}


def acceptability_to_text(record: Record) -> dict[str, str]:
  """Converts a sentence `text` and its `label`, correct or incorrect."""
  label = _named(record['label'], _ACCEPTABILITY_OF, ACCEPTABILITY)
  return {'inputs': _prompt('språk', record['text']), 'targets': label}


def entities_to_text(record: Record) -> dict[str, str]:
  """Converts `tokens` and their `labels`, IOB2 tags."""
  tokens, labels = record['tokens'], record['labels']
  if len(tokens) != len(labels):
    raise ValueError(f'{len(tokens)} tokens, but {len(labels)} labels: {tokens}')
  spans = []
  for token, tag in zip(tokens, labels, strict=True):
    position, _, entity = tag.partition('-')
    entity = _ENTITY_TYPE_OF.get(entity, entity)
    if tag == 'O':
      spans.append(None)
    elif position not in ('B', 'I') or entity not in ENTITY_TYPES:
      raise ValueError(
        f'unknown entity tag {tag!r}. Known: O, and B- or I- before one of '
        f'{", ".join((*ENTITY_TYPES, *_ENTITY_TYPE_OF))}'
      )
    elif position == 'I' and spans and spans[-1] and spans[-1][0] == entity:
      spans[-1][1].append(token)
    else:
      spans.append((entity, [token]))
  # A bar in a name would end it.
  named = [
    f'{entity}: {" ".join(words).replace("|", "/")}'
    for entity, words in filter(None, spans)
  ]
  return {
    'inputs': _prompt('navn', ' '.join(tokens)),
    'targets': metrics.SPAN_SEPARATOR.join(named) or metrics.NO_SPAN,
  }


def question_to_text(record: Record) -> dict[str, str]:
  """Converts `question`, `context` and `answers`; the target is the first answer."""
  answers = record['answers']
  if isinstance(answers, Mapping):
    answers = list(answers['text'])
  else:  # objects, each with its text and where it starts
    answers = [answer['text'] for answer in answers]
  return {
    'inputs': f'spørsmål: {record["question"]} tekst: {record["context"]}',
    **_with_references(answers),
  }


def summary_to_text(record: Record, summaries: str = 'summaries') -> dict[str, str]:
  """Converts an article and its summaries; the target is the first summary.

  The article is `article`, `document` or `text`. The summaries are `summaries` (or the
  column of that parameter), a list of texts or of objects such as {"summary1": …}, as
  in NorSumm's files; or one text, `summary` or `target_text`.
  """
  found = record.get('summaries', record.get(summaries))
  if found is None:
    found = _first_of(record, ('summary', 'target_text'))
  if isinstance(found, str):
    found = [found]
  texts = []
  for one in found:
    texts += one.values() if isinstance(one, Mapping) else [one]
  return {
    'inputs': _prompt('sammendrag', _first_of(record, ('article', 'document', 'text'))),
    **_with_references(texts),
  }


def _with_references(texts: Sequence[str]) -> dict[str, str]:
  return {'targets': texts[0] if texts else '', 'references': json.dumps(texts)}


def references_of(text: str, example: Mapping, is_target: bool = False, **unused):
  """Returns a target's references or the stripped prediction, for `postprocess_fn`."""
  del unused
  return json.loads(example['references']) if is_target else text.strip()


def translation_to_text(record: Record) -> dict[str, str]:
  """Converts the same sentence in Bokmål, `nb`, and Nynorsk, `nn`."""
  return {'inputs': _prompt('til nynorsk', record['nb']), 'targets': record['nn']}


def _named(label: Any, names: Mapping[str, str], known: Sequence[str]) -> str:
  name = names.get(str(label), str(label))
  if name not in known:
    raise ValueError(
      f'unknown label {label!r}. Known labels: {", ".join((*names, *known))}'
    )
  return name


def _first_of(record: Record, names: Sequence[str]) -> Any:
  for name in names:
    if name in record:
      return record[name]
  raise ValueError(
    f'none of the columns {", ".join(names)}. Got: {", ".join(sorted(record))}'
  )
