"""Train vision-language models that reason in words and answer with a segmentation mask.

Names are imported on first use, so `import segrl` loads neither torch nor transformers. `__init__.pyi` is the one table
of what the top level exports: type checkers read it, and so does `lazy_loader`.
"""

import logging

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# PEFT imports bitsandbytes where it is installed, which then warns of a kernel for 4 bit on a CPU that nobody wants.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
