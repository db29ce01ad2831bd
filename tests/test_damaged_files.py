"""Damaged files of a run: one line that names the file, at every door that reads it."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_headed_model, tiny_model
from marks import slow_to_build
from peft import LoraConfig, get_peft_model
from test_checkpoints import SETTINGS, sft
from transformers import TrainerCallback

from segrl.errors import CheckpointError
from segrl.heads import attach_mask_head, detach_mask_head
from segrl.inference import ReasoningSegmenter, load
from segrl.models import load_vlm, restore_weights
from segrl.scripts import check_output


@pytest.fixture(scope="module")
@slow_to_build
def saved(tmp_path_factory) -> Path:
    """A whole model with a head, and a PEFT adapter of it beside."""
    home = tmp_path_factory.mktemp("saved")
    model, processor = tiny_headed_model()
    ReasoningSegmenter(model, processor, SETTINGS).save_pretrained(home / "whole")
    head: Any = detach_mask_head(model)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model.config._name_or_path = str(home / "whole")
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(home / "whole")  # type: ignore[index]
    ReasoningSegmenter(attach_mask_head(adapted, head), processor, SETTINGS).save_pretrained(home / "adapter")
    for name in ("whole", "adapter"):
        assert load(home / name, device="cpu").settings == SETTINGS
    return home


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(key: str, value: Any) -> Any:
    """Set `key` ("part.setting") of a JSON file; None removes it."""

    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        *outer, last = key.split(".")
        inner = content
        for name in outer:
            inner = inner[name]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
        path.write_text(json.dumps(content))

    return damage


def a_list(path: Path) -> None:
    path.write_text("[]")


WHOLE = [
    *[(name, cut, "") for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")],
    *[(name, cut, "") for name in ("generation_config.json", "processor_config.json")],
    *[(name, cut, "") for name in ("mask_head.safetensors", "mask_head.json", "segrl.json")],
    *[(name, a_list, "") for name in ("config.json", "generation_config.json", "mask_head.json", "segrl.json")],
    ("mask_head.json", change("adapter.prompt_dim", 10**9), "adapter.prompt_dim: 1000000000 is more than"),
    ("mask_head.json", change("segmenter.hidden_dim", 10**9), "segmenter.hidden_dim: 1000000000 is more than"),
    ("mask_head.json", change("segmenter.hidden_dim", "64"), "segmenter: hidden_dim='64': expected whole numbers"),
    ("mask_head.json", change("segmenter.image_size", None), "segmenter: no image_size, expected every"),
    ("mask_head.json", change("probe.token_id", 7), "probe: token_id 7 is not '<seg>', which is "),
    ("mask_head.json", change("probe.token_id", "x"), "probe: ValueError"),
    ("segrl.json", change("task", None), "task"),
    ("segrl.json", change("max_new_tokens", "many"), "max_new_tokens='many'"),
    ("segrl.json", change("seg_token", 3), "seg_token=3: expected a text"),
]
ADAPTER = [
    ("adapter_model.safetensors", cut, ""),
    ("adapter_config.json", cut, ""),
    ("adapter_config.json", a_list, ""),
    ("adapter_config.json", change("peft_type", "NONE"), ""),
]


def names(cases: list[Any]) -> list[str]:
    return [f"{number} {case[0]}" for number, case in enumerate(cases)]


@pytest.mark.parametrize(("file", "damage", "text"), WHOLE, ids=names(WHOLE))
def test_a_damaged_run_is_one_line(saved, file, damage, text, tmp_path):
    folder = shutil.copytree(saved / "whole", tmp_path / "run")
    damage(folder / file)
    with pytest.raises(CheckpointError) as caught:
        load(folder, device="cpu")
    said = str(caught.value)
    assert "\n" not in said
    assert (file in said) or "mask_head.safetensors: does not fit" in said
    assert text in said


@pytest.mark.parametrize(("file", "damage", "text"), ADAPTER, ids=names(ADAPTER))
def test_a_damaged_adapter_is_one_line(saved, file, damage, text, tmp_path):
    folder = shutil.copytree(saved / "adapter", tmp_path / "run")
    damage(folder / file)
    with pytest.raises(CheckpointError, match=file) as caught:
        load(folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert text in str(caught.value)


@pytest.mark.parametrize("read", [load_vlm, lambda folder: restore_weights(tiny_model()[0], folder)])
def test_damaged_weights_are_named_by_whatever_reads_them(read, saved, tmp_path):
    folder = shutil.copytree(saved / "whole", tmp_path / "run")
    cut(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"run/model\.safetensors: cannot be read: "):
        read(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("limit", [100_000, 1_000_000, 3_000_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on(limit, tmp_path):
    """A limit on the size of files stands for a full disk: it meets the model, the head, or the optimizer."""
    whole, processor = tiny_headed_model()
    sft(tmp_path / "whole", whole, processor, max_steps=3, save_steps=1).train()
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "whole" / "checkpoint-1").iterdir()}
    assert any(size > limit for size in sizes.values()), sizes
    model, processor = tiny_headed_model()
    trainer = sft(tmp_path / "run", model, processor, max_steps=3, save_steps=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(TrainerCallback):
        """The disk is full from the second save on."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    trainer.add_callback(Full)
    try:
        with pytest.raises(CheckpointError) as caught:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = str(caught.value)
    assert "cannot be written: " in said
    assert said.endswith("; make room, then go on with --resume_from_checkpoint last")
    assert "\n" not in said
    progress = check_output(tmp_path / "run", resume="last")
    assert progress.checkpoint == str(tmp_path / "run" / "checkpoint-1")
    again, processor = tiny_headed_model()
    sft(tmp_path / "run", again, processor, max_steps=3, save_steps=1).train(resume_from_checkpoint=True)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())
