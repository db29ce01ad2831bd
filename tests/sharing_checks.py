"""What the tests of shared prompts share: batches made by hand, and one pass compared with another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from builders import FAMILIES, add_head, grpo_args, tiny_model, tiny_rows
from hypothesis import strategies as st
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from trainer_checks import letters, text_rows
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl.trainer.grpo_trainer import GRPOTrainer

from segrl.caching import ImageKeys
from segrl.heads import DenseLoss
from segrl.heads.mask_head import SegInput
from segrl.models import backbone_of, seg_token_id, tiny_causal_lm
from segrl.sharing import PromptKey
from segrl.trainers import SegGRPOTrainer

KINDS = (*FAMILIES, "text")
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"  # transformers 5.24
SIZES = ((64, 64), (90, 60), (56, 112), (40, 40))  # of the pictures that prompts show; the fifth has the first's size


@dataclass(frozen=True)
class Prompt:
    """A prompt of `words` words about some pictures, by number."""

    words: int = 3
    pictures: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A row: which prompt it answers, with how many tokens (0: masked as a whole), and where it says `<seg>`."""

    prompt: int = 0
    length: int = 4
    seg: int | None = None


@cache
def picture(number: int) -> Image.Image:
    size = SIZES[number % len(SIZES)]
    noise = np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def build(kind: str, **settings: Any) -> tuple[Any, Any]:
    """A tiny model of a family, or without images, and its processor."""
    if kind == "text":
        return tiny_causal_lm(**{"hidden_size": 64, "vocab_size": 640, **settings})
    return tiny_model(kind, **settings)


def attention(model: Any, implementation: str) -> Any:
    """`model`, whose language model uses another attention implementation."""
    model.get_decoder().set_attn_implementation(implementation)
    return model


