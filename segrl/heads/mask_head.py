"""`MaskHead`: probe, adapter and segmenter as one module that rides on a language model's own forward passes.

The head is a submodule of the model and listens to the backbone (`attach.py`). It does nothing until it is asked:

- `head.decode_next(index, valid, inputs)`: the next backbone forward also decodes masks, with gradients, at these
  positions.
- `head.record()`: backbone states of a generation or of a scoring pass are kept, so that masks need no pass of their
  own.

Shape legend: B rows, T tokens, K probe states per mask, D language-model width, N masks, C prompt width, h mask side.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segrl.caching.feature_cache import FeatureCache
from segrl.caching.fingerprint import EncoderFingerprint, feature_key
from segrl.errors import CheckpointError, SegRLError, unknown_name
from segrl.heads.adapters import LinearAdapter, MLPAdapter, SemanticGuidedAdapter
from segrl.heads.probes import AnswerProbe, SegTokenProbe
from segrl.segmenters.base import ImageFeatures, Segmenter, evaluating
from segrl.segmenters.sam2 import Sam2Config, Sam2Segmenter

_SEGMENTER_MEMBERS = (
    *("image_size", "mask_size", "prompt_dim"),
    *("preprocess", "encode", "decode", "decode_boxes", "freeze"),
)
HEAD_CONFIG, HEAD_WEIGHTS = "mask_head.json", "mask_head.safetensors"
_PROBES: dict[str, type] = {"seg_token": SegTokenProbe, "answer": AnswerProbe}
_ADAPTERS: dict[str, type[nn.Module]] = {
    "semantic_guided": SemanticGuidedAdapter,
    "linear": LinearAdapter,
    "mlp": MLPAdapter,
}


class SegInput:
    """What the segmenter needs of one image; shared by every completion on it, so that an image is encoded once.

    Args:
        pixels: the segmenter's input, "3 S S" (`Segmenter.preprocess`), or a function that makes it, called once and
            only if the image has to be encoded.
        features: features of this one image, kept when the encoder is frozen.
        target: what a dense loss compares with, "h h" uint8, 255 = foreground; None without truth.
        same_image: the first `SegInput` of this image, where another question about it has another target; its pixels
            and features serve both.
        key: hash of the image's content, under which `MaskHead.cache` keeps its features; None: this object only.
    """

    def __init__(
        self,
        pixels: Tensor | Callable[[], Tensor],
        features: ImageFeatures | None = None,
        target: Tensor | None = None,
        same_image: SegInput | None = None,
        key: str | None = None,
    ) -> None:
        self._pixels = pixels
        self.features, self.target, self.same_image, self.key = features, target, same_image, key

    @property
    def pixels(self) -> Tensor:
        if callable(self._pixels):
            self._pixels = self._pixels() if self.same_image is None else self.same_image.pixels
        return self._pixels

    def __getstate__(self) -> dict[str, Any]:
        """For another process: a data loader's worker sends pixels, not the segmenter that makes them."""
        return {**self.__dict__, "_pixels": self.pixels}


@dataclass(eq=False)
class MaskRequest:
    """Masks wanted from the next forward, and where they arrive.

    Attributes:
        index, valid: positions of the probe's states, "B K", and which of them exist.
        last: positions count within the last so many tokens of each row; None: within all of them.
        inputs: the image of each row; the same object for the same image.
        rows: rows that have a mask, "N"; set by the forward.
        logits: mask logits "N h h" of these rows, with gradients; set by the forward.
    """

    index: Tensor
    valid: Tensor
    inputs: Sequence[SegInput]
    last: int | None = None
    rows: Tensor | None = None
    logits: Tensor | None = None


@dataclass(eq=False)
class Recording:
    """Backbone states of the forwards inside `MaskHead.record`, one tensor "B T D" per forward."""

    last_only: bool
    calls: list[Tensor] = field(default_factory=list)


