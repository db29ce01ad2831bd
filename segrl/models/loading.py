"""Load a vision-language model, complete or not at all, and give it a segmentation token.

If the keys of a checkpoint do not fit the model, transformers leaves the missing weights random and only warns. Here
that is an error. The model class is always the original one of transformers, found by the Auto classes: the renaming of
old checkpoint keys is registered per class, so a subclass would silently lose the language model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from tokenizers import AddedToken
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils.peft_utils import find_adapter_config_file

from segrl.errors import CheckpointError, SegRLError, unknown_name
from segrl.models.agreement import check_processor
from segrl.models.saved_files import check_saved_files

__all__ = ["ensure_seg_token", "language_model_lora", "load_vlm", "restore_weights", "seg_token_id"]

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_LISTED_KEYS = 20


def load_vlm(
    name_or_path: str,
    *,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    seg_token: str | None = "<seg>",
    device_map: Any = None,
    processor_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, Any]:
    """Load a vision-language model and its processor, complete, with a segmentation token in the vocabulary.

    All weights of the model must be in the checkpoint, with their shapes; other weights in it, such as those of a mask
    head saved along with the model, are ignored. Code from the hub is not run unless ``trust_remote_code=True`` is
    given.

    Args:
        name_or_path: A hub name or a folder.
        dtype: A torch dtype or its name; by default the checkpoint's own.
        attn_implementation: For example "sdpa" or "flash_attention_2"; transformers' choice by default.
        seg_token: Token for `ensure_seg_token`; None leaves the vocabulary alone.
        device_map: As in transformers, for example "auto" or {"": 0}; the CPU by default.
        processor_kwargs: More arguments for the processor only, for example ``{"max_pixels": 512 * 512}``.
        **kwargs: More arguments for ``AutoModelForImageTextToText.from_pretrained``. Those that locate the files
            (`revision`, `token`, `subfolder`, ...) and `trust_remote_code` are given to the processor as well.

    Returns:
        Model (the original transformers class, in eval mode) and processor.

    Raises:
        CheckpointError: If a weight is missing or has the wrong shape (a tied weight need not be there), or if the
            folder holds a PEFT adapter, whose base model could not be checked, or a damaged file.
        SegRLError: If the processor is not the model's, see `check_processor`, or cannot take the segmentation token,
            see `ensure_seg_token`.
        OSError: From transformers, if files are missing.

    Example:
        >>> import tempfile
        >>> from segrl.models import tiny_qwen2_5_vl
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for part in tiny_qwen2_5_vl(layers=1, vision_layers=1, tag_tokens=[]):
        ...         _ = part.save_pretrained(folder)
        ...     model, processor = load_vlm(folder)
        >>> type(model).__name__, processor.tokenizer.tokenize("A cyst.<seg>")[-1]
        ('Qwen2_5_VLForConditionalGeneration', '<seg>')
    """
    kwargs.setdefault("trust_remote_code", False)  # transformers' own default asks at the terminal
    check_saved_files(name_or_path)
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    if find_adapter_config_file(name_or_path, **hub) is not None:
        raise CheckpointError(
            f"{name_or_path!r} holds a PEFT adapter (adapter_config.json), expected the weights of a whole model; "
            "load the base model with load_vlm, then the adapter with peft.PeftModel.from_pretrained(model, path)"
        )
    settings = {"dtype": dtype, "attn_implementation": attn_implementation, "device_map": device_map}
    processor = AutoProcessor.from_pretrained(
        name_or_path, **hub, trust_remote_code=kwargs["trust_remote_code"], **(processor_kwargs or {})
    )
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        name_or_path,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that the error below can name every one of them
        **{key: value for key, value in settings.items() if value is not None},
        **kwargs,
    )
    model, info = loaded
    _require_complete(name_or_path, type(model).__name__, info)
    check_processor(model, processor)
    if seg_token is not None:
        ensure_seg_token(model, processor, seg_token)
    return model, processor


def restore_weights(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Load all weights that `model.save_pretrained(folder)` wrote back into `model`.

    `save_pretrained` writes the hub's names of the weights, which differ from those of the module in Qwen2.5-VL, LLaVA
    and others, so that `torch.nn.Module.load_state_dict` finds none of them; transformers renames them here.

    Args:
        model: A transformers model, on any device; changed in place.
        folder: Holds `config.json` and the weights, in one file or in shards.

    Raises:
        CheckpointError: If a weight is missing or has the wrong shape.

    Example:
        >>> import tempfile
        >>> from segrl.models import tiny_causal_lm
        >>> model, _ = tiny_causal_lm(layers=1)
        >>> weight = model.lm_head.weight
        >>> before = weight.detach().clone()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     _ = torch.nn.init.zeros_(weight)
        ...     restore_weights(model, folder)
        >>> torch.equal(weight, before)
        True
    """
    model_class: Any = type(model)
    check_saved_files(folder)
    with torch.random.fork_rng():
        loaded, info = model_class.from_pretrained(
            str(folder), dtype=model.dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    _require_complete(str(folder), model_class.__name__, info)
    try:
        model.load_state_dict(loaded.state_dict())
    except RuntimeError as error:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} is of another {model_class.__name__} than the one in memory: "
            f"{' '.join(str(error).split())}"
        ) from error


