"""Settings of TRL that change a GRPO loss, each with a mask head, a dense loss and shared prompts: a run that shares
prompts and one that does not have the same texts, masks, losses, gradients and weights.

Every run takes two optimizer steps on one rollout, so that the second has ratios other than one.
"""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import sampled
from sharing_runs import run, same_runs
from trainer_checks import logged, weights
from trl.trainer.grpo_trainer import GRPOTrainer

from segrl.trainers.token_budget import NORMALIZERS

COMMON: dict[str, Any] = {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "num_iterations": 2,
    "max_steps": 2,
    "learning_rate": 0.03,
    "lr_scheduler_type": "constant",
}
REFERENCE: dict[str, Any] = {"beta": 0.1}
CUT: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 4}  # one prompt a rollout, in two halves

CASES: dict[str, dict[str, Any]] = {
    **{
        f"{loss}-{level}": {"loss_type": loss, "importance_sampling_level": level}
        for level in ("token", "sequence")
        for loss in NORMALIZERS
    },
    "bias-corrected-kl": {**REFERENCE, "use_bias_correction_kl": True},
    "bias-corrected-kl-sequence": {
        **REFERENCE,
        "use_bias_correction_kl": True,
        "importance_sampling_level": "sequence",
        "loss_type": "grpo",
    },
    "reference-sync": {**REFERENCE, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    "mask-truncated": {"mask_truncated_completions": True},
    "mask-truncated-vespo": {"mask_truncated_completions": True, "loss_type": "vespo"},
    "three-iterations": {"num_iterations": 3, "max_steps": 3},
    "steps-per-generation": {**CUT, "steps_per_generation": 2, "num_iterations": 1},
    "steps-and-iterations": {**CUT, "steps_per_generation": 2},
    "steps-and-accumulation": {**CUT, "steps_per_generation": 2, "gradient_accumulation_steps": 2, "max_steps": 2},
    "epsilon": {"epsilon": 1e-3, "epsilon_high": 2e-3},
    "delta": {"delta": 1.21, "epsilon": 1e-3},
    "off-policy-mask": {"off_policy_mask_threshold": 1e-6},
    "entropy-quantile": {"top_entropy_quantile": 0.5},
    "entropy-bonus": {"entropy_coef": 0.1},
    "adaptive-entropy": {"entropy_coef": 0.1, "use_adaptive_entropy": True, "entropy_target": 9.0},
    "scale-none": {"scale_rewards": "none", "loss_type": "dr_grpo"},
    "scale-batch": {"scale_rewards": "batch"},
    "normalize-then-sum": {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.5]},
    "head-in-fp32": {"cast_lm_head_to_fp32": True},
    "sampling": {"temperature": 0.8, "top_p": 0.95, "top_k": 200, "min_p": 1e-4, "repetition_penalty": 1.05},
    "static-cache": {"cache_implementation": "static"},
    "padded": {"pad_to_multiple_of": 8},
    "policy-weight": {"policy_weight": 0.5},
}
FAST = ("dapo-token", "reference-sync")  # the two that also run in the quick tests


def both(folder: Any, settings: dict[str, Any], **arguments: Any) -> tuple[Any, Any]:
    """A run that shares prompts, and one that does not."""
    shared, dense = (run(folder, share=share, **{**COMMON, **settings}, **arguments) for share in (True, False))
    return shared, dense


def check(shared: Any, dense: Any) -> None:
    same_runs(shared, dense)
    assert all(loss > 0 for loss in logged(shared, "dense/dice_ce"))
    assert any(batch["completion_mask"].sum() > 0 for batch in shared.batches)
    assert 0 < sum(shared.tokens("loss")) < 0.75 * sum(dense.tokens("loss"))
    assert not same_weights(shared)


def same_weights(trainer: Any) -> bool:
    """Whether the last step's gradient is that of the first, as if nothing had been learned between."""
    first, last = trainer.kept.steps[0], trainer.kept.steps[-1]
    return all(torch.equal(value, last[name]) for name, value in first.items())


@pytest.mark.parametrize(
    "name", [pytest.param(name) for name in FAST] + sampled(name for name in CASES if name not in FAST)
)
def test_a_setting_of_trl(name, tmp_path):
    shared, dense = both(tmp_path, CASES[name])
    check(shared, dense)
    if name == "reference-sync":
        mine, yours = (weights(trainer.ref_model) for trainer in (shared, dense))
        for key, value in yours.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-5)
    if "beta" in CASES[name]:
        assert all(value > 0 for value in logged(shared, "kl"))


def test_every_loss_and_level_of_trl_has_a_case():
    """A new one in `GRPOTrainer._compute_loss` fails here until it has a case."""
    source = inspect.getsource(GRPOTrainer._compute_loss)
    levels = set(re.findall(r'self\.importance_sampling_level == "(\w+)"', source))
    assert levels == {"token", "sequence"}
    assert {f"{loss}-{level}" for loss in NORMALIZERS for level in levels} <= CASES.keys()
    read = set(re.findall(r"self\.args\.(\w+)", source)) | {"top_entropy_quantile", "off_policy_mask_threshold"}
    fixed = {"steps_per_generation", "epsilon", "entropy_target"} | {
        name for name in read if name.startswith(("sapo_", "vespo_", "entropy_coef_"))  # numbers of a loss
    }  # fmt: skip
    assert read - fixed <= {name for settings in CASES.values() for name in settings}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)  # without a GPU its kernels are interpreted
@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_liger(kind, tmp_path):
    pytest.importorskip(f"liger_kernel.transformers.model.{kind}", exc_type=ImportError)
    tests = Path(__file__).parent
    paths = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(tests / "liger_runs.py"), str(tmp_path), kind],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