class _Tie(torch.autograd.Function):
    """Identity on `states` that also depends on `extra` (with zero gradient).

    The masks leave the forward through a `MaskRequest`, unseen by DDP, which looks for used parameters in the graph
    of the forward's outputs. With the tie they are in that graph.
    """

    @staticmethod
    def forward(ctx, states: Tensor, extra: Tensor) -> Tensor:
        ctx.extra = extra.shape, extra.dtype, extra.device
        return states.view_as(states)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.extra
        return grads[0], torch.zeros(shape, dtype=dtype, device=device)


class MaskHead(nn.Module):
    """From hidden states at the probe's positions to mask logits.

    Args:
        probe: which states prompt the segmenter (`SegTokenProbe`, `AnswerProbe`, or any callable with their signature).
        adapter: states "N K D" and their mask "N K" to prompt embeddings "N P C".
        segmenter: see `segrl.segmenters.Segmenter`.
        freeze_encoder: train the image encoder or not. Features of a frozen encoder are computed once per unique image.
        cache: where features of a frozen encoder outlive the rows they were computed for; the trainers make one of
            their settings. It is not saved with the head.
    """

    _hook: Any  # handle of the backbone's hook while the head is attached

    def __init__(
        self,
        probe,
        adapter: nn.Module,
        segmenter: nn.Module,
        *,
        freeze_encoder: bool = True,
        cache: FeatureCache | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(segmenter, Segmenter):
            missing = [name for name in _SEGMENTER_MEMBERS if not hasattr(segmenter, name)]
            raise SegRLError(
                f"segmenter={type(segmenter).__name__}: not a segrl.segmenters.Segmenter, it lacks {missing}; add them"
            )
        self.probe, self.adapter = probe, adapter
        self.segmenter: Any = segmenter
        self.freeze_encoder = freeze_encoder
        self.cache, self._fingerprint = cache, EncoderFingerprint()
        self._request: MaskRequest | None = None
        self._recording: Recording | None = None
        self.encoded_images = 0  # how many images went through the encoder, for reports and tests
        self.freeze()

    @classmethod
    def build(
        cls,
        model,
        segmenter: nn.Module,
        *,
        token_id: int,
        adapter: str = "semantic_guided",
        probe: str = "seg_token",
        tokenizer=None,
        freeze_encoder: bool = True,
        **adapter_settings: Any,
    ) -> MaskHead:
        """A head with a new adapter that fits `model` and `segmenter`.

        Args:
            model: the language model; its text config gives D.
            token_id: id of `<seg>`.
            adapter: `semantic_guided`, `linear` or `mlp`; `adapter_settings` go to its class.
            probe: `seg_token` or `answer` (needs `tokenizer`).
        """
        if adapter not in _ADAPTERS:
            raise unknown_name("adapter", adapter, _ADAPTERS)
        width = model.config.get_text_config().hidden_size
        built: Any = _ADAPTERS[adapter]
        return cls(
            _build_probe(probe, {"token_id": token_id}, tokenizer),
            built(width, segmenter.prompt_dim, **adapter_settings),
            segmenter,
            freeze_encoder=freeze_encoder,
        )

    def freeze(self) -> None:
        """Set `requires_grad` of the head's parameters as `freeze_encoder` says (PEFT freezes all it does not know)."""
        self.adapter.requires_grad_(True)
        self.segmenter.freeze(encoder=self.freeze_encoder)

    # ---- masks from states -------------------------------------------------------------------------------------------

    def features(self, inputs: Sequence[SegInput]) -> tuple[ImageFeatures, Tensor]:
        """Features of the unique images among `inputs`, and for each input the row of its image.

        A frozen encoder runs once per image, in evaluation mode and without gradients, and leaves its result in the
        `SegInput` and in the cache.
        """
        inputs = [item.same_image or item for item in inputs]
        unique: dict[Any, SegInput] = {}
        for item in inputs:
            unique.setdefault(item.key or id(item), item)
        row = {name: n for n, name in enumerate(unique)}
        device = next(self.segmenter.parameters()).device
        index = torch.tensor([row[item.key or id(item)] for item in inputs], device=device, dtype=torch.long)
        items = list(unique.values())
        if not self.freeze_encoder:
            return self._encode(items), index
        self._fill(items, device)
        return ImageFeatures.cat([item.features for item in items if item.features is not None]), index

    def _fill(self, items: Sequence[SegInput], device: torch.device) -> None:
        """Give every item the features of the frozen encoder: its own, the cache's, or new ones."""
        todo = [item for item in items if item.features is None]
        keys = self._cache_keys(todo, device.type)
        for item, key in zip(todo, keys, strict=True):
            found = self.cache.get(key, device) if self.cache is not None and key is not None else None
            item.features = None if found is None else ImageFeatures(found)
        missing = [(item, key) for item, key in zip(todo, keys, strict=True) if item.features is None]
        if not missing:
            return
        with evaluating(self.segmenter), torch.inference_mode(False), torch.no_grad():
            encoded = self._encode([item for item, _ in missing])
            for n, (item, key) in enumerate(missing):
                # a copy, since a slice would keep the whole batch alive; contiguous, as it comes back from disk
                one = (t[n : n + 1].clone(memory_format=torch.contiguous_format) for t in encoded.tensors)
                item.features = ImageFeatures(tuple(one))
                if self.cache is not None and key is not None:
                    self.cache.put(key, item.features.tensors)

    def _cache_keys(self, items: Sequence[SegInput], device: str) -> list[str | None]:
        """What features of these images are kept under: image, encoder and precision; None where they are not kept."""
        wanted = self.cache is not None and any(item.key is not None for item in items)
        encoder = self._fingerprint(self.segmenter) if wanted else None
        return [feature_key(encoder, item.key, device) for item in items]

    def _encode(self, items: Sequence[SegInput]) -> ImageFeatures:
        parameter = next(self.segmenter.parameters())
        self.encoded_images += len(items)
        pixels = torch.stack([item.pixels for item in items]).to(parameter.device, parameter.dtype)
        return self.segmenter.encode(pixels)

    def forward(self, states: Tensor, valid: Tensor, inputs: Sequence[SegInput]) -> Tensor:
        """Mask logits "N h h" from states "N K D", their validity "N K" and the image of each."""
        features, index = self.features(inputs)
        parameter = next(self.adapter.parameters())
        prompts = self.adapter(states.to(parameter.device, parameter.dtype), valid.to(parameter.device))
        return self.segmenter.decode(features, prompts, index)

    # ---- riding on the backbone --------------------------------------------------------------------------------------

    @contextmanager
    def decode_next(
        self, index: Tensor, valid: Tensor, inputs: Sequence[SegInput], last: int | None = None
    ) -> Iterator[MaskRequest]:
        """Inside the context the next backbone forward decodes masks at positions `index` "B K"; see `MaskRequest`."""
        self._request = request = MaskRequest(index, valid, inputs, last)
        try:
            yield request
        finally:
            self._request = None

    @contextmanager
    def record(self, *, last_only: bool = False) -> Iterator[Recording]:
        """Keep the backbone's states of every forward inside; `last_only` keeps one state per forward (generation)."""
        self._recording = recording = Recording(last_only)
        try:
            yield recording
        finally:
            self._recording = None

    def on_backbone(self, states: Tensor) -> Tensor:
        """Called with the backbone's last hidden states "B T D" at each forward; returns what replaces them."""
        if self._recording is not None:
            kept = states.detach()
            # a slice would keep the whole tensor alive
            self._recording.calls.append(kept[:, -1:].clone() if self._recording.last_only else kept)
        request, self._request = self._request, None
        if request is None:
            return states
        if len(states) != len(request.index):
            raise SegRLError(
                f"masks were asked for {len(request.index)} rows, the forward has {len(states)}: the batch was split "
                "or packed, which a mask head does not support here"
            )
        rows = request.valid.any(1).nonzero()[:, 0]
        anchor = rows if len(rows) else rows.new_zeros(1)  # without any mask the head still runs, with weight zero
        skipped = 0 if request.last is None else states.size(1) - request.last
        index = (request.index[anchor] + skipped).unsqueeze(-1).expand(-1, -1, states.size(-1))
        valid = request.valid[anchor].clone()
        valid[:, 0] |= ~valid.any(1)
        chosen = states[anchor].gather(1, index)
        observe: Any = getattr(self.adapter, "observe", None)
        if observe is not None and self.training and torch.is_grad_enabled():
            observe(chosen[request.valid[anchor]])
        logits = self(chosen, valid, [request.inputs[n] for n in anchor.tolist()])
        request.rows, request.logits = rows, logits[: len(rows)]
        # every trainable parameter takes part in every forward, so that no rank waits for a gradient that never comes
        touch = sum((p.reshape(-1)[:1].sum() * 0 for p in self.parameters() if p.requires_grad), logits.sum() * 0)
        return _Tie.apply(states, touch) if torch.is_tensor(touch) and touch.requires_grad else states

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `mask_head.json` and `mask_head.safetensors` (frozen weights too) beside the model's files."""
        from safetensors.torch import save_file

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous().clone() for name, value in self.state_dict().items()}
        save_file(state, path / HEAD_WEIGHTS, metadata={"format": "pt"})
        (path / HEAD_CONFIG).write_text(json.dumps(self.to_config(), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def to_config(self) -> dict[str, Any]:
        """JSON-ready description. A part of a class that segrl does not know is described by its name only."""
        return {
            "probe": {"type": _type_name(_PROBES, self.probe), **_settings(self.probe)},
            "adapter": {"type": _type_name(_ADAPTERS, self.adapter), **_settings(self.adapter)},
            "segmenter": {"type": type(self.segmenter).__name__, **_settings(self.segmenter)},
            "freeze_encoder": self.freeze_encoder,
        }

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, tokenizer=None) -> MaskHead:
        """The head that `save_pretrained` wrote, with its weights.

        Raises:
            CheckpointError: a file is missing, or a part has a class that segrl does not know: build that head in
                code and call `load_weights`.
        """
        path = Path(folder) / HEAD_CONFIG
        if not path.is_file():
            raise CheckpointError(f"{folder}: no {HEAD_CONFIG}; expected a folder written by a segrl trainer")
        config = json.loads(path.read_text(encoding="utf-8"))
        parts = {name: dict(config[name]) for name in ("probe", "adapter", "segmenter")}
        names = {name: part.pop("type") for name, part in parts.items()}
        if (
            names["adapter"] not in _ADAPTERS
            or names["probe"] not in _PROBES
            or names["segmenter"] != Sam2Segmenter.__name__
        ):
            raise CheckpointError(
                f"{path}: made of parts of your own ({names}); build the head in code, then call "
                f"head.load_weights({str(folder)!r})"
            )
        adapter: Any = _ADAPTERS[names["adapter"]]
        head = cls(
            _build_probe(names["probe"], parts["probe"], tokenizer),
            adapter(**parts["adapter"]),
            Sam2Segmenter(Sam2Config(**parts["segmenter"])),
            freeze_encoder=config["freeze_encoder"],
        )
        head.load_weights(folder)
        return head

    def load_weights(self, folder: str | os.PathLike) -> None:
        """Load `mask_head.safetensors` of a folder into this head.

        Raises:
            CheckpointError: no such file, or a weight missing, unexpected or of another shape.
        """
        from safetensors.torch import load_file

        path = Path(folder) / HEAD_WEIGHTS
        if not path.is_file():
            raise CheckpointError(f"{folder}: no {HEAD_WEIGHTS}; expected a folder written by a segrl trainer")
        try:
            self.load_state_dict(load_file(path))
        except RuntimeError as error:
            raise CheckpointError(f"{path}: does not fit this head: {' '.join(str(error).split())}") from error


def _build_probe(name: str, settings: dict[str, Any], tokenizer) -> Any:
    if name not in _PROBES:
        raise unknown_name("probe", name, _PROBES)
    if name == "answer":
        if tokenizer is None:
            raise SegRLError("probe 'answer' looks for <answer> in the text of the tokens: pass tokenizer=")
        settings = {**settings, "tokenizer": tokenizer}
    return _PROBES[name](**settings)


def _type_name(known: dict[str, type], part: Any) -> str:
    return next((name for name, kind in known.items() if type(part) is kind), type(part).__name__)


def _settings(part: Any) -> dict[str, Any]:
    return part.to_config() if hasattr(part, "to_config") else {}