def checkpointed(model: Any, reentrant: bool) -> None:
    """Switch on what the trainer switches on with `activation_checkpointing`, under either of its names."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()


def make_trainer(model: Any, processor: Any, folder: Any, **arguments: Any) -> Any:
    """A `SegGRPOTrainer` that has never trained, but could; settings of `grpo_args` go under `settings`."""
    text = not hasattr(processor, "tokenizer")
    rows = text_rows(4) if text else tiny_rows(4, processor, completions=False)
    args = grpo_args(folder, **{"share_prompt": True, **arguments.pop("settings", {})})
    trainer: Any = SegGRPOTrainer(
        model,
        arguments.pop("reward_funcs", letters),
        args,
        train_dataset=rows,
        processing_class=processor,
        **arguments,
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def headed_trainer(kind: str, folder: Any, **arguments: Any) -> Any:
    """As `make_trainer`, with a mask head and a dense loss."""
    model, processor = build(kind)
    losses = [DenseLoss("dice_ce")]
    return make_trainer(add_head(model, processor), processor, folder, dense_losses=losses, **arguments)


def three_prompts(kind: str) -> list[Prompt]:
    """Prompts of different lengths; with pictures of different sizes, one of them in two prompts."""
    return [Prompt(n, () if kind == "text" else shown) for n, shown in [(3, (0, 1)), (7, (1,)), (1, (2, 3, 3))]]


# ---- batches ---------------------------------------------------------------------------------------------------------


def encoded(processor: Any, prompt: Prompt) -> dict[str, Any]:
    """One prompt as its processor encodes it, without padding."""
    said = " ".join(f"lesion {n}" for n in range(prompt.words)) or "Where?"
    if not hasattr(processor, "tokenizer"):
        return dict(processor([said], return_tensors="pt"))
    content = [{"type": "image", "image": picture(number)} for number in prompt.pictures]
    message = {"role": "user", "content": [*content, {"type": "text", "text": said}]}
    return dict(
        processor.apply_chat_template(
            [[message]], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )


def left(rows: Sequence[torch.Tensor], filler: int = 0) -> torch.Tensor:
    return pad_sequence([row.flip(0) for row in rows], batch_first=True, padding_value=filler).flip(1)


def batch_of(
    processor: Any, prompts: Sequence[Prompt], answers: Sequence[Answer], *, seed: int = 0, head: Any = None
) -> dict[str, Any]:
    """What TRL's buffer holds for these rows, with random completions and advantages, and the keys of their prompts."""
    tokenizer = getattr(processor, "tokenizer", processor)
    rng = torch.Generator().manual_seed(seed)
    known = [encoded(processor, prompt) for prompt in prompts]
    rows = [known[answer.prompt] for answer in answers]
    width = max(1, *(answer.length for answer in answers))
    plain = [n for n in range(len(tokenizer)) if n not in tokenizer.added_tokens_decoder]
    ids, mask = torch.full((len(rows), width), int(tokenizer.pad_token_id)), torch.zeros(len(rows), width).long()
    for number, answer in enumerate(answers):
        length = answer.length or width  # masked as a whole: the tokens are there, as in TRL
        ids[number, :length] = torch.tensor(plain)[torch.randint(len(plain), (length,), generator=rng)]
        mask[number, : answer.length] = 1
        if answer.seg is not None and answer.seg < answer.length:
            ids[number, answer.seg] = seg_token_id(processor)
    prompt_ids = [row["input_ids"][0] for row in rows]
    read = ImageKeys()
    batch: dict[str, Any] = {
        "prompt_ids": left(prompt_ids, int(tokenizer.pad_token_id)),
        "prompt_mask": left([torch.ones_like(row) for row in prompt_ids]),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.randn(len(rows), generator=rng),
        "num_items_in_batch": mask.sum(),
        "prompt_keys": [
            PromptKey(
                tuple(known[answer.prompt]["input_ids"][0].tolist()),
                tuple(read(picture(n)) for n in prompts[answer.prompt].pictures),
            )
            for answer in answers
        ],
    }
    if any(prompt.pictures for prompt in prompts):
        batch["num_images"] = [len(prompts[answer.prompt].pictures) for answer in answers]
        for name in ("pixel_values", "image_grid_thw"):
            parts = [row[name] for row in rows if name in row]
            if parts:
                batch[name] = torch.cat(parts)
        if "mm_token_type_ids" in rows[0]:
            types = left([row["mm_token_type_ids"][0] for row in rows])
            batch["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(ids)], dim=1)
    if head is not None:
        side = head.segmenter.mask_size
        pictures = {number for prompt in prompts for number in prompt.pictures}
        shown = {
            number: SegInput(
                head.segmenter.preprocess(picture(number)),
                target=torch.rand(side, side, generator=rng).mul(255).round() / 255,
            )
            for number in sorted(pictures)
        }
        batch["seg_inputs"] = [shown[prompts[answer.prompt].pictures[0]] for answer in answers]
    return batch


def answers_of(draw: Any, prompts: int, *, most: int = 7) -> list[Answer]:
    """Rows in any order: groups of any size, also of one, scattered; lengths from 0."""
    count = draw(st.integers(2, most))
    lengths = st.sampled_from([0, 1, 1, 2, 3, 5, 9])
    rows = [
        Answer(draw(st.integers(0, prompts - 1)), draw(lengths), draw(st.none() | st.integers(0, 4)))
        for _ in range(count)
    ]
    if all(row.length == 0 for row in rows):
        rows[0] = Answer(rows[0].prompt, 3)
    return rows


@st.composite
def cases(draw: Any, kind: str) -> tuple[list[Prompt], list[Answer], int]:
    """Prompts of different lengths, with 1 to 3 pictures where the model sees; rows that answer them; a seed."""
    count = draw(st.integers(1, 3))
    shown = st.just(()) if kind == "text" else st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple)
    prompts = [Prompt(draw(st.integers(0, 6)), draw(shown)) for _ in range(count)]
    return prompts, answers_of(draw, count), draw(st.integers(0, 99))


# ---- two passes ------------------------------------------------------------------------------------------------------


def dense(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch without keys: TRL's pass."""
    return {name: value for name, value in batch.items() if name != "prompt_keys"}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(trainer: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any], dict[str, float]]:
    """Loss, gradients of all parameters, and what was logged on the way."""
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer._compute_loss(trainer.model, dict(batch))
    loss.backward()
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), gradients(trainer.model), logged


