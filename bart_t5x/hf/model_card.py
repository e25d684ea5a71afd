"""The README.md of an exported model: what it is, made of what, how to load it."""

import dataclasses
import json
import pathlib
from typing import Any

from bart_t5x.network import BartConfig

# How a corpus states its licence, before any colon, and the Hub's name for it.
_HUB_LICENSES = (
  ('CC0 1.0', 'cc0-1.0'),
  ('CC BY 4.0', 'cc-by-4.0'),
  ('CC BY-SA 4.0', 'cc-by-sa-4.0'),
)


@dataclasses.dataclass(frozen=True)
class CardFacts:
  """What a card tells.

  Attributes:
    name: of the model, for its title and the loading examples.
    config: the network's shape.
    num_parameters: without rows that pad the vocabulary.
    step: training steps taken.
    corpus: the content of corpus.json; empty where it is not at hand.
    recipe: settings of the run, name to value.
    metrics: held-out metrics at the last evaluation, name to value.
    command: that made the export.
    training: 'pre-trained', 'fine-tuned', or 'imported' for a model as it came.
    start: the checkpoint that fine-tuning began with; None for random parameters.
  """

  name: str
  config: BartConfig
  num_parameters: int
  step: int
  corpus: dict[str, Any]
  recipe: dict[str, Any]
  metrics: dict[str, float]
  command: str
  training: str
  start: str | None


def _table(header: tuple[str, str], rows: dict[str, Any]) -> str:
  lines = [f'| {header[0]} | {header[1]} |', '| --- | --- |']
  for name, value in rows.items():
    shown = f'{value:.4g}' if isinstance(value, float) else str(value)
    shown = shown.replace('|', '/')  # a bar would end the cell
    lines.append(f'| {name} | {shown} |')
  return '\n'.join(lines)


def _front_matter(corpus: dict[str, Any], training: str) -> str:
  """The block that the Hub reads: language, kind, licence of the data.

  The licence is that of a pre-trained model's corpus; other models' data have one that
  is not known here.
  """
  lines = ['---', 'language: "no"', 'library_name: transformers']
  tuned = training == 'fine-tuned'
  lines += [f'pipeline_tag: {"text2text-generation" if tuned else "fill-mask"}']
  lines += ['tags: [bart, t5x, norwegian]']
  if corpus.get('license') and training == 'pre-trained':
    # The Hub has names for some licences; JSON strings are YAML strings.
    text = json.dumps(corpus['license'], ensure_ascii=False)
    known = next((hub for start, hub in _HUB_LICENSES if _is_only(corpus, start)), None)
    lines += [f'license: {known}'] if known else ['license: other']
    lines += [] if known else [f'license_name: {text}']
  return '\n'.join(lines + ['---'])


def _is_only(corpus: dict[str, Any], license_name: str) -> bool:
  """Whether the corpus is under this one licence; a list of several has commas."""
  stated = corpus['license'].partition(':')[0]
  return stated.strip().lower() == license_name.lower()


def _corpus_section(corpus: dict[str, Any]) -> str:
  if not corpus:
    return 'The corpus was not at hand when this model was exported.'
  counts = {
    f'{split}, {unit}': f'{numbers[unit]:,}'
    for split, numbers in corpus['splits'].items()
    for unit in ('documents', 'tokens', 'bytes')
  }
  facts = {'source': corpus['source'], 'licence': corpus.get('license') or 'not stated'}
  return _table(('corpus', ''), facts | counts)


def _corpus_sections(facts: CardFacts) -> list[str]:
  if facts.training == 'pre-trained':
    return [_corpus_section(facts.corpus)]
  if not facts.corpus:
    return []
  return ['The vocabulary was made from this corpus:', _corpus_section(facts.corpus)]


