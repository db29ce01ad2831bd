"""Seg-Zero: GRPO on boxes and points, masks by a frozen SAM 2.

accelerate launch examples/seg_zero/train_grpo.py --output_dir runs/seg_zero
accelerate launch examples/seg_zero/train_grpo.py --preset core_seg_3b --data path/to/folder --output_dir runs/3b
"""

from recipe import SegZeroRun

from segrl.scripts import run_script

if __name__ == "__main__":
    run_script(SegZeroRun.check_grpo)
