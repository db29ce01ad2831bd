"""A data set for reasoning segmentation, built from any images and masks: hard cases, texts, judgement, publication.

After the construction of ComLesion-14K (CORE-Seg, section 3). Each stage reads and writes files in one build folder.

Names are imported on first use; `__init__.pyi` lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