def ensure_seg_token(model: PreTrainedModel, processor: Any, seg_token: str = "<seg>") -> int:
    """Make `seg_token` one normal token of the tokenizer and give it a row in the model's embeddings.

    Normal means ``special=False``: decoding with ``skip_special_tokens=True``, as TRL does before it calls the rewards,
    keeps the token. A token that exists keeps its id; a special one is made normal. If the vocabulary is padded
    (Qwen2.5-VL), a new token takes a spare row of the embeddings, whose weights do not change. Otherwise the embeddings
    grow, and the new rows of the input and output embeddings are the mean of the old ones. Calling it again changes
    nothing.

    Args:
        model: Any transformers model with token embeddings; changed in place.
        processor: The model's processor or tokenizer; changed in place.
        seg_token: The token's text.

    Returns:
        The token's id.

    Raises:
        SegRLError: If the text is empty or has spaces around it, if the tokenizer splits it nevertheless, or if the id
            that it gets is that of image or video placeholders.

    Example:
        >>> from segrl.models import tiny_causal_lm
        >>> model, tokenizer = tiny_causal_lm(layers=1, tag_tokens=[], spare_rows=0)
        >>> rows = len(model.lm_head.weight)
        >>> ensure_seg_token(model, tokenizer) == rows, len(model.lm_head.weight) - rows
        (True, 1)
    """
    if not seg_token or seg_token != seg_token.strip():
        raise SegRLError(f"seg_token is {seg_token!r}, expected a text without spaces around it, for example '<seg>'")
    tokenizer = _tokenizer_of(processor)
    _add_normal_token(tokenizer, seg_token)
    token_id = seg_token_id(tokenizer, seg_token)
    for name in _PLACEHOLDERS:
        if getattr(model.config, name, None) == token_id:
            raise SegRLError(
                f"seg_token {seg_token!r} got id {token_id}, which is the model's {name}: the tokenizer lacks the "
                "placeholder token; add that to the tokenizer first, at the id that the model's config gives"
            )
    if token_id >= _embedding_rows(model):
        _grow_embeddings(model, max(token_id + 1, len(tokenizer)))
    return token_id


def seg_token_id(processor: Any, seg_token: str = "<seg>") -> int:
    """Look up the id of the segmentation token.

    Args:
        processor: A processor or tokenizer.
        seg_token: The token's text.

    Returns:
        The id.

    Raises:
        SegRLError: If the token is absent or if the tokenizer splits it into several tokens inside a text.

    Example:
        >>> from segrl.models import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> tokenizer.decode([seg_token_id(tokenizer)], skip_special_tokens=True)
        '<seg>'
    """
    tokenizer = _tokenizer_of(processor)
    token_id = tokenizer.get_vocab().get(seg_token)
    ids = tokenizer(f"a.{seg_token}</answer>", add_special_tokens=False)["input_ids"]
    if token_id is not None and ids.count(token_id) == 1:
        return token_id
    pieces = tokenizer.tokenize(seg_token)
    state = "is not in the vocabulary" if token_id is None else "is in the vocabulary but never matched"
    raise SegRLError(
        f"seg_token {seg_token!r} {state} of {type(tokenizer).__name__}, which reads it as {pieces}, expected one "
        "token; call segrl.models.ensure_seg_token(model, processor, seg_token) or load with load_vlm"
    )


