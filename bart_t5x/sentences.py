"""Norwegian sentence boundaries, bokmål and nynorsk, as offsets into the text.

A sentence includes the white space before it, so the sentences add up to the text.

A stop ends a sentence unless the text before it (an abbreviation, ordinal, initial,
heading number) or after it (a lower-case letter) shows that it does not. F1 of
boundaries on the 300 hand-written cases of tests/data/sentences_no.tsv, by
benchmarks/sentences.py:

    Punkt's Norwegian model                      0.722
    sentence-splitter 1.4, Norwegian             0.804
    sentencex 1.0.32, Danish (best of 8 others)  0.815
    these rules, before they had seen the cases  0.981  (optimistic: same author)
    these rules                                  1.000  (tuning set)

In running text most errors are headings without a stop that run into the next sentence
("Kapittel 2 § 4").
"""

import re
from collections.abc import Iterator

# Abbreviations that are followed by text of the same sentence.
_BINDING = frozenset(
  """
  adm. adr. alm. ang. ank. anm. ann. apr. arr. art. asst. aug. avd. avg. avl. bd.
  bl.a. bnr. ca. cand. cand.jur. cand.mag. cand.med. cand.philol. cand.real. chr.
  d.v.s. dep. dir. div. dok. dr. dr.ing. dr.med. dr.philos. dvs. ed. eks. ekskl. el.
  eng. etg. ev. evt. f. f.eks. f.o.m. feb. febr. fhv. fig. fork. forts. fr. frk. gen.
  gml. gnr. gt. hhv. hl. hr. hrr. i.f.m. i.f.t. i.h.t. iflg. ifm. ift. iht. ikr. ing.
  inkl. innb. innst. inst. instr. jamf. jan. jf. jfr. jnr. kand. kap. kapt. kfr. kgl.
  kl. komm. kons. kpt. lic. lnr. løytn. m.a. m.h.t. mag. maj. maks. medd. meld. mht.
  mots. mrk. nov. nr. o.fl. obs. off. okt. omg. oms. omtr. ons. oppl. org.nr. orig.
  ot.prp. overs. p.g.a. pag. par. pga. ph.d. pk. pkt. pl. postnr. pr. pres. prof.
  prop. prp. red. ref. regj. res. resp. rt. s. sekr. sept. sgt. sign. siv.ing. siv.øk.
  skt. sml. smst. sp. spm. ss. st. st.meld. st.prp. sta. stip. str. stud. søn. t.d.
  t.o.m. tab. tekn. tidl. tilsv. tirs. tlf. tors. u.a. utg. v. v.h.a. vedl. vha. vol.
  vs. årg. årh. øv.
  """.split()
)
# Those that are also words, which can end a sentence.
_ALSO_WORDS = frozenset(
  'ann. art. eks. el. fork. ing. komm. maks. off. par. pres. red. ref. res. sp. '
  'tab.'.split()
)
# Abbreviations that end a sentence if a capital letter follows.
_CLOSING = frozenset(
  """
  a.m. a.s. cm. co. corp. d.d. d.e. d.y. d.å. daa. e.kr. e.l. e.m. em. etc. f.kr. f.m.
  ff. fl. flg. fm. fvt. inc. jr. kg. km. kr. ltd. m.fl. m.m. m.o.h. m.v. mfl. mill.
  mm. mnd. moh. mrd. mv. o.a. o.l. o.s.b. o.s.v. osb. osv. p.m. p.t. sek. sr. stk.
  tim. u.d. usa.
  """.split()
)
_MONTHS = frozenset(
  'januar februar mars marts april mai maj juni juli august september oktober october '
  'november desember december'.split()
)
# Capitalized nouns that follow an ordinal.
_ORDINAL_NOUNS = frozenset(
  'divisjon johannesbrev juledag kongebok korinterbrev krønikebok mosebok mosebog '
  'petersbrev påskedag pinsedag samuelsbok tessalonikerbrev timoteusbrev verdenskrig '
  'verdskrig'.split()
)
# Capitalized words that begin a sentence far more often than a name.
_STARTERS = frozenset(
  """
  Alle Allerede Alt Andre At Av Bare Begge Berre Både Da De Dei Den Denne Der Deretter
  Derfor Dermed Dersom Desse Dessuten Det Dette Difor Disse Du Då Eg Ei Ein En Er Et
  Etter Fleire Flere For Fordi Fra Frå Før Ha Han Hans Har Hen Hennar Hennes Her Ho
  Hos Hun Hva Hvem Hver Hvis Hvor Hvordan Hvorfor I Ikke Ikkje Imidlertid Ingen Ja Jau
  Jeg Jo Kan Kanskje Kor Korleis Kva Kvar Kven Kvifor Man Mange Med Medan Mellom Men
  Mens Mot Må Nei No Noen Noko Nokon Nå Når Og Også Om Over På Samtidig Selv Sidan
  Siden Sjå Sjølv Skal Slik Slike Som Så Til Tross Under Utan Uten Ved Vi Vil Vår Våre
  """.split()
)
# Words before a section sign that is a reference rather than a heading: "etter § 4",
# "veglova § 4", "første ledd, § 4".
_REFERENCE = re.compile(
  r'.*(?:[,;(/]|lov(?:en|a|as|ens)?|forskrift(?:en|a|ens)?|konvensjonen)|\d+|jfr?\.|cf\.|'
  r'alle|av|både|eller|enn|er|etter|for|fra|frå|før|gjelder|gjeld|i|med|mot|når|og|'
  r'om|også|på|samt|se|sjå|som|til|under|ved|ledd|første|andre|annet|tredje|ny|nye',
  re.IGNORECASE,
)
# The number of a heading and its prefix: "§ 4. Om …".
_HEADING = re.compile(
  r'\s*(?:[«"(\[]\s*)?'
  r'(?:(?:§§?|kapittel|kapitel|kap\.|artikkel|art\.|del|punkt|pkt\.|nr\.|vedlegg|bok|'
  r'avsnitt|post|trinn|tabell|figur|fig\.|paragraf)\s*)?'
  r'(?:\d+(?:[-.]\d+)*\s?[a-zæøå]?|[ivxlc]+|[a-zæøå])\.',
  re.IGNORECASE,
)
_CLOSERS = '»"”“’\')\\]'
_OPENERS = '«"“”„‘\'(\\['
# A stop followed by white space, or the end of a line. (`re` searches quickly for a
# character class. Possessive, so that a long run of stops is scanned once.)
_STOP_OR_LINE_END = re.compile(
  rf'[.!?…\n](?:(?<=\n)|(?<![.!?…][.!?…])[.!?…]*+[{_CLOSERS}]*+(?=\s))'
)
# White space, then openers (quotes, dashes), then the first word or character. Bounded,
# so that the time for a column of dashes is linear.
_NEXT = re.compile(rf'(\s++)((?:(?:[{_OPENERS}]|[–—•*·-]++)\s*+){{,99}}+)(\w++|§|\S)')
_BLANK_LINE = re.compile(r'\n[^\S\n]*\n')
_LIST_ITEM = re.compile(r'[•*·–—-]|\d+[.)]|[a-zæøå]\)|§')
# A line that ends with one of these continues on the next line.
_OPEN_ENDS = frozenset(
  'og i på til av for med som at er den det de en et ei ein eit om ved fra frå hos mot '
  'eller men å der når hvis dersom etter før under over mellom mr dr herr fru'.split()
)