def _loading(name: str) -> str:
  return f"""```python
# PyTorch (transformers 5)
from transformers import AutoTokenizer, BartForConditionalGeneration
tokenizer = AutoTokenizer.from_pretrained('{name}')
model = BartForConditionalGeneration.from_pretrained('{name}')
batch = tokenizer('Hovedstaden i Norge er <mask>.', return_tensors='pt')
batch.pop('token_type_ids', None)
print(tokenizer.batch_decode(model.generate(**batch), skip_special_tokens=True))
```

```python
# Flax (transformers 4.57 or earlier)
from transformers import FlaxBartForConditionalGeneration
model = FlaxBartForConditionalGeneration.from_pretrained('{name}')
```"""


def _purpose(facts: CardFacts) -> str:
  """What the model was trained for, and from what."""
  if facts.training == 'pre-trained':
    return (
      'A BART for Norwegian, pre-trained to restore noised text '
      '([Lewis et al. 2019](https://arxiv.org/abs/1910.13461)) for '
      f'{facts.step:,} steps with bart-t5x.'
    )
  if facts.training == 'imported':
    return 'A BART that was imported by bart-t5x and not trained since.'
  task = facts.recipe['MIXTURE_OR_TASK_NAME']
  start = f'`{facts.start}`' if facts.start else 'random parameters'
  return (
    f'A BART for Norwegian, fine-tuned on `{task}` from {start} to step {facts.step:,} '
    'with bart-t5x. The licence of that data is to be stated here: it was not known '
    'when this card was written.'
  )


def render(facts: CardFacts) -> str:
  """The card's text.

  Args:
    facts: what it tells.

  Returns:
    Markdown with the Hub's front matter.
  """
  config = facts.config
  shape = {
    'parameters': f'{facts.num_parameters:,}',
    'layers': f'{config.num_encoder_layers} + {config.num_decoder_layers}',
    'width': config.emb_dim,
    'heads': config.num_heads,
    'feed-forward width': config.mlp_dim,
    'vocabulary': f'{config.vocab_size:,}',
    'longest input, tokens': config.max_positions,
  }
  sections = [
    _front_matter(facts.corpus, facts.training),
    f'# {facts.name}',
    _purpose(facts),
    _table(('model', ''), shape),
    '## Loading',
    _loading(facts.name),
    '## Training',
    *_corpus_sections(facts),
    _table(('setting', 'value'), facts.recipe),
  ]
  if facts.metrics:
    sections += [
      '## Held-out documents, at the last evaluation before the export',
      _table(('metric', 'value'), facts.metrics),
    ]
  sections += ['## Made by', f'```\n{facts.command}\n```']
  return '\n\n'.join(sections) + '\n'


def run_metrics(model_dir: pathlib.Path, step: int) -> dict[str, float]:
  """The metrics of a run's evaluation as they stood at a checkpoint.

  Args:
    model_dir: of the run.
    step: of the checkpoint; what was measured later is another model's.

  Returns:
    Name to value, with the task's name where there are several tasks; empty
    without events.
  """
  teacher_forced = sorted((model_dir / 'training_eval').glob('*/'))
  generated = sorted((model_dir / 'inference_eval').glob('*/eval/'))
  return {
    name: value
    for name, value in _latest({f.name: f for f in teacher_forced}, step).items()
    if name.endswith(('accuracy', 'loss'))
  } | _latest({f.parent.name: f for f in generated}, step, 'generated, ')


def _latest(
  folders: dict[str, pathlib.Path], step: int, kind: str = ''
) -> dict[str, float]:
  """The last value of each metric up to a step, by task, kind and name.

  Args:
    folders: with the event files of each task.
    step: what was measured later does not count.
    kind: put before a metric's name, and the task's before that if there are several.
  """
  from bart_t5x import report  # late: it reads TensorBoard files

  metrics = {}
  for task, folder in folders.items():
    start = f'{task}: {kind}' if len(folders) > 1 else kind
    for name, curve in sorted(report.read_curves(folder).items()):
      if points := [value for at, value in curve if at <= step]:
        metrics[start + name] = points[-1]
  return metrics
