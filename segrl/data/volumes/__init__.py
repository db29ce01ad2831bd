"""Volumes: files, intensity scaling, shown slices, prompts, synthetic volumes."""
