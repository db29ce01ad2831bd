"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO: expressions about objects of COCO images, some of which have no target.

Layout as in `utils/grefer.py` of dvlab-research/LISA, f1abb5a, read on 2026-11-29; the downloads were not seen.
Annotations come from the REFER project and from gRefCOCO's page, images are COCO's train2014; nothing is fetched here.

    refs(unc).p, refs(google).p, refs(umd).p or grefs(unc).json     [{"image_id", "ann_id", "split", "sentences", ...}]
    instances.json                                                  COCO's images and annotations

REFER's own folders, as `refer.py` of lichengunc/refer (2fe1dfe) and LISA's `utils/refer_seg_dataset.py` read them:

    refer_seg/{refcoco,refcoco+,refcocog,grefcoco}/                 the two files
    refer_seg/images/mscoco/images/train2014/                       COCO's images
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segrl.data.formats.coco import coco_mask
from segrl.data.formats.coco_images import find_coco_images
from segrl.data.formats.rows import FormatRow
from segrl.data.formats.sources import by_id, listed, named_file, read_bytes, read_json
from segrl.errors import DataError, unknown_name

__all__ = ["read_pickled_lists", "read_refcoco", "read_refcoco_folder"]

_LISTS = {"refcoco": "refs(unc)", "refcoco+": "refs(unc)", "refcocog": "refs(umd)", "grefcoco": "grefs(unc)"}
"""The list of expressions of each data set, in the division that LISA and later systems report."""


def read_refcoco(
    refs: str | Path, instances: str | Path, images: str | Path, *, texts: Mapping[str, str], split: str | None = None
) -> Iterator[FormatRow]:
    """Read expressions, one row for each sentence; its mask is the union of the objects that it refers to.

    Args:
        refs: The list of expressions: JSON, or a pickle, which is read without running what it may hold.
        instances: JSON with COCO's images and annotations.
        images: The folder in which their `file_name` is found.
        texts: Columns that every row gets.
        split: Read only this one, such as "testA"; None reads all.

    Yields:
        Rows whose query is the sentence; where an expression has no target, with an empty mask.

    Raises:
        DataError: Files of another layout, a pickle that holds anything but lists, mappings, texts and numbers,
            different images or annotations with one id, references to what is not there or is outside the folder: all
            are listed.
        UnknownNameError: No such split.

    Example:
        >>> list(read_refcoco("refs.json", "instances.json", "images", texts={}))
        Traceback (most recent call last):
        segrl.errors.DataError: refs.json: cannot be read: No such file or directory
    """
    expressions = _expressions(Path(refs))
    if split is not None and split not in (known := {str(ref.get("split")) for ref in expressions}):
        raise unknown_name(f"split of {refs}", split, sorted(known))
    wanted = [ref for ref in expressions if split is None or ref.get("split") == split]
    content = _object(Path(instances))
    pictures, shapes = (by_id(content[key], f"{key} of {instances}") for key in ("images", "annotations"))
    problems = []
    files: dict[Any, Path] = {}
    for number, ref in enumerate(wanted):
        where = f"ref {ref.get('ref_id', number)}"
        missing = [key for key in ("image_id", "split", "sentences") if key not in ref]
        if missing:
            problems.append(f"{where}: no {', '.join(missing)}")
            continue
        if ref["image_id"] not in pictures:
            problems.append(f"{where}: image_id {ref['image_id']} is not in {instances}")
        elif ref["image_id"] not in files:
            try:
                files[ref["image_id"]] = named_file(Path(images), pictures[ref["image_id"]].get("file_name"))
            except DataError as error:
                files[ref["image_id"]] = Path()  # named once, however many expressions are about it
                problems.append(f"{where}: {error}")
        problems += [f"{where}: ann_id {ann} is not in {instances}" for ann in _objects(ref) if ann not in shapes]
        if not _without_target(ref) and not _objects(ref):
            problems.append(f"{where}: neither ann_id nor no_target")
    if problems:
        raise DataError(f"{refs}: {len(problems)} problems, expected none:{listed(problems)}")
    for ref in wanted:
        picture = pictures[ref["image_id"]]
        mask = np.zeros((picture["height"], picture["width"]), dtype=bool)
        for ann in _objects(ref):
            if not shapes[ann].get("iscrowd"):  # as in the source
                mask |= coco_mask(shapes[ann]["segmentation"], *mask.shape, f"annotation {ann}", crossing=True)
        for sentence in ref["sentences"]:
            query = str(sentence["sent"] if isinstance(sentence, Mapping) else sentence)
            row = {**texts, "query": query}
            yield FormatRow(files[ref["image_id"]], mask, picture["file_name"], str(ref["split"]), row)


