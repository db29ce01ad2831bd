"""LoRA in the precision of its layers: PEFT's values, without its casts, in any way of changing the matrices."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from builders import sft_args
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from sharing_checks import build, make_trainer
from sharing_runs import run, same_runs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_checks import history, same, text_rows, weights
from transformers import TrainerCallback

from segrl.models import language_model_lora
from segrl.models.lora_layers import FusedLoraLinear, forget_copies, fuse_lora
from segrl.trainers import SegSFTTrainer
from segrl.trainers.checkpoints import newest_checkpoint

# torch's compiler reads the gradient of its inputs while it traces
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

LORA = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.0}


class Stack(nn.Module):
    """Two layers, with and without bias, whose LoRA matrices are not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 24), nn.Linear(24, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


def stack(dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> tuple[Any, Any]:
    """The same adapted layers twice: PEFT's, and fused."""
    torch.manual_seed(seed)
    model = get_peft_model(Stack().to(dtype), LoraConfig(**{"target_modules": ["one", "two"], **LORA, **settings}))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.3)
    other = copy.deepcopy(model)
    assert fuse_lora(other) is None
    return model, other


def passed(model: Any, x: torch.Tensor, *, autocast: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Output and all gradients of a weighted sum."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(x)
    (output.float() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert x.grad is not None
    return {"output": output.detach(), "x": x.grad, **gradients}


class Operations(TorchDispatchMode):
    """Operations that compute, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


class TestValues:
    @given(
        shape=st.lists(st.integers(1, 4), max_size=3),
        dropout=st.sampled_from([0.0, 0.4]),
        training=st.booleans(),
        seed=st.integers(0, 99),
        rslora=st.booleans(),
    )
    def test_equal_to_peft(self, shape, dropout, training, seed, rslora):
        ours = [model.train(training) for model in stack(seed=seed, lora_dropout=dropout, use_rslora=rslora)]
        x = torch.randn(*shape, 16)
        results = [passed(model, x, seed=seed) for model in ours]
        assert results[0].keys() == results[1].keys()
        assert len(results[0]) == 6
        for name, value in results[0].items():
            difference = (results[1][name] - value).abs().max().item() if value.numel() else 0.0
            assert difference <= 1e-5 * max(1.0, value.abs().max().item()), name  # sums of up to 64 products

    def test_no_rows(self):
        plain, fused = stack()
        for one, other in zip(
            passed(plain, torch.ones(0, 16)).values(), passed(fused, torch.ones(0, 16)).values(), strict=True
        ):
            assert torch.equal(one, other)

    def test_half_precision_is_no_further_from_the_truth(self):
        """Against float64: in bfloat16, under autocast as the trainers run it and without, over 20 draws."""
        bounds = {"autocast": 1.15, "plain": 2.0}  # without autocast PEFT's matrices are in float32
        errors = {name: [0.0, 0.0] for name in bounds}
        for seed in range(20):
            models = stack(torch.bfloat16, seed=seed)
            x = torch.randn(12, 16).bfloat16()
            truth = passed(copy.deepcopy(models[0]).double(), x.double())
            for name in errors:
                for n, model in enumerate(models):
                    found = passed(model, x, autocast=name == "autocast")
                    errors[name][n] += sum(((found[k] - v).norm() / v.norm()).item() for k, v in truth.items())
                    assert all(value.grad is None or value.grad.dtype == value.dtype for value in model.parameters())
        for name, (peft, ours) in errors.items():
            assert 0 < ours < bounds[name] * peft, (name, ours / peft)

    @pytest.mark.parametrize("dropout", [0.0, 0.1])
    def test_two_operations_a_layer_and_no_casts(self, dropout):
        counted, x = [], torch.ones(3, 16).bfloat16()
        for model in (*stack(torch.bfloat16, lora_dropout=dropout), Stack().bfloat16()):
            passed(model.train(), x, autocast=True)  # which makes the copies
            with torch.autocast("cpu", torch.bfloat16), Operations() as operations:
                model(x)
            counted.append(operations.counts)
        peft, ours, bare = counted
        assert ours["_to_copy"] == bare["_to_copy"] == 0
        assert peft["_to_copy"] == 2 * 4  # of the input, A, B and the output
        mask = 4 if dropout else 0  # operations of a dropout
        assert ours.total() - bare.total() == 2 * (2 + mask)
        assert peft.total() - bare.total() == 2 * (8 + mask)


class TestOtherCalls:
    """Calls other than the usual one are PEFT's."""

    def check(self, plain: Any, fused: Any, **settings: Any) -> None:
        x = torch.randn(5, 16)
        for name, value in passed(plain, x, **settings).items():
            torch.testing.assert_close(passed(fused, x, **settings)[name], value, rtol=1e-5, atol=1e-5)

    def test_adapters_off_and_on_again(self):
        plain, fused = stack()
        x = torch.randn(5, 16)
        with plain.disable_adapter(), fused.disable_adapter():
            assert torch.equal(plain(x), fused(x))
        self.check(plain, fused)

    def test_merged_and_back(self):
        plain, fused = stack()
        x = torch.randn(5, 16)
        before = fused(x)
        for model in (plain, fused):
            model.merge_adapter()
        assert torch.equal(plain(x), fused(x))
        for model in (plain, fused):
            model.unmerge_adapter()
        torch.testing.assert_close(fused(x), before, rtol=1e-4, atol=1e-5)

    def test_adapters_by_name(self):
        """TRL's reference is a second adapter, which it switches to and back."""
        models = stack()
        for model in models:
            torch.manual_seed(3)
            model.add_adapter("ref", LoraConfig(target_modules=["one", "two"], **LORA, init_lora_weights=False))  # type: ignore[arg-type]
        for name in ("ref", "default", "ref"):
            for model in models:
                model.set_adapter(name)
            self.check(*models)
        for model in models:
            model.base_model.set_adapter(["default", "ref"])
        self.check(*models)

    @pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True, "target_modules": ["one"]}])
    def test_variants(self, settings):
        self.check(*stack(**settings))

    def test_autocast_to_another_precision(self):
        self.check(*stack(), autocast=True)

    def test_base_layer_that_trains(self):
        models = stack()
        for model in models:
            model.get_base_model().one.base_layer.weight.requires_grad_()
        self.check(*models)
        assert any("base_layer" in name for name in passed(models[1], torch.ones(2, 16)))


