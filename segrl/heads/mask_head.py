"""`MaskHead`: probe, adapter and segmenter as one module that rides on a language model's own forward passes.

The head is a submodule of the model and listens to the backbone (`attach.py`). It does nothing until it is asked:

- `head.decode_next(index, valid, inputs)`: the next backbone forward also decodes masks, with gradients, at these
  positions.
- `head.record()`: backbone states of a generation or of a scoring pass are kept, so that masks need no pass of their
  own.

"""

# B rows, T tokens, K probe states per mask, D language-model width, N masks, P prompts, C prompt width, h mask side

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segrl.caching.feature_cache import FeatureCache, encoding_batches
from segrl.caching.fingerprint import EncoderFingerprint, feature_key
from segrl.errors import CheckpointError, SegRLError
from segrl.heads.adapters import ADAPTERS, run_adapter
from segrl.heads.head_file import HEAD_CONFIG, HEAD_VERSION, HEAD_WEIGHTS, read_config
from segrl.heads.probes import PROBES
from segrl.heads.requests import MaskRequest, Recording, SegInput
from segrl.models.saved_files import ShapesOnly, check_counts, read_weights, require_shapes
from segrl.registry import Registry
from segrl.registry.parts import build_part, check_part, check_settings, part_config
from segrl.segmenters.base import ImageFeatures, Segmenter, evaluating
from segrl.segmenters.registry import SEGMENTERS

__all__ = ["MaskHead"]

