"""Sentence boundaries: the gold set, and that no character is lost."""

import pathlib
import re

import hypothesis
import pytest
from hypothesis import strategies

from bart_t5x import sentences

GOLD = pathlib.Path(__file__).parent / 'data' / 'sentences_no.tsv'


def gold_cases():
  for line in GOLD.read_text(encoding='utf-8').splitlines()[1:]:
    phenomenon, language, text = line.split('\t')
    yield phenomenon, language, text.replace('\\n', '\n').split('¦')


def test_gold_set_is_large_and_mixed():
  cases = list(gold_cases())
  assert len(cases) >= 200
  assert sum(language == 'nn' for _, language, _ in cases) >= 50
  assert len({phenomenon for phenomenon, _, _ in cases}) >= 10
  assert len({''.join(parts) for _, _, parts in cases}) == len(cases)


def test_gold_set_has_what_norwegian_makes_hard():
  texts = {'nb': '', 'nn': ''}
  for _, language, parts in gold_cases():
    texts[language] += ''.join(parts) + '\n'
  for word in 'f.eks. bl.a. dvs. kl. nr. jf. pkt. ca. osv. m.m.'.split():
    assert word in texts['nb'], word
  for word in 't.d. m.a. dvs. kl. nr. jf. ca. osb. jamf.'.split():
    assert word.lower() in texts['nn'].lower(), word
  for text in texts.values():
    for pattern in (
      r'\d\. mai',  # ordinals and dates
      r'\d+\. \w+ 1\d\d\d',
      r'[A-Z]\. [A-Z]',  # initials
      r'\d,\d',  # decimals and times
      r'\d\.\d',
      r' ?(…|\.\.\.)',
      '[«"]',
      r'§ \d+\. [A-Z]',  # at the head of a paragraph, and referred to
      r'av § \d\.',
      r'www\.\w+\.no|@',
      '\n',
    ):
      assert re.search(pattern, text), pattern


@pytest.mark.parametrize('phenomenon', sorted({case[0] for case in gold_cases()}))
def test_gold(phenomenon):
  for found, _, parts in gold_cases():
    if found == phenomenon:
      assert sentences.split_sentences(''.join(parts)) == parts


def naive(text):
  return [0] + [m.start() for m in re.finditer(r'(?<=[.!?])\s+', text)]


def test_better_than_a_regular_expression_by_far():
  right = {'rules': 0, 'naive': 0}
  for _, _, parts in gold_cases():
    text = ''.join(parts)
    starts = [sum(map(len, parts[:i])) for i in range(len(parts))]
    right['rules'] += sentences.sentence_starts(text) == starts
    right['naive'] += naive(text) == starts
  assert right['rules'] > 2 * right['naive']


# Text dense in what the rules look at.
TEXTS = strategies.lists(
  strategies.sampled_from(
    [
      'Han',
      'kom',
      '.',
      '!',
      '?',
      '…',
      '...',
      ' ',
      '  ',
      '\n',
      '\n\n',
      '«',
      '»',
      '"',
      '§',
      '4',
      '17',
      'kl.',
      'osv.',
      'f.eks.',
      'A.',
      '-',
      '•',
      ')',
      '(',
      '\u00a0',
      'Ø',
      'å',
      '\u2028',
      '\U0001f600',
      '',
    ]
  ),
  max_size=40,
).map(''.join)


@hypothesis.given(TEXTS | strategies.text(max_size=80))
def test_pieces_give_the_text_back(text):
  pieces = sentences.split_sentences(text)
  assert ''.join(pieces) == text
  assert all(pieces)
  starts = sentences.sentence_starts(text)
  if text.strip():
    assert starts[0] == 0
    assert all(a < b for a, b in zip(starts, starts[1:]))
    # No sentence is white space alone.
    assert all(piece.strip() for piece in pieces)
  else:
    assert starts == []


def test_white_space_goes_with_what_follows():
  text = 'En.  To.\n\nTre.\t Fire. '
  pieces = ['En.', '  To.', '\n\nTre.', '\t Fire. ']
  assert sentences.split_sentences(text) == pieces


@pytest.mark.parametrize('text', ['', ' ', '\n\n', '\u00a0'])
def test_no_sentence_in_white_space(text):
  assert sentences.sentence_starts(text) == []
  assert sentences.split_sentences(text) == ([text] if text else [])


def test_no_blow_up_on_odd_text():
  for text in (
    '.' * 100_000,
    '. ' * 50_000,
    '(' * 50_000 + '. A',
    '\n' * 100_000,
    'A. ' * 30_000,
    '- ' * 50_000,
  ):
    assert ''.join(sentences.split_sentences(text)) == text
