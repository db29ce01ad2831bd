"""Questions that do not name the structure: descriptions in its place, or whole paraphrased questions.

M3D keeps descriptions by structure in `Data/data/M3D-Seg/term_dictionary.json` of https://github.com/BAAI-DCAI/M3D, an
object of lists of sentences; read there in November 2026. Some of its sentences name their structure ("Liver: Vital
organ ..."), which would turn the implicit question into an explicit one: they are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from segrl.data.reasoning import pick_by_hash
from segrl.data.text_columns import name_classes
from segrl.errors import DataError, SegRLError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Queries"]

_TEMPLATES = (
    "Segment the structure of this description: {text}.",
    "Which structure fits this description? {text}. Segment it.",
    "Find and segment what is described here: {text}.",
    "Description: {text}. Segment what it describes.",
)


@dataclass(frozen=True, kw_only=True)
class Queries:
    """Questions by structure, none of which names its own.

    Attributes:
        texts: Descriptions or whole questions, by the structure's name in lower case.
        templates: A question is one of these with a description in place of {text}.
        left_out: Number of texts that were left out, because they name their structure.
        source: Where they come from, for errors.

    Example:
        >>> queries = Queries.from_texts({"liver": ["Produces bile.", "Liver: a vital organ."]})
        >>> queries.texts, queries.left_out
        ({'liver': ('Produces bile',)}, 1)
        >>> from datasets import Dataset
        >>> rows = Dataset.from_list([{"name": "a", "lesion": "liver", "query": "Segment the liver in this scan."}])
        >>> queries.ask(rows)["query"][:]
        ['Description: Produces bile. Segment what it describes.']
    """

    texts: Mapping[str, tuple[str, ...]]
    templates: Sequence[str] = _TEMPLATES
    left_out: int = 0
    source: str = "descriptions"

    @classmethod
    def from_files(cls, descriptions: str | None, paraphrases: str | None) -> Self | None:
        """Read one of two JSON files of texts by structure; None without either.

        Args:
            descriptions: File of descriptions, each put into a template; its flag is `--descriptions`.
            paraphrases: File of whole questions, asked as they are; its flag is `--paraphrases`.

        Raises:
            SegRLError: Both are given.
            DataError: A file that cannot be read or is not of this layout, or a structure whose texts all name it.
        """
        if descriptions is not None and paraphrases is not None:
            raise SegRLError("--descriptions and --paraphrases both replace the questions; pass one of them")
        flag, path = ("descriptions", descriptions) if paraphrases is None else ("paraphrases", paraphrases)
        if path is None:
            return None
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"--{flag} {path!r} cannot be read ({error}); expected a JSON file of texts by structure"
            ) from error
        templates = _TEMPLATES if paraphrases is None else None
        return cls.from_texts(content, templates=templates, source=f"--{flag} {path!r}")

    @classmethod
    def from_texts(cls, content: Any, *, templates: Sequence[str] | None = _TEMPLATES, source: str = "texts") -> Self:
        """Check texts by structure, and leave out repeated ones and those that name their structure.

        Args:
            content: Lists of texts by the name of the structure.
            templates: Questions with {text} for a description; None asks the texts as they are.
            source: Where they come from, for errors.

        Raises:
            DataError: Another layout, or a structure whose texts all name it.
        """
        if not isinstance(content, Mapping) or not content:
            raise DataError(f"{source}: holds a {type(content).__name__}, expected an object of texts by structure")
        kept: dict[str, tuple[str, ...]] = {}
        left_out = 0
        for name, texts in content.items():
            if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
                raise DataError(f"{source}: {name!r} holds {texts!r:.80}, expected a list of texts")
            cleaned = dict.fromkeys(" ".join(text.split()) for text in texts)
            implicit = [text.rstrip(" .") if templates else text for text in cleaned if not _names(text, name)]
            left_out += len(cleaned) - len(implicit)
            if not implicit:
                raise DataError(f"{source}: all texts of {name!r} name it, expected at least one that does not")
            kept[_key(name)] = tuple(implicit)
        return cls(texts=kept, templates=templates or ("{text}",), left_out=left_out, source=source)

    def ask(self, rows: Dataset) -> Dataset:
        """Return the rows with other questions; a stable hash of a row's name picks text and template.

        Args:
            rows: With the columns query, lesion and name.

        Raises:
            DataError: Structures of the rows that have no text.
        """
        rows = name_classes(rows)
        if missing := sorted({str(name) for name in rows["lesion"] if self.of(name) is None}):
            raise DataError(
                f"{self.source}: no text for {', '.join(map(repr, missing[:5]))}, found in the column lesion; it "
                f"has {', '.join(list(self.texts)[:5])} and others; add them"
            )

        def asked(row: dict[str, Any]) -> dict[str, str]:
            text = pick_by_hash(self.of(row["lesion"]) or (), f"text of {row['name']}")
            return {"query": pick_by_hash(self.templates, str(row["name"])).format(text=text)}

        return rows.map(asked, desc="questions")

    def of(self, lesion: Any) -> tuple[str, ...] | None:
        """Return the texts of a structure; None if there are none."""
        return self.texts.get(_key(str(lesion or "")))


def _key(name: str) -> str:
    """The name in lower case, each of its words in the singular."""
    return " ".join(word.removesuffix("s") for word in name.casefold().split())


def _names(text: str, name: str) -> bool:
    """Return whether a text holds every word of a name, in the singular or plural, wherever."""
    words = {word.removesuffix("s") for word in re.findall(r"\w+", text.casefold())}
    return set(re.findall(r"\w+", _key(name))) <= words
