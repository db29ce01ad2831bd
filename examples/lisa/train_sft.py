"""LISA: supervised fine-tuning on text and masks.

accelerate launch examples/lisa/train_sft.py --output_dir runs/lisa
accelerate launch examples/lisa/train_sft.py --preset lisa_3b --data path/to/folder --output_dir runs/lisa_3b
"""

from recipe import LisaRun

from segrl.scripts import run_script

if __name__ == "__main__":
    run_script(LisaRun.check_sft)
