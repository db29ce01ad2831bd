"""Before transformers is first imported: offline, no telemetry. Hypothesis profiles, marks, less garbage."""

import atexit
import gc
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("seeded", deadline=None, max_examples=30)  # as .ci/run has it, with a seed that it prints
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what is `long`, or uses a fixture that is `slow_to_build`, as `slow`, too."""
    for item in items:
        fixtures = [definition.func for known in item._fixtureinfo.name2fixturedefs.values() for definition in known]
        if item.get_closest_marker("long") or any(hasattr(fixture, "slow_to_build") for fixture in fixtures):
            item.add_marker("slow")


def pytest_collection_finish():
    """accelerate collects garbage after every training run: what the imports left need not be looked at each time."""
    gc.freeze()
    atexit.register(gc.unfreeze)


@pytest.fixture
def registries():
    """Give every registry its content back: what examples register is not there for other tests."""
    from segrl.registry import Registry

    modules = [vars(module) for name, module in sys.modules.items() if name.split(".")[0] == "segrl"]
    kept = [value._items for names in modules for value in names.values() if isinstance(value, Registry)]
    kept += [names["_registered"] for names in modules if "_registered" in names]
    before = [dict(items) for items in kept]
    yield
    for items, content in zip(kept, before, strict=True):
        items.clear()
        items.update(content)
