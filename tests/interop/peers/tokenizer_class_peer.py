"""Tokenizes texts with a tokenizer's folder, in a Python that has transformers.

Usage: tokenizer_class_peer.py IN.npz OUT.npz. IN holds `folder`, `tokenizer` (the
name of a class) and `texts` (JSON list). OUT gets `ids` (JSON list of lists).
"""

import json
import sys

import numpy as np
import transformers


def main():
  given = dict(np.load(sys.argv[1]))
  tokenizer_class = getattr(transformers, str(given['tokenizer']))
  tokenizer = tokenizer_class.from_pretrained(str(given['folder']))
  texts = json.loads(str(given['texts']))
  np.savez(sys.argv[2], ids=json.dumps([tokenizer(t)['input_ids'] for t in texts]))


if __name__ == '__main__':
  main()
