"""What each of the two processes of `test_distributed.py` runs: `two_processes.py FOLDER CASES_AS_JSON`."""

import hashlib
import json
import sys
from typing import Any

import torch
from accelerate import PartialState
from builders import add_head, seg_bias, tiny_model, tiny_rows, with_answers
from peft import LoraConfig

from segrl import DenseLoss, SegGRPOConfig, SegGRPOTrainer, SegSFTConfig, SegSFTTrainer
from segrl.losses import dice_ce
from segrl.models import seg_token_id

WITH = "<think>One.</think><answer>The dark cyst is located at [4, 5, 30, 41].<seg></answer>"
WITHOUT = "<think>None.</think><answer>No dark cyst.</answer>"


def length_reward(completions, **_):
    return [len(completion[0]["content"]) % 7 / 7 for completion in completions]


def run(
    folder: str,
    kind: str,
    peft: bool,
    unused: bool | None,
    frozen: bool,
    answers: int = 4,
    rows_of_step: tuple[int, int] = (4, 1),
    budget: int | None = None,
    standardise: bool = True,
    epsilon: float = 1e-8,
) -> dict[str, Any]:
    """Train three steps with `<seg>` in the batches of rank 0 only; hashes of all parameters, and what moved."""
    state = PartialState()
    model, processor = tiny_model("qwen2_5_vl", tie_word_embeddings=peft)
    model = add_head(
        model, processor, freeze_encoder=frozen, standardise=standardise
    )  # running statistics must agree as well
    token, seen, rows_of = seg_token_id(processor), [], []

    def counted(logits, target):
        seen.append(len(logits))
        return dice_ce(logits, target)

    common: dict[str, Any] = {
        **{"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"},
        **{"max_steps": 3, "per_device_train_batch_size": rows_of_step[0], "learning_rate": 1e-2, "logging_steps": 1},
        **{"gradient_checkpointing": False, "ddp_find_unused_parameters": unused, "adam_epsilon": epsilon},
        **{"gradient_accumulation_steps": rows_of_step[1], "tokens_per_micro_batch": budget},
    }
    shared: dict[str, Any] = {
        "processing_class": processor,
        "dense_losses": [DenseLoss("dice_ce", fn=counted)],
        "peft_config": LoraConfig(
            r=4,
            target_modules=r".*language_model.*\.(q_proj|v_proj)",
            task_type="CAUSAL_LM",
            trainable_token_indices={"embed_tokens": [token]},
        )
        if peft
        else None,
    }
    trainer: Any
    if kind == "sft":
        # in order, and the ranks take turns: rank 1 gets the batches without the token
        rows = with_answers(tiny_rows(6 * rows_of_step[0] * rows_of_step[1], processor), [WITH] * 4 + [WITHOUT] * 4)
        args: Any = SegSFTConfig(folder, max_length=None, train_sampling_strategy="sequential", **common)
        trainer = SegSFTTrainer(model, args, train_dataset=rows, **shared)
    else:
        # rank 1 cannot write the token, and neither can write placeholders of pictures
        never = seg_bias(processor)["suppress_tokens"]
        often = {"suppress_tokens": never, "sequence_bias": [[[token], 12.0]]}
        often = often if state.process_index == 0 else {"suppress_tokens": [*never, token]}
        beta = 0.05 if peft else 0.0  # without PEFT, TRL reads the reference model from a folder
        sizes: dict[str, Any] = {"num_generations": answers, "max_completion_length": 10}
        args = SegGRPOConfig(folder, generation_kwargs=often, beta=beta, **sizes, **common)
        rows = tiny_rows(12 * rows_of_step[1], processor, completions=False)
        trainer = SegGRPOTrainer(model, ["format", length_reward], args, train_dataset=rows, **shared)
    model.get_decoder().register_forward_hook(
        lambda module, args, output: rows_of.append(len(output[0])) if torch.is_grad_enabled() else None
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    digests, moved = {"model": hashlib.sha256(), "head": hashlib.sha256()}, []
    for name, parameter in trainer.model.named_parameters():
        digests["head" if "mask_head." in name else "model"].update(parameter.detach().numpy().tobytes())
        if not torch.equal(parameter, before[name]):
            moved.append(name)
    adapter = trainer.mask_head.adapter
    if standardise:
        for buffer in (adapter.mean, adapter.variance):
            digests["head"].update(buffer.numpy().tobytes())
        if adapter.mean.abs().max() > 0:
            moved.append("running statistics")
    return {
        "rank": state.process_index,
        "world": state.num_processes,
        "wrapped": type(trainer.model_wrapped).__name__,
        "digests": {part: digest.hexdigest() for part, digest in digests.items()},
        "moved": moved,
        "norms": [p.detach().norm().item() for p in trainer.model.parameters() if p.requires_grad],
        "seen": seen,
        "rows": rows_of,
        "logged": [entry["dense/dice_ce"] for entry in trainer.state.log_history if "dense/dice_ce" in entry],
    }


if __name__ == "__main__":
    folder, cases = sys.argv[1], json.loads(sys.argv[2])
    results = [run(f"{folder}/run{number}", **case) for number, case in enumerate(cases)]
    with open(f"{folder}/rank{PartialState().process_index}.json", "w", encoding="utf-8") as file:
        json.dump(results, file)
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
