"""Fingerprints of frozen encoders, equal in every run, and the cache keys made from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from segrl.caching.content import raw_bytes

__all__ = ["EncoderFingerprint", "feature_key"]


class EncoderFingerprint:
    """Hash of class, settings and frozen weights of a segmenter; parts that train beside a frozen encoder do not count.

    The weights are read once, and again when any of them was replaced or changed in place. A change through `.data`
    that keeps the storage is not noticed. Where an engine shards the weights over processes (`hold`), neither is any
    other: place and version of a gathered weight say nothing, so the first whole ones are read, and no others until
    `forget`.

    Args:
        whole: Whether every weight counts, because nothing trains.

    Example:
        >>> class Scale(nn.Module):
        ...     image_size = 8
        ...     def __init__(self, value):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.tensor(value))
        >>> first, equal, other = (EncoderFingerprint(whole=True)(Scale(value)) for value in (1.0, 1.0, 2.0))
        >>> first == equal, first == other
        (True, False)
    """

    def __init__(self, whole: bool = False) -> None:
        self._whole = whole
        self._names: frozenset[str] = frozenset()
        self._stamp: Any = None
        self._value: str | None = None
        self.held = False

    def hold(self) -> None:
        """Read the weights once, when they are whole, because an engine moves them between its uses."""
        self.held = True

    def forget(self) -> None:
        """Read the weights anew: others were loaded."""
        self._stamp = self._value = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._whole,)  # a copy has weights of its own, and reads them

    def __call__(self, segmenter: nn.Module) -> str | None:
        """Return the fingerprint, or None where the weights have never been whole."""
        if self.held and self._value is not None:
            return self._value
        if any(self._is_elsewhere(tensor) for _, tensor in _tensors(segmenter)):
            return None
        if self._stamp is None or self._stamp != self._read_stamp(segmenter):
            self._names = frozenset(name for name, _ in _tensors(segmenter)) if self._whole else _frozen(segmenter)
            self._stamp, self._value = self._read_stamp(segmenter), self._hash(segmenter)
        return self._value

    def _is_elsewhere(self, tensor: Tensor) -> bool:
        """Return whether a tensor has not all of its values: a DTensor of FSDP2, a parameter that ZeRO-3 releases."""
        released = hasattr(tensor, "ds_id") and not (self.held and tensor.numel())
        return type(tensor.data) is not Tensor or released

    def _read_stamp(self, segmenter: nn.Module) -> tuple[Any, ...]:
        """Return values that change when a weight does, without reading the weight."""
        return id(segmenter), *(
            (name, tensor.data_ptr(), tensor.dtype, 0 if tensor.is_inference() else tensor._version)
            for name, tensor in _tensors(segmenter)
            if name in self._names
        )

    def _hash(self, segmenter: Any) -> str:
        kind = type(segmenter)
        config = segmenter.to_config() if hasattr(segmenter, "to_config") else None
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{kind.__module__}.{kind.__qualname__} {segmenter.image_size} {config}".encode())
        for name, tensor in sorted(_tensors(segmenter), key=lambda item: item[0]):
            if name in self._names:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(raw_bytes(tensor.clone()))  # numpy would pin the storage, which FSDP2 frees
        return digest.hexdigest()


def feature_key(encoder: str | None, content: str | None, device: str) -> str | None:
    """Return the cache key of features.

    Args:
        encoder: Fingerprint of the encoder.
        content: Content key of the image.
        device: Type of the device, "cpu" or "cuda"; its autocast precision is a part of the key.

    Returns:
        The key, or None if encoder or content is None: such features must not be kept.

    Example:
        >>> feature_key("e5f6", "0a1b", "cpu"), feature_key("e5f6", None, "cpu")
        ('e5f6 None 0a1b', None)
    """
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return None if encoder is None or content is None else f"{encoder} {precision} {content}"


def _tensors(segmenter: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from segmenter.named_parameters()
    yield from segmenter.named_buffers()


def _frozen(segmenter: Any) -> frozenset[str]:
    """Return the names of all buffers and of the parameters that `freeze` freezes with the encoder."""
    trains = {name: parameter.requires_grad for name, parameter in segmenter.named_parameters()}
    segmenter.freeze(encoder=True)
    names = {name for name, parameter in segmenter.named_parameters() if not parameter.requires_grad}
    for name, parameter in segmenter.named_parameters():
        parameter.requires_grad_(trains[name])
    return frozenset(names | {name for name, _ in segmenter.named_buffers()})
