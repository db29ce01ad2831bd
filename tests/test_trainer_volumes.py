"""Training on volumes: TRL's path of several images, masks by a frozen segmenter, and how often it encodes a slice."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from builders import grpo_args, seg_bias, sft_args, tiny_model, tiny_segmenter
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from trainer_checks import Collect, history, same, weights, written_rollout
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from volume_builders import blocks, row_of

from segrl.caching import FeatureCache
from segrl.data import make_synthetic_volumes, prepare_volumes
from segrl.errors import DataError, SegRLError, UnknownNameError
from segrl.models import tiny_causal_lm
from segrl.predictions import VolumePromptSettings
from segrl.rewards import make_reward, weighted_sum
from segrl.scoring import score_file
from segrl.segmenters import PropagationRequest, VolumePropagator
from segrl.tasks import VolumeTask
from segrl.trainers import SegGRPOTrainer, SegSFTConfig, SegSFTTrainer

pytestmark = [
    # TRL's word on rollout functions, and its use of names that transformers has renamed.
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func'"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning"),
]
SHOWN = VolumePromptSettings(slices=4, size=32, frame_kind="original_px", instruction="Answer.")
MASK = blocks([0, 9, 9, 9, 9, 9, 9, 0])  # boxes 5, 2, 13, 3 and 7, 10, 8, 11 on its slices; 0, 2, 5, 7 are shown
NEAR, FAR = [4, 1, 14, 5], [25, 15, 36, 22]


def model_of(family="qwen3_vl", **settings):
    return tiny_model(family, min_pixels=32 * 32, max_pixels=32 * 32, **settings)


def text(number, *boxes):
    return f'<think>a</think><answer>{{"slice": {number}, "bbox_2d_list": {[list(box) for box in boxes]}}}</answer>'


def prepared(rows, completions=False, brief=False, **settings) -> Any:
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return prepare_volumes(dataset, None, replace(SHOWN, **settings), completions=completions, brief=brief)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    return make_synthetic_volumes(4, tmp_path_factory.mktemp("volumes"), depth=8, size=32)


@pytest.fixture
def one(tmp_path):
    return prepared([row_of(tmp_path, MASK)])


def propagator(reach: int | None = 2, **settings):
    return VolumePropagator(tiny_segmenter(), reach=reach, **settings)


def rewards(delta=2) -> list[Any]:
    return ["slice_format", "slice_visibility", "slice_boxes", make_reward("propagated_dice", delta=delta)]


class Keeping(SegGRPOTrainer):
    """Keeps what goes to the loss."""

    outputs: list[dict[str, Any]]

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.outputs = [*getattr(self, "outputs", []), output]
        return output


def trainer_of(rows, reward_funcs, folder, *, model=None, kind: Any = SegGRPOTrainer, texts=None, **settings) -> Any:
    names = ("propagator", "peft_config", "eval_dataset", "prompt_settings")
    extra = {name: settings.pop(name) for name in names if name in settings}
    if texts is not None:
        extra["rollout_func"] = written_rollout(texts)
    model, processor = model or model_of()
    args = grpo_args(folder, **settings)
    extra.setdefault("prompt_settings", SHOWN)
    return kind(model, reward_funcs, args, train_dataset=rows, processing_class=processor, **extra)


class TestPicturesInPrompts:
    @pytest.mark.slow
    @pytest.mark.parametrize("share", [True, False])
    @pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
    def test_every_picture_after_its_number_in_order(self, family, share, synthetic, tmp_path):
        """Two volumes, of which four and two slices are shown, in one batch."""
        flat = row_of(tmp_path, blocks([4, 9], 32, 32), "flat")
        rows = prepared([*synthetic.select([0]), flat])
        model, processor = tiny_model(family)
        trainer = trainer_of(
            rows,
            ["slice_visibility"],
            tmp_path / "run",
            model=(model, processor),
            kind=Keeping,
            share_prompt=share,
            max_steps=1,
            per_device_train_batch_size=8,
            generation_kwargs=seg_bias(processor),
        )
        trainer.train()
        (output,) = trainer.outputs
        decoded = processor.tokenizer.batch_decode(output["prompt_ids"], skip_special_tokens=False)
        assert sorted(output["num_images"]) == [2] * 4 + [4] * 4
        expected = {4: rows[0], 2: rows[1]}
        pictures = []
        for prompt, count in zip(decoded, output["num_images"], strict=True):
            parts = re.findall(r"<slice (\d+)><\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>", prompt)
            assert parts == [str(n + 1) for n in range(count)]
            assert prompt.count("<|vision_start|>") == count
            assert expected[count]["query"] in prompt
            pictures += expected[count]["images"]
        seen = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        assert torch.equal(output["pixel_values"].float(), seen.float())

    @pytest.mark.long
    def test_sharing_changes_nothing(self, synthetic, tmp_path):
        logs = []
        for share in (True, False):
            torch.manual_seed(0)
            model, processor = model_of()
            trainer = trainer_of(
                prepared(synthetic),
                rewards(),
                tmp_path / str(share),
                model=(model, processor),
                propagator=propagator(),
                share_prompt=share,
                texts=[text(2, NEAR), text(3, NEAR, FAR), text(1), "nothing"],
                per_device_train_batch_size=8,
            )
            trainer.train()
            logs.append([{k: v for k, v in entry.items() if isinstance(v, float)} for entry in history(trainer)])
        assert len(logs[0]) == 3
        for shared, plain in zip(*logs, strict=True):
            names = [name for name in plain if not name.startswith("share")]
            assert {n: shared[n] for n in names} == {n: pytest.approx(plain[n], rel=1e-3, abs=1e-5) for n in names}


class TestSft:
    @pytest.mark.slow
    @pytest.mark.parametrize(("kind", "config"), [(SegSFTTrainer, SegSFTConfig), (SFTTrainer, SFTConfig)])
    def test_trains_on_prepared_rows_of_different_depth(self, kind, config, synthetic, tmp_path):
        flat = row_of(tmp_path, blocks([4, 9], 32, 32), "flat")
        rows = prepared([*synthetic, flat], completions=True, brief=True)
        model, processor = model_of()
        before = weights(model)
        trainer = kind(
            model,
            sft_args(tmp_path / "run", config, per_device_train_batch_size=5, max_length=None, max_steps=3),
            train_dataset=rows,
            processing_class=processor,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["pixel_values"].shape[0] == (4 * 4 + 2) * 4  # slices, and patches of 16 px in 32 px
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            learnt = processor.tokenizer.decode(ids[labels != -100])
            assert learnt.startswith("<think>")
            assert re.search(r'<answer>\{"slice": \d, "bbox_2d_list": \[\[\d', learnt)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        assert not same(weights(model), before)


@pytest.mark.slow
def test_rows_without_a_target_train(tmp_path):
    """Beside a row with one: both stages take the two, and the answer that there is nothing has every reward."""
    rows = [row_of(tmp_path, blocks([0] * 8), "none"), row_of(tmp_path, MASK, "some")]
    model, processor = model_of()
    settings = {"per_device_train_batch_size": 2, "max_length": None, "max_steps": 1}
    trainer: Any = SegSFTTrainer(
        model,
        sft_args(tmp_path / "sft", SegSFTConfig, **settings),
        train_dataset=prepared(rows, completions=True, brief=True),
        processing_class=processor,
    )
    trainer.train()
    assert np.isfinite(trainer.state.log_history[0]["loss"])
    collect = Collect()
    trainer = trainer_of(
        prepared(rows),
        [*rewards(), collect],
        tmp_path / "grpo",
        model=(model, processor),
        propagator=propagator(),
        texts=[text(2, NEAR), "<think>a</think><answer>{}</answer>"] * 2,
        max_steps=1,
        per_device_train_batch_size=8,
    )
    trainer.train()
    seen = [pair for call in collect.calls for pair in zip(call["prediction"], call["target"], strict=True)]
    assert {target.empty for _, target in seen} == {True, False}
    for prediction, target in seen:
        said_none = prediction.slice_index is None
        for reward in map(make_reward, rewards()[1:]):
            score = float(reward.score(prediction, target) or 0)
            assert score == float(said_none) if target.empty else score < 1 or not said_none


class TestGrpo:
    @pytest.mark.slow
    @pytest.mark.parametrize("settings", [{}, {"checkpointing": True}, {"peft": True}, {"kept": True}])
    def test_trains_and_leaves_the_segmenter_as_it_was(self, settings, synthetic, tmp_path):
        model, processor = model_of()
        frozen = propagator(cache=FeatureCache() if settings.get("kept") else None)
        before, language = weights(frozen.segmenter), weights(model)
        extra: dict[str, Any] = {}
        if settings.get("checkpointing"):
            extra = {"gradient_checkpointing": True}
        if settings.get("peft"):
            extra = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "beta": 0.01}
        collect = Collect()
        trainer = trainer_of(
            prepared(synthetic),
            [*rewards(), collect],
            tmp_path,
            model=(model, processor),
            propagator=frozen,
            texts=[text(2, [8, 8, 20, 20]), text(3, [4, 4, 24, 24]), text(1), text(9, NEAR)],
            prompt_boxes="all",
            **extra,
        )
        trainable = {id(parameter) for parameter in frozen.segmenter.parameters()}
        trainer.train()
        assert not any(id(p) in trainable for group in trainer.optimizer.param_groups for p in group["params"])
        assert same(weights(frozen.segmenter), before)
        assert all(parameter.grad is None for parameter in frozen.segmenter.parameters())
        trained = weights(trainer.model)
        if not settings.get("peft"):
            assert not same(trained, language)
        masks = collect.joined("prediction")
        assert len(masks) == 8
        assert [prediction.mask.shape for prediction in masks] == [(8, 32, 32)] * 8
        named = [prediction.slice_index for prediction in masks]
        assert named == [2, 5, 0, -1] * 2
        for prediction in masks[2::4] + masks[3::4]:
            assert not prediction.mask.any()
        entry = trainer.state.log_history[0]
        assert entry["rollout/valid"] == 1.0
        for name in ("slice_format", "slice_visibility", "slice_boxes", "propagated_dice"):
            assert f"rewards/{name}/mean" in entry
        assert entry["rewards/slice_format/mean"] == 0.75  # a slice without boxes is not the format

    def test_what_a_random_model_writes(self, synthetic, tmp_path):
        model, processor = model_of()
        trainer = trainer_of(
            prepared(synthetic),
            rewards(),
            tmp_path,
            model=(model, processor),
            propagator=propagator(),
            generation_kwargs=seg_bias(processor),
        )
        trainer.train()
        assert trainer.state.global_step == 2
        assert trainer.state.log_history[0]["rollout/encoded_slices"] == 0

    def test_each_slice_within_reach_is_encoded_once(self, one, tmp_path):
        """Answers name slices 0, 2, 5 and none, one slice each way: 0 to 6, whatever the number of answers."""
        frozen = propagator(reach=1)
        trainer = trainer_of(
            one,
            rewards(delta=1),
            tmp_path,
            propagator=frozen,
            prompt_boxes="all",
            texts=[
                text(1, NEAR),
                text(2, FAR),
                text(3, NEAR, FAR),
                text(3, FAR),
                text(2, NEAR),
                text(9, NEAR),
                "",
                text(2),
            ],
            per_device_train_batch_size=8,
            num_generations=8,
        )
        trainer.train()
        assert [entry["rollout/encoded_slices"] for entry in trainer.state.log_history[:2]] == [7.0, 7.0]
        assert frozen.encoded_slices == 14

    def test_features_that_are_kept_serve_the_next_step(self, one, tmp_path):
        frozen = propagator(reach=1, cache=FeatureCache())
        trainer = trainer_of(
            one, rewards(delta=1), tmp_path, propagator=frozen, prompt_boxes="all", texts=[text(1, NEAR), text(3, NEAR)]
        )
        trainer.train()
        assert [entry["rollout/encoded_slices"] for entry in trainer.state.log_history[:2]] == [5.0, 0.0]

    @pytest.mark.slow
    def test_two_volumes_in_a_batch(self, tmp_path):
        masks = {"one": MASK, "other": blocks([0, 0, 12], 32, 20)}
        rows = prepared([row_of(tmp_path, mask, name) for name, mask in masks.items()])
        frozen, collect = propagator(reach=None), Collect()
        trainer = trainer_of(
            rows,
            [*rewards(), collect],
            tmp_path / "run",
            propagator=frozen,
            prompt_boxes="all",
            texts=[text(3, NEAR), text(3, NEAR), text(2, NEAR), text(1)],
            per_device_train_batch_size=8,
            max_steps=1,
        )
        trainer.train()
        read = dict(zip(masks, VolumeTask(None, SHOWN).read(rows), strict=True))
        assert set(collect.joined("name")) == {"one", "other"}
        for name, prediction, target in zip(*map(collect.joined, ("name", "prediction", "target")), strict=True):
            row = read[name]
            assert np.array_equal(target.mask, masks[name])
            expected = np.zeros_like(target.mask)
            if len(prediction.boxes):
                request = PropagationRequest(row.case.grey, "", prediction.slice_index, prediction.boxes)
                expected = propagator(reach=None)([request])[0]
            assert np.array_equal(prediction.mask, expected)
        assert trainer.state.log_history[0]["rollout/encoded_slices"] == 8 + 3

    @pytest.mark.slow
    def test_matched_boxes_or_all(self, one, tmp_path):
        grey = VolumeTask(None, SHOWN).read(one)[0].case.grey

        def expected(index, *boxes):
            return propagator()([PropagationRequest(grey, "", index, np.array(boxes, dtype=float).reshape(-1, 4))])[0]

        for kind, boxes in {"matched": [[NEAR], []], "all": [[NEAR, FAR], [FAR]]}.items():
            collect = Collect()
            trainer_of(
                one,
                [*rewards(), collect],
                tmp_path / kind,
                propagator=propagator(),
                texts=[text(2, FAR, NEAR), text(3, FAR)],
                max_steps=1,
                **({} if kind == "matched" else {"prompt_boxes": kind}),
            ).train()
            both, far = collect.joined("prediction")[:2]
            assert np.array_equal(both.mask, expected(2, *boxes[0]))
            assert np.array_equal(far.mask, expected(5, *boxes[1]))
            assert both.mask.any()

    def test_rewards_see_the_slice_of_the_volume_and_not_its_number(self, one, tmp_path):
        collect = Collect()
        trainer = trainer_of(
            one, ["slice_visibility", collect], tmp_path, texts=[text(1), text(2), text(3), text(4)], max_steps=1
        )
        trainer.train()
        assert [prediction.slice_index for prediction in collect.joined("prediction")] == [0, 2, 5, 7]
        assert all(prediction.mask is None for prediction in collect.joined("prediction"))
        assert trainer.state.log_history[0]["rewards/slice_visibility/mean"] == 0.5

    def test_the_first_log_says_what_is_invalid_and_why(self, one, tmp_path, capsys):
        fenced = text(2, NEAR).replace("<answer>", "<answer>```json\n").replace("</answer>", "\n```</answer>")
        hidden = text(2).replace("[]}", '[], "box": [4, 1, 14, 5]}')
        collect = Collect()
        texts = [fenced + "</s>", hidden, text(2).replace("<think>a", "<think>\u200b"), text(2)]
        trainer = trainer_of(one, ["slice_format", collect], tmp_path, texts=texts, max_steps=1)
        trainer.train()
        kinds = [prediction.status.value for prediction in collect.joined("prediction")]
        assert kinds == ["valid", "malformed_json", "no_reasoning", "valid"]
        assert trainer.state.log_history[0]["rewards/slice_format/mean"] == 0.25
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("first rollouts")]
        assert line.startswith("first rollouts: 2 of 4 answers are invalid (50.0 %): 1 malformed_json (")

    def test_a_function_of_the_user_alone(self, one, tmp_path):
        """No segrl reward says how answers are read: with a propagator they are JSON that names a slice."""
        collect = Collect()
        trainer_of(
            one, collect, tmp_path, propagator=propagator(), prompt_boxes="all", texts=[text(2, NEAR)], max_steps=1
        ).train()
        first = collect.joined("prediction")[0]
        assert (first.valid, first.slice_index, first.boxes.tolist()) == (True, 2, [NEAR])
        assert first.mask.any()

    def test_evaluation(self, synthetic, tmp_path):
        rows = prepared(synthetic)
        trainer = trainer_of(
            rows.select([0]),
            rewards(),
            tmp_path,
            propagator=propagator(),
            eval_dataset=rows.select([1]),
            texts=[text(2, NEAR), text(3, NEAR)],
            eval_strategy="steps",
            eval_steps=1,
            max_steps=1,
        )
        trainer.train()
        logged = next(entry for entry in trainer.state.log_history if "eval_reward" in entry)
        assert logged["eval_rollout/valid"] == 1.0
        assert "eval_rewards/propagated_dice/mean" in logged

    @pytest.mark.filterwarnings("ignore::DeprecationWarning:rich")
    def test_what_is_written_is_scored_again(self, synthetic, tmp_path):
        trainer = trainer_of(
            prepared(synthetic),
            rewards(),
            tmp_path,
            propagator=propagator(),
            prompt_boxes="all",
            texts=[text(2, [8, 8, 20, 20]), text(3, [4, 4, 24, 24]), text(1), "nothing"],
            log_completions=True,
            max_steps=1,
        )
        trainer.train()
        entry = trainer.state.log_history[0]
        (file,) = (tmp_path / "completions").glob("predictions_*.jsonl")
        for reward in map(make_reward, rewards()):
            scores = score_file(reward, file)
            assert len(scores.rows) == 4
            found = np.mean(scores.columns[reward.name])  # type: ignore[arg-type]
            assert found == pytest.approx(entry[f"rewards/{reward.name}/mean"], abs=1e-6)


class TestErrors:
    def refuse(self, rows, reward_funcs, folder, message, error=SegRLError, **settings):
        with pytest.raises(error, match=message):
            trainer_of(rows, reward_funcs, folder, **settings)

    def test_no_propagator(self, one, tmp_path):
        message = r"reward 'propagated_dice' reads masks; pass propagator=VolumePropagator\(segmenter\)"
        self.refuse(one, rewards(), tmp_path, message)
        self.refuse(one, ["medvol_r1"], tmp_path, "reward 'medvol_r1' reads masks; pass")

    @pytest.mark.parametrize(
        "reward",
        [
            lambda: make_reward("propagated_dice", delta=7),
            lambda: weighted_sum([("slice_boxes", 1.0), (make_reward("propagated_dice", delta=7), 0.5)], name="both"),
            lambda: weighted_sum([(make_reward("propagated_dice", delta=7), 0.5)], name="both").clip(0, 1),
            lambda: make_reward("slice_boxes").gate(make_reward("propagated_dice", delta=7)),
            lambda: make_reward("propagated_dice", delta=7).gate("slice_format"),
        ],
    )
    def test_further_than_the_reach(self, reward, one, tmp_path):
        message = r"reads masks up to 7 slices from the named one, .* goes reach=2 slices; pass .*reach=7\)"
        self.refuse(one, [reward()], tmp_path, message, propagator=propagator())
        for reach in (7, None):
            trainer_of(one, [reward()], tmp_path, propagator=propagator(reach))

    def test_rewards_of_images_beside_those_of_volumes(self, one, tmp_path):
        message = r"reward 'box_f1' reads the ground truth of an image, and the rows are volumes; train with rewards of"
        self.refuse(one, ["slice_boxes", "box_f1"], tmp_path, message)
        self.refuse(one, ["box_f1"], tmp_path, message, propagator=propagator())

    def test_boxes_that_prompt(self, one, tmp_path):
        message = "unknown prompt_boxes 'any'; .*Known: all, matched"
        self.refuse(one, ["slice_boxes"], tmp_path, message, UnknownNameError, prompt_boxes="any")

    def test_columns(self, one, tmp_path):
        message = r"train_dataset: no column \['intensity', 'scan'\]"
        self.refuse(one.remove_columns(["scan", "intensity"]), ["slice_boxes"], tmp_path, message, DataError)
        bad = one.remove_columns("slices")
        message = r"eval_dataset: no column \['slices'\]"
        self.refuse(one, ["slice_boxes"], tmp_path, message, DataError, eval_dataset=bad, eval_strategy="steps")

    def test_a_row_without_label(self, one, tmp_path):
        rows = concatenate_datasets([one.remove_columns("label").add_column("label", [""])])
        trainer = trainer_of(rows, ["slice_boxes"], tmp_path, texts=[text(1)])
        with pytest.raises(DataError, match=r"one: no value for \['label'\]"):
            trainer.train()


class TestPlainTrl:
    def run(self, rows, folder, texts):
        model, tokenizer = tiny_causal_lm(hidden_size=64, vocab_size=640)
        trainer = GRPOTrainer(
            model,
            make_reward("slice_visibility"),
            grpo_args(folder, GRPOConfig, max_steps=1),
            train_dataset=rows,
            processing_class=tokenizer,
            rollout_func=written_rollout(texts),
        )
        trainer.train()
        return trainer.state.log_history[0]["rewards/slice_visibility/mean"]

    def test_a_column_with_the_volume_is_enough(self, tmp_path):
        prompt = [{"role": "user", "content": "Where?"}]
        rows = Dataset.from_list([{"prompt": prompt, "volume": blocks([0, 2, 4, 8]).astype(np.uint8).tolist()}] * 2)
        assert self.run(rows, tmp_path, [text(1), text(2), text(3), text(4)]) == pytest.approx((0 + 2 + 4 + 8) / 8 / 4)

    def test_the_slices_that_were_shown_are_read(self, tmp_path):
        prompt = [{"role": "user", "content": "Where?"}]
        row = {"prompt": prompt, "volume": blocks([0, 2, 4, 8]).astype(np.uint8).tolist(), "slices": [0, 3]}
        assert self.run(Dataset.from_list([row] * 2), tmp_path, [text(1), text(2), text(3), text(4)]) == 1 / 4
