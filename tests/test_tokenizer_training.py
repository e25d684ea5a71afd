"""The same text gives the same tokenizer, of exactly the size asked for."""

import pytest

from bart_t5x import tokenization, tokenizer_training

TEXTS = [f'Tekst {i} om fjell og fjord, nr. {i * 7}. Så kom våren!' for i in range(300)]
SIZES = {'bytelevel': 330, 'unigram': 330, 'bpe': 330}


@pytest.mark.parametrize('kind', tokenizer_training.KINDS)
def test_same_bytes_twice_and_size_as_asked(kind):
  first, second = (
    tokenizer_training.train(kind, iter(TEXTS), len(TEXTS), SIZES[kind], 2)
    for _ in range(2)
  )
  assert first == second
  assert tokenization.read_tokenizer('t', first).vocab_size == SIZES[kind]


@pytest.mark.parametrize('kind', tokenizer_training.KINDS)
def test_too_little_text_is_an_error_with_both_numbers(kind):
  with pytest.raises(tokenizer_training.VocabularyTooLarge) as error:
    tokenizer_training.train(kind, iter(TEXTS), len(TEXTS), 30_000, 2)
  message = str(error.value)
  assert '30000' in message
  possible = int(message.split('at most ')[1].split(',')[0])
  again = tokenizer_training.train(kind, iter(TEXTS), len(TEXTS), possible, 2)
  assert tokenization.read_tokenizer('t', again).vocab_size == possible


@pytest.mark.parametrize('kind', ['unigram', 'bpe'])
def test_no_room_for_the_characters(kind):
  with pytest.raises(ValueError, match='alone are 292 tokens.*--vocab_size=270'):
    tokenizer_training.train(kind, iter(TEXTS), len(TEXTS), 270, 2)


def test_min_frequency_acts():
  # Pairs that occur once are merged only if once is enough.
  texts = ['entydig forskjellige strenger']
  size = tokenizer_training.SMALLEST_VOCABULARY + 5
  tokenizer_training.train('bytelevel', texts, 1, size, 1)
  with pytest.raises(tokenizer_training.VocabularyTooLarge):
    tokenizer_training.train('bytelevel', texts, 1, size + 5, 3)