def sentence_starts(text: str) -> list[int]:
  """Returns character offsets of sentences, increasing from 0; [] for white space.

  Blank lines and list items also end a sentence, even without a stop.
  """
  if not text or text.isspace():
    return []
  starts = [0]
  for stop, end in _candidates(text):
    following = _NEXT.match(text, end)
    if following is None:  # only white space and openers follow
      break
    if _ends(text, starts[-1], stop, end, following):
      starts.append(end)
  return starts


def _candidates(text: str) -> Iterator[tuple[str, int]]:
  """Yields stops, with the offset after them and their closing marks.

  A line that ends without one has '' for it.
  """
  line = after = 0  # where the line begins, and the last candidate ends
  for match in _STOP_OR_LINE_END.finditer(text):
    stop, end = match.group(), match.end()
    if stop != '\n':
      yield stop, end
    else:
      content = text[line : match.start()].rstrip()
      line, stop, end = end, '', line + len(content)
      if content and end > after and content[-1] not in '.!?…':
        yield stop, end
    after = end


def split_sentences(text: str) -> list[str]:
  """Splits text at `sentence_starts`; white space alone is one piece."""
  starts = sentence_starts(text) or ([0] if text else [])
  return [text[a:b] for a, b in zip(starts, [*starts[1:], None])]


