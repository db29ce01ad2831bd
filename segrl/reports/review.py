"""A blinded comparison by people: a sheet of pairs of masks, and what the answers say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import binomtest

from segrl.errors import DataError
from segrl.geometry.masks import rle_to_mask
from segrl.models.saved_files import read_object
from segrl.reports.drawing import draw_overlay, drawn_size
from segrl.reports.page import element, picture
from segrl.reports.results_file import write_results
from segrl.reports.sheet import read_sheet, sheet_page

__all__ = ["read_review", "write_review"]

SHEET, KEY = "sheet.html", "key.json"
ANSWERS = ("left", "equal", "right")
SIDE = 320  # of a drawn image, pixels


def write_review(
    first: Sequence[Mapping[str, Any]],
    second: Sequence[Mapping[str, Any]],
    images: Mapping[int, Callable[[], Image.Image]],
    folder: str | Path,
    *,
    names: tuple[str, str] = ("first", "second"),
    count: int = 20,
    seed: int = 0,
) -> list[int]:
    """Write a sheet on which people say which of two masks is better, without knowing whose it is.

    Samples are drawn at random among those whose masks differ, and so are the sides, each system's equally often. The
    ground truth is not shown.

    Args:
        first: Records of one system, see `overlap_record`.
        second: Records of the other, of the same samples in the same order.
        images: By the number of a record a function that reads its image, as it was evaluated; samples without one are
            left out.
        folder: Gets `sheet.html`, for the people, and `key.json`, which says what is where; a new folder.
        names: Of the systems, for the key.
        count: Samples on the sheet, at most.
        seed: Of what is drawn.

    Returns:
        The numbers of the samples, in the order of the sheet.

    Raises:
        DataError: The folder is a file or not empty, records hold no masks or those of volumes, or no sample has an
            image and two different masks.

    Example:
        >>> from segrl.geometry import mask_to_rle
        >>> first, second = ([{"query": "Where?", "predicted_mask": mask_to_rle([[n, 0]])}] for n in (True, False))
        >>> write_review(first, second, {0: lambda: Image.new("L", (2, 1))}, "review")
        [0]
        >>> sorted(path.name for path in Path("review").iterdir())
        ['key.json', 'sheet.html']
    """
    home = Path(folder)
    if home.exists() and not home.is_dir():
        raise DataError(f"{home} is a file; pass a new folder as --output_dir")
    if home.exists() and any(home.iterdir()):
        raise DataError(f"{home} is not empty; pass a new --output_dir")
    for name, records in zip(names, (first, second), strict=True):
        if not all("predicted_mask" in record for record in records):
            raise DataError(f"{name}: its records hold no masks; evaluate it again with this version of segrl")
        if any(len((record["predicted_mask"] or {}).get("size", ())) == 3 for record in records):
            raise DataError(f"{name}: its records are of volumes, and a review shows images; compare without --review")
    differ = [n for n in images if first[n]["predicted_mask"] != second[n]["predicted_mask"]]
    if not differ:
        raise DataError(f"{names[0]} and {names[1]}: no sample with an image and two different masks")
    rng = np.random.default_rng(seed)
    chosen = [int(n) for n in rng.permutation(sorted(differ))[:count]]
    swapped = rng.permutation(len(chosen)) % 2 == 1  # each system is on the left equally often
    identity = f"{int(rng.integers(16**8)):08x}"
    questions, key = [], []
    for number, (n, swap) in enumerate(zip(chosen, swapped, strict=True), 1):
        records = (second[n], first[n]) if swap else (first[n], second[n])
        questions.append((str(records[0].get("query") or ""), _pictures(images[n](), records)))
        sides = {"left": names[1] if swap else names[0], "right": names[0] if swap else names[1]}
        key.append({"sample": number, "name": str(first[n].get("name") or ""), "record": n, **sides})
    intro = "For each question, which red mask answers it better? The order of the two is random."
    page = sheet_page("Which mask is better?", intro, questions, ANSWERS, identity)
    home.mkdir(parents=True, exist_ok=True)
    (home / SHEET).write_text(page, encoding="utf-8")
    write_results(home / KEY, {"id": identity, "systems": list(names), "samples": key})
    return chosen


def _pictures(image: Image.Image, records: Sequence[Mapping[str, Any]]) -> str:
    cells = [element("div", element("p", text="image"), picture(_drawn(image, None), "the image"))]
    for side, record in zip(("left", "right"), records, strict=True):
        found = record["predicted_mask"]
        mask = np.zeros((1, 1), dtype=bool) if found is None else rle_to_mask(found)
        cells.append(element("div", element("p", text=side), picture(_drawn(image, mask), f"the {side} mask")))
    return element("div", *cells, class_="row")


def _drawn(image: Image.Image, mask: np.ndarray | None) -> Image.Image:
    return draw_overlay(image, drawn_size(image, SIDE), mask=mask)


def read_review(folder: str | Path, answers: Sequence[str | Path]) -> dict[str, Any]:
    """Read the answers of people to a sheet.

    Args:
        folder: What `write_review` wrote.
        answers: CSV files that the sheet saved, one for each person.

    Returns:
        Plain Python values: "systems"; "people"; "answers", how often the "first" or the "second" system was better or
        both were "equal"; "preferred", the share of the second system among answers that prefer one, with its exact
        95 % binomial interval "ci95" and the two-sided "p" that both are preferred alike (None without such answers;
        answers of several people to one sample count one by one); "unanswered"; "agreement", the share of pairs of
        people who agree on a sample.

    Raises:
        DataError: No key there, or a file of another sheet, with an unknown answer or sample, or a sample twice; names
            file and row.

    Example:
        >>> read_review("no/such/folder", [])
        Traceback (most recent call last):
        segrl.errors.DataError: no/such/folder: no key.json; pass the folder that `segrl compare --review` wrote
    """
    home = Path(folder)
    if not (home / KEY).is_file():
        raise DataError(f"{home}: no {KEY}; pass the folder that `segrl compare --review` wrote")
    key = read_object(home / KEY)
    sides = {str(sample["sample"]): sample for sample in key["samples"]}
    one, other = key["systems"]
    counts = {"first": 0, "equal": 0, "second": 0}
    unanswered, votes = 0, {sample: [] for sample in sides}
    for path in answers:
        for sample, answer, _ in read_sheet(path, home, key["id"], sides, ANSWERS):
            if not answer:
                unanswered += 1
                continue
            vote = answer if answer == "equal" else "first" if sides[sample][answer] == one else "second"
            counts[vote] += 1
            votes[sample].append(vote)
    decided = counts["first"] + counts["second"]
    found: dict[str, Any] = {"systems": [one, other], "people": len(answers), "answers": counts}
    found |= {"unanswered": unanswered, "preferred": None, "ci95": None, "p": None, "agreement": _agreement(votes)}
    if decided:
        test = binomtest(counts["second"], decided)
        ends = test.proportion_ci()
        found |= {
            "preferred": counts["second"] / decided,
            "ci95": [float(ends.low), float(ends.high)],
            "p": float(test.pvalue),
        }
    return found


def _agreement(votes: Mapping[str, Sequence[str]]) -> float | None:
    pairs = [one == other for given in votes.values() for n, one in enumerate(given) for other in given[n + 1 :]]
    return float(np.mean(pairs)) if pairs else None
