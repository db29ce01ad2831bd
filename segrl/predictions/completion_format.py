"""The format of a model's completions: the frame of its boxes, the answer format, and what a valid text needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from segrl.errors import DataError, FrameError
from segrl.predictions.frames import Frame, FrameKind
from segrl.predictions.parsing import SEG_TOKEN, AnswerFormat, parse_completion
from segrl.predictions.prediction import Prediction

__all__ = ["CompletionFormat"]


@dataclass(frozen=True)
class CompletionFormat:
    """The format in which completions are parsed when the trainer passes no predictions (a plain TRL `GRPOTrainer`).

    Attributes:
        frame: Frame kind in which the model writes boxes, or a function ``(image_size, original_size) -> Frame`` of
            (width, height) pairs, such as ``functools.partial(frame_for, processor)``.
        seg_token: The segmentation token; for this and the following see `segrl.predictions.parse_completion`.
        require_seg: Whether a valid text needs the token.
        require_reasoning: Whether a valid text needs a reasoning block.
        require_tags: Whether the answer needs its tags.
        answer_format: "text" or "json".
        end_tokens: Tokens that a framework may leave behind a completion, besides `segrl.predictions.END_TOKENS`; the
            trainers and inference add the tokenizer's own.

    Raises:
        FrameError: For a frame kind that does not exist, or that needs a processor.
        DataError: For another answer format, or end tokens that are not a list.

    Example:
        >>> text = "<answer>At [500, 0, 1000, 500].</answer>"
        >>> completion_format = CompletionFormat(require_seg=False, require_reasoning=False)
        >>> prediction = completion_format.parse(text, Frame("relative_1000", (200, 100)))
        >>> prediction.valid, prediction.boxes.tolist()
        (True, [[100.0, 0.0, 200.0, 50.0]])
    """

    frame: FrameKind | Callable[..., Frame] = "relative_1000"
    seg_token: str = SEG_TOKEN
    require_seg: bool = True
    require_reasoning: bool = True
    require_tags: bool = True
    answer_format: AnswerFormat = "text"
    end_tokens: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.end_tokens, str):
            raise DataError(f"end_tokens={self.end_tokens!r}; expected a list of texts, such as ['<|im_end|>']")
        object.__setattr__(self, "end_tokens", tuple(self.end_tokens))  # from YAML it is a list
        if self.frame == "resized_px":
            raise FrameError(
                "frame='resized_px' depends on the processor; pass frame=functools.partial(frame_for, processor)"
            )
        if not callable(self.frame):
            Frame(self.frame, (1, 1))  # raises for an unknown kind
        self.parse("", Frame("original_px", (1, 1)))  # raises for an unknown answer format

    def frame_of(self, shown: tuple[int, int], original: tuple[int, int]) -> Frame:
        """Return the frame of the boxes written for an image.

        Args:
            shown: (width, height) of the image that the model saw.
            original: (width, height) of the original image.
        """
        return self.frame(shown, original) if callable(self.frame) else Frame(self.frame, original)

    def for_tokenizer(self, tokenizer: Any) -> CompletionFormat:
        """Return the format with the tokenizer's own end-of-text and padding tokens among the end tokens.

        Args:
            tokenizer: A tokenizer of transformers; its `eos_token` and `pad_token` are read.
        """
        own = [getattr(tokenizer, name, None) for name in ("eos_token", "pad_token")]
        found = [token for token in own if token and token != self.seg_token]
        return replace(self, end_tokens=tuple(dict.fromkeys([*self.end_tokens, *map(str, found)])))

    def parse(self, text: str, frame: Frame) -> Prediction:
        """Parse a completion in this format."""
        return parse_completion(
            text,
            frame,
            seg_token=self.seg_token,
            require_seg=self.require_seg,
            require_reasoning=self.require_reasoning,
            require_tags=self.require_tags,
            answer_format=self.answer_format,
            end_tokens=self.end_tokens,
        )
