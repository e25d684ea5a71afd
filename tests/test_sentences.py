"""Sentence boundaries on the gold set; pieces add up to the text."""

import pathlib

import hypothesis
import pytest
from hypothesis import strategies

from bart_t5x import sentences

GOLD = pathlib.Path(__file__).parent / 'data' / 'sentences_no.tsv'


def gold_cases():
  for line in GOLD.read_text(encoding='utf-8').splitlines()[1:]:
    phenomenon, language, text = line.split('\t')
    yield phenomenon, language, text.replace('\\n', '\n').split('¦')


@pytest.mark.parametrize('phenomenon', sorted({case[0] for case in gold_cases()}))
def test_gold(phenomenon):
  for found, _, parts in gold_cases():
    if found == phenomenon:
      assert sentences.split_sentences(''.join(parts)) == parts


# Text dense in what the rules examine.
TEXTS = strategies.lists(
  strategies.sampled_from(
    [
      *'Han kom . ! ? … ... « » " § 4 17 kl. osv. f.eks. A. - • ) ( Ø å'.split(),
      *(' ', '  ', '\n', '\n\n', '\u00a0', '\u2028', '\U0001f600', ''),
    ]
  ),
  max_size=40,
).map(''.join)


@hypothesis.given(TEXTS | strategies.text(max_size=80))
def test_pieces_add_up_to_the_text(text):
  pieces = sentences.split_sentences(text)
  assert ''.join(pieces) == text
  assert all(pieces)
  starts = sentences.sentence_starts(text)
  if text.strip():
    assert starts[0] == 0
    assert all(a < b for a, b in zip(starts, starts[1:]))
    # No sentence is only white space.
    assert all(piece.strip() for piece in pieces)
  else:
    assert starts == []


@hypothesis.given(TEXTS)
def test_sentences_do_not_depend_on_those_before_them(text):
  hypothesis.assume(text.strip())
  tail = ['\n\nDet er fint.', ' Så gikk han.']
  assert sentences.split_sentences(text.rstrip() + ''.join(tail))[-2:] == tail
  pieces = sentences.split_sentences(text)
  for i in range(len(pieces)):
    assert sentences.split_sentences(''.join(pieces[i:])) == pieces[i:]


@pytest.mark.parametrize('mark', '«"(\'[„')
def test_opening_mark_before_white_space(mark):
  pieces = ['Han kom.', f' {mark} Søner » er bra.', '\n\nDet er fint.', ' Ja.']
  assert sentences.split_sentences(''.join(pieces)) == pieces


def test_white_space_goes_with_what_follows():
  text = 'En.  To.\n\nTre.\t Fire. '
  pieces = ['En.', '  To.', '\n\nTre.', '\t Fire. ']
  assert sentences.split_sentences(text) == pieces


@pytest.mark.parametrize('text', ['', ' ', '\n\n', '\u00a0'])
def test_white_space_has_no_sentence(text):
  assert sentences.sentence_starts(text) == []
  assert sentences.split_sentences(text) == ([text] if text else [])


def test_odd_text_takes_linear_time():
  for text in (
    '.' * 100_000,
    '. ' * 50_000,
    '(' * 50_000 + '. A',
    '\n' * 100_000,
    'A. ' * 30_000,
    '- ' * 50_000,
    '-\n' * 50_000 + 'A',
  ):
    assert ''.join(sentences.split_sentences(text)) == text
