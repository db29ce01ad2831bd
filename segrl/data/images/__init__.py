"""Images: folders, prompts, synthetic lesions, augmentation."""

__all__: list[str] = []