def _ends(text: str, start: int, stop: str, end: int, following: re.Match) -> bool:
  """Whether a sentence from `start` ends at `end`, after `stop`."""
  space, opener, word = following.groups()
  new_line = '\n' in space
  if new_line:
    if _BLANK_LINE.search(space):
      return True
    if not stop:
      return _line_ends(text, start, end, following)
  if word[0].islower():
    # A list item in lower case, but not the continuation of a quotation.
    return new_line and bool(opener) and opener[0] in '•*·-–'
  if not (word[0].isalnum() or word[0] == '§'):
    return False
  if stop[0] != '.' or stop.startswith('..'):
    return True
  return _full_stop_ends(text, start, end - len(stop) + 1, following)


def _line_ends(text: str, start: int, end: int, following: re.Match) -> bool:
  """Whether a line without a stop is a sentence, such as a heading or list item."""
  if _LIST_ITEM.match(text, following.start(2)):
    return True
  if not following.group(3)[0].isupper() or text[end - 1] in ',;-–':
    return False
  last = text[max(start, end - 20) : end].split()[-1]
  return last.lower() not in _OPEN_ENDS


def _full_stop_ends(text: str, start: int, end: int, following: re.Match) -> bool:
  """Whether a single full stop just before `end` ends the sentence from `start`."""
  _, opener, word = following.groups()
  words = text[max(start, end - 60) : end].split()
  last = words[-1].lstrip('«"“”„‘\'([–—-')
  before = words[-2] if len(words) > 1 else ''
  bare = last[:-1]
  if end - start < 40:
    # The number or letter of a heading or list item.
    heading = _HEADING.match(text, start, end)
    if heading and heading.end() == end:
      return False
  if before in ('§', '§§') and len(words) > 2 and not _REFERENCE.fullmatch(words[-3]):
    return False
  if bare.isdigit():
    ordinal_follows = word[0].isdigit() and text.startswith('.', following.end())
    return not ordinal_follows and _number_ends(bare, before, opener, word)
  if bare.isalpha() and len(bare) == 1 and bare.isupper():  # an initial, "vitamin C."
    return word in _STARTERS and not before[:1].isupper()
  return _word_ends(last, word)


def _number_ends(number: str, before: str, opener: str, word: str) -> bool:
  """Whether "17." ends a sentence, rather than being an ordinal."""
  if len(number) > 2 or opener:
    return True
  if word.lower() in _MONTHS or word.lower() in _ORDINAL_NOUNS:
    return False
  if before.lower() in ('den', 'dei', 'de'):
    return word in _STARTERS
  return True


def _word_ends(last: str, word: str) -> bool:
  """Whether the full stop of `last` ends a sentence, rather than an abbreviation."""
  number_follows = word[0].isdigit()
  parts = last[:-1].split('.')
  if len(parts) > 1 and parts[0].isalpha() and len(parts[0]) == 1:
    if parts[0].isupper():  # H.K.H. Kronprinsen, P.Chr. Asbjørnsen
      return word in _STARTERS
  lower = last.lower()
  if lower in _CLOSING:
    return not number_follows
  if lower in _BINDING:
    return lower in _ALSO_WORDS and word in _STARTERS
  if len(parts[0]) == 1 and len(parts) == 1:  # "bokstav a."
    return not number_follows
  # Storgt. 5: street names have abbreviations of their own.
  return not (number_follows and lower.endswith('gt.'))
