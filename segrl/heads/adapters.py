"""Prompt adapters: hidden states of a language model to prompt embeddings of a segmenter.

An adapter is built as `Adapter(input_dim, prompt_dim, **settings)`. It takes `states` (N, K, D) and `state_mask` (N, K)
(True where a state exists; each mask has at least one), accepts N = 0, and returns

- `prompts` (N, P, C), or
- `(prompts, aux)`, where `aux` names further outputs with N rows. `DenseLoss(..., on="name")` trains them, and one
  named "mask_prompt", (N, 1, h', h') logits, also prompts the segmenter.

An adapter whose `forward` has the keywords `features` and `index` also gets the segmenter's `ImageFeatures` of the
unique images and, as (N,), the row of each mask's image.
"""

# N masks, K probe states, D width of the language model, P prompts, C width of the segmenter's prompts

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from segrl.errors import SegRLError
from segrl.registry import Registry
from segrl.segmenters.base import ImageFeatures

__all__ = [
    "ADAPTERS",
    "LinearAdapter",
    "MLPAdapter",
    "SemanticGuidedAdapter",
    "register_adapter",
    "run_adapter",
]

Class = TypeVar("Class", bound=type[nn.Module])

ADAPTERS = Registry("adapter", "segrl.adapters", classes=True, preload=("segrl.heads",))
_MOMENTUM = 0.1  # of running statistics


def register_adapter(name: str) -> Callable[[Class], Class]:
    """Register an adapter class under a name, for `MaskHead.build` and for files.

    `to_config()` returns JSON-ready settings from which `from_config(config, **context)`, or without that method
    `cls(**config)`, builds the same adapter.

    Raises:
        SegRLError: The name is taken, or it is no class.

    Example:
        >>> @register_adapter("first_state")
        ... class FirstState(nn.Linear):
        ...     def forward(self, states, state_mask):
        ...         return super().forward(states[:, :1])
        ...
        ...     def to_config(self):
        ...         return {"in_features": self.in_features, "out_features": self.out_features}
        >>> ADAPTERS.get("first_state")(8, 4)(torch.zeros(2, 3, 8), torch.ones(2, 3)).shape
        torch.Size([2, 1, 4])
    """
    return ADAPTERS.register(name)


@register_adapter("semantic_guided")
class SemanticGuidedAdapter(nn.Module):
    """CORE-Seg's Semantic-Guided Prompt Adapter (SG-A): residual MLP blocks, whose result a learned query attends to.

    `h_{l+1} = h_l + MLP(LayerNorm(h_l))`, then `Proj(LayerNorm(Attn(q, h, h)))`. The paper states neither the number
    of blocks, nor the inner width, nor the heads: `blocks`, `hidden_dim` and `num_heads` are settings.

    Args:
        input_dim: D, width of the language model.
        prompt_dim: C, width of the segmenter's prompt embeddings.
        blocks: Number of residual blocks.
        hidden_dim: Inner width of a block's MLP; `input_dim` when None.
        attention_dim: Width of the cross attention; `prompt_dim` when None.
        num_heads: Heads of the cross attention; must divide `attention_dim`.
        num_queries: P, learned queries (1 in the paper).
        standardise: Subtract the running mean of the states and divide by their running deviation, per feature. What
            `<seg>` states of different questions share is many times larger than what tells them apart; a decoder
            that starts from random weights learns to ignore such prompts. Not in the paper, whose decoder is
            pretrained.

    Raises:
        SegRLError: `num_heads` does not divide `attention_dim`.

    Example:
        >>> adapter = SemanticGuidedAdapter(input_dim=24, prompt_dim=16, num_heads=4, num_queries=3)
        >>> adapter(torch.zeros(2, 5, 24), torch.ones(2, 5, dtype=torch.bool)).shape
        torch.Size([2, 3, 16])
    """

    mean: Tensor  # buffers, only with `standardise`
    variance: Tensor

    def __init__(
        self,
        input_dim: int,
        prompt_dim: int,
        *,
        blocks: int = 2,
        hidden_dim: int | None = None,
        attention_dim: int | None = None,
        num_heads: int = 8,
        num_queries: int = 1,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        hidden, attention = hidden_dim or input_dim, attention_dim or prompt_dim
        if attention % num_heads:
            raise SegRLError(f"num_heads={num_heads} does not divide attention_dim={attention}; choose a divisor")
        self._settings = {
            "input_dim": input_dim,
            "prompt_dim": prompt_dim,
            "blocks": blocks,
            "hidden_dim": hidden,
            "attention_dim": attention,
            "num_heads": num_heads,
            "num_queries": num_queries,
            "standardise": standardise,
        }
        self.standardise = standardise
        if standardise:
            self.register_buffer("mean", torch.zeros(input_dim))
            self.register_buffer("variance", torch.ones(input_dim))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(input_dim), nn.Linear(input_dim, hidden), nn.GELU(), nn.Linear(hidden, input_dim)
            )
            for _ in range(blocks)
        )
        self.query = nn.Parameter(torch.randn(num_queries, attention) * 0.02)
        self.attention = nn.MultiheadAttention(attention, num_heads, kdim=input_dim, vdim=input_dim, batch_first=True)
        self.norm = nn.LayerNorm(attention)
        self.projection = nn.Linear(attention, prompt_dim)
        nn.init.normal_(self.projection.weight, std=attention**-0.5)  # unit variance, as SAM's own prompt embeddings
        nn.init.zeros_(self.projection.bias)

    @torch.no_grad()
    def observe(self, states: Tensor) -> None:
        """Update the running mean and variance with the states (M, D) of a training batch, of all ranks together.

        Every rank must call this for every batch, with M = 0 if it has none.
        """
        if not self.standardise:
            return
        mean, variance = self.mean, self.variance
        states = states.to(mean)
        totals = torch.cat([mean.new_tensor([len(states)]), states.sum(0), (states - mean).square().sum(0)])
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(totals)
        count = totals[0].clamp(min=1)
        weight = _MOMENTUM * (totals[0] > 0)
        step = weight * (totals[1 : 1 + len(mean)] / count - mean)
        variance.add_(weight * (totals[1 + len(mean) :] / count - variance))
        mean.add_(step)

    def forward(self, states: Tensor, state_mask: Tensor) -> Tensor:
        """Return prompts (N, P, C) for states (N, K, D) and their mask (N, K)."""
        if self.standardise:
            states = (states - self.mean) / (self.variance + 1e-4).sqrt()
        for block in self.blocks:
            states = states + block(states)
        query = self.query.expand(len(states), -1, -1)
        if not len(states):  # MultiheadAttention cannot reshape an empty mask
            return self.projection(self.norm(query))
        attended, _ = self.attention(query, states, states, key_padding_mask=~state_mask, need_weights=False)
        return self.projection(self.norm(attended))

    def to_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return dict(self._settings)


