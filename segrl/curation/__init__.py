"""A data set for reasoning segmentation, built from any images and masks: hard cases, texts, judgement, publication.

After the construction of ComLesion-14K (CORE-Seg, section 3). Each stage reads and writes files in one build folder.
"""

from segrl.curation.case import Case, read_cases, write_cases
from segrl.curation.committee import CommitteeSettings
from segrl.curation.difficulty import DifficultySettings, SetDifficulty, find_difficulty, read_errors, select_cases
from segrl.curation.publish import FinalText, PublishSettings, publish_cases
from segrl.curation.report import write_build_report
from segrl.curation.settings import CurationSettings
from segrl.curation.sources import LoadedSources, SourceSettings, load_sources
from segrl.curation.stages import run_difficulty, run_publish, run_selection, selected_cases
from segrl.curation.suspects import SuspectSettings
from segrl.curation.tails import Comparison, Tail, TailSettings, find_tail, vote

__all__ = [
    "Case",
    "CommitteeSettings",
    "Comparison",
    "CurationSettings",
    "DifficultySettings",
    "FinalText",
    "LoadedSources",
    "PublishSettings",
    "SetDifficulty",
    "SourceSettings",
    "SuspectSettings",
    "Tail",
    "TailSettings",
    "find_difficulty",
    "find_tail",
    "load_sources",
    "publish_cases",
    "read_cases",
    "read_errors",
    "run_difficulty",
    "run_publish",
    "run_selection",
    "select_cases",
    "selected_cases",
    "vote",
    "write_build_report",
    "write_cases",
]
