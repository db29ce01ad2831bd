"""A trained model behind a page in the browser and an HTTP endpoint: one model, a queue, limits on size and time."""

from segrl.serving.server import find_examples, running_server, serve
from segrl.serving.settings import ServingSettings

__all__ = ["ServingSettings", "find_examples", "running_server", "serve"]
