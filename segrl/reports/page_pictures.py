"""Pictures of a page as long as there is room for them."""

from __future__ import annotations

import base64
import io

from PIL import Image

from segrl.reports.page import element

__all__ = ["Pictures"]


class Pictures:
    """Pictures inside a page, as JPEG, as long as there is room for them.

    Args:
        room: Characters that they may take.

    Example:
        >>> pictures = Pictures(room=10)
        >>> pictures.add(Image.new("L", (8, 8)), "case 3")
        '<p class="note">case 3: left out, the page would be larger than 20 MB</p>'
    """

    def __init__(self, room: int) -> None:
        self.room, self.left_out = room, 0

    def add(self, image: Image.Image, alt: str) -> str:
        """Return the picture as an element, or a note that it was left out."""
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=82)
        content = base64.b64encode(buffer.getvalue()).decode("ascii")
        if len(content) > self.room:
            self.left_out += 1
            return element("p", text=f"{alt}: left out, the page would be larger than 20 MB", class_="note")
        self.room -= len(content)
        return element("img", src=f"data:image/jpeg;base64,{content}", alt=alt).removesuffix("</img>")
