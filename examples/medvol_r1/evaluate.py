"""Evaluate a trained run, beside the ceiling of its frozen segmenter (true boxes on the best slice).

python examples/medvol_r1/evaluate.py --model runs/medvol_r1 --data path/to/folder
"""

from recipe import MedVolRun

from segrl.scripts import run_script

if __name__ == "__main__":
    run_script(MedVolRun.check_evaluation)
