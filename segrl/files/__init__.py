"""Files that appear whole or not at all."""

__all__: list[str] = []
