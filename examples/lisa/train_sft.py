"""LISA: supervised fine-tuning on text and masks.

accelerate launch examples/lisa/train_sft.py --output_dir runs/lisa
accelerate launch examples/lisa/train_sft.py --preset core_seg_3b --data path/to/folder --output_dir runs/core_seg_3b
"""

from recipe import LisaRun

from segrl.scripts import run_script

if __name__ == "__main__":
    run_script(LisaRun.check_sft)
