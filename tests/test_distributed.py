"""Two processes with gloo: replicas stay equal, also where one rank never sees a `<seg>`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = '''
import json, sys, hashlib
import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import LoraConfig
from builders import tiny_headed_model, tiny_rows, with_answers
from segrl import DenseLoss, SegGRPOConfig, SegGRPOTrainer, SegSFTConfig, SegSFTTrainer
from segrl.heads import find_mask_head
from segrl.loading import seg_token_id

WITH = "<think>One.</think><answer>The dark cyst is located at [4, 5, 30, 41].<seg></answer>"
WITHOUT = "<think>None.</think><answer>No dark cyst.</answer>"


def reward(completions, **_):
    return [len(completion[0]["content"]) % 7 / 7 for completion in completions]


def run(folder, kind, peft, unused, frozen):
    state = PartialState()
    model, processor = tiny_headed_model(freeze_encoder=frozen, tie_word_embeddings=peft)
    token = seg_token_id(processor)
    common = dict(
        use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no", max_steps=3,
        per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, gradient_checkpointing=False,
        ddp_find_unused_parameters=unused, ddp_backend="gloo",
    )
    lora = LoraConfig(
        r=4, target_modules=r".*language_model.*\\\\.(q_proj|v_proj)", task_type="CAUSAL_LM",
        trainable_token_indices={"embed_tokens": [token]},
    ) if peft else None
    if kind == "sft":
        # no shuffling, so that every batch of four on rank 1 is one without <seg>
        rows = with_answers(tiny_rows(24, processor), [WITH] * 4 + [WITHOUT] * 4)
        args = SegSFTConfig(folder, max_length=None, shuffle_dataset=False, **common)
        trainer = SegSFTTrainer(
            model, args, train_dataset=rows, processing_class=processor, peft_config=lora,
            dense_losses=[DenseLoss("dice_ce")],
        )
        trainer._get_train_sampler = lambda dataset=None: torch.utils.data.SequentialSampler(dataset)
    else:
        # rank 1 cannot write the token
        often = {"sequence_bias": [[[token], 5.0]]} if state.process_index == 0 else {"suppress_tokens": [token]}
        args = SegGRPOConfig(
            folder, num_generations=4, max_completion_length=10, generation_kwargs=often, beta=0.05, **common
        )
        trainer = SegGRPOTrainer(
            model, ["format", reward], args, train_dataset=tiny_rows(12, processor, completions=False),
            processing_class=processor, peft_config=lora, dense_losses=[DenseLoss("dice_ce")],
        )
    head = trainer.mask_head
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    seen = []
    decode = head.decode_next

    def counting(index, valid, inputs):
        seen.append(int(valid.any(1).sum()))
        return decode(index, valid, inputs)

    head.decode_next = counting
    trainer.train()
    digest, moved = {"model": hashlib.sha256(), "head": hashlib.sha256()}, set()
    for name, p in trainer.model.named_parameters():
        part = "head" if "mask_head." in name else "model"
        digest[part].update(p.detach().numpy().tobytes())
        if not torch.equal(p, before[name]):
            moved.add(name)
    return {
        "rank": state.process_index,
        "world": state.num_processes,
        "model": digest["model"].hexdigest(),
        "head": digest["head"].hexdigest(),
        "moved_model": sum("mask_head." not in name for name in moved),
        "moved_head": sum("mask_head.adapter" in name for name in moved),
        "moved_encoder": sum("image_encoder" in name for name in moved),
        "seen": seen,
        "logs": [entry for entry in trainer.state.log_history if "dense/dice_ce" in entry],
    }


if __name__ == "__main__":
    folder, cases = sys.argv[1], json.loads(sys.argv[2])
    results = []
    for number, case in enumerate(cases):
        results.append(run(f"{folder}/run{number}", **case))
    with open(f"{folder}/rank{PartialState().process_index}.json", "w") as file:
        json.dump(results, file)
    dist.barrier()
    dist.destroy_process_group()
'''

CASES = [
    {"kind": kind, "peft": peft, "unused": unused, "frozen": frozen}
    for kind in ("sft", "grpo")
    for peft, unused, frozen in (
        (False, True, True),
        (False, False, True),
        (False, None, False),
        (True, True, True),
        (True, False, True),
    )
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All cases in one launch of two processes, since importing takes longer than training."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "train.py"
    script.write_text(SCRIPT.replace("\\\\\\\\", "\\\\"), encoding="utf-8")
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(script), str(folder), json.dumps(CASES)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=240, check=False, cwd=folder
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"two processes hang: {error.stdout!r} {error.stderr!r}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    return list(zip(*ranks, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=[json.dumps(case) for case in CASES])
def test_replicas_are_equal_and_trained(results, number):
    first, second = results[number]
    assert [first["world"], second["world"]] == [2, 2]
    assert [first["rank"], second["rank"]] == [0, 1]
    assert first["model"] == second["model"]
    assert first["head"] == second["head"]
    assert first["moved_model"] > 0
    assert first["moved_head"] > 0
    assert bool(first["moved_encoder"]) is not CASES[number]["frozen"]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=[json.dumps(case) for case in CASES])
def test_one_rank_had_masks_and_the_other_had_none(results, number):
    first, second = results[number]
    assert len(first["seen"]) == len(second["seen"]) == 3
    assert all(count > 0 for count in first["seen"])
    assert second["seen"] == [0, 0, 0]
    # the logged term is the mean over all ranks: half of rank 0's
    assert all(0 < entry["dense/dice_ce"] for entry in first["logs"])
