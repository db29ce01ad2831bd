"""Stored completions, scored by any reward: `score_file`; `segrl rewards score` prints what it returns."""

from segrl.scoring.scores import Scores, histogram, score_file, statistics

__all__ = ["Scores", "histogram", "score_file", "statistics"]
