"""A data set for reasoning segmentation, built from any images and masks: hard cases, texts, judgement, publication.

After the construction of ComLesion-14K (CORE-Seg, section 3). Each stage reads and writes files in one build folder.
"""

from segrl.curation.call_plans import CallPlan, PlanAssumptions, SourceSize
from segrl.curation.case import Case, read_cases, write_cases
from segrl.curation.committee import CommitteeSettings
from segrl.curation.difficulty import DifficultySettings, SetDifficulty, find_difficulty, read_errors, select_cases
from segrl.curation.endpoints import Endpoint
from segrl.curation.facts import Facts, read_facts
from segrl.curation.judgements import Judgement, Round, judge_texts, read_judgements
from segrl.curation.judges import JudgeSettings
from segrl.curation.plan import Plan, plan_build, plan_sources
from segrl.curation.plan_table import plan_table
from segrl.curation.prompts import write_prompts
from segrl.curation.publish import FinalText, PublishSettings, publish_cases
from segrl.curation.report import write_build_report
from segrl.curation.rules import CheckedText, RuleSettings, check_text
from segrl.curation.settings import CurationSettings
from segrl.curation.sources import LoadedSources, SourceSettings, load_sources
from segrl.curation.stages import (
    run_difficulty,
    run_judging,
    run_publish,
    run_selection,
    run_writing,
    selected_cases,
)
from segrl.curation.suspects import SuspectSettings
from segrl.curation.tails import Comparison, Tail, TailSettings, find_tail, vote
from segrl.curation.texts import Text, TextSettings, read_texts, write_texts

__all__ = [
    "CallPlan",
    "Case",
    "CheckedText",
    "CommitteeSettings",
    "Comparison",
    "CurationSettings",
    "DifficultySettings",
    "Endpoint",
    "Facts",
    "FinalText",
    "JudgeSettings",
    "Judgement",
    "LoadedSources",
    "Plan",
    "PlanAssumptions",
    "PublishSettings",
    "Round",
    "RuleSettings",
    "SetDifficulty",
    "SourceSettings",
    "SourceSize",
    "SuspectSettings",
    "Tail",
    "TailSettings",
    "Text",
    "TextSettings",
    "check_text",
    "find_difficulty",
    "find_tail",
    "judge_texts",
    "load_sources",
    "plan_build",
    "plan_sources",
    "plan_table",
    "publish_cases",
    "read_cases",
    "read_errors",
    "read_facts",
    "read_judgements",
    "read_texts",
    "run_difficulty",
    "run_judging",
    "run_publish",
    "run_selection",
    "run_writing",
    "select_cases",
    "selected_cases",
    "vote",
    "write_build_report",
    "write_cases",
    "write_prompts",
    "write_texts",
]
