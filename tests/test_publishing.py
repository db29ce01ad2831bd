"""Runs on the hub: what leaves, the card, the upload, and loading by name; on a server of this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from builders import tiny_headed_model
from hub_server import LARGE, PART, Hub, Repository
from huggingface_hub import constants
from peft import get_peft_model
from PIL import Image

from segrl.cli.main import main
from segrl.errors import CheckpointError, SegRLError
from segrl.heads import attach_mask_head, detach_mask_head, find_mask_head
from segrl.hub import upload_files
from segrl.inference import ReasoningSegmenter, load, push
from segrl.models import language_model_lora
from segrl.predictions import ImagePromptSettings
from segrl.publishing import find_base, model_card, publish_folder, run_files

# huggingface_hub gives httpx2 a file in a way that it is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

ROOT = Path(__file__).parents[1]
SCORES = {"mdice": 0.8123, "miou": 0.7, "fail": 0.05, "n": 240, "ci95": {"mdice": [0.79, 0.83], "fail": [0.02, 0.08]}}
RESULTS = {
    "baseline": {"mdice": 0.28, "n": 240, "ci95": {"mdice": [0.27, 0.29]}},
    "stage1": {**SCORES, "mdice": 0.7},
    "stage2": SCORES,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a trained run: what is published, and what must not be."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    settings = ImagePromptSettings(instruction="Answer <now>.", max_edge=56, max_new_tokens=8)
    ReasoningSegmenter(*tiny_headed_model(), settings).save_pretrained(folder)
    data = str(folder.parent / "secret" / "clinic_a")
    (folder / "results.json").write_text(json.dumps({**RESULTS, "config": {"data": data}}))
    marker = {"arguments": {"data": data, "preset": "tiny", "model": None}}
    (folder / "segrl_run.json").write_text(json.dumps(marker))
    (folder / "predictions.json").write_text('[{"query": "patient Miller"}]')
    Image.new("L", (4, 4)).save(folder / "predictions.png")
    (folder / "training_args.bin").write_bytes(b"\x80\x04pickle")
    (folder / "optimizer.pt").write_bytes(b"\x80\x04pickle")
    (folder / "checkpoint-5").mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(folder / name, folder / "checkpoint-5" / name)
    return folder


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8))


def same_answers(one, other):
    first, second = (segmenter.predict(picture(), "Where is the cyst?") for segmenter in (one, other))
    assert (first.text, first.status) == (second.text, second.status)
    heads = [find_mask_head(segmenter.model) for segmenter in (one, other)]
    states = [head.adapter.state_dict() for head in heads if head is not None]
    assert len(states) == 2
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The local hub, and this process as a client of it with alice's token and an empty cache."""
    with Hub().serving() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.address)
        template = made.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        yield made


def one_line(capsys):
    """The message of a command that failed; what came before it are bars of progress."""
    *bars, said = capsys.readouterr().err.splitlines()
    assert said.startswith("segrl: error: ")
    assert not any("error" in bar or "Traceback" in bar for bar in bars)
    return said


def test_what_leaves_and_what_does_not(run):
    files = run_files(run)
    assert {"model.safetensors", "config.json", "segrl.json", "mask_head.json", "mask_head.safetensors"} <= set(files)
    assert not {"predictions.json", "results.json", "segrl_run.json", "training_args.bin", "optimizer.pt"} & set(files)
    assert not any(path.suffix in (".bin", ".pt", ".png") for path in files.values())
    assert run_files(run / "checkpoint-5")["segrl.json"] == run / "segrl.json"  # of the folder around it


def test_the_card_says_what_it_is(run):
    card = model_card(run, "alice/nodules", base="acme/base", licence="mit")
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "segrl"
    assert (front["license"], front["base_model"], front["base_model_relation"]) == ("mit", "acme/base", "finetune")
    for part in (
        "**For research. Not a medical device.**",
        "| stage 2 | 240 | 81.2 (79.0 to 83.0) | 70.0 | 5.0 (2.0 to 8.0) |",
        "| best constant mask | 240 | 28.0 (27.0 to 29.0) |",
        "The published weights are those of stage 2.",
        "segrl predict alice/nodules image.png",
        "model = segrl.inference.load('alice/nodules')",
        "| instruction | Answer \\<now\\>. |",
        "Trained on: clinic\\_a. Evaluated on 240 held-out samples.",
        "comes from a head",
        "`mit`. The licence of [acme/base]",
    ):
        assert part in card, part
    for hidden in (str(run.parent), "secret", "Miller"):
        assert hidden not in card


