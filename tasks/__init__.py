"""seqio tasks. Importing the package registers all of them."""

from tasks import fill_in, pretrain

__all__ = ['fill_in', 'pretrain']
