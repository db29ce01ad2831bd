"""`segrl serve`: the endpoint, its limits and refusals, and the page in a browser."""

import io
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import nibabel
import numpy as np
import psutil
import pytest
import torch
from browser import CHROMIUM, browser
from builders import tiny_headed_model, tiny_model, tiny_segmenter
from dicom_builders import write_series
from PIL import Image

from segrl.cli.main import main
from segrl.errors import CheckpointError, SegRLError
from segrl.geometry import read_mask_file, rle_to_mask
from segrl.inference import ReasoningSegmenter, VolumeSegmenter
from segrl.models import seg_token_id
from segrl.predictions import ImagePromptSettings, VolumePromptSettings
from segrl.serving import ServingSettings, find_examples, running_server, serve
from segrl.serving.worker import BusyError, Question, TimeLimitError, Worker

ROOT = Path(__file__).parents[1]
QUESTION = "Where is the cyst?"
ANY_PORT = ServingSettings(port=0, max_size_mb=0.2, max_waiting=16)


def picture(seed=0, size=(64, 48)):
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def huge_png(width, height):
    """A valid PNG header of a picture that nobody wants in memory, and no pixels."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.fixture(scope="module")
def segmenter():
    """Random weights that soon write `<seg>` and then end, so that answers have masks of their own."""
    model, processor = tiny_headed_model("qwen2_5_vl")
    seg, end = seg_token_id(processor), processor.tokenizer.eos_token_id
    model.generation_config.sequence_bias = [[[seg], 3.0], [[seg, end], 99.0]]
    return ReasoningSegmenter(model.eval(), processor, ImagePromptSettings(instruction="Answer.", max_new_tokens=12))


@pytest.fixture(scope="module")
def expected(segmenter):
    """What the model says about five pictures, asked without a server: masks that differ."""
    found = [segmenter.predict(picture(seed), QUESTION) for seed in range(5)]
    assert len({answer.mask.tobytes() for answer in found}) == 5
    return found


@pytest.fixture(scope="module")
def server(segmenter, expected):
    with running_server(segmenter, ANY_PORT, name="tiny & <b>bold</b>") as address:
        yield address


@pytest.fixture
def client(server):
    with httpx2.Client(base_url=server, timeout=60) as made:
        yield made


def ask(client, content, question: Any = QUESTION, name="image.png", form="json", **fields):
    return client.post(
        f"/api/predict?format={form}", files={"file": (name, content)}, data={"question": question, **fields}
    )


def test_an_answer_is_that_of_the_model(client, expected):
    for seed, wanted in enumerate(expected):
        response = ask(client, png(picture(seed)), name="scans/../patient 7.png")
        assert response.status_code == 200, response.text
        found = response.json()
        assert (found["text"], found["status"]) == (wanted.text, wanted.status.value)
        assert found["name"] == "patient 7.png"
        assert tempfile.gettempdir() not in response.text
        assert np.array_equal(rle_to_mask(found["mask"]), wanted.mask)


def test_files_of_an_answer(client, expected):
    mask = ask(client, png(picture(2)), form="mask", name="a b;c.png")
    assert mask.headers["content-type"] == "image/png"
    assert mask.headers["content-disposition"] == 'attachment; filename="a_b_c_mask.png"'
    assert np.array_equal(read_mask_file(Image.open(io.BytesIO(mask.content))), expected[2].mask)
    overlay = ask(client, png(picture(2)), form="overlay")
    assert Image.open(io.BytesIO(overlay.content)).size == (256, 192)
    headless = ReasoningSegmenter(*tiny_model(), ImagePromptSettings(max_new_tokens=3))
    with running_server(headless, ANY_PORT) as address, httpx2.Client(base_url=address, timeout=60) as other:
        refused = ask(other, png(picture()), form="mask")
        assert (refused.status_code, "the answer has no mask" in refused.json()["error"]) == (422, True)
        assert ask(other, png(picture()), form="page").json()["mask_file"] is None


def test_several_answers_have_a_confidence(client):
    found = ask(client, png(picture()), samples="3").json()
    assert found["confidence"]["samples"] == 3
    assert ask(client, png(picture())).json()["confidence"] is None


def test_what_the_server_says_of_itself(client):
    info = client.get("/api/info").json()
    assert (info["task"], info["max_size_mb"], info["waiting"]) == ("images", 0.2, 0)
    page = client.get("/")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "http" not in page.text  # nothing from elsewhere


@pytest.mark.parametrize(
    ("content", "fields", "status", "message"),
    [
        (b"no image", {}, 422, "image.png: cannot be decoded"),
        (b"%PDF-1.7", {"name": "report.pdf"}, 422, "report.pdf: expected a file of images, .png, .jpg"),
        (b"", {}, 400, "file: it is empty"),
        (None, {"question": "  "}, 400, "question: expected a text"),
        (None, {"question": "x" * 2001}, 400, "question: 2001 characters; expected at most 2000"),
        (None, {"question": "Find <|image_pad|>."}, 422, "<|image_pad|>"),
        (None, {"samples": "0"}, 400, "samples: '0'; expected 1 to 16"),
        (None, {"samples": "99"}, 400, "expected 1 to 16"),
        (None, {"samples": "²"}, 400, "expected 1 to 16"),
        (None, {"form": "exe"}, 400, "format='exe': expected one of json, mask, overlay, page"),
        (huge_png(20_000, 20_000), {}, 422, "image.png: declares"),
        (huge_png(9_000, 9_000), {}, 422, "81000000 pixels; this server takes at most 80000000"),
        (b"\x00" * 300_000, {}, 413, "the upload is larger than 0.2 MB"),
    ],
    ids=range(13),
)
def test_what_is_refused(client, content, fields, status, message):
    response = ask(client, png(picture()) if content is None else content, **fields)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert message in error
    assert "\n" not in error
    assert tempfile.gettempdir() not in error


def test_requests_that_are_no_forms(client, server):
    assert client.post("/api/predict", json={"question": "x"}).status_code == 415
    assert (
        client.post("/api/predict", data={"question": "x"}, files={"other": b"x"}).json()["error"].startswith("file: ")
    )
    broken = client.post("/api/predict", content=b"--x", headers={"Content-Type": "multipart/form-data; boundary=y"})
    assert broken.status_code == 400
    assert client.get("/api/predict").status_code == 405

    def endless():
        yield b'--y\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
        for _ in range(100):
            yield b"\x00" * 10_000

    chunked = client.post(
        "/api/predict", content=endless(), headers={"Content-Type": "multipart/form-data; boundary=y"}
    )
    assert chunked.status_code == 413  # whatever its header says, or does not


def test_nothing_of_the_machine_is_read(client, server):
    secret = "/etc/passwd"
    for path in (
        f"/..{secret}",
        f"//{secret}",
        "/%2e%2e/%2e%2e" + secret,
        "/examples/..%2f..%2fetc",
        "/examples/0",
        "/page.py",
    ):
        host, port = urlsplit(server).hostname, urlsplit(server).port
        with socket.create_connection((host, port)) as raw:  # as it is, which a client would tidy up
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda raw=raw: raw.recv(65536), b""))
        assert b" 404 " in answer.splitlines()[0], path
        assert b"root:" not in answer
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    crossed = client.post("/api/predict", headers={"Origin": "http://evil.example"}, files={"file": ("a.png", b"x")})
    assert crossed.status_code == 403


def test_nothing_of_an_upload_is_kept(client, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert ask(client, png(picture()), form="mask").status_code == 200
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))  # it was used, and not another
    assert ask(client, png(picture())).status_code == 500


def test_a_client_that_leaves_is_not_answered(segmenter, monkeypatch):
    """The generation ends at its next token, and the next client is answered."""
    slow = ReasoningSegmenter(segmenter.model, segmenter.processor, ImagePromptSettings(max_new_tokens=100_000))
    tokens = []
    forward = slow.model.get_input_embeddings().register_forward_hook(lambda *_: tokens.append(1))
    monkeypatch.setattr(
        segmenter.model.generation_config, "sequence_bias", [[[slow.processor.tokenizer.eos_token_id], -99.0]]
    )
    try:
        with running_server(slow, ServingSettings(port=0)) as address, httpx2.Client(base_url=address) as client:
            while not tokens:  # leaves while its answer is generated
                with pytest.raises(httpx2.ReadTimeout):
                    client.post("/api/predict", files={"file": ("a.png", png(picture()))}, data={"question": QUESTION},
                                timeout=1.5)  # fmt: skip
            count = 0
            while len(tokens) > count:  # until nobody generates any more
                count = len(tokens)
                time.sleep(0.5)
            assert count < 100_000
            assert client.get("/api/info").json()["waiting"] == 0
    finally:
        forward.remove()


def test_the_time_limit(segmenter, monkeypatch):
    monkeypatch.setattr(
        segmenter.model.generation_config, "sequence_bias", [[[segmenter.processor.tokenizer.eos_token_id], -99.0]]
    )
    slow = ReasoningSegmenter(segmenter.model, segmenter.processor, ImagePromptSettings(max_new_tokens=100_000))
    with (
        running_server(slow, ServingSettings(port=0, time_limit=0.7)) as address,
        httpx2.Client(base_url=address) as client,
    ):
        response = ask(client, png(picture()))
        assert response.status_code == 504
        assert "time limit" in response.json()["error"]


def test_the_queue():
    worker, hold, began = Worker(1, 60), threading.Event(), threading.Event()

    def wait(**_):
        began.set()
        hold.wait()
        return "answered"

    first = worker.put(wait)
    began.wait()
    second = worker.put(lambda **_: "second")
    with pytest.raises(BusyError, match="too many questions wait"):
        worker.put(lambda **_: "third")
    assert worker.waiting == 1
    second.left.set()
    hold.set()
    assert first.answer.result() == "answered"
    with pytest.raises(TimeLimitError, match="waited until its time was over"):
        second.answer.result()
    assert worker.put(lambda **_: "fourth").answer.result() == "fourth"
    with pytest.raises(ZeroDivisionError):  # a fault is that question's alone
        worker.put(lambda **_: 1 / 0).answer.result()
    worker.close()


def test_a_question_that_is_given_up_stops_the_generation():
    question = Question(lambda **_: None, time.monotonic() + 60)
    (stop,) = _criteria(question)
    assert not stop(torch.zeros(2, 3, dtype=torch.long), None).any()
    question.left.set()
    assert stop(torch.zeros(2, 3, dtype=torch.long), None).tolist() == [True, True]


def _criteria(question):
    found = []
    Question(lambda stopping_criteria: found.append(stopping_criteria), question.deadline, left=question.left).run()
    return found[0]


def test_volumes(tmp_path):
    model, processor = tiny_model("qwen3_vl")
    prompt = VolumePromptSettings(slices=3, size=32, instruction="Answer.", max_new_tokens=4)
    segmenter = VolumeSegmenter(model.eval(), processor, prompt, tiny_segmenter())
    voxels = np.random.default_rng(0).normal(size=(20, 24, 7)).astype(np.float32)
    affine = np.diag([0.5, 0.5, 2.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "scan.nii.gz")
    content = (tmp_path / "scan.nii.gz").read_bytes()
    limits = ServingSettings(port=0, max_pixels=4000)
    with running_server(segmenter, limits) as address, httpx2.Client(base_url=address, timeout=60) as client:
        found = ask(client, content, name="scan.nii.gz", form="page")
        assert found.status_code == 200, found.text
        slices = found.json()["slices"]
        assert [shown["index"] for shown in slices] == list(range(7))
        assert all(shown["picture"].startswith("data:image/jpeg;base64,") for shown in slices)
        mask = ask(client, content, name="scan.nii.gz", form="mask")
        (tmp_path / "mask.nii.gz").write_bytes(mask.content)
        written: Any = nibabel.load(tmp_path / "mask.nii.gz")
        assert written.shape == voxels.shape
        assert np.allclose(written.affine, affine)
        names = ("scan.nii.gz", "scan.nii.gz", "other.nii.gz")
        one, again, other = (ask(client, content, name=name, form="overlay").content for name in names)
        assert one == again != other  # the title is the name of the client
        for bad, name, message in (
            (b"no scan", "scan.nii.gz", "scan.nii.gz: no NIfTI file"),
            (content[:100], "scan.nii.gz", "scan.nii.gz: "),
            (png(picture()), "image.png", "expected a file of volumes, .nii.gz, .nii"),
        ):
            refused = ask(client, bad, name=name)
            assert refused.status_code == 422, refused.text
            assert message in refused.json()["error"]
        nibabel.save(nibabel.Nifti1Image(np.zeros((40, 40, 40), dtype=np.uint8), affine), tmp_path / "large.nii.gz")
        large = ask(client, (tmp_path / "large.nii.gz").read_bytes(), name="large.nii.gz")
        assert "64000 pixels; this server takes at most 4000" in large.json()["error"]


def zipped(**files: bytes):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_a_dicom_series_in_a_zip(tmp_path):
    model, processor = tiny_model("qwen3_vl")
    prompt = VolumePromptSettings(slices=3, size=32, instruction="Answer.", max_new_tokens=4)
    segmenter = VolumeSegmenter(model.eval(), processor, prompt, tiny_segmenter())
    voxels = np.random.default_rng(0).integers(-900, 900, (7, 24, 20)).astype(np.int16)
    files = {f"a/{path.name}": path.read_bytes() for path in write_series(tmp_path / "one", voxels)}
    other = {f"b/{path.name}": path.read_bytes() for path in write_series(tmp_path / "two", voxels)}
    extra = {"../../x.txt": b"note", "__MACOSX/a/._IM000.dcm": b"rubbish", "DICOMDIR": b"index"}
    expected = segmenter.predict(tmp_path / "one", QUESTION).to_dict()
    limits = ServingSettings(port=0, max_pixels=4000)
    with running_server(segmenter, limits) as address, httpx2.Client(base_url=address, timeout=60) as client:
        found = ask(client, zipped(**files, **extra), name="series.ZIP")
        assert found.status_code == 200, found.text
        assert found.json() == {**json.loads(json.dumps(expected)), "name": "series.ZIP"}
        mask = ask(client, zipped(**files), name="series.zip", form="mask")
        assert 'filename="series_mask.nii.gz"' in mask.headers["content-disposition"]
        (tmp_path / "mask.nii.gz").write_bytes(mask.content)
        assert nibabel.load(tmp_path / "mask.nii.gz").shape == (20, 24, 7)  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
        good, whole = zipped(**files), dict(list(files.items())[:3] + list(files.items())[4:])
        broken = good[:200] + bytes(400) + good[600:]
        deep = np.zeros((3, 40, 40), dtype=np.int16)
        for bad, message in (
            (b"no archive", "s.zip: no zip archive that can be read"),
            (broken, "s.zip: no zip archive that can be read"),
            (zipped(**extra), "s.zip: holds no DICOM files"),
            (zipped(**files, **other), "s.zip: holds 2 series, expected one"),
            (zipped(**whole), "IM0"),  # a slice is missing: files are named as they came
            (zipped(**{"a.dcm": bytes(50_000_000)}), "50000000 bytes when unpacked; this server takes at most"),
            (
                zipped(**{path.name: path.read_bytes() for path in write_series(tmp_path / "deep", deep)}),
                "s.zip: 4800 pixels; this server takes at most 4000",
            ),
        ):
            refused = ask(client, bad, name="s.zip")
            error = refused.json()["error"]
            assert refused.status_code == 422, error
            assert message in error
            assert "00000" not in error.replace("50000000", "")
            assert tempfile.gettempdir() not in error


def test_what_does_not_begin(tmp_path, capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "no_run", "--port", str(port)]) == 2
        assert f"127.0.0.1:{port}: the port is in use; pass another --port" in capsys.readouterr().err
    for arguments, message in (
        (["no_run"], "model folder 'no_run' does not exist"),
        ([str(tmp_path)], "no segrl.json; expected the output directory of a run"),
        (["no_run", "--port", "70000"], "port=70000: expected a number from 0 to 65535"),
        (["no_run", "--time_limit", "0"], "time_limit=0.0: expected a number above 0"),
        (["no_run", "--host", "no such host"], "--host no such host: "),
    ):
        assert main(["serve", "--port", "0", *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    ImagePromptSettings().save(tmp_path)
    with pytest.raises(CheckpointError, match="holds no model"):
        serve(tmp_path, ServingSettings(port=0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SegRLError, match="no file of images in it"):  # known before a model is looked for
        serve(tmp_path, ServingSettings(port=0), examples=tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SegRLError, match=r"uvicorn is not installed; pip install 'segrl\[demo\]'"):
        serve("no_run")


def test_examples(tmp_path, segmenter):
    with pytest.raises(SegRLError, match="no file of images in it"):
        find_examples("images", tmp_path)
    picture().save(tmp_path / "b.png")
    picture().save(tmp_path / "a.jpg")
    (tmp_path / "questions.json").write_text('{"b.png": "Where?"}')
    found = find_examples("images", tmp_path)
    assert found == [(tmp_path / "a.jpg", ""), (tmp_path / "b.png", "Where?")]
    with (
        running_server(segmenter, ServingSettings(port=0), examples=found) as address,
        httpx2.Client(base_url=address) as c,
    ):
        assert c.get("/api/info").json()["examples"][1] == {"number": 1, "question": "Where?"}
        assert c.get("/examples/1").content == (tmp_path / "b.png").read_bytes()
        assert c.get("/examples/2").status_code == 404
    (tmp_path / "questions.json").write_text("[]")
    with pytest.raises(SegRLError, match="expected an object of questions"):
        find_examples("images", tmp_path)
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    picture().save(run / "samples" / "000.png")
    (run / "predictions.json").write_text('[{"query": "Where is it?"}, {"query": "Not drawn"}]')
    assert find_examples("images", None, run) == [(run / "samples" / "000.png", "Where is it?")]
    assert find_examples("volumes", None, run) == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_two_people_in_a_browser(server, expected, tmp_path):
    """Upload, ask, see the mask, download, a wrong type of file, two people at once, one who leaves."""
    seeds = (1, 4)
    for seed in seeds:
        picture(seed).save(tmp_path / f"scan{seed}.png")
    (tmp_path / "notes.png").write_text("no picture")
    with browser() as made:
        people = [made.page(server) for _ in seeds]
        for person in people:
            person.wait("document.querySelector('#name').textContent !== ''")
        one = people[0]
        assert one.text("#name") == "tiny & <b>bold</b>"

        one.choose("#file", tmp_path / "notes.png")
        one.fill("#question", QUESTION)
        one.click("#ask")
        one.wait("document.querySelector('#status').className === 'error'")
        assert "notes.png: cannot be decoded" in one.text("#status")

        leaving = made.page(server)
        leaving.choose("#file", tmp_path / f"scan{seeds[0]}.png")
        leaving.fill("#question", QUESTION)
        leaving.click("#ask")
        leaving.close()
        for person, seed in zip(people, seeds, strict=True):  # both ask before either is answered
            person.choose("#file", tmp_path / f"scan{seed}.png")
            person.fill("#question", QUESTION)
            person.click("#ask")
        for person, seed in zip(people, seeds, strict=True):
            person.wait("!document.querySelector('#answer').hidden")
            mask = expected[seed].mask
            assert person.text("#mask") == f"{mask.sum()} pixels"
            assert person.text("#text") == (expected[seed].answer or expected[seed].text).strip()
            shown = person.run(
                "[document.querySelector('#overlay').naturalWidth, document.querySelector('#overlay').naturalHeight]"
            )
            assert shown == [256, 192]
            folder = tmp_path / f"downloads{seed}"
            folder.mkdir()
            person.download_into(folder)
            person.click("#downloads a")
            until = time.monotonic() + 30
            while not (folder / f"scan{seed}_mask.png").is_file() and time.monotonic() < until:
                time.sleep(0.1)
            assert np.array_equal(read_mask_file(str(folder / f"scan{seed}_mask.png")), mask)

        hostile = "<img src=x onerror=\"document.title='taken over'\"><script>1</script>"
        one.run(f"""show({{overlay: "", status: {json.dumps(hostile)}, reasoning: {json.dumps(hostile)}, answer: null,
            text: {json.dumps(hostile)}, boxes: [], slices: [], mask_file: null, confidence: null,
            name: {json.dumps(hostile)}, overlay: "data:image/png;base64,"}})""")
        assert one.run("document.querySelector('#reasoning').textContent") == hostile
        assert one.run("document.querySelectorAll('#answer script, #answer dd img').length") == 0
        assert one.run("document.title").startswith("segrl: ")


@pytest.mark.slow
def test_the_command(segmenter, tmp_path):
    segmenter.save_pretrained(tmp_path / "run")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "segrl", "serve", str(tmp_path / "run"), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "http" in line)
        address = line.split()[1]
        curl = [
            "curl",
            "-s",
            "-F",
            f"file=@{tmp_path / 'a.png'}",
            "-F",
            f"question={QUESTION}",
            f"{address}/api/predict",
        ]
        picture().save(tmp_path / "a.png")
        done = subprocess.run(curl, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["name"] == "a.png"
        process.send_signal(2)  # Ctrl-C
        assert process.wait(30) in (0, 130, -2)


@pytest.mark.long
def test_two_hundred_requests_of_eight_clients(server, expected):
    """One in ten is malformed; all are answered, none wrongly, and memory does not grow."""
    bad = [
        (b"no image", {}),
        (None, {"question": ""}),
        (b"", {}),
        (None, {"samples": "x"}),
        (huge_png(20_000, 20_000), {}),
    ]
    own = psutil.Process()
    contents = [png(picture(seed)) for seed in range(5)]

    def one(number: int) -> bool:
        with httpx2.Client(base_url=server, timeout=120) as client:
            if number % 10 == 9:
                content, fields = bad[number // 10 % len(bad)]
                return ask(client, contents[0] if content is None else content, **fields).status_code in (400, 422)
            seed = number % 5
            response = ask(client, contents[seed])
            found, wanted = response.json(), expected[seed]
            same = np.array_equal(rle_to_mask(found["mask"]), wanted.mask)
            return response.status_code == 200 and found["text"] == wanted.text and same

    with ThreadPoolExecutor(8) as clients:
        assert all(clients.map(one, range(50)))  # what is allocated once is allocated now
        before = own.memory_info().rss
        assert all(clients.map(one, range(200)))
    grown = (own.memory_info().rss - before) / 1e6
    print(f"{grown:.1f} MB more after 200 requests")
    assert grown < 30