def test_a_checkpoint_begins_with_the_model_of_its_run(tmp_path):
    checkpoint = tmp_path / "mine" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    ImagePromptSettings().save(checkpoint)
    assert find_base(checkpoint) is None
    marker = checkpoint.parent / "segrl_run.json"
    marker.write_text(json.dumps({"arguments": {"model": "acme/base"}}))
    assert find_base(checkpoint) == find_base(checkpoint.parent) == "acme/base"
    assert "base_model: acme/base" in model_card(checkpoint, "alice/nodules")
    marker.write_text("{")
    with pytest.raises(CheckpointError, match=r"segrl_run\.json"):
        find_base(checkpoint)


def test_a_card_of_a_run_without_results(tmp_path):
    ImagePromptSettings().save(tmp_path)
    card = model_card(tmp_path, "alice/nodules")
    assert "Not evaluated." in card
    assert "Not stated by its author." in card
    assert "base_model" not in card
    assert "license:" not in card
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match=r"no segrl.json"):
        model_card(tmp_path / "other" / "run", "alice/nodules")


def test_pushed_and_loaded_by_name(run, hub, capsys):
    address = push(run, "alice/nodules", private=True, licence="apache-2.0")
    assert address.startswith(f"{hub.address}/alice/nodules/commit/")
    stored = hub.repositories["alice/nodules"]
    assert stored.private
    assert len(stored.commits) == 2  # one commit holds everything
    assert set(stored.files) == {*run_files(run), "README.md"}
    for name, path in run_files(run).items():
        assert stored.files[name] == path.read_bytes()
    sizes = [len(content) for content in stored.files.values()]
    assert max(sizes) > PART > LARGE > min(sizes)  # in parts, at once, and with the commit
    assert any(LARGE <= size <= PART for size in sizes)
    assert any(request.endswith("/part/2") for request in hub.requests)

    stored.files["harmful.pt"] = b"a pickle"
    loaded = load("alice/nodules", device="cpu")
    same_answers(load(run, device="cpu"), loaded)
    assert loaded.settings.instruction == "Answer <now>."
    assert not any("harmful" in request and "resolve" in request for request in hub.requests)

    assert main(["push", str(run), "alice/nodules"]) == 2
    assert "the name is taken; pass --overwrite" in one_line(capsys)
    assert main(["push", str(run), "alice/nodules", "--overwrite", "--licence", "mit"]) == 0
    assert "Uploaded: " in capsys.readouterr().out
    assert len(stored.commits) == 3


def test_pushed_from_python(run, hub):
    load(run, device="cpu").push_to_hub("alice/loaded", licence="mit")
    stored = hub.repositories["alice/loaded"].files
    assert "81.2 (79.0 to 83.0)" in stored["README.md"].decode()  # of the run that it was loaded from
    assert stored["mask_head.safetensors"] == (run / "mask_head.safetensors").read_bytes()
    built = ReasoningSegmenter(*tiny_headed_model(), ImagePromptSettings(max_edge=56))
    built.push_to_hub("alice/built", licence="mit")
    assert "Not evaluated." in hub.repositories["alice/built"].files["README.md"].decode()
    loaded = ReasoningSegmenter.from_pretrained("alice/built", device="cpu")
    assert loaded.settings.max_edge == 56


def test_what_the_hub_refuses(run, hub, capsys, monkeypatch):
    def refused(*arguments):
        assert main(["push", str(run), *arguments]) == 2
        return one_line(capsys)

    assert "expected owner/name" in refused("nodules")
    assert "expected owner/name" in refused("alice/no dules")
    assert 'Invalid metadata in README.md. - "license" must be one of' in refused("alice/a", "--licence", "mine")
    assert not hub.repositories  # refused before anything was created
    assert "the token may not write there" in refused("bob/a", "--licence", "mit")
    assert "and the run holds no adapter; drop the flag" in refused("alice/a", "--merge")
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert "the hub does not know the token; log in with `hf auth login`" in refused("alice/a")
    monkeypatch.setenv("HF_TOKEN", "")
    assert "'alice/a': the hub asks who you are; log in with `hf auth login`" in refused("alice/a")
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is on (HF_HUB_OFFLINE)" in refused("alice/a")


def test_content_with_a_wrong_hash_is_refused(run, hub, capsys):
    hub.damage = True
    assert main(["push", str(run), "alice/a"]) == 2
    said = one_line(capsys)
    assert "Error while uploading" in said
    assert "sha256" in said
    assert "push again with --overwrite" in said
    assert hub.repositories["alice/a"].files == {}  # no commit names what is not there
    hub.damage = False
    assert main(["push", str(run), "alice/a", "--overwrite"]) == 0


