"""Dense terms: names, weights, the mean over rows, and its invariance to how rows are split."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from segrl import losses
from segrl.errors import SegRLError, UnknownNameError
from segrl.heads import DenseLoss, register_dense_loss
from segrl.heads.dense import check_dense_losses, dense_terms
from segrl.heads.requests import MaskRequest, SegInput
from segrl.metrics import dice

SIDE = 6


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def request_for(valid, seed=0, target=True) -> Any:
    """A request as a forward leaves it: logits for the rows that have a mask."""
    valid = torch.tensor(valid, dtype=torch.bool)
    truth = [((noise(SIDE, SIDE, seed=seed + n) > 0) * 255).to(torch.uint8) for n in range(len(valid))]
    inputs = [SegInput(torch.zeros(3, 4, 4), target=mask if target else None) for mask in truth]
    request = MaskRequest(torch.zeros(len(valid), 1, dtype=torch.long), valid[:, None], inputs)
    request.rows = valid.nonzero()[:, 0]
    request.logits = noise(len(valid), SIDE, SIDE, seed=seed + 100)[request.rows].requires_grad_()
    return request


def part(request, rows):
    """The request of a micro-batch made of some rows."""
    smaller = MaskRequest(request.index[rows], request.valid[rows], [request.inputs[n] for n in rows])
    smaller.rows = smaller.valid[:, 0].nonzero()[:, 0]
    place = {row: n for n, row in enumerate(request.rows.tolist())}
    smaller.logits = request.logits[[place[n] for n in rows if n in place]]
    return smaller


def area(mask_logits, target, scale=1):
    return scale * (mask_logits.sigmoid().mean((1, 2)) - target.mean((1, 2))).abs()


class TestDenseLoss:
    @pytest.mark.parametrize("name", ["dice_ce", "dice", "cross_entropy", "focal"])
    def test_named(self, name):
        logits, target = noise(3, SIDE, SIDE), (noise(3, SIDE, SIDE, seed=1) > 0).float()
        assert torch.equal(DenseLoss(name)(logits, target), getattr(losses, name)(logits, target))

    def test_own_function_and_module(self):
        class Area(nn.Module):
            def forward(self, mask_logits, target):
                return (mask_logits.sigmoid().mean((1, 2)) - target.mean((1, 2))).abs()

        logits, target = noise(2, SIDE, SIDE), torch.zeros(2, SIDE, SIDE)
        expected = logits.sigmoid().mean((1, 2))
        assert torch.equal(DenseLoss("area", fn=Area())(logits, target), expected)
        assert torch.equal(DenseLoss("area", fn=lambda x, t: x.sigmoid().mean((1, 2)))(logits, target), expected)

    def test_a_function_gives_its_name(self):
        logits, target = noise(2, SIDE, SIDE), torch.zeros(2, SIDE, SIDE)
        for term in (DenseLoss(area), DenseLoss(f"{__name__}:area"), DenseLoss("area", fn=f"{__name__}:area")):
            assert term.name == "area"
            assert torch.equal(term(logits, target), area(logits, target))
        register_dense_loss("test_dense_area")(area)
        assert DenseLoss("test_dense_area").fn is area
        assert DenseLoss("heat", fn="dice", on="heatmap").fn is losses.dice

    @pytest.mark.parametrize("loss", [lambda x, t: x, functools.partial(area, scale=2), 3])
    def test_what_has_no_name_needs_one(self, loss):
        with pytest.raises(SegRLError, match=r"expected a name or a named function; write DenseLoss\('name', fn=...\)"):
            DenseLoss(loss)

    def test_repr(self):
        assert repr(DenseLoss("dice", on="heatmap")) == "DenseLoss('dice', weight=1.0, on='heatmap')"
        assert repr(DenseLoss("dice", 2)) == "DenseLoss('dice', weight=2.0)"

    def test_unknown_name_suggests_the_closest(self):
        with pytest.raises(UnknownNameError, match="unknown dense loss 'dice_cee'; did you mean 'dice_ce'"):
            DenseLoss("dice_cee")

    @pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf")])
    def test_bad_weight(self, weight):
        with pytest.raises(SegRLError, match=rf"DenseLoss\('dice', weight={weight}\): expected a finite weight"):
            DenseLoss("dice", weight)

    def test_one_value_per_mask(self):
        with pytest.raises(SegRLError, match=r"'mean' returned shape \(\) for 2 masks; expected .* shape \(2,\)"):
            DenseLoss("mean", fn=lambda x, t: x.mean())(noise(2, SIDE, SIDE), torch.zeros(2, SIDE, SIDE))


class TestCheck:
    def test_none_and_empty(self):
        assert check_dense_losses(None) == check_dense_losses([]) == []

    def test_keeps_order(self):
        terms = [DenseLoss("dice"), DenseLoss("focal")]
        assert check_dense_losses(iter(terms)) == terms

    @pytest.mark.parametrize("item", ["dice", losses.dice, None])
    def test_wrong_type(self, item):
        with pytest.raises(SegRLError, match="expected DenseLoss objects such as DenseLoss"):
            check_dense_losses([item])

    def test_same_name_twice(self):
        with pytest.raises(SegRLError, match=r"\['dice'\] occur twice; give each term its own name"):
            check_dense_losses([DenseLoss("dice"), DenseLoss("dice", fn=losses.focal)])


class TestTerms:
    def test_sum_over_masks_by_all_rows(self):
        request = request_for([True, False, True, True])
        terms, statistics = dense_terms([DenseLoss("dice", 3.0), DenseLoss("focal")], request)
        truth = torch.stack([request.inputs[n].target for n in request.rows.tolist()]) / 255
        assert terms.keys() == {"dice", "focal"}
        assert terms["dice"].item() == pytest.approx(losses.dice(request.logits, truth).sum().item() / 4, abs=1e-6)
        assert terms["focal"].item() == pytest.approx(losses.focal(request.logits, truth).sum().item() / 4, abs=1e-6)
        assert statistics["masks"] == 0.75
        overlap = [
            dice(logits.detach().numpy() > 0, mask.numpy() > 0)
            for logits, mask in zip(request.logits, truth, strict=True)
        ]
        assert statistics["dice"].item() == pytest.approx(float(np.mean(overlap)), abs=1e-6)

    @given(
        st.lists(st.booleans(), min_size=2, max_size=8).flatmap(
            lambda valid: st.tuples(st.just(valid), st.permutations(range(len(valid))), st.sampled_from([1, 2]))
        )
    )
    def test_mean_of_micro_batches_is_the_term_of_the_batch(self, drawn):
        valid, order, size = drawn
        order = order[: len(order) // size * size]
        whole = request_for([valid[n] for n in sorted(order)])
        ranks = {row: n for n, row in enumerate(sorted(order))}
        terms = [DenseLoss("dice_ce")]
        expected, _ = dense_terms(terms, whole)
        gradient = torch.autograd.grad(expected["dice_ce"], whole.logits, allow_unused=True)[0]
        parts = [
            dense_terms(terms, part(whole, [ranks[n] for n in order[start : start + size]]))[0]["dice_ce"]
            for start in range(0, len(order), size)
        ]
        mean = torch.stack(parts).mean()
        torch.testing.assert_close(mean, expected["dice_ce"])
        other = torch.autograd.grad(mean, whole.logits, allow_unused=True)[0]
        torch.testing.assert_close(other, gradient)

    def test_a_term_on_an_auxiliary_output(self):
        request = request_for([True, False, True])
        request.aux = {"heatmap": noise(2, SIDE, SIDE, seed=7).bfloat16().requires_grad_()}
        terms, _ = dense_terms([DenseLoss("dice"), DenseLoss("heat", fn=losses.dice, on="heatmap")], request)
        truth = torch.stack([request.inputs[n].target for n in (0, 2)]) / 255
        expected = losses.dice(request.aux["heatmap"].float(), truth).sum().item() / 3
        assert terms["heat"].item() == pytest.approx(expected, abs=1e-6)
        terms["heat"].backward()
        assert request.aux["heatmap"].grad is not None
        assert request.logits.grad is None

    def test_an_unknown_output_lists_those_of_the_adapter(self):
        request = request_for([True])
        request.aux = {"heatmap": request.logits, "edge": request.logits}
        with pytest.raises(UnknownNameError, match=r"'heatmp'; did you mean 'heatmap'\? Known: edge, heatmap, mask"):
            dense_terms([DenseLoss("dice", on="heatmp")], request)

    def test_no_mask_at_all(self):
        request = request_for([False, False])
        terms, statistics = dense_terms([DenseLoss("dice_ce")], request)
        assert terms["dice_ce"].item() == 0.0
        terms["dice_ce"].backward()  # every rank can do its backward pass
        assert statistics == {"dice": None, "masks": 0.0}

    def test_empty_truth_met_by_an_empty_mask(self):
        request = request_for([True])
        request.inputs[0].target = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
        request.logits = torch.full((1, SIDE, SIDE), -20.0)
        terms, statistics = dense_terms([DenseLoss("dice_ce")], request)
        assert terms["dice_ce"].item() == pytest.approx(0.0, abs=1e-4)
        assert statistics["dice"].item() == 1.0

    def test_half_precision_logits(self):
        request = request_for([True, True])
        exact, _ = dense_terms([DenseLoss("dice_ce")], request)
        request.logits = request.logits.detach().bfloat16().requires_grad_()
        terms, _ = dense_terms([DenseLoss("dice_ce")], request)
        assert terms["dice_ce"].dtype == torch.float32
        torch.testing.assert_close(terms["dice_ce"], exact["dice_ce"], rtol=0.02, atol=0.02)

    def test_row_without_truth(self):
        with pytest.raises(SegRLError, match="needs a target mask for every row"):
            dense_terms([DenseLoss("dice")], request_for([True, True], target=False))

    def test_forward_that_never_came(self):
        request = request_for([True])
        request.rows = request.logits = None
        with pytest.raises(SegRLError, match="the model's backbone was not called"):
            dense_terms([DenseLoss("dice")], request)
