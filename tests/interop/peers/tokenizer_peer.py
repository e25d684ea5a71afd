"""Loads a folder's tokenizer as any user would, with the transformers at hand.

Usage: tokenizer_peer.py IN.npz OUT.npz. IN holds `folder` and `texts` (JSON list). OUT
gets as JSON `ids` and `decoded` (of the texts) and `special` (ids by name).
"""

import json
import sys

import numpy as np
import transformers


def main():
  given = dict(np.load(sys.argv[1]))
  tokenizer = transformers.AutoTokenizer.from_pretrained(str(given['folder']))
  ids = [tokenizer(text)['input_ids'] for text in json.loads(str(given['texts']))]
  special = ('bos', 'pad', 'eos', 'unk', 'mask')
  np.savez(
    sys.argv[2],
    ids=json.dumps(ids),
    decoded=json.dumps([tokenizer.decode(row[1:-1]) for row in ids]),
    special=json.dumps([getattr(tokenizer, f'{s}_token_id') for s in special]),
  )


if __name__ == '__main__':
  main()
