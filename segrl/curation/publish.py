"""The stage that publishes: a data set that segrl trains on and `datasets` reads, with a card of its licences."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from segrl.caching.content import content_key
from segrl.curation.card import dataset_card
from segrl.curation.case import Case
from segrl.curation.committee import case_groups, group_folds
from segrl.curation.committee_settings import CommitteeSettings
from segrl.curation.json_lines import read_json_lines
from segrl.curation.judgements import JUDGEMENTS
from segrl.curation.statistics import case_statistics, statistics_figure
from segrl.curation.texts import TEXTS
from segrl.data.reasoning import build_query
from segrl.errors import DataError
from segrl.geometry.mask_images import read_mask_file
from segrl.geometry.masks import boxes_from_mask
from segrl.predictions.frames import Frame
from segrl.predictions.parsing import format_answer

__all__ = ["DATASET", "FinalText", "PublishSettings", "publish_cases", "read_final_texts"]

DATASET, CARD, FIGURE = "dataset", "README.md", "statistics.png"
_FOLDS = 20  # of which some are the test split


@dataclass(frozen=True, kw_only=True)
class PublishSettings:
    """The section `publish` of a build.

    Attributes:
        test_fraction: Share of the cases in the split "test"; patients and near-duplicates are in one split.
        seed: Of the division.
        title: Of the card.

    Raises:
        DataError: A share that is not between 0 and 1.

    Example:
        >>> PublishSettings(test_fraction=0)
        Traceback (most recent call last):
        segrl.errors.DataError: test_fraction=0; expected a share between 0 and 1, such as 0.2
    """

    test_fraction: float = 0.2
    seed: int = 0
    title: str = "Hard lesions with reasoning"

    def __post_init__(self) -> None:
        if not 0 < self.test_fraction < 1:
            raise DataError(f"test_fraction={self.test_fraction}; expected a share between 0 and 1, such as 0.2")


@dataclass(frozen=True)
class FinalText:
    """Texts of one case.

    Attributes:
        query: The question.
        reasoning: "" for none.
        answer: "" takes the fixed form with the boxes of the mask.
        scores: Of the judge, by name.

    Example:
        >>> FinalText("Where is the nodule?").reasoning
        ''
    """

    query: str
    reasoning: str = ""
    answer: str = ""
    scores: Mapping[str, Any] | None = None


def read_final_texts(build: Path) -> dict[str, FinalText] | None:
    """Read the texts that are good enough, by the id of their case.

    Of `judgements.jsonl` the last record of a case counts, if its status is "accepted"; without that file those of
    `texts.jsonl` whose status is "written".

    Returns:
        None if there is neither file.

    Raises:
        DataError: A damaged line, which is named.

    Example:
        >>> read_final_texts(Path("no/build")) is None
        True
    """
    for name, good, stage in ((JUDGEMENTS, "accepted", "judge"), (TEXTS, "written", "write")):
        if (build / name).is_file():
            last = dict(read_json_lines(build / name, _final_text, stage))
            return {identity: text for identity, (status, text) in last.items() if status == good}
    return None


def publish_cases(
    cases: Sequence[Case],
    texts: Mapping[str, FinalText] | None,
    settings: PublishSettings,
    build: Path,
    *,
    committee: CommitteeSettings | None = None,
) -> dict[str, int]:
    """Write `build/dataset`, which replaces an earlier one at once.

    Args:
        cases: To publish, at least two that are of different patients and do not look alike.
        texts: By the id of a case; cases without are left out. None asks from templates, without reasoning.
        settings: How.
        build: Folder of the build.
        committee: Says what counts as a near-duplicate; None takes the default.

    Returns:
        Number of rows of the splits "train" and "test".

    Raises:
        DataError: No cases left, or all of them in one group.

    Example:
        >>> publish_cases([], None, PublishSettings(), Path("build"))
        Traceback (most recent call last):
        segrl.errors.DataError: 0 cases, none with an accepted text: nothing to publish
    """
    kept = [case for case in cases if texts is None or case.id in texts]
    if not kept:
        raise DataError(f"{len(cases)} cases, none with an accepted text: nothing to publish")
    from datasets import Dataset, DatasetDict

    test = _test_split(kept, settings, committee or CommitteeSettings())
    unfinished = build / f".{DATASET}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    splits, features = {}, _features()
    for split, own in (("train", [c for c in kept if c.id not in test]), ("test", [c for c in kept if c.id in test])):
        rows = Dataset.from_list([_row(case, (texts or {}).get(case.id)) for case in own], features=features)
        key = content_key([case.id for case in own])[:16]
        splits[split] = rows.select(range(len(rows)), new_fingerprint=key)  # equal builds have equal files
    DatasetDict(splits).save_to_disk(unfinished)
    statistics = case_statistics(kept)
    figure = statistics_figure(statistics)
    figure.savefig(unfinished / FIGURE, dpi=120, metadata={"Software": None})
    counts = {split: len(rows) for split, rows in splits.items()}
    card = dataset_card(kept, counts, statistics, settings.title, FIGURE, with_texts=texts is not None)
    (unfinished / CARD).write_text(card, encoding="utf-8")
    home = build / DATASET
    if home.exists():
        shutil.rmtree(home)
    unfinished.rename(home)
    return counts


def _final_text(row: Any) -> tuple[str, tuple[str, FinalText]]:
    query, reasoning, answer = (str(row.get(key) or "") for key in ("query", "reasoning", "answer"))
    return str(row["id"]), (str(row["status"]), FinalText(query, reasoning, answer, dict(row.get("scores") or {})))


def _test_split(cases: Sequence[Case], settings: PublishSettings, committee: CommitteeSettings) -> set[str]:
    """The ids of the cases of the test split: some of many folds, so that lesions are spread over both splits."""
    groups = case_groups(cases, committee)
    count = max(2, min(_FOLDS, len(set(groups))))
    folds = group_folds(cases, groups, replace(committee, folds=count, seed=settings.seed))
    wanted = min(count - 1, max(1, round(count * settings.test_fraction)))
    return {cases[n].id for fold in folds[:wanted] for n in fold}


def _row(case: Case, text: FinalText | None) -> dict[str, Any]:
    mask = read_mask_file(case.mask, str(case.mask))
    boxes = boxes_from_mask(mask)
    asked = text or FinalText(build_query(case.lesion, case.anatomy, case.modality, case.id))
    answer = asked.answer or format_answer(
        case.lesion, boxes.tolist(), Frame("original_px", (mask.shape[1], mask.shape[0])), ""
    )
    return {
        "image": {"bytes": case.image.read_bytes(), "path": None},
        "mask": {"bytes": case.mask.read_bytes(), "path": None},
        "boxes": [[int(side) for side in box] for box in boxes],
        **{"query": asked.query, "reasoning": asked.reasoning, "answer": answer},
        **{name: getattr(case, name) for name in ("modality", "anatomy", "lesion", "source", "patient", "licence")},
        **{"difficulty": case.difficulty, "scores": json.dumps(dict(asked.scores or {}), sort_keys=True)},
        **{"name": case.id, "volume": case.volume, "slice": case.slice},
    }


def _features() -> Any:
    from datasets import Features, Image, List, Value

    return Features(
        {
            "image": Image(),
            "mask": Image(),
            "boxes": List(List(Value("int64"))),
            **{name: Value("string") for name in ("query", "reasoning", "answer", "modality", "anatomy", "lesion")},
            **{name: Value("string") for name in ("source", "patient", "licence")},
            "difficulty": Value("float64"),
            "scores": Value("string"),
            "name": Value("string"),
            "volume": Value("string"),
            "slice": Value("int64"),
        }
    )
