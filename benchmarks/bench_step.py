"""Cost of masks: TRL's `GRPOTrainer` with a box reward against `SegGRPOTrainer` with masks, three rewards and DiceCE.

    python benchmarks/bench_step.py [--rounds 5] [--steps 4] [--json result.json]

Both train the same tiny Qwen2.5-VL on the same rows, in one process, in turn (A B A B ...), with completions of a fixed
length in which nearly every text holds a `<seg>` (a generation bias gives an untrained model one). Printed: the median
time of a step, which holds generation, rewards, loss and backward, and the ratio; then how often B encodes an image for
its masks.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from segrl import DenseLoss, MaskHead, Sam2Segmenter, SegGRPOConfig, SegGRPOTrainer, attach_mask_head, make_reward
from segrl.data import make_synthetic, prepare
from segrl.frames import Frame, frame_for
from segrl.loading import seg_token_id
from segrl.report import versions
from segrl.segmenters import Sam2Config
from segrl.testing.tiny import tiny_qwen2_5_vl

TINY_SAM2 = Sam2Config(
    image_size=128, embed_dim=32, stages=(1, 2, 2, 1), global_att_blocks=(4,), window_spec=(8, 4, 8, 4),
    pos_embed_size=(4, 4), hidden_dim=64, memory_dim=16, memory_layers=1, memory_feedforward=128,
)  # fmt: skip


def trainer(masks: bool, rows: int, steps: int, tokens: int, folder: str) -> Any:
    """A trainer with its own copy of the model: the same weights, rows and sampling seed for A and B."""
    model, processor = tiny_qwen2_5_vl(seed=0)
    token = seg_token_id(processor)
    data = prepare(make_synthetic(rows, seed=0), processor, completions=False)
    settings: dict[str, Any] = {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": 16, "num_generations": 4,
        "max_completion_length": tokens, "beta": 0.0, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "use_cpu": not torch.cuda.is_available(),
        "generation_kwargs": {"min_new_tokens": tokens, "sequence_bias": {(token,): 4.0}},
    }  # fmt: skip
    if not masks:

        def frame(image_size: tuple[int, int], original_size: tuple[int, int]) -> Frame:
            return frame_for(processor, image_size, original_size)

        return GRPOTrainer(
            model,
            [make_reward("box_f1", frame=frame)],
            GRPOConfig(**settings),
            train_dataset=data,
            processing_class=processor,
        )
    torch.manual_seed(0)
    attach_mask_head(model, MaskHead.build(model, Sam2Segmenter(TINY_SAM2), token_id=token))
    return SegGRPOTrainer(
        model, ["format", "box_f1", "dual_granularity_mask"], SegGRPOConfig(**settings), train_dataset=data,
        processing_class=processor, dense_losses=[DenseLoss("dice_ce")],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times A and B take turns")
    parser.add_argument("--steps", type=int, default=4, help="steps a turn; the first is a warm-up and not counted")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of every completion")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    if options.steps < 2 or options.rounds < 1:
        parser.error("--steps must be at least 2 and --rounds at least 1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    times: dict[str, list[float]] = {"trl": [], "segrl": []}
    counts = {"encodes": 0, "steps": 0}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name in times:
                run = trainer(name == "segrl", 4 * options.steps, options.steps, options.tokens, folder)
                run.remove_callback(PrinterCallback)
                run.train()
                logs = [log for log in run.state.log_history if "step_time" in log]
                times[name] += [log["step_time"] for log in logs[1:]]
                if name == "segrl":
                    counts["encodes"] += run.mask_head.encoded_images
                    counts["steps"] += len(logs)
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "command": "benchmarks/bench_step.py", "shape": {"completions": 16, "generations": 4, "tokens": options.tokens},
        "median_step_s": medians, "ratio": medians["segrl"] / medians["trl"], "measured_steps": len(times["trl"]),
        "encodes_per_step": counts["encodes"] / counts["steps"], "unique_images_per_step": 4,
        "threads": torch.get_num_threads(), "versions": versions(),
    }  # fmt: skip
    print(f"A  TRL without masks   {medians['trl']:.3f} s a step (median of {len(times['trl'])})")
    print(f"B  segrl with masks    {medians['segrl']:.3f} s a step")
    print(f"B / A                  {result['ratio']:.2f}")
    print(f"image encodes a step   {result['encodes_per_step']:.1f} for 4 unique images and 16 completions")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
