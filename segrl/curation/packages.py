"""Packages of extras, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from segrl.errors import SegRLError

__all__ = ["require"]


def require(package: str, extra: str = "curation") -> Any:
    """Import a package of an extra of segrl.

    Raises:
        SegRLError: It is not installed; names the extra.

    Example:
        >>> require("no_such_package")
        Traceback (most recent call last):
        segrl.errors.SegRLError: no_such_package is not installed; run pip install "segrl[curation]"
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise SegRLError(f'{package} is not installed; run pip install "segrl[{extra}]"') from error
