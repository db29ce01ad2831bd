"""Masks written as a COCO file of annotations."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from segrl.errors import DataError
from segrl.files.whole import write_whole
from segrl.geometry.masks import foreground, mask_to_box, mask_to_rle

__all__ = ["CocoWriter"]


class CocoWriter:
    """Collects masks on images, as compressed run lengths, and writes them as one COCO file.

    `segrl.data.formats.read_coco` and pycocotools read it back, pixel by pixel. Ids count from 1.

    Example:
        >>> from pathlib import Path
        >>> writer = CocoWriter()
        >>> writer.add("a.png", (3, 2), np.array([[0, 1, 1], [0, 1, 0]], dtype=bool), category="cyst", score=0.5)
        >>> writer.write("a.json")
        >>> found = json.loads(Path("a.json").read_text())["annotations"][0]
        >>> found["area"], found["bbox"], found["score"]
        (3, [1.0, 0.0, 2.0, 2.0], 0.5)
    """

    def __init__(self) -> None:
        self._images: dict[str, dict[str, Any]] = {}
        self._categories: dict[str, int] = {}
        self._annotations: list[dict[str, Any]] = []

    def add(
        self,
        file_name: str,
        size: tuple[int, int],
        mask: np.ndarray | None,
        *,
        category: str,
        score: float | None = None,
    ) -> None:
        """Add a mask; an image may have several.

        Args:
            file_name: Of the image.
            size: (width, height) of the image.
            mask: (H, W) bool; an empty one, or None, has no annotation, and its image is listed all the same.
            category: Name of its category.
            score: Confidence in [0, 1].

        Raises:
            DataError: A mask of another form, or of another size than the image.
        """
        width, height = map(int, size)
        known = {"id": len(self._images) + 1, "file_name": file_name, "width": width, "height": height}
        image = self._images.setdefault(file_name, known)
        number = self._categories.setdefault(category, len(self._categories) + 1)
        inside = None if mask is None else foreground(mask, f"mask of {file_name}")
        if inside is None or not inside.any():
            return
        if inside.shape != (height, width):
            raise DataError(f"mask of {file_name}: shape {inside.shape}, expected {(height, width)}, its image's")
        box = mask_to_box(inside)
        assert box is not None
        self._annotations.append(
            {
                "id": len(self._annotations) + 1,
                "image_id": image["id"],
                "category_id": number,
                "segmentation": mask_to_rle(inside, compressed=True),
                "area": int(inside.sum()),
                "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
                "iscrowd": 0,
                **({} if score is None else {"score": score}),
            }
        )

    def write(self, path: str | os.PathLike) -> None:
        """Write the file; an existing one is replaced."""
        content = {
            "images": list(self._images.values()),
            "categories": [{"id": number, "name": name} for name, number in self._categories.items()],
            "annotations": self._annotations,
        }
        write_whole(path, json.dumps(content, ensure_ascii=False))
