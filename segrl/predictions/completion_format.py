"""The format of a model's completions: the frame of its boxes, the answer format, and what a valid text needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from segrl.errors import FrameError
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
        answer_format: "text" or "json".

    Raises:
        FrameError: For a frame kind that does not exist, or that needs a processor.

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
    answer_format: AnswerFormat = "text"

    def __post_init__(self) -> None:
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

    def parse(self, text: str, frame: Frame) -> Prediction:
        """Parse a completion in this format."""
        return parse_completion(
            text,
            frame,
            seg_token=self.seg_token,
            require_seg=self.require_seg,
            require_reasoning=self.require_reasoning,
            answer_format=self.answer_format,
        )
