"""What the processes of `test_parts_plugin.py` run: `plugin_runs.py train|resume|predict FOLDER`, one line of JSON."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from builders import as_data, grpo_args, questions, sft_args, tiny_model, tiny_rows, with_answers

from segrl.data import make_synthetic
from segrl.evaluation import evaluate
from segrl.heads import DenseLoss, MaskHead, attach_mask_head, find_mask_head
from segrl.inference import ReasoningSegmenter
from segrl.models import seg_token_id
from segrl.predictions import ImagePromptSettings
from segrl.trainers import SegGRPOTrainer, SegSFTTrainer

ANSWER = "<think>One.</think><answer>The dark cyst is located at [4, 5, 30, 41].<seg></answer>"


def predictions(segmenter: ReasoningSegmenter) -> list[Any]:
    images, queries = questions()
    found = segmenter.predict_batch(images, queries, max_new_tokens=60)
    return as_data([answer for answer in found if answer.mask is not None])


def sft(folder: Path, model: Any, processor: Any) -> Any:
    return SegSFTTrainer(
        model,
        sft_args(
            folder, max_steps=40, save_strategy="steps", save_steps=20, max_length=None, learning_rate=3e-3, seed=1
        ),
        train_dataset=with_answers(tiny_rows(16, processor), [ANSWER]),
        processing_class=processor,
        dense_losses=[DenseLoss("rim"), DenseLoss("dice_ce")],
    )


def train(folder: Path) -> dict[str, Any]:
    """SFT and then GRPO on a head that is made of the plugin's parts by name."""
    torch.manual_seed(0)
    model, processor = tiny_model()
    head = MaskHead.build(
        model, "small_unet", token_id=seg_token_id(processor), adapter="gated", temperature=2.0, freeze_encoder=False
    )
    attach_mask_head(model, head)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    trainer = sft(folder / "sft", model, processor)
    trainer.train()
    logged = [entry["dense/rim"] for entry in trainer.state.log_history if "dense/rim" in entry]
    still = [name for name, value in head.state_dict().items() if torch.equal(value, before[name])]
    trainer = SegGRPOTrainer(
        model,
        ["format", "mask_dice"],
        grpo_args(folder / "grpo", max_completion_length=60),
        train_dataset=tiny_rows(4, processor, completions=False),
        processing_class=processor,
        dense_losses=[DenseLoss("rim")],
    )
    trainer.train()
    segmenter = ReasoningSegmenter(model.eval(), processor, ImagePromptSettings(instruction="Answer."))
    segmenter.save_pretrained(folder / "model")
    return {"rim": logged, "still": still, "predictions": predictions(segmenter)}


def predict(folder: Path) -> dict[str, Any]:
    """The saved model in a process that has never named the plugin."""
    segmenter = ReasoningSegmenter.from_pretrained(folder / "model", device="cpu")
    head = find_mask_head(segmenter.model)
    assert head is not None
    records = evaluate(segmenter, make_synthetic(3, size=64), progress=False)
    return {
        "parts": [f"{type(part).__module__}:{type(part).__name__}" for part in (head.adapter, head.segmenter)],
        "config": head.to_config(),
        "predictions": predictions(segmenter),
        "records": [record["dice"] for record in records],
    }


def resume(folder: Path) -> dict[str, Any]:
    """The run taken up at its step 20, from the checkpoint alone; hashes of its weights and those of the whole run."""
    segmenter = ReasoningSegmenter.from_pretrained(folder / "sft" / "checkpoint-20", device="cpu", trainable=True)
    trainer = sft(folder / "again", segmenter.model, segmenter.processor)
    trainer.train(resume_from_checkpoint=str(folder / "sft" / "checkpoint-20"))
    whole = ReasoningSegmenter.from_pretrained(folder / "sft" / "checkpoint-40", device="cpu")
    expected, found = whole.model.state_dict(), trainer.model.state_dict()
    return {
        "steps": trainer.state.global_step,
        "different": [name for name, value in expected.items() if not torch.equal(value, found[name])],
    }


if __name__ == "__main__":
    run = {"train": train, "predict": predict, "resume": resume}[sys.argv[1]]
    print(json.dumps(run(Path(sys.argv[2]))))