class TestChanges:
    @pytest.mark.parametrize(
        "step",
        [
            lambda values: torch.optim.AdamW(values, lr=0.1, foreach=True).step(),
            lambda values: torch.optim.AdamW(values, lr=0.1, foreach=False).step(),
            lambda values: torch.optim.AdamW(values, lr=0.1, fused=True).step(),
            lambda values: torch.optim.SGD(values, lr=0.1).step(),
            lambda values: [
                value.data.__setattr__("data", value.data) or setattr(value, "data", value.data + 1) for value in values
            ],
        ],
    )
    def test_are_noticed(self, step):
        plain, fused = stack(torch.bfloat16)
        x = torch.randn(5, 16).bfloat16()
        passed(fused, x)
        before = fused(x)
        step([value for value in fused.parameters() if value.requires_grad])
        plain.load_state_dict(fused.state_dict())
        torch.testing.assert_close(fused(x), plain(x), rtol=0.05, atol=0.05)
        assert (fused(x) - before).abs().max() > 0.1

    def test_loaded_weights_are_noticed(self):
        plain, fused = stack()
        x = torch.randn(5, 16)
        before = fused(x)
        plain.load_state_dict({name: value + 1 for name, value in fused.state_dict().items()})
        fused.load_state_dict(plain.state_dict())
        torch.testing.assert_close(fused(x), plain(x))
        assert not torch.allclose(fused(x), before)

    def test_an_uncounted_change_is_read_after_forgetting(self):
        _, fused = stack()
        x = torch.randn(5, 16)
        before = fused(x)
        for value in fused.parameters():
            value.data.add_(1)
        forget_copies(fused)
        assert not torch.allclose(fused(x), before)

    def test_copies_of_an_inference_serve_training(self):
        plain, fused = stack(torch.bfloat16)
        x = torch.randn(5, 16).bfloat16()
        with torch.inference_mode():
            fused(x)
        assert passed(fused, x).keys() == passed(plain, x).keys()

    def test_copies_are_neither_copied_nor_saved(self, tmp_path):
        plain, fused = stack()
        fused(torch.ones(1, 16))
        twin = copy.deepcopy(fused)
        assert not any("_segrl_lora_copies" in vars(module) for module in twin.modules())
        for name, model in (("plain", plain), ("fused", twin)):
            model.save_pretrained(tmp_path / name)
        files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "fused")]
        assert files[0] == files[1]


