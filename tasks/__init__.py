"""seqio tasks. Importing the package registers all of them."""

from tasks import pretrain

__all__ = ['pretrain']
