"""`SegSFTTrainer`: TRL bit for bit without masks, the joint gradient, and the data it needs."""

from typing import Any

import numpy as np
import pytest
import torch
from builders import FAMILIES, add_head, sft_args, tiny_headed_model, tiny_model, tiny_rows, with_answers
from datasets import Dataset
from peft import LoraConfig
from trainer_checks import (
    Calls,
    Gradients,
    history,
    reference_dice_ce,
    reference_forward,
    reference_target,
    same,
    weights,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from segrl.errors import DataError, SegRLError
from segrl.heads import DenseLoss
from segrl.models import tiny_causal_lm
from segrl.trainers import SegSFTConfig, SegSFTTrainer

pytestmark = [
    # TRL's use of a name that transformers has renamed, and its word on a setting that still works.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning"),
]


def text_rows(n=8) -> Any:
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"Find lesion {number}."}] for number in range(n)],
            "completion": [[{"role": "assistant", "content": f"The cyst is at {number}."}] for number in range(n)],
        }
    )


class TestPlainTrl:
    """Without head and dense losses: the same logs and the same weights as TRL, exactly."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("kind", "settings"),
        [
            ("text", {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}),
            ("text", {"label_smoothing_factor": 0.1}),
            ("packed-text", {}),
            ("vision", {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}),
            ("vision", {"eval_strategy": "steps", "eval_steps": 2}),
            ("lora", {}),
        ],
        ids=["text-accumulated", "text-smoothing", "packed-text", "vision-accumulated", "vision-evaluation", "lora"],
    )
    def test_logs_and_weights(self, kind, settings, tmp_path):
        def run(trainer_class, config_class):
            text = kind in ("text", "packed-text")
            model, processor = tiny_causal_lm(hidden_size=64, vocab_size=640) if text else tiny_model()
            rows = text_rows(24) if text else tiny_rows(24, processor)
            packing = (
                {"packing": True, "packing_strategy": "wrapped", "max_length": 16} if kind == "packed-text" else {}
            )
            trainer = trainer_class(
                model,
                sft_args(tmp_path, config_class, max_steps=4, **settings, **packing),
                train_dataset=rows,
                eval_dataset=rows.select(range(4)),
                processing_class=processor,
                peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if kind == "lora" else None,
            )
            before = weights(trainer.model)
            trainer.train()
            return history(trainer), before, weights(trainer.model)

        plain_logs, before, plain = run(SFTTrainer, SFTConfig)
        logs, seg_before, ours = run(SegSFTTrainer, SegSFTConfig)
        assert logs == plain_logs
        assert same(before, seg_before)
        assert same(plain, ours)
        assert not same(before, ours)
        assert len([entry for entry in logs if "loss" in entry]) == 4

    @pytest.mark.parametrize("weight", [0.25, 3.0])
    def test_text_weight_scales_the_gradient(self, weight, tmp_path):
        def gradients(text_weight):
            model, processor = tiny_causal_lm(hidden_size=64, vocab_size=640)
            kept = Gradients()
            args = sft_args(tmp_path, max_steps=1, text_weight=text_weight, max_grad_norm=0.0)
            SegSFTTrainer(model, args, train_dataset=text_rows(), processing_class=processor, callbacks=[kept]).train()
            return kept.steps[0]

        one, scaled = gradients(1.0), gradients(weight)
        assert one.keys() == scaled.keys()
        for name in one:
            torch.testing.assert_close(scaled[name], weight * one[name], rtol=1e-4, atol=1e-6)
        assert any(gradient.abs().max() > 1e-4 for gradient in one.values())

    def test_trl_config_is_enough(self, tmp_path):
        model, processor = tiny_headed_model()
        trainer = SegSFTTrainer(
            model,
            sft_args(tmp_path, SFTConfig, max_steps=1),
            train_dataset=tiny_rows(4, processor),
            processing_class=processor,
            dense_losses=[DenseLoss("dice")],
        )
        trainer.train()
        assert "dense/dice" in trainer.state.log_history[0]


def reference_objective(model, processor, rows, micro, *, text_weight, dense_weight):
    """`text_weight * CE + dense_weight * DiceCE` of one optimiser step, row by row: (total, text, dense)."""
    tokenizer = processor.tokenizer
    ending = [tokenizer.eos_token_id, *tokenizer("\n")["input_ids"]]
    ids = [[*tokenizer(row["completion"][0]["content"])["input_ids"], *ending] for row in rows]
    text, dense = torch.zeros(()), torch.zeros(())
    for n, (row, completion) in enumerate(zip(rows, ids, strict=True)):
        log_probs, mask_logits = reference_forward(model, processor, row, completion)
        first = n // micro * micro
        # a model may refuse to weigh tokens across micro-batches (Qwen-VL does): then each counts the same
        counted = ids if getattr(model, "accepts_loss_kwargs", True) else ids[first : first + micro]
        share = sum(map(len, counted)) * (len(rows) // len(counted))
        text = text - log_probs.sum() / share
        if mask_logits is not None:
            target = reference_target(row, mask_logits.size(-1))
            dense = dense + reference_dice_ce(mask_logits, target) / len(rows)
    return text_weight * text + dense_weight * dense, text, dense


class TestJointGradient:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("family", "micro", "steps", "text_weight", "dense_weight", "freeze"),
        [
            ("qwen2_5_vl", 3, 2, 1.0, 1.0, True),
            ("llava", 2, 3, 0.5, 2.0, True),
            ("qwen3_vl", 3, 2, 1.0, 0.5, False),
        ],
    )
    def test_equals_the_slow_reference(self, family, micro, steps, text_weight, dense_weight, freeze, tmp_path):
        model, processor = tiny_headed_model(family, freeze_encoder=freeze)
        rows = tiny_rows(6, processor)
        texts = [row["completion"][0]["content"] for row in rows]
        texts[1], texts[4] = "<think>nothing</think>", "two <seg> of them <seg>, the last counts"
        rows = with_answers(rows, texts)
        kept = Gradients()
        args = sft_args(
            tmp_path,
            max_steps=1,
            max_grad_norm=0.0,
            learning_rate=0.0,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=steps,
            text_weight=text_weight,
            max_length=None,
            train_sampling_strategy="sequential",
        )
        trainer = SegSFTTrainer(
            model,
            args,
            train_dataset=rows,
            processing_class=processor,
            dense_losses=[DenseLoss("dice_ce", weight=dense_weight)],
            callbacks=[kept],
        )
        trainer.train()
        total, text, dense = reference_objective(
            model, processor, list(rows), micro, text_weight=text_weight, dense_weight=dense_weight
        )
        model.zero_grad()
        total.backward()
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.requires_grad}
        (gradients,) = kept.steps
        for name, gradient in gradients.items():
            reference = expected.get(name, torch.zeros_like(gradient))
            torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert expected.keys() <= gradients.keys()
        assert any(n.startswith("mask_head.segmenter.sam.image_encoder.") for n in expected) is not freeze
        assert expected["mask_head.adapter.projection.weight"].abs().max() > 1e-4

        log = trainer.state.log_history[0]
        assert log["loss"] == pytest.approx(total.item(), abs=1e-5)
        assert log["text"] == pytest.approx(text.item(), abs=1e-5)
        assert log["text_weighted"] == pytest.approx(text_weight * text.item(), abs=1e-5)
        assert log["dense/dice_ce"] == pytest.approx(dense.item(), abs=1e-5)
        assert log["dense/dice_ce_weighted"] == pytest.approx(dense_weight * dense.item(), abs=1e-5)

    def test_seg_in_the_prompt_is_not_the_answers(self, tmp_path):
        model, processor = tiny_headed_model()
        rows = with_answers(tiny_rows(4, processor), ["<think>nothing</think>"])
        asked = [[{"role": "user", "content": "End with <seg>."}]] * len(rows)
        rows = rows.remove_columns("prompt").add_column("prompt", asked)
        before = weights(model.mask_head)
        trainer = SegSFTTrainer(
            model,
            sft_args(tmp_path, max_steps=1),
            train_dataset=rows,
            processing_class=processor,
            dense_losses=[DenseLoss("dice_ce")],
        )
        trainer.train()
        assert trainer.state.log_history[0]["dense/dice_ce"] == 0.0
        assert same(before, weights(model.mask_head))

    def test_one_backbone_forward_a_micro_batch(self, tmp_path):
        model, processor = tiny_headed_model()
        trainer = SegSFTTrainer(
            model,
            sft_args(tmp_path, gradient_accumulation_steps=2),
            train_dataset=tiny_rows(16, processor),
            processing_class=processor,
            dense_losses=[DenseLoss("dice_ce")],
        )
        backbone, encoder = Calls(model.model), Calls(model.mask_head.segmenter.sam.image_encoder)
        trainer.train()
        assert backbone.rows == [4] * 4
        assert encoder.rows == [1] * 16  # one by one on a CPU


class TestTraining:
    @pytest.mark.slow
    @pytest.mark.parametrize("family", FAMILIES)
    def test_families_learn(self, family, tmp_path):
        model, processor = tiny_headed_model(family)
        rows = tiny_rows(4, processor)
        before = weights(model)
        trainer = SegSFTTrainer(
            model,
            sft_args(tmp_path, max_steps=6, learning_rate=5e-3, lr_scheduler_type="constant"),
            train_dataset=rows,
            processing_class=processor,
            dense_losses=[DenseLoss("dice_ce")],
        )
        trainer.train()
        logs = trainer.state.log_history
        changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
        assert any(name.startswith("mask_head.adapter.") for name in changed)
        assert any(name.startswith("mask_head.segmenter.sam.sam_mask_decoder.") for name in changed)
        assert any("language_model.layers.0." in name for name in changed)
        assert any("vis" in name and not name.startswith("mask_head") for name in changed)
        assert not any(name.startswith("mask_head.segmenter.sam.image_encoder.") for name in changed)
        for name in ("text", "dense/dice_ce"):
            assert logs[5][name] < logs[0][name]
            assert logs[0][f"{name}_weighted"] == logs[0][name]
        assert 0 <= logs[0]["mask/dice"] <= 1

    def test_several_named_terms(self, tmp_path):
        model, processor = tiny_headed_model()

        def foreground(logits, target):
            return (logits.sigmoid().mean((1, 2)) - target.mean((1, 2))).abs()

        terms = [DenseLoss("dice", 0.5), DenseLoss("focal", 2.0), DenseLoss("area", 0.0, foreground)]
        trainer = SegSFTTrainer(
            model,
            sft_args(tmp_path, max_steps=1),
            train_dataset=tiny_rows(4, processor),
            processing_class=processor,
            dense_losses=terms,
        )
        trainer.train()
        log = trainer.state.log_history[0]
        total = log["text"] + 0.5 * log["dense/dice"] + 2 * log["dense/focal"]
        assert log["loss"] == pytest.approx(total, abs=1e-5)
        assert log["dense/area"] > 0
        assert log["dense/area_weighted"] == 0.0

    def test_head_has_a_learning_rate_of_its_own(self, tmp_path):
        model, processor = tiny_headed_model()
        before = weights(model)
        trainer = SegSFTTrainer(
            model,
            sft_args(tmp_path, max_steps=1, head_learning_rate=1e-2, learning_rate=0.0, weight_decay=0.1),
            train_dataset=tiny_rows(4, processor),
            processing_class=processor,
            dense_losses=[DenseLoss("dice_ce")],
        )
        trainer.train()
        changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
        assert changed
        assert all(name.startswith("mask_head.") for name in changed)
        optimizer: Any = trainer.optimizer
        params = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(params) == len({id(p) for p in params}) == sum(p.requires_grad for p in model.parameters())

    @pytest.mark.long
    @pytest.mark.parametrize(
        "settings",
        [
            {"eval_strategy": "steps", "eval_steps": 1},
            {"activation_checkpointing": True},
            {"dataloader_num_workers": 1},
            {"label_smoothing_factor": 0.1},
            {"completion_only_loss": False},
            {"remove_unused_columns": False},
            {"loss_type": "dft"},
        ],
        ids=lambda settings: next(iter(settings)),
    )
    def test_settings_of_trl_with_dense_losses(self, settings, tmp_path):
        model, processor = tiny_headed_model()
        rows = tiny_rows(8, processor)
        trainer = SegSFTTrainer(
            model,
            sft_args(tmp_path, **settings),
            train_dataset=rows,
            eval_dataset=rows.select(range(4)),
            processing_class=processor,
            dense_losses=[DenseLoss("dice_ce")],
        )
        trainer.train()
        train = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(train) == 2
        for entry in train:
            assert entry["loss"] == pytest.approx(entry["text"] + entry["dense/dice_ce"], abs=1e-4)
        if "eval_strategy" in settings:
            log = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
            assert log["eval_loss"] == pytest.approx(log["eval_text"] + log["eval_dense/dice_ce"], abs=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize("layout", ["images", "messages", "stream"])
    def test_layouts_of_the_data(self, layout, tmp_path):
        model, processor = tiny_headed_model()
        rows = tiny_rows(8, processor)
        if layout == "images":
            rows = rows.map(lambda row: {"images": [row["image"]]}, remove_columns="image")
        elif layout == "messages":
            messages = [row["prompt"] + row["completion"] for row in rows]
            rows = rows.remove_columns(["prompt", "completion"]).add_column("messages", messages)
        else:
            rows = rows.to_iterable_dataset()
        trainer = SegSFTTrainer(
            model,
            sft_args(tmp_path),
            train_dataset=rows,
            processing_class=processor,
            dense_losses=[DenseLoss("dice_ce")],
        )
        trainer.train()
        assert trainer.state.log_history[0]["dense/dice_ce"] > 0

    def test_lora_with_a_head(self, tmp_path):
        model, processor = tiny_headed_model()
        trainer = SegSFTTrainer(
            model,
            sft_args(tmp_path),
            train_dataset=tiny_rows(8, processor),
            processing_class=processor,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
            dense_losses=[DenseLoss("dice_ce")],
        )
        before = weights(trainer.model)
        trainer.train()
        changed = {n for n, value in weights(trainer.model).items() if not torch.equal(value, before[n])}
        assert all("lora_" in name or "mask_head." in name for name in changed)
        assert any("lora_B" in name for name in changed)
        assert any("mask_head.adapter." in name for name in changed)
        assert not any("lora_" in name for name in changed if "mask_head." in name)


class TestBadInput:
    def test_dense_losses_without_a_head(self, tmp_path):
        model, processor = tiny_model()
        with pytest.raises(SegRLError, match="no mask head; call attach_mask_head"):
            SegSFTTrainer(
                model,
                sft_args(tmp_path),
                train_dataset=tiny_rows(4, processor),
                processing_class=processor,
                dense_losses=[DenseLoss("dice_ce")],
            )

    def test_dense_losses_need_a_model_object(self, tmp_path):
        _, processor = tiny_model()
        with pytest.raises(SegRLError, match="no mask head"):
            SegSFTTrainer(
                "some/model",
                sft_args(tmp_path),
                train_dataset=tiny_rows(4, processor),
                processing_class=processor,
                dense_losses=[DenseLoss("dice_ce")],
            )

    @pytest.mark.parametrize("setting", ["packing", "padding_free"])
    def test_packing_with_dense_losses(self, setting, tmp_path):
        model, processor = tiny_headed_model()
        with pytest.raises(SegRLError, match="set packing=False and padding_free=False"):
            SegSFTTrainer(
                model,
                sft_args(tmp_path, **{setting: True}),
                train_dataset=tiny_rows(4, processor),
                processing_class=processor,
                dense_losses=[DenseLoss("dice_ce")],
            )

    @pytest.mark.parametrize("where", ["train_dataset", "eval_dataset", "named"])
    def test_missing_mask_column_is_seen_before_training(self, where, tmp_path):
        model, processor = tiny_headed_model()
        rows = tiny_rows(4, processor)
        bare = rows.remove_columns("mask")
        sets = {"train_dataset": rows, "eval_dataset": rows}
        sets |= {"eval_dataset": {"far": rows, "near": bare}} if where == "named" else {where: bare}
        expected = r"eval_dataset\['near'\]" if where == "named" else where
        with pytest.raises(DataError, match=rf"{expected}: no column \['mask'\]"):
            SegSFTTrainer(
                model,
                sft_args(tmp_path),
                processing_class=processor,
                dense_losses=[DenseLoss("dice_ce")],
                **sets,
            )

    def test_bad_mask_names_its_row(self, tmp_path):
        model, processor = tiny_headed_model()
        rows = list(tiny_rows(4, processor))
        rows[2]["mask"] = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % 5
        with pytest.raises(DataError, match=rows[2]["name"]):
            SegSFTTrainer(
                model,
                sft_args(tmp_path, max_steps=1),
                train_dataset=Dataset.from_list([{**row, "mask": np.asarray(row["mask"]).tolist()} for row in rows]),
                processing_class=processor,
                dense_losses=[DenseLoss("dice_ce")],
            ).train()

    def test_failed_construction_keeps_the_head(self, tmp_path):
        model, processor = tiny_headed_model()
        head = model.mask_head
        with pytest.raises(TypeError):
            SegSFTTrainer(model, sft_args(tmp_path), no_such_argument=1, dense_losses=[DenseLoss("dice_ce")])
        assert model.mask_head is head
        with pytest.raises(SegRLError, match="already has a mask head"):
            add_head(model, processor)
