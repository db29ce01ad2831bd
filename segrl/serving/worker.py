"""One model, one thread, and the questions that wait for it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from segrl.errors import SegRLError

__all__ = ["BusyError", "Question", "TimeLimitError", "Worker"]


class BusyError(SegRLError):
    """Too many questions wait."""


class TimeLimitError(SegRLError):
    """A question was given up, since its time was over or nobody waits for its answer any more."""


class _Stop(StoppingCriteria):
    """Ends a generation whose answer nobody gets."""

    def __init__(self, question: Question) -> None:
        self.question = question

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        done = self.question.given_up
        return torch.full((len(input_ids),), done, device=input_ids.device, dtype=torch.bool)

    def __deepcopy__(self, memo: Any) -> _Stop:
        return self


@dataclass(eq=False)
class Question:
    """A question that waits or is answered.

    Attributes:
        ask: Called in the worker's thread with settings for `model.generate`, which end the generation early.
        deadline: Time of `time.monotonic` at which it is given up.
        answer: What `ask` returned or raised.
        left: Set when nobody waits for the answer any more.
    """

    ask: Callable[..., Any]
    deadline: float
    answer: Future[Any] = field(default_factory=Future)
    left: threading.Event = field(default_factory=threading.Event)

    @property
    def given_up(self) -> bool:
        """Whether nobody gets the answer: its time is over, or its client has left."""
        return self.left.is_set() or time.monotonic() > self.deadline

    def run(self) -> None:
        """Answer, unless it was given up while it waited."""
        if not self.answer.set_running_or_notify_cancel():
            return
        try:
            if self.given_up:
                raise TimeLimitError("the question waited until its time was over; ask again later")
            found = self.ask(stopping_criteria=StoppingCriteriaList([_Stop(self)]))
            if self.given_up:
                raise TimeLimitError("the answer took longer than the time limit of this server")
        except BaseException as error:  # raised where the answer is awaited, whatever it is; the thread goes on
            self.answer.set_exception(error)
        else:
            self.answer.set_result(found)


class Worker:
    """The thread that answers questions, one after the other.

    Args:
        max_waiting: Questions that wait, at most.
        time_limit: Seconds until a question is given up.
    """

    def __init__(self, max_waiting: int, time_limit: float) -> None:
        self.time_limit = time_limit
        self._waiting: queue.Queue[Question | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._work, name="segrl-model", daemon=True)
        self._thread.start()

    def put(self, ask: Callable[..., Any]) -> Question:
        """Let a question wait for its answer.

        Raises:
            BusyError: Too many wait already.
        """
        question = Question(ask, time.monotonic() + self.time_limit)
        try:
            self._waiting.put_nowait(question)
        except queue.Full:
            raise BusyError("too many questions wait; ask again in a moment") from None
        return question

    @property
    def waiting(self) -> int:
        """Number of questions that wait."""
        return self._waiting.qsize()

    def close(self) -> None:
        """End the thread after the question that it answers; those that wait are given up."""
        while not self._waiting.empty():
            try:
                question = self._waiting.get_nowait()
            except queue.Empty:
                break
            if question is not None:
                question.answer.cancel()
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (question := self._waiting.get()) is not None:
            question.run()
            del question  # with the image that it holds, before the next one comes
