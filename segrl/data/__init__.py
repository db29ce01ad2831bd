"""Data sets with the columns that segrl trains on.

Images: image, mask, query, modality, anatomy, lesion, name, [reasoning]. Volumes have scan, label, label_value and
intensity instead of image and mask.

Names are imported on first use; `__init__.pyi` lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