def read_refcoco_folder(source: str | Path, name: str, *, texts: Mapping[str, str]) -> Iterator[FormatRow]:
    """Read one of the four data sets from its folder, as `read_refcoco` reads its files.

    RefCOCO and RefCOCO+ are read in the division of UNC, RefCOCOg in that of UMD, the one with a test set; Google's
    division of RefCOCO and RefCOCOg is read by `read_refcoco` alone. Images are found by `find_coco_images`.

    Args:
        source: The folder `name`, or the one that holds it, or the one that holds `refer_seg`.
        name: "refcoco", "refcoco+", "refcocog" or "grefcoco".
        texts: Columns that every row gets.

    Yields:
        Rows of all splits: train, val, and testA and testB or, of RefCOCOg, test.

    Raises:
        DataError: No such folder, the folder of another of the four, no list in that division, no folder of COCO's
            images; or as `read_refcoco`.
        UnknownNameError: Another name.

    Example:
        >>> list(read_refcoco_folder("no/such/folder", "refcocog", texts={}))
        Traceback (most recent call last):
        segrl.errors.DataError: no/such/folder: no refs(umd).p in it, in refcocog or in refer_seg/refcocog
    """
    if name not in _LISTS:
        raise unknown_name("data set of referring expressions", name, _LISTS)
    home, wanted = Path(source), _LISTS[name]
    lists = {folder: _lists(folder) for folder in (home / name, home / "refer_seg" / name, home)}
    folder = next((folder for folder, found in lists.items() if found), None)
    if folder is None:
        raise DataError(f"{home}: no {wanted}.p in it, in {name} or in refer_seg/{name}")
    own = Path(os.path.abspath(folder)).name
    if own in _LISTS and own != name:
        raise DataError(f"{folder}: is the folder of {own}; read it as {own}, or give the folder of {name}")
    refs = next((path for path in lists[folder] if path.stem == wanted), None)
    if refs is None:
        there = ", ".join(path.name for path in lists[folder])
        raise DataError(
            f"{folder}: no {wanted}.p, the division that is reported, only {there}; add it, or convert that one"
        )
    images = find_coco_images(folder, ["train2014"]) / "train2014"
    yield from read_refcoco(refs, folder / "instances.json", images, texts=texts)


def _lists(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*refs(*).*") if path.suffix in (".p", ".json"))


def _objects(ref: Mapping[str, Any]) -> list[Any]:
    """Ids of the objects; gRefCOCO writes -1 where there is none."""
    given = ref.get("ann_id")
    ids = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    return [] if _without_target(ref) else ids


def _without_target(ref: Mapping[str, Any]) -> bool:
    return bool(ref.get("no_target")) or ref.get("ann_id") in (-1, [-1])


def read_pickled_lists(data: bytes, where: str = "pickle") -> Any:
    """Read a pickle of lists, mappings, texts and numbers; anything else in it is refused, and nothing is run.

    Args:
        data: The pickle, also of Python 2.
        where: The file, for errors.

    Raises:
        DataError: Another content, or damaged data.

    Example:
        >>> read_pickled_lists(pickle.dumps([{"sent": "left cyst"}]))
        [{'sent': 'left cyst'}]
        >>> read_pickled_lists(pickle.dumps(Path("a")))
        Traceback (most recent call last):
        segrl.errors.DataError: pickle: refused: it holds pathlib...
    """

    class Plain(pickle.Unpickler):
        def find_class(self, module_name: str, global_name: str, /) -> Any:
            raise DataError(f"{where}: refused: it holds {module_name}.{global_name}, expected lists, mappings, texts "
                            "and numbers")  # fmt: skip

        def persistent_load(self, pid: Any) -> Any:
            raise DataError(f"{where}: refused: it refers to something outside of it")

    try:
        return Plain(io.BytesIO(data), encoding="latin1").load()
    except DataError:
        raise
    except Exception as error:  # whatever damaged bytes make of the format
        raise DataError(f"{where}: cannot be read: {type(error).__name__}: {error}") from error


def _expressions(path: Path) -> Sequence[Mapping[str, Any]]:
    pickled = path.suffix in (".p", ".pkl", ".pickle")
    found = read_pickled_lists(read_bytes(path), str(path)) if pickled else read_json(path)
    if not isinstance(found, list) or not found or not all(isinstance(ref, Mapping) for ref in found):
        raise DataError(f"{path}: expected a list of expressions")
    return found


def _object(path: Path) -> Mapping[str, Any]:
    content = read_json(path)
    if not isinstance(content, Mapping) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise DataError(f"{path}: expected an object with the lists images and annotations")
    return content
