"""Evaluate a run of LISA on the test split, beside the best constant mask of the training split, if there is one.

python examples/lisa/evaluate.py --model runs/lisa --data path/to/folder
"""

from recipe import LisaRun

from segrl.scripts import run_script

if __name__ == "__main__":
    run_script(LisaRun.check_evaluation)
