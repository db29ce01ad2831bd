"""A trained run for others: which of its files are published, and the card that says what it is."""

from segrl.publishing.model_card import model_card
from segrl.publishing.run_files import find_base, run_files
from segrl.publishing.upload import publish_folder

__all__ = ["find_base", "model_card", "publish_folder", "run_files"]
