"""The report of a run: its metrics, filled masks, and the page."""

import json
import re
from html.parser import HTMLParser

import pytest

from bart_t5x import inspect, report

BASELINES = {
  'unigram_loss': 6.5,
  'commonest_token': '<',
  'commonest_token_share': 0.07,
}


@pytest.fixture
def run(tmp_path):
  """A folder with a run, its corpus, predictions and noise."""
  reports = [
    ('training_eval/task', 0, {'loss': 9.0, 'copied_accuracy': 0.0}),
    ('train', 10, {'loss': 6.0, 'extra': float('nan')}),
    ('training_eval/task', 10, {'loss': 5.0, 'copied_accuracy': 0.5}),
    ('training_eval/task', 20, {'loss': 4.0, 'copied_accuracy': 0.9}),
  ]
  lines = [json.dumps({'step': i, 'source': s, 'values': v}) for s, i, v in reports]
  text = '\n'.join(lines)
  (tmp_path / 'metrics.jsonl').write_text(f'{text}\n{{"step": 30, "sou')
  (tmp_path / 'corpus.json').write_text(
    json.dumps({'splits': {}, 'baselines': BASELINES})
  )
  # str.splitlines would split at U+2028.
  row = {'inputs': {'inputs_pretokenized': 'det <mask>'}, 'prediction': 'det \u2028går'}
  (tmp_path / 'predictions').write_text(json.dumps(row, ensure_ascii=False) + '\n')
  (tmp_path / 'noise').write_text('a \033[33m<mask>\033[0m & b')
  return tmp_path


def arguments(run, **paths):
  paths = {'model_dir': run, 'corpus_dir': run, **paths}
  return [f'--{name}={path}' for name, path in paths.items()]


def test_curves_are_finite_values_by_step(run):
  assert report.read_curves(run) == {
    'train': {'loss': [(10, 6.0)]},
    'training_eval/task': {
      'loss': [(0, 9.0), (10, 5.0), (20, 4.0)],
      'copied_accuracy': [(0, 0.0), (10, 0.5), (20, 0.9)],
    },
  }


def test_sparkline_spans_lowest_to_highest():
  assert report.sparkline([(0, 7.0), (1, 3.5), (2, 0.0)]) == '█▅▁'
  assert report.sparkline([(0, 1.0), (1, 1.0)]) == '▁▁'


@pytest.mark.parametrize(
  ('masked', 'filled', 'parts'),
  [
    ('Han <mask> nå.', 'Han går nå.', ['Han ', 'går', ' nå.']),
    ('<mask> og <mask>', 'a og b', ['', 'a', ' og ', 'b', '']),
    ('Han <mask> nå.', 'Han  nå.', ['Han ', '', ' nå.']),
    ('Han (?) <mask>.', 'Han (?) to\nlinjer.', ['Han (?) ', 'to\nlinjer', '.']),
    ('Han <mask> nå.', 'Hun går nå.', ['Hun går nå.']),
    ('Han <mask> nå.', 'Han går nå. Ja.', ['Han går nå. Ja.']),
    ('<mask> ' * 9 + 'nå.', 'ja ' * 99, ['ja ' * 99]),
  ],
)
def test_fill_ins_are_what_the_masks_became(masked, filled, parts):
  assert report.fill_in_parts(masked, filled) == parts


def test_fill_ins_are_marked_by_colour_or_brackets():
  pairs = [('Han <mask> nå.', ' Han går nå.')]
  assert (
    list(report.fill_in_lines(pairs, inspect.paint_brackets))[1] == '  Han [går] nå.'
  )
  (_, colored, _) = report.fill_in_lines(pairs, inspect.paint_colour)
  assert colored == '  Han \033[32mgår\033[0m nå.'


def test_main_prints_start_end_baselines_and_fill_ins(run, capsys):
  assert report.main(arguments(run, predictions=run / 'predictions')) == 0
  out = capsys.readouterr().out
  assert re.search(r'loss .*9\.000 +4\.000 +6\.500', out)
  assert '  det <mask>\n  det [\u2028går]\n' in out
  assert '\033' not in out


class Page(HTMLParser):
  """Collects a page's tags and text; checks that elements are closed in order."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.texts = [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in ('meta', 'html', 'tr', 'td', 'doctype'):
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)


@pytest.mark.parametrize('line', ['no json', '[1]', '{"step": 1}', '{"source": 1}'])
@pytest.mark.parametrize('name', ['metrics.jsonl', 'predictions'])
def test_a_damaged_line_is_named(run, capsys, name, line):
  with (run / name).open('a') as file:
    file.write(line + '\n')
  number = len((run / name).read_text().split('\n')) - 1
  assert report.main(arguments(run, predictions=run / 'predictions')) == 1
  assert f'{run / name}, line {number}' in capsys.readouterr().err


def test_page_has_all_and_refers_to_nothing(run):
  paths = {name: run / name for name in ('predictions', 'noise')}
  assert report.main(arguments(run, html=run / 'report.html', **paths)) == 0
  page = Page((run / 'report.html').read_text())
  assert page.open == []
  assert not any({'src', 'href'} & set(attributes) for _, attributes in page.tags)
  assert ('span', {'class': 'sgr33'}) in page.tags
  text = ''.join(page.texts)
  assert 'a <mask> & b' in text and "always '<'" in text and 'held out 4.000' in text


def test_chart_places_points_by_step_and_value():
  drawn = report.chart(
    't', {'a': [(0, 0.0), (5, 1.0), (20, 0.5)], 'level': [(0, 0.25)]}
  )
  left, top, width, height = 36, 10, 400, 200
  points = (left, top + height), (left + width / 4, top), (left + width, top + 100)
  line = ' '.join(f'{x:.1f},{y:.1f}' for x, y in points)
  assert f'class="c0 curve" d="M{line}"' in drawn
  assert f'class="c1 flat" d="M{left:.1f},160.0 h{width}"' in drawn


def test_bad_folders_are_errors(run, capsys):
  (run / 'metrics.jsonl').write_text('')
  assert report.main(arguments(run)) == 1
  assert 'no evaluation' in capsys.readouterr().err
  (run / 'metrics.jsonl').unlink()
  assert report.main(arguments(run)) == 1
  assert 'metrics.jsonl' in capsys.readouterr().err
  (run / 'corpus.json').write_text('{')
  assert report.main(arguments(run)) == 1
  assert "corpus.json' is damaged" in capsys.readouterr().err
