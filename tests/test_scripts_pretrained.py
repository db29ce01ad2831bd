"""`train_once`: what stands in for pretraining is trained once, and loaded by runs that differ in what follows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from marks import sampled
from PIL import Image
from safetensors.torch import load_file
from script_modules import Example
from torch import nn

from segrl.errors import CheckpointError
from segrl.models import Finding, Picture, tiny_qwen3_vl
from segrl.scripts import pictures_key, reader_key, train_once
from segrl.segmenters import Sam2Segmenter, sam2_config

SHORT = ("--max_steps", 1, "--train_limit", 24, "--eval_limit", 2, "--dataloader_pin_memory", "false")


def layer(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


class Training:
    """Adds 1 to the weights, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def once(self, folder, module, made_of=7, part="vision"):
        def train() -> float:
            self.count += 1
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter += 1
            module.eval()
            return 0.1 + 0.2

        return train_once(folder, part, module, lambda: made_of, train)


def test_the_second_run_loads_what_the_first_one_trained(tmp_path):
    training = Training()
    modules = [layer(), layer()]
    assert [training.once(tmp_path, module) for module in modules] == [0.1 + 0.2] * 2
    assert training.count == 1
    assert torch.equal(modules[0].weight, modules[1].weight)
    assert not torch.equal(modules[0].weight, layer().weight)
    assert not any(module.training for module in modules)


@pytest.mark.parametrize("change", [{"made_of": 8}, {"part": "captions"}, {"module": layer(1)}])
def test_whatever_differs_is_trained(change, tmp_path):
    training = Training()
    training.once(tmp_path, layer())
    training.once(tmp_path, **{"module": layer(), **change})
    assert training.count == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_another_config_of_equal_weights_is_trained(tmp_path):
    training = Training()
    modules = [Sam2Segmenter(sam2_config("tiny", image_size=side)) for side in (64, 64, 96)]
    for module in modules[1:]:
        module.load_state_dict(modules[0].state_dict())
    for module in modules:
        training.once(tmp_path, module)
    assert training.count == 2


def test_readers_of_equal_weights_differ_by_their_tokens_and_pixels():
    built = [tiny_qwen3_vl(corpus=["a dark cyst"], max_pixels=side**2)[1] for side in (64, 64, 96)]
    other = tiny_qwen3_vl(corpus=["a ring abscess"], max_pixels=64**2)[1]
    keys = [reader_key(processor) for processor in (*built, other)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_without_a_folder_nothing_is_asked_or_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refuse() -> None:
        raise AssertionError

    assert train_once(None, "vision", layer(), refuse, lambda: 1.0) == 1.0
    assert not list(tmp_path.iterdir())


def test_a_head_is_neither_kept_nor_part_of_the_key(tmp_path):
    training = Training()
    models = [nn.ModuleDict({"lm": layer(), "mask_head": layer(seed)}) for seed in (1, 2)]
    training.once(tmp_path, models[0])
    training.once(tmp_path, models[1])
    assert training.count == 1
    first, second = (model.state_dict() for model in models)
    assert torch.equal(second["mask_head.weight"], layer(2).weight)
    assert torch.equal(second["lm.weight"], first["lm.weight"])


@pytest.mark.parametrize("content", [b"", b"\0" * 100, None])
def test_a_damaged_file(content, tmp_path):
    Training().once(tmp_path, layer())
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3] if content is None else content)
    with pytest.raises(CheckpointError, match=rf"{path.name}.*delete it"):
        Training().once(tmp_path, layer())


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "kept").write_text("")
    training = Training()
    with pytest.raises(CheckpointError, match="kept: not a folder"):
        training.once(tmp_path / "kept", layer())
    assert training.count == 0


def test_pictures_differ_by_all_that_is_known_of_them():
    mask = np.eye(4, dtype=bool)
    image = Image.new("RGB", (4, 4))
    pictures = [
        Picture(image, [Finding("cyst", mask)]),
        Picture(image, [Finding("cyst", ~mask)]),
        Picture(image, [Finding("abscess", mask)]),
        Picture(image, [Finding("cyst", mask)], frozenset({"cyst"})),
        Picture(image, [], frozenset()),
        Picture(image, []),
        Picture(Image.new("RGB", (4, 4), "red"), [Finding("cyst", mask)]),
    ]
    assert len({pictures_key([picture]) for picture in pictures}) == len(pictures)
    assert pictures_key(pictures[:1]) == pictures_key([Picture(image.copy(), [Finding("cyst", mask.copy())])])


RUNS = [("core_seg", ["captions", "segmenter", "vision"]), ("medvol_r1", ["segmenter", "vision"])]


@pytest.mark.parametrize(("name", "parts"), sampled(RUNS))
def test_runs_are_the_same_with_it(name, parts, tmp_path):
    example = Example(name)
    kept = tmp_path / "kept"
    weights = []
    for run, more in (("plain", ()), ("first", ("--pretrained_dir", kept)), ("second", ("--pretrained_dir", kept))):
        example.done("train_sft", *SHORT, *more, "--output_dir", tmp_path / run)
        written = {path.name: path.stat().st_mtime_ns for path in kept.glob("*")}
        files = sorted(path.name for path in Path(tmp_path / run).glob("*.safetensors"))
        weights.append({file: load_file(tmp_path / run / file) for file in files})
        if run == "first":
            before = written
    assert sorted(file.split("-")[0] for file in written) == parts
    assert written == before
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        for file, tensors in other.items():
            assert all(torch.equal(tensor, weights[0][file][key]) for key, tensor in tensors.items())
