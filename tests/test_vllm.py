"""vLLM, at the interface at which TRL's trainer asks for completions, with a real model behind it.

vLLM itself is not run here. `Engine` has what `GRPOTrainer` calls of `VLLMGeneration`: `sync_weights` and `generate`,
with a model of its own, which samples and says the log-probability of each token.
"""

import copy
import warnings
from typing import Any

import pytest
import torch
from builders import add_head, grpo_args, seg_bias, tiny_model, tiny_rows
from PIL import Image
from sharing_runs import Watched
from trainer_checks import Collect, letters, logged, same_masks
from trl.generation.vllm_generation import VLLMGeneration

from segrl.errors import SegRLError
from segrl.heads import DenseLoss, find_mask_head

pytestmark = pytest.mark.slow


class Engine:
    """A sampler with weights of its own, which gets the trainer's when it is told to."""

    def __init__(self, trainer: Any, model: Any, processor: Any, synchronises: bool = True) -> None:
        self.trainer, self.model, self.processor, self.synchronises = trainer, model, processor, synchronises
        self.pushed: list[set[str]] = []
        self.asked: list[int] = []

    def sync_weights(self) -> None:
        state = {name: value.detach().clone() for name, value in self.trainer.model.named_parameters()}
        self.pushed.append(set(state))
        if self.synchronises:
            self.model.load_state_dict(state, strict=False)

    @torch.no_grad()
    def generate(self, prompts: Any, images: Any, num_generations: int, profiler: Any) -> Any:
        self.asked.append(len(prompts))
        completions, scores = [], []
        for ids, shown in zip(prompts, images, strict=True):
            assert all(isinstance(image, Image.Image) for image in shown)
            pixels = self.processor.image_processor(images=shown, return_tensors="pt")
            batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
            types = (batch["input_ids"] == self.model.config.image_token_id).int()
            output = self.model.generate(
                **batch,
                **pixels,
                mm_token_type_ids=types,
                do_sample=True,
                max_new_tokens=self.trainer.max_completion_length,
                **seg_bias(self.processor),
            )
            own = output[0, len(ids) :]
            full = {"input_ids": output, "attention_mask": torch.ones_like(output)}
            types = torch.cat([types, torch.zeros_like(own)[None]], 1)
            logits = self.model(**full, **pixels, mm_token_type_ids=types).logits[0, len(ids) - 1 : -1]
            completions.append(own.tolist())
            scores.append([[value] for value in logits.log_softmax(-1)[torch.arange(len(own)), own].tolist()])
        return None, completions, scores, None


def made(folder: Any, *, synchronises: bool = True, change: float = 0.0, served: Any = None, **settings: Any) -> Any:
    """A trainer that samples with an `Engine`, whose model is `served`, or the policy with `change` of noise."""
    model, processor = tiny_model()
    sampler = copy.deepcopy(model) if served is None else served
    collect = Collect(letters)
    trainer: Any = Watched(
        add_head(model, processor),
        [collect, "format"],
        grpo_args(folder, per_device_train_batch_size=8, num_generations=4, **settings),
        train_dataset=tiny_rows(4, processor, completions=False),
        processing_class=processor,
        dense_losses=[DenseLoss("dice_ce")],
    )
    with torch.no_grad():
        for parameter in sampler.parameters():
            parameter.add_(change * torch.randn_like(parameter))
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer.vllm_generation = Engine(trainer, sampler, processor, synchronises)
    trainer.collect = collect
    return trainer


def test_the_interface_of_trl():
    assert {"sync_weights", "generate"} <= set(dir(VLLMGeneration))


def test_masks_states_and_weights(tmp_path):
    """Masks are those of a plain forward, the head is never pushed, and scoring shares prompts."""
    trainer = made(tmp_path, learning_rate=1e-2)
    trainer.train()
    engine = trainer.vllm_generation
    assert engine.asked == [8, 8]
    assert len(engine.pushed) == 2
    assert not any("mask_head" in name for names in engine.pushed for name in names)
    assert find_mask_head(trainer.model) is trainer.mask_head
    for name, parameter in engine.model.named_parameters():  # what the second rollout was sampled with
        assert parameter.shape == dict(trainer.model.named_parameters())[name].shape
    gaps = logged(trainer, "sampling/sampling_logp_difference/mean")
    assert len(gaps) == 2
    assert max(gaps) < 1e-4
    assert all(loss > 0 for loss in logged(trainer, "dense/dice_ce"))
    masks = [prediction.mask for prediction in trainer.collect.joined("prediction")]
    assert any(mask is not None for mask in masks)
    for scored, batch in zip(trainer.tokens("score"), trainer.batches, strict=True):
        unique = sum(len(key.tokens) for key in set(batch["prompt_keys"]))
        assert scored == unique + int(batch["completion_mask"].sum())


def test_masks_of_the_first_rollout(tmp_path):
    trainer = made(tmp_path, max_steps=1, learning_rate=0.0)
    trainer.train()
    rows = trainer.train_dataset
    assert same_masks(trainer.model, trainer.processing_class, rows, trainer.collect) >= 1


@pytest.mark.parametrize("another", [False, True], ids=["other weights", "another model"])
def test_an_engine_with_other_weights_stops_the_run(another, tmp_path):
    served = tiny_model(seed=3, layers=1)[0] if another else None
    trainer = made(tmp_path, synchronises=False, change=0.0 if another else 0.5, served=served)
    with pytest.raises(SegRLError, match=r"max_sampling_gap=0\.3: log-probabilities of the sampled tokens differ by"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_gap_that_is_allowed(tmp_path):
    trainer = made(tmp_path, synchronises=False, change=0.5, max_sampling_gap=None, max_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()
    assert trainer.state.global_step == 1


def test_a_stale_engine_is_warned_of_later(tmp_path):
    """Its first rollout is right, since nothing has been learned yet."""
    trainer = made(tmp_path, synchronises=False, max_sampling_gap=1e-3, learning_rate=1e-2)
    with pytest.warns(UserWarning, match="weights that were not synchronised"):
        trainer.train()
    assert trainer.state.global_step == 2
