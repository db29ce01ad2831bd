"""Losses against pixel-by-pixel sums, torchvision and numeric gradients."""

import pytest
import references
import torch
import torchvision.ops
from hypothesis import given
from hypothesis import strategies as st

from segrl import losses
from segrl.errors import SegRLError

ALL = [losses.dice, losses.cross_entropy, losses.dice_ce, losses.focal]


def random_pair(seed: int, *, soft: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    target = torch.rand(3, 4, 5, generator=generator, dtype=torch.float64)
    return logits, target if soft else (target > 0.5).double()


@given(st.integers(0, 10**6), st.booleans())
def test_equal_pixel_by_pixel_sums(seed: int, soft: bool):
    logits, target = random_pair(seed, soft=soft)
    flat = [(x.flatten().tolist(), t.flatten().tolist()) for x, t in zip(logits, target, strict=True)]
    dice = torch.tensor([references.dice_loss(x, t, 1.0) for x, t in flat], dtype=torch.float64)
    entropy = torch.tensor([references.cross_entropy(x, t) for x, t in flat], dtype=torch.float64)
    torch.testing.assert_close(losses.dice(logits, target), dice)
    torch.testing.assert_close(losses.cross_entropy(logits, target), entropy)
    torch.testing.assert_close(losses.dice_ce(logits, target, dice_weight=2, ce_weight=0.5), 2 * dice + 0.5 * entropy)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.7, 1.5), (None, 2.0)])
def test_focal_equals_torchvision(alpha: float | None, gamma: float):
    logits, target = random_pair(0, soft=False)
    expected = torchvision.ops.sigmoid_focal_loss(logits, target, -1 if alpha is None else alpha, gamma).mean((1, 2))
    torch.testing.assert_close(losses.focal(logits, target, alpha=alpha, gamma=gamma), expected)


def test_focal_without_focus_is_the_cross_entropy():
    logits, target = random_pair(1)
    torch.testing.assert_close(losses.focal(logits, target, alpha=None, gamma=0), losses.cross_entropy(logits, target))


def test_known_values():
    zeros = torch.zeros(1, 2, 2)
    half = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    assert losses.dice(zeros, half).item() == pytest.approx(1 - 3 / 5)
    assert losses.cross_entropy(zeros, half).item() == pytest.approx(0.693147, abs=1e-6)
    assert losses.focal(zeros, half).item() == pytest.approx(0.25 * 0.693147 * 0.5, abs=1e-6)


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("soft", [True, False])
def test_gradients(loss, soft: bool):
    logits, target = random_pair(2, soft=soft)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), logits.requires_grad_())


@pytest.mark.parametrize("loss", ALL)
def test_masks_do_not_influence_each_other(loss):
    logits, target = random_pair(3)
    together = loss(logits, target)
    assert together.shape == (3,)
    torch.testing.assert_close(
        together, torch.cat([loss(x[None], t[None]) for x, t in zip(logits, target, strict=True)])
    )


@pytest.mark.parametrize("loss", ALL)
def test_a_perfect_prediction_costs_nothing_and_the_opposite_much(loss):
    target = random_pair(4, soft=False)[1].bool()
    logits = torch.where(target, 50.0, -50.0)
    torch.testing.assert_close(loss(logits, target), torch.zeros(3), atol=1e-6, rtol=0)
    assert (loss(-logits, target) > 0.9).all()


def test_empty_masks_follow_the_rule():
    empty, full, no, yes = (
        torch.zeros(1, 9, 11),
        torch.ones(1, 9, 11),
        *(torch.full((1, 9, 11), v) for v in (-50.0, 50.0)),
    )
    assert losses.dice(no, empty).item() == pytest.approx(0)
    assert losses.dice(yes, empty).item() == pytest.approx(1 - 1 / 100)
    assert losses.dice(no, full).item() == pytest.approx(1 - 1 / 100)
    assert losses.dice(no, full, smoothing=1e-6).item() == pytest.approx(1)


@pytest.mark.parametrize("loss", ALL)
def test_no_masks(loss):
    logits = torch.zeros(0, 4, 4, requires_grad=True)
    value = loss(logits, torch.zeros(0, 4, 4))
    assert value.shape == (0,)
    value.sum().backward()
    assert logits.grad is not None


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_stalls(loss, dtype: torch.dtype):
    logits = torch.full((1, 512, 512), 4.0, dtype=dtype, requires_grad=True)
    target = torch.ones(1, 512, 512, dtype=dtype)
    value = loss(logits, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(logits.double(), target.double()).float())
    value.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", ALL)
def test_extreme_logits_stay_finite(loss):
    logits = torch.tensor([[[1e4, -1e4]]], requires_grad=True)
    loss(logits, torch.tensor([[[0.0, 1.0]]])).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(4, 4), torch.zeros(4, 4), r"mask_logits: expected shape \(N, H, W\) .*got \(4, 4\)"),
        (torch.zeros(1, 0, 4), torch.zeros(1, 0, 4), "at least one pixel"),
        (torch.zeros(1, 4, 4), torch.zeros(1, 8, 8), r"target: .*\(1, 4, 4\), got \(1, 8, 8\); resize the target"),
        (
            torch.zeros(1, 4, 4),
            torch.zeros(1, 4, 4, dtype=torch.uint8),
            "got torch.uint8; divide a 0..255 target by 255",
        ),
        (torch.zeros(1, 4, 4, dtype=torch.int64), torch.zeros(1, 4, 4), "mask_logits: expected a floating dtype"),
    ],
)
def test_errors(loss, logits: torch.Tensor, target: torch.Tensor, message: str):
    with pytest.raises(SegRLError, match=message):
        loss(logits, target)


def test_smoothing_must_be_positive():
    with pytest.raises(SegRLError, match="smoothing: expected a positive number of pixels, got 0"):
        losses.dice(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), smoothing=0)
