"""A data set for reasoning segmentation, built from any images and masks: hard cases, texts, judgement, publication.

After the construction of ComLesion-14K (CORE-Seg, section 3). Each stage reads and writes files in one build folder.
"""

from segrl.curation.case import Case, read_cases, write_cases
from segrl.curation.settings import CurationSettings
from segrl.curation.sources import LoadedSources, SourceSettings, load_sources

__all__ = [
    "Case",
    "CurationSettings",
    "LoadedSources",
    "SourceSettings",
    "load_sources",
    "read_cases",
    "write_cases",
]
