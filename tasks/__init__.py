"""seqio tasks. Importing the package registers all of them."""

from tasks import fill_in, finetune, pretrain

__all__ = ['fill_in', 'finetune', 'pretrain']