@torch.no_grad()
def scores(trainer: Any, batch: dict[str, Any], *, shared: bool, model: Any = None, **settings: Any) -> Any:
    """Log-probabilities and entropies of a batch "B T", by shared prompts or by TRL's own pass."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    images = {name: batch[name] for name in names if name in batch}
    arguments = (model or trainer.model, ids, mask, batch["completion_ids"].size(1))
    settings = {"compute_entropy": True, **settings}
    if not shared:
        return GRPOTrainer._get_per_token_logps_and_entropies(trainer, *arguments, **settings, **images)[:2]
    trainer._prompt_keys = batch["prompt_keys"]
    try:
        return trainer._get_per_token_logps_and_entropies(*arguments, **settings, **images)[:2]
    finally:
        trainer._prompt_keys = None


def close(found: torch.Tensor, expected: torch.Tensor, *, scale: float = 0.0, tolerance: float = 1e-5) -> None:
    """Assert that two tensors differ by at most `tolerance`, relative to the larger of their norm and `scale`."""
    assert found.shape == expected.shape
    difference = (found - expected).norm().item()
    assert difference <= tolerance * max(expected.norm().item(), scale) + 1e-12, (difference, expected.norm().item())


def same_step(trainer: Any, batch: dict[str, Any], tolerance: float = 1e-5) -> dict[str, Any]:
    """Assert that loss, gradients and metrics of the shared pass are those of TRL's; returns the gradients."""
    known = scores(trainer, batch, shared=False)[0]
    noise = torch.Generator().manual_seed(len(known))
    batch = {**batch, "old_per_token_logps": known + 0.1 * torch.randn(known.shape, generator=noise)}
    batch["ref_per_token_logps"] = known + 0.1 * torch.randn(known.shape, generator=noise)
    expected, wanted, logged = loss_and_gradients(trainer, dense(batch))
    with counted(trainer) as tokens:
        loss, found, also = loss_and_gradients(trainer, batch)
    assert tokens == [computed(batch)]
    # a completion's terms cancel in the loss, so it is measured against the policy's own size
    close(loss, expected, scale=1.0, tolerance=tolerance)
    assert found.keys() == wanted.keys()
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm().item()
    assert norm > 1e-4
    for name, gradient in wanted.items():
        try:
            close(found[name], gradient, scale=1e-2 * norm, tolerance=tolerance)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}") from error
    assert also.keys() == logged.keys()
    for name, value in logged.items():
        close(torch.tensor(also[name]), torch.tensor(value), scale=1.0, tolerance=tolerance)
    return found


def computed(batch: dict[str, Any]) -> int:
    """Tokens that a pass with shared prompts computes: those of TRL's pass if no two rows share a prompt."""
    keys = batch["prompt_keys"]
    if len(set(keys)) == len(keys):
        return batch["prompt_ids"].numel() + batch["completion_ids"].numel()
    return sum(len(key.tokens) for key in set(keys)) + int(batch["completion_mask"].sum())


@contextmanager
def counted(trainer: Any) -> Iterator[list[int]]:
    """The tokens that the language model computes in each forward inside."""
    tokens: list[int] = []
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder()
    assert decoder is backbone_of(base) or decoder is not base

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        values = kwargs.get("inputs_embeds")
        tokens.append((kwargs["input_ids"] if values is None else values[..., 0]).numel())

    handle = decoder.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield tokens
    finally:
        handle.remove()


def tower_of(model: Any) -> Any:
    """The vision tower of a model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model.vision_tower if hasattr(base.model, "vision_tower") else base.model.visual


@contextmanager
def seen_by(tower: Any) -> Iterator[list[int]]:
    """How many pictures the vision tower is given in each forward inside."""
    pictures: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs["grid_thw"] if "grid_thw" in kwargs else [*args, kwargs.get("pixel_values")][0]
        pictures.append(len(given))

    handle = tower.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield pictures
    finally:
        handle.remove()
