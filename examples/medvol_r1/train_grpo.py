"""MedVol-R1: the segmenter if it has no weights yet, stage 1 (unless `--model` names one), then stage 2 (GRPO).

accelerate launch examples/medvol_r1/train_grpo.py                                   # tiny preset, synthetic volumes
accelerate launch examples/medvol_r1/train_grpo.py --data path/to/folder --output_dir runs/mine
accelerate launch examples/medvol_r1/train_grpo.py --model runs/medvol_r1_sft --drop_rewards propagated_dice
"""

from recipe import MedVolRun

from segrl.scripts import run_script

if __name__ == "__main__":
    run_script(MedVolRun.check_grpo)
