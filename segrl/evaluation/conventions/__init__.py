"""Scores of the same masks as published evaluators count: named conventions, side by side, with their sources."""

from segrl.evaluation.conventions.cases import KINDS, VOLUMES, Case, cases_of
from segrl.evaluation.conventions.compared import (
    check_conventions,
    compare_conventions,
    conventions_page,
    explain_difference,
)
from segrl.evaluation.conventions.published import CONVENTIONS, Convention, ConventionError

__all__ = [
    "CONVENTIONS",
    "KINDS",
    "VOLUMES",
    "Case",
    "Convention",
    "ConventionError",
    "cases_of",
    "check_conventions",
    "compare_conventions",
    "conventions_page",
    "explain_difference",
]
