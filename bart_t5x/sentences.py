"""Where Norwegian sentences begin, bokmål and nynorsk, as offsets into the text.

The text is never changed: cut at the offsets and joined again it is the same, for the
white space before a sentence belongs to that sentence. Imports nothing heavy.
"""

import re
from collections.abc import Sequence

import numpy as np

from bart_t5x import tokenization

# Abbreviations that want a continuation: what follows belongs to the same sentence.
_BINDING = frozenset(
  """
  adj. adm. adr. adv. afd. alm. anm. ang. ank. anl. ant. apr. arb. arr. art. ass. atl.
  aug. avd. avg. avh. avl. avs. bd. begr. besl. best. betegn. bl.a. blg. boktr. cand.
  ca. cf. chr. cirk. d.v.s. dep. des. det. dim. dir. disp. distr. div. do. dr. dvs. eg.
  ekskl. eks. eksp. el. elekt. eng. et.al. ev. evt. f.eks. f.o.m. fa. feb. febr. ff.
  fhv. fig. fmk. fom. forb. fork. forts. forv. foss. fot. fr. fre. frk. fung. fv. fyl.
  gen. gj. gml. gnr. gr. grl. hebr. hen. henv. hhv. hpl. hr. hrr. hum. i.e. if. ifm.
  ift. ifb. iht. ikr. incl. ing. inkl. innb. inst. instr. int. internasj. isl. istf. ital.
  jamf. jan. jf. jfr. jnr. jr. juss. kand. kap. kfr. kgl. kl. kols. komm. konst. kons.
  kpl. kpt. kst. lat. ldn. lic. likn. lnr. lør. loddr. m.a. mag. man. maks. maskin.
  mat. mdl. medd. mek. merk. mht. mht. mia. mil. min. moh. mots. mrk. mspr. mus. muh.
  ndf. nedf. nno. nob. no. nom. nor. nov. nr. nyno. o.v.f. obj. obs. off. okt. oms.
  omtr. ons. oppg. oppl. opr. oppr. osbl. ovenn. overf. overs. ovf. p.g.a. pag. part.
  pga. ph. pk. pkt. pl. pol. port. post. pr. pref. prem. pres. prof. prop. prov. prs.
  pst. psyk. rad. red. ref. reg. regj. rel. rep. res. resp. riksmål. rskr. rt. s.k. saml.
  seksj. sekr. sen. sept. skr. smh. smst. sms. sml. spes. sp. spm. sst. st. stip. str.
  stud. subj. subst. sup. søn. t.d. t.eks. tab. tekn. temp. tidl. tils. tirs. tlf. tom.
  tors. ty. tv. t.o.m. tr. u.a. ubest. ult. utg. uttr. v. vb. vedk. vedl. vg. vgs. vha.
  vis. vit. vol. ø. ønh. øv. åg. årg. årh. st.meld. st.prp. ot.prp. innst. dok. meld.
  dnr. bnr. fnr. snr. mva.nr. org.nr. kontonr. postnr. husnr. refnr. sgt. løytn. maj.
  obl. gt. hl. skt. sta. fru. sivilark. siv.ing. siv.øk. cand.jur. cand.med. cand.mag.
  cand.philol. cand.real. dr.philos. dr.med. dr.ing. ph.d. adv.fullm. h.r.adv. o.r.sakf.
  gl. vest. aust. nord. sør. lign. ng. sign. sek. tilsv. vår. dvs.: s. ss. sp. l. f.
  mosjøkl. jul. overing. underdir. ekspedisjonssj. statsadv. univ. rådm. ordf. varaordf.
  sekt. fakult. inf. mnd. mill.kr. m.h.t. m.t.p. i.f.t. v.h.a. i.h.t. i.f.m. d.s. d.s.s.
  """.split()
)
# Those of them that are words too, and may well end a sentence as such.
_BINDING_WORDS = frozenset(
  'det. el. eg. des. do. fot. if. int. man. min. nor. port. post. sen. tom. vest. aust. '
  'nord. sør. vis. vår. fru. mil. mat. rad. ty. post. part. sta. best. jul. pol. mus. '
  'disp. fig. gen. no. st. v. f. l. res. sek. ref. til. riksmål. hl. inf.'.split()
) - {'st.', 'hl.', 'fig.', 'v.', 'f.', 'l.', 'ref.', 'no.'}
# Abbreviations that may stand last: they end a sentence before a capital letter.
_CLOSING = frozenset(
  """
  osv. o.s.v. osb. o.s.b. etc. o.l. o.l ol. m.m. m.fl. mfl. m.v. mv. m.a.o. f.kr. e.kr.
  fvt. evt. a.s. a/s. as. d.y. d.e. d.eld. d.yngre. kr. mill. mrd. mia. stk. o.a. s.d.
  p.t. pt. e.l. d.å. d.m. e.kl. o.dl. o.fl. o.m.a. e.d. og l. sen. jr. sr. mm. cm. km.
  kg. gr. hg. dl. cl. ml. kvm. km. km/t. kw. kwh. prom. dag. tim. sek. mva. inc. ltd.
  co. corp. i.a. b.nr. u.d. u.s.a. usa. e.v.t. m.o.h. moh. mnd. daa. fm. em. e.m. f.m.
  a.m. p.m. cit. loc.cit. op.cit. ibid. passim. ff. flg. fl. plur. mask. fem. nøytr.
  """.split()
) - {'evt.', 'dag.', 'ff.'}
_MONTHS = frozenset(
  'januar februar mars april mai juni juli august september oktober november desember '
  'january february marts maj juny july october december decembre novbr oktbr sept '
  'jan feb febr mar apr jun jul aug sep okt nov des'.split()
)
# Nouns that an ordinal stands before with a capital letter.
_ORDINAL_NOUNS = frozenset(
  'mosebok mosebog kongebok samuelsbok krønikebok korinterbrev timoteusbrev johannesbrev '
  'petersbrev peters tessalonikerbrev verdenskrig verdenskrigen verdskrig verdskrigen '
  'divisjon juledag påskedag pinsedag søndag søndagen adventssøndag januar'.split()
)
# Words that begin a sentence far more often than a name does.
_STARTERS = frozenset(
  """
  Alle Allerede Alt Andre Att At Av Bare Begge Berre Både Da Der Derfor Dermed Dersom
  Desse Dessuten Det Dette Dei De Den Denne Deretter Difor Disse Du Då Eg Ei Ein En Enkelte
  Er Et Etter Etterpå Fleire Flere For Forresten Fordi Fra Frå Før Ha Han Hans Har Hen
  Hennar Hennes Her Hjå Ho Hos Hun Hva Hvem Hver Hvis Hvor Hvordan Hvorfor Ikke Ikkje
  Imidlertid Ingen Ingenting I Jeg Kan Kanskje Kor Korleis Kva Kvar Kven Kvifor Man Mange
  Med Medan Mellom Men Mens Mot Må Mine Nei Noen Noko Nokon Nå Når No Og Også Om Ordet Over
  Per På Samtidig Selv Siden Sidan Sjå Sjølv Skal Slik Slike Som Så Til Tross Under Uten Utan
  Ved Vi Vil Være Vår Våre Å Åtte Inn Ja Jo Jau
  """.split()
) - {'Per'}
# What may stand before a number at the head of a heading: "§ 4. Om …".
_HEADING = re.compile(
  r'\s*(?:[«"(\[]\s*)?'
  r'(?:(?:§§?|kapittel|kapitel|kap\.|artikkel|art\.|del|punkt|pkt\.|nr\.|vedlegg|bok|avsnitt|'
  r'post|steg|trinn|tabell|figur|side|paragraf)\s*)?'
  r'(?:\d+(?:[-.]\d+)*\s?[a-zæøå]?|[ivxlc]+|[a-zæøå])\.(?:\s*[\d]+(?:[-.]\d+)*\.)?',
  re.IGNORECASE,
)
_CLOSERS = '»"”“’\')\\]'
_OPENERS = '«"“”„‘\'(\\['
# A stop that white space follows, or the last character of a line without one.
_CANDIDATE = re.compile(rf'[.!?…]+[{_CLOSERS}]*(?=\s)|[^\s.!?…](?=[^\S\n]*\n)')
# White space, then what may open a sentence, then its first telling character.
_NEXT = re.compile(rf'(\s+)((?:[{_OPENERS}]|[–—•*·-]+\s*)*)(\w+|§|\S)')
_BLANK_LINE = re.compile(r'\n[^\S\n]*\n')
_LIST_ITEM = re.compile(r'[•*·–—-]|\d+[.)]|[a-zæøå]\)|§')
# A line that ends like this goes on in the next.
_OPEN_ENDS = frozenset(
  'og i på til av for med som at er den det de en et ei ein eit om ved fra frå hos mot '
  'eller men å der når hvis dersom etter før under over mellom mr dr herr fru'.split()
)


