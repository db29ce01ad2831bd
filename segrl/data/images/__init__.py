"""Images: folders, prompts, synthetic lesions, augmentation."""