def language_model_lora(
    model: PreTrainedModel,
    *,
    tokens: Sequence[int] = (),
    scope: Literal["language", "all"] = "language",
    layers: Sequence[str] | None = None,
    **settings: Any,
) -> Any:
    """Return LoRA settings for every linear layer of the language model, or of the vision tower as well.

    Args:
        model: Any transformers model; the language model in it is what `get_decoder()` returns.
        tokens: Ids of tokens whose input embeddings are trained in full, such as that of `<seg>`.
        scope: "language" leaves out vision tower and projector; "all" is PEFT's "all-linear", every linear layer but
            the output layer. Neither has a mask head, which the trainers take off before PEFT sees the model.
        layers: Names of the layers of the language model, such as ["q_proj", "v_proj"]; None takes all.
        **settings: More settings of `peft.LoraConfig`, for example ``r=64, lora_alpha=128``.

    Returns:
        A `peft.LoraConfig`, for the `peft_config` of a trainer.

    Raises:
        SegRLError: If there are no linear layers in the language model or none of these names, or `scope` is another.

    Example:
        >>> from peft import get_peft_model
        >>> from segrl.models import tiny_qwen2_5_vl
        >>> model, _ = tiny_qwen2_5_vl(layers=1, vision_layers=1)
        >>> adapted = get_peft_model(model, language_model_lora(model, r=4))
        >>> {name.split(".")[3] for name, weight in adapted.named_parameters() if weight.requires_grad}
        {'language_model'}
    """
    from peft import LoraConfig

    if scope not in ("language", "all"):
        raise unknown_name("LoRA scope", scope, ("language", "all"))
    decoder, output = model.get_decoder(), model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, layer in decoder.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not output
    }
    if not linear:
        raise SegRLError(
            f"{type(model).__name__} has no torch.nn.Linear in {type(decoder).__name__}, expected layers to adapt; "
            "build the peft.LoraConfig yourself, with target_modules"
        )
    if layers is not None and (unknown := sorted(set(layers) - linear)):
        raise unknown_name("linear layer", unknown[0], sorted(linear))
    if layers is not None and scope == "all":
        raise SegRLError(f'layers={list(layers)} with scope="all": names are those of the language model; drop one')
    linear = linear if layers is None else set(layers)
    location = next(name for name, module in model.named_modules() if module is decoder)
    inside = re.escape(location) + r"\." if location else ""
    if tokens:
        rows = model.get_input_embeddings()
        name = next(name for name, module in model.named_modules() if module is rows)
        settings = {"trainable_token_indices": {name.rpartition(".")[2]: list(tokens)}, **settings}
    target = "all-linear" if scope == "all" else rf"{inside}(.*\.)?({'|'.join(sorted(linear))})"
    return LoraConfig(target_modules=target, **{"task_type": "CAUSAL_LM", **settings})


def _tokenizer_of(processor: Any) -> Any:
    tokenizer = getattr(processor, "tokenizer", None) if isinstance(processor, ProcessorMixin) else processor
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise SegRLError(
            f"processor is {type(processor).__name__}, expected a transformers processor with a tokenizer, or a "
            "tokenizer; get one with AutoProcessor.from_pretrained"
        )
    return tokenizer


def _add_normal_token(tokenizer: Any, token: str) -> None:
    known = tokenizer.added_tokens_decoder.get(tokenizer.get_vocab().get(token, -1))
    if known is not None and not known.special and token not in tokenizer.all_special_tokens:
        return
    listed = [str(other) for other in tokenizer.extra_special_tokens]
    if token in listed:
        tokenizer.extra_special_tokens = [other for other in listed if other != token]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if known is not None and backend is not None:
        # The backend remembers that the token was special until it is rebuilt from its own state.
        backend.__setstate__(backend.__getstate__())


def _embedding_rows(model: PreTrainedModel) -> int:
    """Return the number of rows that the input and the output embeddings both have."""
    return min(len(layer.weight) for layer in _embeddings(model))


def _embeddings(model: PreTrainedModel) -> list[Any]:
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [layer for layer in layers if layer is not None]


def _grow_embeddings(model: PreTrainedModel, rows: int) -> None:
    old_rows = [len(layer.weight) for layer in _embeddings(model)]
    with torch.random.fork_rng():  # transformers draws the new rows; they are overwritten below
        model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer, old in zip(_embeddings(model), old_rows, strict=True):
            for values in (layer.weight, getattr(layer, "bias", None)):
                if values is not None:
                    values[old:] = values[:old].mean(0, dtype=torch.float32).to(values.dtype)


def _require_complete(name: str, model_class: str, info: Mapping[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    mismatched = sorted(
        f"{key} {tuple(in_file)} instead of {tuple(in_model)}" for key, in_file, in_model in info["mismatched_keys"]
    )
    if not missing and not mismatched:
        return
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {_first(missing)}")
    if mismatched:
        problems.append(f"{len(mismatched)} of the wrong shape: {_first(mismatched)}")
    hint = ""
    if unexpected := sorted(info["unexpected_keys"]):
        hint = f" Not used by the model: {_first(unexpected)}."
    raise CheckpointError(
        f"checkpoint {name!r} does not hold all weights of {model_class}, expected every one: {'; '.join(problems)}."
        f"{hint} These weights would be random. Download or export the checkpoint again, or load it with the "
        "transformers version that wrote it"
    )


def _first(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f" and {len(keys) - _LISTED_KEYS} more" if len(keys) > _LISTED_KEYS else ""
    return ", ".join(keys[:_LISTED_KEYS]) + more
