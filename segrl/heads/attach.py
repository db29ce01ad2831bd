"""Put a `MaskHead` on an instance of any vision-language model, find it there, and take it off.

The model's class, `forward` and checkpoint layout stay what they are: a subclass would lose the key renames that
transformers registers per class, and TRL replaces `forward` of the instance. The head listens to a forward hook of
the **backbone**, the one call that generation, scoring and the loss share, through PEFT, DDP and a fused
language-model head alike.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from segrl.errors import SegRLError
from segrl.heads.mask_head import MaskHead
from segrl.models.backbone import base_instance

__all__ = ["attach_mask_head", "detach_mask_head", "find_mask_head", "without_prefix"]

_ATTRIBUTE = "mask_head"


def attach_mask_head(model: Any, head: MaskHead) -> Any:
    """Make `head` the submodule `mask_head` of `model` and let it listen to the backbone.

    Args:
        model: Any transformers causal vision-language model, or one wrapped by PEFT.
        head: The head; it is moved to the model's device.

    Returns:
        `model`.

    Raises:
        SegRLError: The model already has a head, or has no backbone that returns `last_hidden_state`.

    Example:
        >>> from segrl.heads import LinearAdapter, SegTokenProbe
        >>> from segrl.models import tiny_qwen2_5_vl
        >>> from segrl.segmenters import Sam2Segmenter
        >>> model, _ = tiny_qwen2_5_vl()
        >>> head = MaskHead(SegTokenProbe(3), LinearAdapter(128, 256), Sam2Segmenter())
        >>> attach_mask_head(model, head).mask_head is head
        True
    """
    base = base_instance(model)
    if find_mask_head(model) is not None:
        raise SegRLError(
            f"{type(base).__name__} already has a mask head; detach it first (segrl.heads.detach_mask_head)"
        )
    backbone = getattr(base, getattr(base, "base_model_prefix", "") or "model", None)
    if not isinstance(backbone, nn.Module) or backbone is base:
        raise SegRLError(
            f"{type(base).__name__} has no backbone under base_model_prefix="
            f"{getattr(base, 'base_model_prefix', None)!r}"
        )
    device = next(backbone.parameters()).device
    if any(tensor.device != device for tensor in head.state_dict().values()):
        head.to(device)
    base.add_module(_ATTRIBUTE, head)
    head._hooks = [backbone.register_forward_hook(_BackboneHook(head))]
    if hasattr(head.probe, "embed"):
        head._hooks.append(base.get_input_embeddings().register_forward_hook(_EmbeddingHook(head)))
    return model


def find_mask_head(model: Any) -> MaskHead | None:
    """Return the head on `model` (through PEFT), or None.

    Example:
        >>> from segrl.heads import LinearAdapter, SegTokenProbe
        >>> from segrl.models import tiny_qwen2_5_vl
        >>> from segrl.segmenters import Sam2Config, Sam2Segmenter
        >>> model, _ = tiny_qwen2_5_vl()
        >>> head = MaskHead(SegTokenProbe(3), LinearAdapter(128, 256), Sam2Segmenter(Sam2Config(image_size=64)))
        >>> find_mask_head(model), find_mask_head(attach_mask_head(model, head)) is head
        (None, True)
    """
    head = getattr(base_instance(model), _ATTRIBUTE, None)
    return head if isinstance(head, MaskHead) else None


def detach_mask_head(model: Any) -> MaskHead | None:
    """Take the head off `model` and return it, or None if there is none.

    Example:
        >>> from segrl.heads import LinearAdapter, SegTokenProbe
        >>> from segrl.models import tiny_qwen2_5_vl
        >>> from segrl.segmenters import Sam2Config, Sam2Segmenter
        >>> model, _ = tiny_qwen2_5_vl()
        >>> head = MaskHead(SegTokenProbe(3), LinearAdapter(128, 256), Sam2Segmenter(Sam2Config(image_size=64)))
        >>> detach_mask_head(attach_mask_head(model, head)) is head, detach_mask_head(model)
        (True, None)
    """
    base, head = base_instance(model), find_mask_head(model)
    if head is not None:
        for hook in head._hooks:
            hook.remove()
        head._hooks = []
        delattr(base, _ATTRIBUTE)
    return head


class _EmbeddingHook:
    """Lets a probe put learned queries in the place of the embeddings of their token."""

    def __init__(self, head: MaskHead) -> None:
        self.head = head

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.head.probe.embed(args[0], output) if args else output


class _BackboneHook:
    """A forward hook as an object, so that a model with a head can be copied and pickled."""

    def __init__(self, head: MaskHead) -> None:
        self.head = head

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output.last_hidden_state
        replaced = self.head.on_backbone(states)
        if replaced is states:
            return output
        if isinstance(output, tuple):
            return (replaced, *output[1:])
        output["last_hidden_state"] = replaced
        return output


def without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's state dict without the head's keys."""
    return {key: value for key, value in state.items() if f"{_ATTRIBUTE}." not in key}
