"""What the trainers' tests share: what a run did, and a slow reference of one row's forward with a mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import references
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import TrainerCallback

from segrl import losses
from segrl.models import seg_token_id

TIMES = ("step_time", "runtime", "samples_per_second", "steps_per_second")


def letters(completions, **_) -> Any:
    """A reward that tells any two texts apart."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [sum(map(ord, text)) % 101 / 100 for text in texts]


def history(trainer) -> list[dict[str, Any]]:
    """The log without the values that measure time."""
    return [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in trainer.state.log_history]


def logged(trainer, *names) -> list[float]:
    """The values of some names in a trainer's log, name by name."""
    return [entry[name] for name in names for entry in trainer.state.log_history if name in entry]


def text_rows(n=8) -> Any:
    questions = [f"Find every lesion, number {number}." for number in range(n)]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": question}] for question in questions]})


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Collect:
    """A reward that keeps what it was given."""

    __name__ = "collect"

    def __init__(self, score=letters):
        self.score, self.calls = score, []

    def __call__(self, completions, **columns):
        self.calls.append({"completions": completions, **columns})
        return self.score(completions=completions, **columns)

    def joined(self, name: str) -> list[Any]:
        return [value for call in self.calls for value in call[name]]


class Gradients(TrainerCallback):
    """The accumulated gradients at every optimiser step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert model is not None
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


class Calls:
    """How often a module ran, and on how many rows, by a forward hook."""

    def __init__(self, module):
        self.rows: list[int] = []
        module.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs, output):
        first = args[0] if args else next(v for v in kwargs.values() if torch.is_tensor(v))
        self.rows.append(len(first))


# ---- the slow reference ----------------------------------------------------------------------------------------------


def row_inputs(processor, row, completion_ids, tools=None):
    """Unpadded inputs of one row, made by the processor itself."""
    content = [{"type": "image", "image": row["image"]}, {"type": "text", "text": row["prompt"][0]["content"]}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tools=tools,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    length = batch["input_ids"].size(1)
    ids = torch.tensor([completion_ids])
    batch["input_ids"] = torch.cat([batch["input_ids"], ids], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], torch.zeros_like(ids)], dim=1)
    return dict(batch), length


def reference_mask_logits(head, image, state):
    """SAM 2's own single-image path, one mask: "h h" from one state "D"."""
    sam = head.segmenter.sam
    features = sam.forward_image(head.segmenter.preprocess(image)[None])["backbone_fpn"]
    prompt = head.adapter(state.view(1, 1, -1), torch.ones(1, 1, dtype=torch.bool))
    empty = torch.zeros(1, 0, head.segmenter.prompt_dim)
    _, dense = sam.sam_prompt_encoder(points=None, boxes=None, masks=None)
    masks, *_ = sam.sam_mask_decoder(
        image_embeddings=features[2] + sam.no_mem_embed.view(1, -1, 1, 1),
        image_pe=sam.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=torch.cat([empty, prompt], dim=1),
        dense_prompt_embeddings=dense,
        multimask_output=False,
        repeat_image=False,
        high_res_features=features[:2],
    )
    return masks[0, 0]


def reference_forward(model, processor, row, completion_ids, tools=None):
    """Log-probabilities "T" of one row's completion, and its mask logits "h h" or None, with gradients."""
    inputs, length = row_inputs(processor, row, completion_ids, tools)
    states = model.model(**inputs).last_hidden_state[0]
    logits = model.lm_head(states)[length - 1 : -1]
    chosen = torch.tensor(completion_ids)
    log_probs = logits.log_softmax(-1)[torch.arange(len(chosen)), chosen]
    seg = [t for t, token in enumerate(completion_ids) if token == seg_token_id(processor)]
    if not seg:
        return log_probs, None
    return log_probs, reference_mask_logits(model.mask_head, row["image"], states[length + seg[-1]])


def reference_target(row, side):
    cover = references.area_average(np.asarray(row["mask"]) > 0, (side, side))
    return torch.tensor(np.round(cover * 255) / 255, dtype=torch.float32)


def reference_dice_ce(logits, target):
    p = 1 / (1 + torch.exp(-logits))
    dice = 1 - (2 * (p * target).sum() + losses.DICE_SMOOTHING) / ((p + target).sum() + losses.DICE_SMOOTHING)
    cross_entropy = -(target * torch.log(p) + (1 - target) * torch.log(1 - p)).mean()
    flat, true = logits.detach().flatten().tolist(), target.flatten().tolist()
    expected = references.dice_loss(flat, true, losses.DICE_SMOOTHING) + references.cross_entropy(flat, true)
    assert (dice + cross_entropy).item() == pytest.approx(expected, abs=1e-5)
    return dice + cross_entropy


def same_masks(model, processor, rows, collect, tolerance=1e-3, tools=None):
    """Assert that the masks that rewards saw are those of a plain forward per row. Returns how many there were."""
    named = {row["name"]: row for row in rows}
    found = 0
    for call in collect.calls:
        for name, ids, prediction in zip(call["name"], call["completion_ids"], call["prediction"], strict=True):
            row = named[name]
            with torch.no_grad():
                _, logits = reference_forward(model, processor, row, ids, tools)
            if prediction.mask is None:
                cut_off = ids[-1] == seg_token_id(processor)  # written last, never fed back
                assert logits is None or cut_off, "a completion with <seg> has no mask"
                continue
            assert logits is not None
            full = F.interpolate(logits[None, None], row["mask"].size[::-1], mode="bilinear")[0, 0]
            clear = full.abs() > tolerance
            assert torch.equal(torch.from_numpy(prediction.mask)[clear], (full > 0)[clear])
            assert clear.float().mean() > 0.9
            found += 1
    return found


def overfit(model, processor, conversation, tools, steps=120):
    """Teach a model one conversation by heart."""
    batch = processor.apply_chat_template(
        [conversation], tools=tools, tokenize=True, return_dict=True, return_tensors="pt"
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.02:
            break
    return loss.item()


def written_rollout(texts):
    """A rollout function that answers with fixed texts, in turn."""

    def rollout(prompts, trainer):
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        tokenizer = trainer._tokenizer
        ids = [tokenizer(texts[n % len(texts)])["input_ids"] + [tokenizer.eos_token_id] for n in range(len(prompts))]
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": None}

    return rollout
