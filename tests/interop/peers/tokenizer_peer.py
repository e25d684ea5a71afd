"""Tokenizes texts with a folder's tokenizer.

Usage: tokenizer_peer.py IN.npz OUT.npz. IN holds `folder`, `texts` (JSON list) and
maybe `tokenizer` (a class, by default AutoTokenizer). OUT gets, as JSON, `ids` and
`decoded` (of the texts) and `special` (ids of special tokens).
"""

import json
import sys

import numpy as np
import transformers


def main():
  given = dict(np.load(sys.argv[1]))
  tokenizer_class = getattr(transformers, str(given.get('tokenizer', 'AutoTokenizer')))
  tokenizer = tokenizer_class.from_pretrained(str(given['folder']))
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
