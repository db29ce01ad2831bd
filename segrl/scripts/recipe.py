"""`Recipe`: one preset of an example, and the builder of its SAM 2."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from segrl.predictions.prompt_settings import PromptSettings
from segrl.segmenters.sam2 import Sam2Config, Sam2Segmenter
from segrl.segmenters.stored import load_segmenter

__all__ = ["Recipe", "sam2_builder"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One preset: what is built, how the model is asked, and with which settings it is trained.

    It holds numbers and builders only, and every trainer setting in it is a default that a flag overrides. An example
    adds fields of its own in a subclass.

    Attributes:
        build: `build(train_rows, model, **loading) -> (model, processor)`; `model` is `--model`, None for the preset's
            own. `loading` goes to `load_vlm`, and may be missing where `--load_in_4bit` is not supported.
        segmenter: `segmenter(weights)` builds the segmenter; `weights` is `--segmenter`, None for the preset's own.
        prompt: How the model is asked; `--reasoning` and `--frame_kind` change it.
        sft_reasoning: Chain of thought in stage 1, where it differs from stage 2; `--sft_reasoning` changes it. None:
            as in `prompt`.
        sft: Trainer settings of stage 1; None: there is none, stage 2 begins with a pretrained model.
        grpo: Trainer settings of stage 2; None: there is none.
        rewards: Rewards of stage 2, as `make_reward` takes them.
        lora: Settings of `peft.LoraConfig`; None trains the model whole.
        lora_scope: Layers with LoRA, see `language_model_lora`; `--lora_scope` changes it.
        fill_to: Repeat the rows of a small training set up to about this many; 0 does not.
        synthetic: Sizes of the data that is made without `--data`; "train" and "test" are the rows of these splits.
        demonstration: Whether the preset's own model has random weights, as a run says when it begins.
        quick: Fields, of those above, that differ where `--quick` is given. Their numbers of steps hold as they are; of
            stages and parts that it does not name, `--quick` takes 3.
        on_data: Fields, of those above, that differ where `--data` is given.

    Example:
        >>> from segrl.models import tiny_qwen2_5_vl
        >>> from segrl.predictions import ImagePromptSettings
        >>> tiny = Recipe(
        ...     build=lambda rows, model: tiny_qwen2_5_vl(),
        ...     prompt=ImagePromptSettings(max_edge=160, max_new_tokens=112),
        ...     sft={"max_steps": 650, "learning_rate": 1e-3},
        ...     grpo={"max_steps": 80, "num_generations": 4},
        ...     rewards=("format", "box_f1"),
        ... )
        >>> tiny.prompt.task, tiny.lora
        ('images', None)
    """

    build: Callable[..., tuple[Any, Any]]
    prompt: PromptSettings
    sft: Mapping[str, Any] | None
    grpo: Mapping[str, Any] | None
    rewards: Sequence[str] = ()
    segmenter: Callable[[str | None], Any] | None = None
    sft_reasoning: bool | None = None
    lora: Mapping[str, Any] | None = None
    lora_scope: Literal["language", "all"] = "language"
    fill_to: int = 0
    synthetic: Mapping[str, int] = field(default_factory=dict)
    demonstration: bool = False
    quick: Mapping[str, Any] = field(default_factory=dict)
    on_data: Mapping[str, Any] = field(default_factory=dict)

    def fitted(self, data: str | None, *, quick: bool = False) -> Self:
        """Return the preset as it is for `--data`, or without, and for a look.

        Example:
            >>> from segrl.predictions import ImagePromptSettings
            >>> parts = {"build": print, "prompt": ImagePromptSettings(), "grpo": {}, "rewards": ()}
            >>> recipe = Recipe(sft={"max_steps": 200}, on_data={"sft": {"max_steps": 500}}, **parts)
            >>> recipe.fitted(None).sft, recipe.fitted("my/images").sft
            ({'max_steps': 200}, {'max_steps': 500})
        """
        recipe = self if data is None else replace(self, **self.on_data)
        return replace(recipe, **recipe.quick) if quick else recipe


def sam2_builder(config: Sam2Config, source: str | None = None) -> Callable[[str | None], Any]:
    """Return the `segmenter` of a `Recipe`: what `--segmenter` names, or else a SAM 2 with the weights of `source`.

    Args:
        config: Sizes of the model.
        source: Weights without `--segmenter`, as `load_segmenter` takes them; None leaves them random.

    Example:
        >>> from segrl.segmenters import sam2_config
        >>> segmenter = sam2_builder(sam2_config("tiny"))(None)
        >>> segmenter.image_size
        128
    """

    def build(weights: str | None) -> Any:
        name = weights or source
        return Sam2Segmenter(config) if name is None else load_segmenter(name, config)

    return build
