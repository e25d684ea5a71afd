"""T5X's interface, from packages on PyPI only.

A clone of google-research/t5x that is later on the Python path supplies what is not
here, such as `t5x.examples`. Nothing is imported: `python -m t5x.train` imports this
package first, and must then load the module it runs only once.
"""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
