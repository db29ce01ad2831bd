"""CORE-Seg stage 1: supervised fine-tuning with DiceCE on the masks (`L_S1`).

accelerate launch examples/core_seg/train_sft.py --output_dir runs/core_seg_sft
accelerate launch examples/core_seg/train_sft.py --preset core_seg_3b --data path/to/folder --output_dir runs/3b_sft
"""

from recipe import CoreSegRun

from segrl.scripts import run_script

if __name__ == "__main__":
    run_script(CoreSegRun.check_sft)
