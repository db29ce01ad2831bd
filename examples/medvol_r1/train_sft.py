"""MedVol-R1 stage 1: supervised fine-tuning on key slices and boxes.

accelerate launch examples/medvol_r1/train_sft.py --output_dir runs/medvol_r1_sft
accelerate launch examples/medvol_r1/train_sft.py --preset medvol_r1_4b --data path/to/folder --output_dir runs/4b_sft
"""

from recipe import MedVolRun

from segrl.scripts import run_script

if __name__ == "__main__":
    run_script(MedVolRun.check_sft)
