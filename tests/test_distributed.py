"""Two processes with gloo: replicas stay equal, also where one rank never sees a `<seg>`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
CASES.append({**CASES[7], "answers": 8})  # the answers to a prompt are spread over both processes
PLAIN = len(CASES)
# The same rows whole or accumulated, and divided by tokens. Running statistics would depend on the division. Where a
# gradient is little more than rounding, as of a key's bias, Adam takes whole steps along it with its usual epsilon.
SFT, GRPO = ({**CASES[number], "standardise": False, "epsilon": 1e-5} for number in (0, 5))
CASES += [{**SFT, "rows_of_step": [8, 1]}, {**SFT, "rows_of_step": [8, 1], "budget": 400}]
CASES += [{**GRPO, "rows_of_step": [4, 2]}, {**GRPO, "rows_of_step": [4, 2], "budget": 100}]
NAMES = ["-".join(f"{key}={value}" for key, value in case.items()) for case in CASES]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All cases in one launch, since importing takes longer than training; a hang fails here."""
    folder, tests = tmp_path_factory.mktemp("ranks"), Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1"}
    # accelerate 1.15 starts a single process for `launch --cpu --num_processes 2`, unless MPI starts the others
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tests / "two_processes.py"), str(folder), json.dumps(CASES)]
    code: int | str
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
        try:
            code = process.wait(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its two processes
            process.wait(timeout=40)
            code = "a timeout"
    assert code == 0, f"ended with {code}: {(folder / 'output.txt').read_text()[-6000:]}"
    ranks = [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    return list(zip(*ranks, strict=True))


@pytest.mark.parametrize("number", range(PLAIN), ids=NAMES[:PLAIN])
def test_replicas_are_trained_and_equal_bit_for_bit(results, number):
    first, second = results[number]
    assert [first["world"], second["world"]] == [2, 2]
    assert [first["rank"], second["rank"]] == [0, 1]
    assert first["wrapped"] == "DistributedDataParallel"
    assert first["digests"] == second["digests"]
    assert first["moved"] == second["moved"]
    # in the loss, 4 answers to one prompt are one packed row; a prompt of its own has each row of SFT
    assert first["rows"] == second["rows"] == [1 if CASES[number]["kind"] == "grpo" else 4] * 3
    for part in ("mask_head.adapter", "sam_mask_decoder", "lora_B" if CASES[number]["peft"] else "q_proj.weight"):
        assert any(part in name for name in first["moved"]), part
    assert any("image_encoder" in name for name in first["moved"]) is not CASES[number]["frozen"]
    assert any("trainable_tokens_delta" in name for name in first["moved"]) is CASES[number]["peft"]


@pytest.mark.parametrize("number", range(PLAIN), ids=NAMES[:PLAIN])
def test_one_rank_had_masks_and_the_other_had_none(results, number):
    first, second = results[number]
    assert len(first["seen"]) == 3
    assert all(count > 0 for count in first["seen"])
    assert second["seen"] == [0, 0, 0]
    assert len(first["logged"]) == 3
    assert all(value > 0 for value in first["logged"])


@pytest.mark.parametrize("number", [PLAIN, PLAIN + 2], ids=["sft", "grpo"])
def test_micro_batches_by_tokens(results, number):
    """Both processes run as many passes, and train what they train without the division."""
    whole, divided = results[number], results[number + 1]
    for first, second in (whole, divided):
        assert first["digests"] == second["digests"]
        assert len(first["rows"]) == len(second["rows"])
    assert divided[0]["norms"] == pytest.approx(whole[0]["norms"], rel=1e-4)
    assert divided[0]["logged"] == pytest.approx(whole[0]["logged"], rel=1e-4)
    assert len(divided[0]["rows"]) == 6
