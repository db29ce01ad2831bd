"""Score stored completions with any reward: `score_file`, printed by `segrl rewards score`."""

from segrl.scoring.scores import Scores, histogram, score_file, statistics

__all__ = ["Scores", "histogram", "score_file", "statistics"]
