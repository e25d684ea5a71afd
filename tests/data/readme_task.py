from tasks.finetune import add_text_to_text_task


def to_text(row):
  return {'inputs': f'ordklasse: {row["ord"]}', 'targets': row['klasse']}


add_text_to_text_task(
  'ordklasser',
  to_text,
  files={'train': 'ord/train.tsv', 'validation': 'ord/validation.tsv'},
  corpus_dir='data/mini',
  labels=('substantiv', 'verb', 'adjektiv'),
)
