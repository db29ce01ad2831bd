"""Evaluate a run of Seg-Zero on the test split, beside the best constant mask of the training split, if there is one.

python examples/seg_zero/evaluate.py --model runs/seg_zero --data path/to/folder
"""

from recipe import SegZeroRun

from segrl.scripts import run_script

if __name__ == "__main__":
    run_script(SegZeroRun.check_evaluation)
