"""Shared prompts on a GPU: the same numbers as TRL's pass, in single precision and in bfloat16. Skipped without one."""

from typing import Any

import pytest
import torch
from builders import add_head
from sharing_checks import (
    Answer,
    batch_of,
    build,
    close,
    computed,
    counted,
    dense,
    headed_trainer,
    loss_and_gradients,
    make_trainer,
    scores,
    three_prompts,
)
from sharing_runs import norm, run
from test_sharing_generation import generated, inputs_of, prompts_of, settings_of
from torch.nn import functional as F

from segrl.caching import FeatureCache
from segrl.heads import DenseLoss
from segrl.models import backbone_of
from segrl.sharing import enable_sharing, install_vision
from segrl.sharing.attention import shared_attention
from segrl.sharing.layout import build_layout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

KINDS = ("qwen2_5_vl", "text")
ROWS = [Answer(0, 5, 1), Answer(1, 3, 2), Answer(0, 9, 8), Answer(1, 0), Answer(0, 1), Answer(2, 4), Answer(1, 9, 3)]


def on_gpu(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}


def trainer_on_gpu(kind: str, folder: Any, **settings: Any) -> Any:
    """With a mask head where the model sees."""
    settings = {"use_cpu": False, **settings}
    if kind == "text":
        return make_trainer(*build(kind), folder, settings=settings)
    return headed_trainer(kind, folder, settings=settings)


def batch_for(trainer: Any, kind: str) -> dict[str, Any]:
    batch = batch_of(trainer.processing_class, three_prompts(kind), ROWS, seed=5, head=trainer.mask_head)
    batch = on_gpu(batch)
    known = scores(trainer, batch, shared=False)[0].float()
    noise = torch.randn(known.shape, generator=torch.Generator().manual_seed(1)).to(known.device)
    return {**batch, "old_per_token_logps": known + 0.1 * noise}


def results_of(trainer: Any, batch: dict[str, Any], *, shared: bool) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, loss and all gradients."""
    logps = scores(trainer, batch, shared=shared)[0].float() * batch["completion_mask"]
    loss, found, _ = loss_and_gradients(trainer, batch)
    return logps, loss.float().view(1), torch.cat([gradient.float().flatten() for gradient in found.values()])


@pytest.fixture(autouse=True)
def exact_convolutions():
    """cuDNN computes convolutions of single precision in TF32 unless told otherwise."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def lower_right(monkeypatch):
    """The shapes for which a mask of flash attention was asked for."""
    import torch.nn.attention.bias as bias

    shapes, original = [], bias.causal_lower_right

    def remember(*shape: int) -> Any:
        shapes.append(shape)
        return original(*shape)

    monkeypatch.setattr(bias, "causal_lower_right", remember)
    return shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_models_are_supported(kind, dtype):
    model, _ = build(kind)
    assert enable_sharing(model.to("cuda", dtype)) is None