def sentence_starts(text: str) -> list[int]:
  """Offsets, in characters, at which the text's sentences begin.

  A sentence begins where the one before it ends, so with the white space between them.
  Blank lines and the beginnings of list items end a sentence too, also one without a
  full stop.

  Args:
    text: one document.

  Returns:
    Strictly increasing offsets, the first 0; empty where the text holds no more than
    white space.
  """
  if not text or text.isspace():
    return []
  starts = [0]
  for match in _CANDIDATE.finditer(text):
    following = _NEXT.match(text, match.end())
    if following is None:  # nothing but white space is left
      break
    if _ends(text, starts[-1], match, following):
      starts.append(match.end())
  return starts


def split_sentences(text: str) -> list[str]:
  """The text cut at `sentence_starts`; `''.join` gives it back.

  White space alone is one piece, so that nothing is lost.
  """
  starts = sentence_starts(text) or ([0] if text else [])
  return [text[a:b] for a, b in zip(starts, [*starts[1:], None])]


def encode_documents(
  tokenizer: tokenization.Tokenizer, texts: Sequence[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Token ids of documents, and at which tokens their sentences begin.

  Documents are encoded whole; the tokens' lengths in bytes then say where each begins.
  A sentence whose beginning lies inside a token begins with the next one (the
  tokenizers trained here have no such token: theirs never reach from a character over
  the white space behind it).

  Args:
    tokenizer: one that loses nothing.
    texts: documents.

  Returns:
    For each document int32 ids [n] and int32 offsets [s] into them, strictly
    increasing, the first 0; both empty for an empty text.

  Raises:
    ValueError: the tokens do not add up to the text.
  """
  lengths = tokenizer.byte_lengths
  documents = []
  for text, ids in zip(texts, tokenizer.encode_batch(texts)):
    ids = np.array(ids, np.int32)
    ends = np.cumsum(lengths[ids], dtype=np.int64)
    pieces = [len(piece.encode('utf-8')) for piece in split_sentences(text)]
    if sum(pieces) != (ends[-1] if ids.size else 0):
      raise ValueError(
        f'The tokenizer does not keep the text: {ends[-1] if ids.size else 0} of its '
        f'{sum(pieces)} bytes are in the tokens of {text[:60]!r}…'
      )
    begins = np.cumsum([0, *pieces[:-1]])
    starts = np.unique(np.searchsorted(ends - lengths[ids], begins))
    documents.append((ids, starts[starts < ids.size].astype(np.int32)))
  return documents


def _ends(text: str, start: int, match: re.Match, following: re.Match) -> bool:
  """Whether a sentence that began at `start` ends where `match` does."""
  space, opener, word = following.groups()
  stop = match.group()
  if '\n' in space:
    if _BLANK_LINE.search(space):
      return True
    if stop[0] not in '.!?…':
      return _line_ends(text, start, match.end(), following)
  if word[0].islower():
    return bool(opener) and '\n' in space and opener[0] in '•*·'
  if not (word[0].isalnum() or word[0] == '§'):
    return False
  if stop[0] != '.' or stop.startswith('..'):
    return True
  return _full_stop_ends(text, start, match.start() + 1, opener, word)


def _line_ends(text: str, start: int, end: int, following: re.Match) -> bool:
  """Whether a line without a stop is a sentence: a heading, an item of a list."""
  if _LIST_ITEM.match(text, following.start(2)):
    return True
  if not following.group(3)[0].isupper() or text[end - 1] in ',;-–':
    return False
  last = text[max(start, end - 20) : end].split()[-1]
  return last.lower() not in _OPEN_ENDS


def _full_stop_ends(text: str, start: int, end: int, opener: str, word: str) -> bool:
  """Whether a single full stop, just before `end`, is the end of its sentence.

  Args:
    text: the document.
    start: where the sentence began.
    end: offset behind the full stop.
    opener: quotes, brackets and dashes before the next word.
    word: the next word, which begins with a capital letter, a digit or §.
  """
  words = text[max(start, end - 60) : end].split()
  last = words[-1].lstrip('«"“”„‘\'([–—-')
  before = words[-2] if len(words) > 1 else ''
  starter = word in _STARTERS
  # The number or letter that a heading or an item of a list begins with.
  if end - start < 40 and (heading := _HEADING.match(text, start, end)):
    if heading.end() == end:
      return False
  bare = last[:-1]
  if bare.isdigit():
    return _number_ends(bare, before, opener, word, starter)
  if len(bare) == 1 and bare.isalpha():
    if bare.isupper():  # an initial, or "vitamin C."
      return starter and not before[:1].isupper()
    return last.lower() not in _BINDING or (starter and not word[0].isdigit())
  lower = last.lower()
  if lower in _CLOSING:
    return not word[0].isdigit()
  if lower in _BINDING:
    return lower in _BINDING_WORDS and not word[0].isdigit()
  if '.' in bare and all(part.isalpha() for part in bare.split('.')):
    # H.K.H. Kronprinsen, J.R.R. Tolkien; but o.m.k. Det er ...
    return starter or not bare.replace('.', '').isupper()
  return True


def _number_ends(
  number: str, before: str, opener: str, word: str, starter: bool
) -> bool:
  """Whether "17." ends a sentence, or is the ordinal number of what follows."""
  if len(number) > 2 or opener:
    return True
  if word.lower() in _MONTHS or word.lower() in _ORDINAL_NOUNS:
    return False
  if word[0].isdigit():  # 3. 4. og 5. klasse; 17. 5. 1814
    return False
  if before.lower() in ('den', 'dei', 'de', 'til', 'fra', 'frå'):
    return starter
  return True
