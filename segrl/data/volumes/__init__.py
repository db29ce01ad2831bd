"""Volumes: files, intensity scaling, shown slices, prompts, synthetic volumes."""

__all__: list[str] = []
