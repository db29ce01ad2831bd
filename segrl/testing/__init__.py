"""Tools for tests: a conformance check for rewards and Hypothesis strategies.

Names are imported on first use, because both need hypothesis (`pip install 'segrl[testing]'`).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
