"""Records of the data sets' different forms as inputs and targets."""

import json

import pytest

from tasks import prompts


@pytest.mark.parametrize(
  ('record', 'label'),
  [
    ({'text': 'x', 'label': 'neutral'}, 'nøytral'),
    ({'text': 'x', 'label': 'fair'}, 'nøytral'),
    ({'text': 'x', 'label': 'positiv'}, 'positiv'),
    ({'text': 'x', 'rating': '2'}, 'negativ'),
    ({'text': 'x', 'rating': 3}, 'nøytral'),
    ({'text': 'x', 'rating': 5}, 'positiv'),
    ({'id': '1', 'review': 'x', 'sentiment': 0}, 'negativ'),
    ({'id': '1', 'review': 'x', 'sentiment': 2}, 'positiv'),
  ],
)
def test_sentiment_in_every_form(record, label):
  assert prompts.sentiment_to_text(record) == {
    'inputs': 'stemning: x',
    'targets': label,
  }


@pytest.mark.parametrize(
  'answers',
  [
    {'text': ['1814', 'i 1814'], 'answer_start': [3, 1]},
    [{'text': '1814', 'answer_start': 3}, {'text': 'i 1814', 'answer_start': 1}],
  ],
)
def test_answers_in_both_forms(answers):
  record = {'question': 'Når?', 'context': 'Det var i 1814.', 'answers': answers}
  example = prompts.question_to_text(record)
  assert example['targets'] == '1814'
  assert json.loads(example['references']) == ['1814', 'i 1814']


@pytest.mark.parametrize(
  ('record', 'summaries'),
  [
    ({'article': 'x', 'summaries': ['a', 'b']}, ['a', 'b']),
    (
      {'article': 'x', 'summaries_nn': [{'summary1': 'a'}, {'summary2': 'b'}]},
      ['a', 'b'],
    ),
    ({'article': 'x', 'summaries': 'a'}, ['a']),
    ({'document': 'x', 'summary': 'a'}, ['a']),
    ({'text': 'x', 'target_text': 'a'}, ['a']),
  ],
)
def test_summaries_in_every_form(record, summaries):
  example = prompts.summary_to_text(record, 'summaries_nn')
  assert example['inputs'] == 'sammendrag: x'
  assert example['targets'] == 'a'
  assert prompts.references_of('ignored', example, is_target=True) == summaries
  assert prompts.references_of(' b ', example, is_target=False) == 'b'


@pytest.mark.parametrize(
  ('to_text', 'record', 'message'),
  [
    (prompts.sentiment_to_text, {'text': 'x', 'label': 'bra'}, "label 'bra'"),
    (prompts.sentiment_to_text, {'text': 'x', 'rating': 7}, '1 to 6. Got: 7'),
    (prompts.sentiment_to_text, {'text': 'x', 'sentiment': 3}, '0, 1 or 2. Got: 3'),
    (
      prompts.sentiment_to_text,
      {'tekst': 'x', 'label': 'fair'},
      'text, review. Got: label, tekst',
    ),
    (prompts.summary_to_text, {'text': 'x', 'sum': 'y'}, 'summary, target_text'),
    (prompts.acceptability_to_text, {'text': 'x', 'label': 1}, 'unknown label 1'),
    (prompts.entities_to_text, {'tokens': ['x'], 'labels': ['B-DYR']}, 'B-DYR'),
    (prompts.entities_to_text, {'tokens': ['x'], 'labels': []}, '1 tokens, but 0'),
  ],
)
def test_unknown_labels_stop(to_text, record, message):
  with pytest.raises(ValueError, match=message):
    to_text(record)


def test_entities_side_by_side_and_without_a_beginning():
  record = {
    'tokens': ['Oslo', 'Bergen', 'Kari', 'Dahl'],
    'labels': ['B-GPE_LOC', 'B-LOC', 'I-PER', 'I-PER'],
  }
  targets = prompts.entities_to_text(record)['targets']
  assert targets == 'LOC: Oslo | LOC: Bergen | PER: Kari Dahl'