_SEGMENTER_MEMBERS = (
    *("image_size", "mask_size", "prompt_dim"),
    *("preprocess", "encode", "decode", "decode_boxes", "freeze"),
)
MASK_PROMPT = "mask_prompt"  # the auxiliary output that also prompts the segmenter
_REGISTRIES = {"probe": PROBES, "adapter": ADAPTERS, "segmenter": SEGMENTERS}


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
    """Probe, adapter and segmenter: from hidden states at the probe's positions to mask logits.

    Args:
        probe: Which states prompt the segmenter (`SegTokenProbe`, `AnswerProbe`, or any callable with their signature).
        adapter: States (N, K, D) and their mask (N, K) to prompt embeddings (N, P, C); see `segrl.heads.adapters`.
        segmenter: See `segrl.segmenters.Segmenter`.
        freeze_encoder: Whether the image encoder is frozen. Features of a frozen one are computed once per image.
        cache: Where features of a frozen encoder outlive the rows they were computed for; the trainers make one of
            their settings. It is not saved with the head.

    Attributes:
        encoded_images: How many images went through the image encoder, for reports and tests.

    Raises:
        SegRLError: The segmenter lacks members; all are named.

    Example:
        >>> from segrl.heads import LinearAdapter, SegTokenProbe
        >>> from segrl.segmenters import Sam2Config, Sam2Segmenter
        >>> head = MaskHead(SegTokenProbe(3), LinearAdapter(24, 256), Sam2Segmenter(Sam2Config(image_size=64)))
        >>> image = SegInput(torch.zeros(3, 64, 64))
        >>> logits = head(torch.zeros(2, 1, 24), torch.ones(2, 1, dtype=torch.bool), [image, image])
        >>> logits.shape, head.encoded_images
        (torch.Size([2, 16, 16]), 1)
    """

    _hooks: list[Any]  # handles of the hooks on the model while the head is attached

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
        self._hooks = []
        self._checked: dict[str, Any] = {}  # descriptions that are known to rebuild their part
        self.encoded_images = 0
        self.freeze()

    @classmethod
    def build(
        cls,
        model,
        segmenter: Any,
        *,
        token_id: int,
        adapter: Any = "semantic_guided",
        probe: Any = "seg_token",
        tokenizer=None,
        freeze_encoder: bool = True,
        **adapter_settings: Any,
    ) -> MaskHead:
        """Build a head with a new adapter that fits `model` and `segmenter`.

        Each part is a name from `segrl parts list`, "module:Class", a class, or an object.

        Args:
            model: The language model; its text config gives D.
            segmenter: An object, or what is built without settings.
            token_id: Id of `<seg>`.
            adapter: Built as `Adapter(D, segmenter.prompt_dim, **adapter_settings)`.
            probe: Built from `{"token_id": token_id}`; "answer" also needs `tokenizer`.
            tokenizer: For probes that read text.
            freeze_encoder: See `MaskHead`.

        Raises:
            UnknownNameError: No such part.
            SegRLError: Settings for an adapter that is built already.
        """
        if isinstance(segmenter, str | type):
            segmenter = _found(SEGMENTERS, segmenter)()
        if isinstance(adapter, str | type):
            width = model.config.get_text_config().hidden_size
            adapter = _found(ADAPTERS, adapter)(width, segmenter.prompt_dim, **adapter_settings)
        elif adapter_settings:
            raise SegRLError(f"adapter settings {sorted(adapter_settings)}: {type(adapter).__name__} is built already")
        if isinstance(probe, str | type):
            probe = _built_probe(_found(PROBES, probe), token_id, tokenizer)
        return cls(probe, adapter, segmenter, freeze_encoder=freeze_encoder)

    def hold_fingerprint(self) -> None:
        """Read the frozen encoder's weights once for the keys of its features, as an engine moves them from now on."""
        self._fingerprint.hold()

    def freeze(self) -> None:
        """Set `requires_grad` of the head's parameters as `freeze_encoder` says (PEFT freezes all it does not know)."""
        for part in (self.probe, self.adapter):
            if isinstance(part, nn.Module):
                part.requires_grad_(True)
        self.segmenter.freeze(encoder=self.freeze_encoder)

    # ---- masks from states -------------------------------------------------------------------------------------------

    def features(self, inputs: Sequence[SegInput]) -> tuple[ImageFeatures, Tensor]:
        """Return features of the unique images among `inputs`, and for each input the row of its image.

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
            named = any(item.key is not None for item, _ in missing)  # those of inference have no name
            for batch in encoding_batches(missing, device.type, kept=named):
                encoded = self._encode([item for item, _ in batch])
                for n, (item, key) in enumerate(batch):
                    # a copy, since a slice would keep the whole batch alive; contiguous, as it comes back from disk
                    one = (t[n : n + 1].clone(memory_format=torch.contiguous_format) for t in encoded.tensors)
                    item.features = ImageFeatures(tuple(one))
                    if self.cache is not None and key is not None:
                        self.cache.put(key, item.features.tensors)

    def _cache_keys(self, items: Sequence[SegInput], device: str) -> list[str | None]:
        """Return the keys of these images' features: image, encoder and precision; None where none are kept."""
        wanted = self.cache is not None and any(item.key is not None for item in items)
        encoder = self._fingerprint(self.segmenter) if wanted else None
        return [feature_key(encoder, item.key, device) for item in items]

    def _encode(self, items: Sequence[SegInput]) -> ImageFeatures:
        parameter = next(self.segmenter.parameters())
        self.encoded_images += len(items)
        pixels = torch.stack([item.pixels for item in items]).to(parameter.device, parameter.dtype)
        return self.segmenter.encode(pixels)

    def forward(self, states: Tensor, valid: Tensor, inputs: Sequence[SegInput], *, joint: bool = False) -> Any:
        """Return mask logits (N, h, h).

        Args:
            states: (N, K, D).
            valid: (N, K), which of them exist.
            inputs: The image of each mask.
            joint: Whether to return also the adapter's auxiliary outputs, and a zero in whose graph every trainable
                parameter is. Engines that shard the head watch what goes into this call and what comes out of it.

        Raises:
            SegRLError: The adapter returned something else than (N, P, C) prompts and N rows of auxiliary outputs.
        """
        features, index = self.features(inputs)
        parameter = next(self.adapter.parameters(), states)
        states, valid = states.to(parameter.device, parameter.dtype), valid.to(parameter.device)
        prompts, aux = run_adapter(self.adapter, states, valid, features, index, self.segmenter.prompt_dim)
        logits = self.segmenter.decode(features, prompts, index, **self._mask_prompt(aux))
        if not joint:
            return logits
        # every trainable parameter takes part in every forward, so that no rank waits for a gradient that never comes
        touch = sum((p.reshape(-1)[:1].sum() * 0 for p in self.parameters() if p.requires_grad), logits.sum() * 0)
        return logits, aux, touch

    def _mask_prompt(self, aux: dict[str, Tensor]) -> dict[str, Tensor]:
        if MASK_PROMPT not in aux:
            return {}
        if MASK_PROMPT not in inspect.signature(self.segmenter.decode).parameters:
            raise SegRLError(
                f"adapter {type(self.adapter).__name__}: returned {MASK_PROMPT!r}, which "
                f"{type(self.segmenter).__name__}.decode does not take; give it another name, or the segmenter that "
                "argument"
            )
        return {MASK_PROMPT: aux[MASK_PROMPT]}

    # ---- riding on the backbone --------------------------------------------------------------------------------------

    @contextmanager
    def decode_next(
        self, index: Tensor, valid: Tensor, inputs: Sequence[SegInput | None], last: int | None = None
    ) -> Iterator[MaskRequest]:
        """Inside the context the next backbone forward decodes masks at positions `index` "B K"; see `MaskRequest`."""
        self._request = request = MaskRequest(index, valid, inputs, last)
        try:
            yield request
        finally:
            self._request = None

    @property
    def is_asked(self) -> bool:
        """Whether the next backbone forward decodes masks."""
        return self._request is not None

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
        seen = torch.tensor([item is not None for item in request.inputs], device=request.valid.device)
        rows = (request.valid.any(1) & seen).nonzero()[:, 0]
        # without any mask the head still runs, with weight zero
        anchor = rows if len(rows) else seen.int().argmax(keepdim=True)
        skipped = 0 if request.last is None else states.size(1) - request.last
        index = (request.index[anchor] + skipped).unsqueeze(-1).expand(-1, -1, states.size(-1))
        valid = request.valid[anchor].clone()
        valid[:, 0] |= ~valid.any(1)
        chosen = states[anchor].gather(1, index)
        observe: Any = getattr(self.adapter, "observe", None)
        if observe is not None and self.training and torch.is_grad_enabled():
            observe(chosen[request.valid[anchor] & bool(len(rows))])
        images = [request.inputs[n] or self._blank() for n in anchor.tolist()]
        logits, aux, touch = self(chosen, valid, inputs=images, joint=True)
        request.rows, request.logits = rows, logits[: len(rows)]
        request.aux = {name: value[: len(rows)] for name, value in aux.items()}
        return _Tie.apply(states, touch) if touch.requires_grad else states

    def _blank(self) -> SegInput:
        """A black image, for a batch in which no row has an image."""
        return SegInput(torch.zeros(3, self.segmenter.image_size, self.segmenter.image_size))

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike, state: Mapping[str, Tensor] | None = None) -> None:
        """Write `mask_head.json` and `mask_head.safetensors` (frozen weights too) beside the model's files.

        Args:
            folder: The folder; it is created where it does not exist.
            state: The weights, where the module itself has only a part of them; None: those of the module.

        Raises:
            CheckpointError: See `check_saving`; then nothing is written.
        """
        from safetensors.torch import save_file

        self.check_saving()
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict() if state is None else state
        state = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
        save_file(state, path / HEAD_WEIGHTS, metadata={"format": "pt"})
        (path / HEAD_CONFIG).write_text(json.dumps(self.to_config(), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def check_saving(self) -> None:
        """Build every part anew from its description, once for each description, so that a file can be read later.

        Raises:
            CheckpointError: A part's `to_config` does not rebuild it; part and fix are named.
        """
        context = {"tokenizer": getattr(self.probe, "tokenizer", None)}
        for name, registry in _REGISTRIES.items():
            part = getattr(self, name)
            if self._checked.get(name) != (type(part), _settings(part)):
                check_part(registry, part, context)
                self._checked[name] = type(part), _settings(part)

    def to_config(self) -> dict[str, Any]:
        """Return a JSON-ready description: version, whether the encoder is frozen, and each part's type and settings.

        Raises:
            SegRLError: A part's class is local and not registered.
        """
        parts = {name: part_config(registry, getattr(self, name)) for name, registry in _REGISTRIES.items()}
        return {"version": HEAD_VERSION, "freeze_encoder": self.freeze_encoder, **parts}

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, tokenizer=None, head: MaskHead | None = None) -> MaskHead:
        """Read the head that `save_pretrained` wrote, with its weights.

        Args:
            folder: Where its files are.
            tokenizer: For probes that read text.
            head: A head built in code, into which only the weights are loaded.

        Raises:
            CheckpointError: A file is missing, damaged or of a newer segrl, or a part cannot be found or built; file
                and key are named.
        """
        if head is None:
            path = Path(folder) / HEAD_CONFIG
            config = read_config(path, _REGISTRIES)
            _require_sizes(Path(folder), config, tokenizer)
            head = cls(**_built_parts(path, config, tokenizer), freeze_encoder=config["freeze_encoder"])
        head.load_weights(folder)
        return head

    def load_weights(self, folder: str | os.PathLike) -> None:
        """Load `mask_head.safetensors` of a folder into this head.

        Raises:
            CheckpointError: No such file, a damaged one, or a weight missing, unexpected or of another shape.
        """
        path = _weights_file(Path(folder))
        self._fingerprint.forget()
        try:
            self.load_state_dict(read_weights(path))
        except RuntimeError as error:
            raise CheckpointError(f"{path}: does not fit this head: {' '.join(str(error).split())}") from error


def _weights_file(folder: Path) -> Path:
    if not (folder / HEAD_WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: no {HEAD_WEIGHTS}; expected a folder written by a segrl trainer")
    return folder / HEAD_WEIGHTS


def _built_parts(path: Path, config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    parts = {}
    for name, registry in _REGISTRIES.items():
        try:
            parts[name] = build_part(registry, config[name], {"tokenizer": tokenizer})
            check_settings(parts[name], config[name])
        except Exception as error:  # whatever a part's class raises
            reason = f"{error}" if isinstance(error, SegRLError) else f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{path}: {name}: {reason}; or pass head=, a head built in code") from error
    return parts


def _require_sizes(folder: Path, config: dict[str, Any], tokenizer: Any) -> None:
    """Compare what `mask_head.json` describes with the weights in the file, before anything of that size is made.

    A part that cannot be built without memory for its weights is left to `load_weights`.
    """
    weights = _weights_file(folder)
    own = {name: part for name, part in config.items() if isinstance(part, dict) and ":" not in part["type"]}
    check_counts(folder / HEAD_CONFIG, own, weights)
    shapes: dict[str, Any] = {}
    for name, part in _parts_without_memory(folder / HEAD_CONFIG, config, tokenizer).items():
        if part is None:
            return
        if isinstance(part, nn.Module):
            shapes |= {f"{name}.{key}": value.shape for key, value in part.state_dict().items()}
    require_shapes(weights, shapes)


def _parts_without_memory(path: Path, config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    try:
        with torch.random.fork_rng(devices=[]), ShapesOnly():
            return _built_parts(path, config, tokenizer)
    except CheckpointError as error:
        if isinstance(error.__cause__, SegRLError | TypeError | KeyError):
            raise  # wrong settings, wherever the part is built
        return {"": None}


def _found(registry: Registry, part: str | type) -> Any:
    return registry.get(part) if isinstance(part, str) else part


def _built_probe(made: Any, token_id: int, tokenizer: Any) -> Any:
    if inspect.isfunction(made):
        return made
    if hasattr(made, "from_config"):
        return made.from_config({"token_id": token_id}, tokenizer=tokenizer)
    return made(token_id=token_id)


def _settings(part: Any) -> Any:
    return part.to_config() if hasattr(part, "to_config") else None
