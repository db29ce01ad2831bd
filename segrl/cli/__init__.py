"""The command `segrl`."""

__all__: list[str] = []
