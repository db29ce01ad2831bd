"""CORE-Seg, the main job: stage 1 (unless `--model` names one), then stage 2 (GRPO with mask rewards and DiceCE,
`L_S2`).

accelerate launch examples/core_seg/train_grpo.py                                  # tiny preset, synthetic lesions
accelerate launch examples/core_seg/train_grpo.py --data path/to/folder --output_dir runs/mine
accelerate launch examples/core_seg/train_grpo.py --model runs/core_seg_sft --rewards format box_f1
"""

from recipe import CoreSegRun

from segrl.scripts import run_script

if __name__ == "__main__":
    run_script(CoreSegRun.check_grpo)
