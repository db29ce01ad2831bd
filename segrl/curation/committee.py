"""A committee of U-Nets for one set of cases, and its errors on cases that none of its members has seen.

Every member is trained once for each fold, on the other folds. Images of a fold share no patient and no near-duplicate
with others. Each training is a file that is complete or absent, so that a build goes on where it was.
"""

# n cases; K folds

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from segrl.caching.content import content_key
from segrl.curation.case import Case
from segrl.curation.committee_settings import CommitteeSettings, Membership
from segrl.curation.duplicates import near_duplicates
from segrl.curation.engine import Engine, map_items
from segrl.data.groups import balanced_folds, joined
from segrl.errors import DataError
from segrl.files.whole import write_whole
from segrl.geometry.image_files import read_image

__all__ = ["case_folds", "case_groups", "committee_jobs", "group_folds", "run_committee"]


def case_folds(cases: Sequence[Case], settings: CommitteeSettings) -> tuple[list[int], list[set[int]]]:
    """Divide cases into folds; patients, equal images and near-duplicates stay together.

    Returns:
        The number of the group of every case, and the numbers of the cases of each fold.

    Raises:
        DataError: Fewer groups than folds.
    """
    groups = case_groups(cases, settings)
    return groups, group_folds(cases, groups, settings)


def case_groups(cases: Sequence[Case], settings: CommitteeSettings) -> list[int]:
    """Return (n,) the number of the group of every case: patients, equal images and near-duplicates are in one group.

    Raises:
        DataError: No cases, or an image that cannot be read.
    """
    images = [read_image(case.image, f"image {case.image}") for case in cases]
    looks = near_duplicates(images, settings.near)
    patients = [f"{case.source}: {case.patient}" if case.patient else number for number, case in enumerate(cases)]
    return joined(looks, patients, [str(case.image) for case in cases])


def group_folds(cases: Sequence[Case], groups: Sequence[int], settings: CommitteeSettings) -> list[set[int]]:
    """Divide groups of cases into folds, and return the numbers of the cases of each.

    Raises:
        DataError: Fewer groups than folds.
    """
    count = len(set(groups))
    if count < settings.folds:
        raise DataError(
            f"{cases[0].source}: {count} groups of cases that share a patient or look alike; expected folds="
            f"{settings.folds} or more: lower folds, or near={settings.near} if they do not look alike"
        )
    keys = [content_key(case.id, settings.seed) for case in cases]
    return balanced_folds(groups, [case.lesion for case in cases], keys, settings.folds)


def committee_jobs(cases: Sequence[Case], settings: CommitteeSettings, folder: Path) -> list[Membership]:
    """Plan the trainings of a set; files of `folder` that are there are finished ones.

    Args:
        cases: Of one set.
        settings: Of the committee.
        folder: Gets a file for each training.

    Raises:
        DataError: As `case_folds`.
    """
    groups, folds = case_folds(cases, settings)
    return [
        Membership(
            *(tuple(cases), tuple(groups), tuple(sorted(held_out)), member, settings),
            folder / f"member{member}_fold{number}.json",
        )
        for member in range(len(settings.encoders))
        for number, held_out in enumerate(folds)
    ]


def run_committee(jobs: Sequence[Membership], *, engine: Engine = "local") -> Iterator[Membership]:
    """Train what is not there yet; yields every job when its file is, finished ones first.

    With the engine "ray" the trainings run in the workers of a cluster, and their files are written here.
    """
    waiting = [job for job in jobs if not job.path.is_file()]
    yield from (job for job in jobs if job not in waiting)
    if not waiting:
        return
    settings = waiting[0].settings
    from segrl.curation.committee_networks import trained_alone  # here, because settings should not wait for torch

    gpus = 1 if settings.device.startswith("cuda") else 0
    for number, found in map_items(trained_alone, waiting, workers=settings.processes, gpus=gpus, engine=engine):
        write_whole(waiting[number].path, json.dumps(found) + "\n")
        yield waiting[number]
