"""For mkdocstrings: docstrings say `Example:`, and griffe takes only `Examples:` for a section of code."""

import re
from typing import Any

from griffe import Extension, Object


class ExamplesSection(Extension):
    """Rename the section while docstrings are read."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
