"""Evaluate a trained run on the test split, beside the best constant mask of the training split, if there is one.

python examples/core_seg/evaluate.py --model runs/core_seg --data path/to/folder
"""

from recipe import CoreSegRun

from segrl.scripts import run_script

if __name__ == "__main__":
    run_script(CoreSegRun.check_evaluation)