@register_adapter("linear")
class LinearAdapter(nn.Module):
    """Project the mean of the states with one linear layer, CORE-Seg's ablation of SG-A.

    Example:
        >>> LinearAdapter(24, 16)(torch.zeros(2, 5, 24), torch.ones(2, 5, dtype=torch.bool)).shape
        torch.Size([2, 1, 16])
    """

    def __init__(self, input_dim: int, prompt_dim: int) -> None:
        super().__init__()
        self._settings = {"input_dim": input_dim, "prompt_dim": prompt_dim}
        self.projection = nn.Linear(input_dim, prompt_dim)

    def forward(self, states: Tensor, state_mask: Tensor) -> Tensor:
        """Return prompts (N, P, C) for states (N, K, D) and their mask (N, K)."""
        return self.projection(_mean_state(states, state_mask))

    def to_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return dict(self._settings)


@register_adapter("mlp")
class MLPAdapter(nn.Module):
    """Project the mean of the states as LISA projects `[SEG]`: LayerNorm and two linear layers (arXiv:2308.00692).

    Args:
        input_dim: D, width of the language model.
        prompt_dim: C, width of the segmenter's prompt embeddings.
        hidden_dim: Width between the layers; `input_dim` when None.

    Example:
        >>> MLPAdapter(24, 16, hidden_dim=8).layers[1].weight.shape
        torch.Size([8, 24])
    """

    def __init__(self, input_dim: int, prompt_dim: int, *, hidden_dim: int | None = None) -> None:
        super().__init__()
        hidden = hidden_dim or input_dim
        self._settings = {"input_dim": input_dim, "prompt_dim": prompt_dim, "hidden_dim": hidden}
        self.layers = nn.Sequential(
            nn.LayerNorm(input_dim), nn.Linear(input_dim, hidden), nn.GELU(), nn.Linear(hidden, prompt_dim)
        )

    def forward(self, states: Tensor, state_mask: Tensor) -> Tensor:
        """Return prompts (N, P, C) for states (N, K, D) and their mask (N, K)."""
        return self.layers(_mean_state(states, state_mask))

    def to_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return dict(self._settings)


def _mean_state(states: Tensor, state_mask: Tensor) -> Tensor:
    """Average the states that exist: (N, K, D) to (N, 1, D)."""
    weight = state_mask.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)


def run_adapter(
    adapter: nn.Module, states: Tensor, state_mask: Tensor, features: ImageFeatures, index: Tensor, prompt_dim: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Call an adapter, and check what it returns.

    Args:
        adapter: Any adapter.
        states: (N, K, D).
        state_mask: (N, K).
        features: Of the unique images, for an adapter whose `forward` takes them.
        index: (N,) row of each mask's image.
        prompt_dim: C.

    Returns:
        Prompts (N, P, C), and its auxiliary outputs by name.

    Raises:
        SegRLError: Prompts or an auxiliary output of another shape, or an output named "mask".
    """
    images = {"features": features, "index": index}
    reads = "features" in inspect.signature(adapter.forward).parameters
    output = adapter(states, state_mask, **(images if reads else {}))
    prompts, aux = output if isinstance(output, tuple) else (output, {})
    name, count = type(adapter).__name__, len(states)
    got = _shape(prompts)
    if not isinstance(got, tuple) or len(got) != 3 or (got[0], got[2]) != (count, prompt_dim):
        raise SegRLError(f"adapter {name}: returned prompts {got}; expected shape ({count}, prompts, {prompt_dim})")
    if not isinstance(aux, dict):
        raise SegRLError(f"adapter {name}: returned auxiliary outputs {type(aux).__name__}; expected a dict")
    for key, value in aux.items():
        got = _shape(value)
        if key == "mask" or not isinstance(got, tuple) or got[:1] != (count,):
            raise SegRLError(
                f"adapter {name}: returned auxiliary output {key!r} {got}; expected shape ({count}, ...) and a name "
                "other than 'mask'"
            )
    return prompts, aux


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