def test_what_cannot_be_loaded(hub, monkeypatch):
    for name in ("hidden", "gated", "pickles"):
        hub.repositories[f"bob/{name}"] = Repository(private=name == "hidden")
    hub.repositories["bob/gated"].gated = True
    hub.repositories["bob/pickles"].files["pytorch_model.bin"] = b"a pickle"
    for name, message in (
        ("alice/none", "no such folder, and the hub has no such repository, or it is private"),
        ("bob/hidden", "no such folder, and the hub has no such repository, or it is private"),
        ("bob/gated", "the hub asks for consent to its terms first; give it on the repository's page"),
        ("bob/pickles", r"no \*.safetensors in the repository"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            load(name)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"offline mode is on \(HF_HUB_OFFLINE\) and this machine's cache"):
        load("alice/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SegRLError, match="the hub cannot be reached"):
        load("alice/other")


def test_no_run_is_pushed(tmp_path, run):
    with pytest.raises(CheckpointError, match="no such folder"):
        push(tmp_path / "none", "alice/a")
    with pytest.raises(CheckpointError, match=r"no segrl.json"):
        push(tmp_path, "alice/a")
    ImagePromptSettings().save(tmp_path)
    with pytest.raises(CheckpointError, match="only safetensors are published"):
        push(tmp_path, "alice/a")
    shutil.copy(run / "model.safetensors", tmp_path)
    shutil.copy(run / "mask_head.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"of mask_head.json and mask_head.safetensors one is missing"):
        run_files(tmp_path)
    with pytest.raises(SegRLError, match="expected the name of a model on the hub"):
        publish_folder(run, "alice/a", base="runs")


def test_an_adapter_and_its_base(hub, tmp_path, capsys):
    """An adapter needs a base that others have; merged, it needs none."""
    model, processor = tiny_headed_model()
    head = detach_mask_head(model)
    assert head is not None
    base = tmp_path / "base"
    model.save_pretrained(base)
    processor.save_pretrained(base)
    tuned = get_peft_model(model, language_model_lora(model, r=2))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(0.05)
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    lora = tmp_path / "lora"
    settings = ImagePromptSettings(max_edge=56, max_new_tokens=8)
    ReasoningSegmenter(attach_mask_head(tuned, head), processor, settings).save_pretrained(lora)
    assert find_base(lora) is None
    assert main(["push", str(lora), "alice/lora"]) == 2
    assert "which others do not have; pass --base owner/name, or --merge" in one_line(capsys)

    push(lora, "alice/merged", merge=True)
    assert "adapter_config.json" not in hub.repositories["alice/merged"].files
    same_answers(load(lora, device="cpu"), load("alice/merged", device="cpu"))

    upload_files({path.name: path for path in base.iterdir()}, "---\nlicense: cc-by-4.0\n---\n", "alice/base")
    push(lora, "alice/lora", base="alice/base")
    stored = hub.repositories["alice/lora"].files
    assert json.loads(stored["adapter_config.json"])["base_model_name_or_path"] == "alice/base"
    front = yaml.safe_load(stored["README.md"].decode().split("---")[1])
    assert (front["base_model_relation"], front["license"]) == ("adapter", "cc-by-4.0")  # the licence of its base
    assert str(tmp_path) not in stored["README.md"].decode()
    assert "model.safetensors" not in stored


@pytest.mark.slow
def test_in_processes_of_their_own(run, tmp_path):
    """As a user: a command and a script, with nothing but the environment set."""
    with Hub().serving() as made:
        environment = {
            **{key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"},
            **{"HF_ENDPOINT": made.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_alice"},
            **{"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)},
        }

        def python(*arguments):
            command = [sys.executable, *map(str, arguments)]
            return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

        done = python("-m", "segrl", "push", run, "alice/nodules", "--licence", "apache-2.0")
        assert done.returncode == 0, done.stderr
        assert "Uploaded: http" in done.stdout
        code = """
from PIL import Image
from segrl.inference import load
segmenter = load("alice/nodules", device="cpu")
print(segmenter.predict(Image.new("RGB", (40, 40)), "Where is the cyst?").status, segmenter.settings.max_edge)
"""
        loaded = python("-c", code)
        assert loaded.returncode == 0, loaded.stderr
        assert loaded.stdout.split()[-1] == "56"
