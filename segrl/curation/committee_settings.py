"""Settings of a committee of U-Nets, and one of its trainings; without torch, so that settings are read quickly."""

# S side of the square that images are resized to; K folds

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from segrl.curation.case import Case
from segrl.errors import DataError

__all__ = ["CommitteeSettings", "Membership"]


@dataclass(frozen=True, kw_only=True)
class CommitteeSettings:
    """Settings of the committee, `difficulty: {committee: ...}`; what is silent in the paper is our choice.

    The default is made for two cores; with a GPU take `size: 256, folds: 5, steps: 2000, batch: 16`.

    Attributes:
        encoders: Members: an encoder of `segmentation_models_pytorch` each, and one seed each.
        weights: Of the encoders, such as "imagenet", which are downloaded; None starts from random weights.
        folds: K.
        size: Side of the square that images are resized to for the networks, pixels; a multiple of 16. Errors are
            measured on the masks as they are.
        steps: Updates of a member, at most.
        batch: Images of an update.
        learning_rate: Of AdamW, warmed up over 10 % of the steps, then falling to 0.
        check: Steps between two measurements on the cases that stop the training.
        patience: Measurements without a better one after which it stops.
        near: Bits of 256 in which the hashes of near-duplicates differ at most, see `near_duplicates`.
        seed: Of weights, batches, augmentation and folds.
        processes: Trainings at a time; 1 trains in this process.
        device: Of torch, such as "cuda".

    Raises:
        DataError: A number out of range.

    Example:
        >>> CommitteeSettings(size=100)
        Traceback (most recent call last):
        segrl.errors.DataError: size=100; expected a multiple of 16, 32 or more
    """

    encoders: tuple[str, ...] = ("resnet18", "mobilenet_v2", "tu-regnetx_002")
    weights: str | None = None
    folds: int = 3
    size: int = 96
    steps: int = 120
    batch: int = 8
    learning_rate: float = 2e-3
    check: int = 20
    patience: int = 3
    near: int = 24
    seed: int = 0
    processes: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.size < 32 or self.size % 16:
            raise DataError(f"size={self.size}; expected a multiple of 16, 32 or more")
        if not self.encoders:
            raise DataError("encoders is empty; expected one or more")
        for name, fewest in (("folds", 2), ("steps", 1), ("batch", 2), ("check", 1), ("patience", 1), ("processes", 1)):
            if getattr(self, name) < fewest:
                raise DataError(f"{name}={getattr(self, name)}; expected {fewest} or more")
        if not self.learning_rate > 0:
            raise DataError(f"learning_rate={self.learning_rate}; expected a number above 0")


@dataclass(frozen=True)
class Membership:
    """One training: a member of the committee without one fold.

    Attributes:
        cases: All cases of the set.
        groups: (n,) cases of one number share a patient or show nearly the same.
        held_out: Numbers of the cases of the fold.
        member: Number of the member.
        settings: Of the committee.
        path: The file of its predictions, JSON by the id of a case: "error", and the "mask" as run lengths at S.
    """

    cases: tuple[Case, ...]
    groups: tuple[int, ...]
    held_out: tuple[int, ...]
    member: int
    settings: CommitteeSettings
    path: Path
