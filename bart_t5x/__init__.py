"""BART for T5X: model, denoising objective, corpora and conversion."""

import os

import gin

# Gin files include each other as 'gin/….gin', from any working folder. The folder gin/
# is next to this one in a checkout, and inside it when installed from a wheel.
_HERE = os.path.dirname(os.path.abspath(__file__))
for _folder in (_HERE, os.path.dirname(_HERE)):
  if os.path.isfile(os.path.join(_folder, 'gin', 'eval.gin')):
    gin.add_config_file_search_path(_folder)