# bfloat16 keeps 8 bits: a number is rounded by 2^-8 at most. Inputs are exact here; rounded are the weights of the
# keys, the output, and in the backward pass three more products.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("lengths", [(200, 200, 200, 200), (70, 1, 130, 257)])
def test_attention_equals_a_mask_over_each_row(lengths, head, dtype, tolerance, lower_right):
    """Against single precision, over more than one tile of the kernels; and all gradients."""
    prompt, heads, key_heads = 430, 8, 2
    layout = build_layout([range(len(lengths))], [prompt] * len(lengths), lengths, max(lengths), "cuda")
    torch.manual_seed(0)
    shape = (1, heads, layout.tokens, head), (1, key_heads, layout.tokens, head), (1, key_heads, layout.tokens, head)
    given = [torch.randn(size, device="cuda").to(dtype).requires_grad_() for size in shape]
    query, key, value = given
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    part = torch.repeat_interleave(
        torch.arange(len(lengths) + 1), torch.tensor([prompt, *lengths]), output_size=layout.tokens
    ).cuda()
    place = torch.arange(layout.tokens, device="cuda")
    sees = (place[:, None] >= place) & ((part[:, None] == part) | (part == 0))
    repeated = [exact[0], *(tensor.repeat_interleave(heads // key_heads, dim=1) for tensor in exact[1:])]
    expected = F.scaled_dot_product_attention(*repeated, attn_mask=sees).transpose(1, 2)
    found, _ = shared_attention(torch.nn.Identity(), query, key, value, None, shared_prompt=layout)
    assert lower_right == ([(max(lengths), prompt + max(lengths))] if dtype == torch.bfloat16 else [])
    close(found.double(), expected, tolerance=tolerance)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), exact)
    gradients = torch.autograd.grad((found * weight.to(dtype)).sum(), given)
    for one, other in zip(gradients, wanted, strict=True):
        close(one.double(), other, tolerance=tolerance)


@pytest.mark.parametrize("kind", KINDS)
class TestLoss:
    def test_single_precision(self, kind, tmp_path):
        trainer = trainer_on_gpu(kind, tmp_path)
        assert trainer._shares
        batch = batch_for(trainer, kind)
        for one, other in zip(scores(trainer, batch, shared=True), scores(trainer, batch, shared=False), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        expected, wanted, _ = loss_and_gradients(trainer, dense(batch))
        with counted(trainer) as tokens:
            loss, found, _ = loss_and_gradients(trainer, batch)
        assert tokens == [computed(batch)]
        close(loss, expected, scale=1.0, tolerance=1e-4)
        assert found.keys() == wanted.keys()
        whole = norm(wanted.values())
        assert whole > 1e-4
        for name, gradient in wanted.items():
            close(found[name], gradient, scale=1e-2 * whole, tolerance=1e-4)

    @pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
    def test_half_precision(self, kind, weights, tmp_path, lower_right):
        """As near to single precision, with the same weights, as TRL's own pass: twice its distance at most."""
        exact = trainer_on_gpu(kind, tmp_path)
        for parameter in exact.model.parameters():
            parameter.data = parameter.data.bfloat16().float()  # both precisions can hold these weights
        batch = batch_for(exact, kind)
        results = {"exact": results_of(exact, dense(batch), shared=False)}
        trainer = trainer_on_gpu(
            kind, tmp_path, bf16=True
        )  # not before: accelerate knows one precision for all trainers
        for mine, given in zip(trainer.model.parameters(), exact.model.parameters(), strict=True):
            mine.data = given.data.to(weights)
        if trainer.mask_head is not None:
            trainer.mask_head.float()
        results["trl"] = results_of(trainer, dense(batch), shared=False)
        lower_right.clear()
        results["ours"] = results_of(trainer, batch, shared=True)
        assert bool(lower_right) == (weights == torch.bfloat16)
        for number, what in enumerate(("log-probabilities", "loss", "gradients")):
            reference = results["exact"][number]
            theirs, ours = ((results[name][number] - reference).norm().item() for name in ("trl", "ours"))
            size = reference.norm().item()
            assert ours <= 2 * theirs + 5e-3 * max(size, 1.0 if what == "loss" else 0.0), (what, ours, theirs, size)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_writes_the_same(kind):
    model, processor = build(kind)
    model.cuda()
    assert enable_sharing(model) is None
    install_vision(backbone_of(model), model.get_decoder(), FeatureCache(2**24))
    inputs, *shared = inputs_of(processor, prompts_of(kind), [0, 0, 1, 2, 1, 0, 2])
    settings_ = settings_of(processor, repetition_penalty=5.0)
    expected = generated(model, on_gpu(inputs), settings_)
    assert torch.equal(generated(model, on_gpu(inputs), settings_, shared), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_training(weights, checkpointing, tmp_path):
    """Two steps with masks, rewards and a dense loss; the model and the mask head get gradients."""
    model, processor = build("qwen2_5_vl")
    trainer = run(
        tmp_path,
        model=(model.to(weights), processor),
        use_cpu=False,
        bf16=True,
        activation_checkpointing=checkpointing,
        steps_per_generation=2,
    )
    assert next(trainer.model.parameters()).is_cuda
    assert trainer._shares
    assert len(trainer.kept.steps) == 2
    for step in trainer.kept.steps:
        for prefix in ("mask_head.", "model.language_model."):
            size = norm(gradient for name, gradient in step.items() if name.startswith(prefix))
            assert 0 < size < float("inf")
    assert any(prediction.mask is not None for prediction in trainer.collect.joined("prediction"))


def test_masks_and_text_share_one_forward(tmp_path):
    """A dense loss alone (no advantage) reaches the language model through the packed row, as without sharing."""
    model, processor = build("qwen2_5_vl")
    trainer = make_trainer(
        add_head(model, processor),
        processor,
        tmp_path,
        dense_losses=[DenseLoss("dice_ce")],
        settings={"use_cpu": False},
    )
    batch = batch_for(trainer, "qwen2_5_vl")
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    _, wanted, _ = loss_and_gradients(trainer, dense(batch))
    _, found, _ = loss_and_gradients(trainer, batch)
    whole = norm(wanted.values())
    assert norm(g for name, g in wanted.items() if name.startswith("model.language_model.")) > 1e-4 * whole
    for name, gradient in wanted.items():
        close(found[name], gradient, scale=1e-2 * whole, tolerance=1e-4)