class InPlace(torch.optim.SGD):
    """An optimizer of the old kind, whose writes PyTorch does not count."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is not None:
                    value.data.add_(value.grad, alpha=-group["lr"])


def answered(n: int = 8) -> Any:
    return text_rows(n).add_column("completion", [[{"role": "assistant", "content": "It is small."}]] * n)


def supervised(folder: Any, *, model: Any = None, optimizer: Any = None, callbacks: Any = (), **settings: Any) -> Any:
    base, tokenizer = model or build("text")
    lora = None if isinstance(base, PeftModel) else language_model_lora(base, **LORA)
    trainer = SegSFTTrainer(
        base,
        sft_args(folder, learning_rate=0.02, **settings),
        train_dataset=answered(),
        processing_class=tokenizer,
        peft_config=lora,
        optimizer_cls_and_kwargs=None if optimizer is None else (optimizer, {"lr": 0.5}),
        callbacks=list(callbacks),
    )
    return trainer


class TestTrainers:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
    def test_grpo_with_a_head(self, tmp_path, kind):
        """Shared prompts, dense losses, KL (adapters off), checkpointed layers: texts, masks, gradients, weights."""
        runs = []
        for fused in (False, True):
            model, processor = build(kind)
            lora = language_model_lora(model, **{**LORA, "lora_alpha": 40})
            settings = {"beta": 0.04, "gradient_checkpointing": True, "learning_rate": 0.05}
            trainer = run(
                tmp_path, kind, model=(model, processor), fuse_lora=fused, arguments={"peft_config": lora}, **settings
            )
            kinds = Counter(type(module) for module in trainer.model.modules())
            assert kinds[FusedLoraLinear] == (kinds[FusedLoraLinear] + kinds[Linear]) * fused
            runs.append(trainer)
        same_runs(*runs)

    @pytest.mark.parametrize("optimizer", [None, InPlace])
    def test_supervised(self, tmp_path, optimizer):
        results = []
        for fused in (False, True):
            torch.manual_seed(0)
            trainer = supervised(tmp_path, optimizer=optimizer, fuse_lora=fused, max_steps=4, logging_steps=1)
            trainer.train()
            results.append([entry["loss"] for entry in history(trainer) if "loss" in entry])
        assert results[0] == pytest.approx(results[1], abs=1e-4)
        assert max(results[0]) - min(results[0]) > 0.01

    @pytest.mark.slow
    def test_a_resumed_run_is_the_uninterrupted_one(self, tmp_path):
        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                control.should_training_stop = state.global_step == 2

        settings = {"fuse_lora": True, "max_steps": 4, "save_steps": 2, "save_strategy": "steps", "bf16": True}
        finished = []
        for name, callbacks in (("whole", []), ("stopped", [Stop()])):
            base, tokenizer = build("text")
            trainer = supervised(tmp_path / name, model=(base.bfloat16(), tokenizer), callbacks=callbacks, **settings)
            trainer.train()
            finished.append(trainer)
        base, tokenizer = build("text")
        resumed = supervised(tmp_path / "stopped", model=(base.bfloat16(), tokenizer), **settings)
        resumed.train(resume_from_checkpoint=str(newest_checkpoint(tmp_path / "stopped")[0]))
        assert same(weights(resumed.model), weights(finished[0].model))
        assert not same(weights(resumed.model), weights(finished[1].model))
        kinds = {value.dtype for name, value in resumed.model.named_parameters() if "lora" in name}
        assert kinds == {torch.float32}

    @pytest.mark.slow
    def test_with_compiled_layers(self, tmp_path):
        results = []
        for fused in (False, True):
            torch.manual_seed(0)
            trainer = supervised(
                tmp_path,
                fuse_lora=fused,
                compile_layers=fused,
                compile_backend="aot_eager",
                max_steps=4,
                logging_steps=1,
            )
            trainer.train()
            results.append([entry["loss"] for entry in history(trainer) if "loss" in entry])
        assert results[0] == pytest.approx(results[1], abs=1e-4)

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"target_modules": ["embed_tokens"]}, "adapts no plain linear layers, but Embedding ones"),
            (None, "has no LoRA"),
        ],
    )
    def test_reasons(self, settings, reason):
        model, _ = build("text")
        model = model if settings is None else get_peft_model(model, LoraConfig(**settings))
        assert reason in (fuse_lora(model) or "")

    def test_without_lora(self, tmp_path):
        model, tokenizer = build("text")
        with pytest.warns(
            UserWarning, match=r"fuse_lora: Qwen2ForCausalLM has no LoRA layers\. .* says that this is meant"
        ):
            SegSFTTrainer(
                model, sft_args(tmp_path, fuse_lora=True), train_dataset=answered(), processing_class=tokenizer
            )
        with pytest.warns(UserWarning, match="fuse_lora: .* has no LoRA layers"):
            make_trainer(*build("text"), tmp_path, settings={"fuse_lora": True})
