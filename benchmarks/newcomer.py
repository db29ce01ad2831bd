"""A scripted newcomer: from 40 images in a common layout to the first own mask, with the wheel alone.

    python benchmarks/newcomer.py [--layouts pairs coco nnunet hf] [--work FOLDER] [--picture docs/assets/newcomer.png]

The wheel is built and installed into a fresh environment that sees segrl's dependencies but no checkout. Each layout is
written without segrl; then the commands that are printed lead from the installed package to `segrl predict` about an
image that is in no data set. Printed are the commands, their wall and CPU seconds, and the mask that was found with its
Dice. The exit status is 1 if a command fails, the mask is empty, or there are more than 8 commands or 10 minutes of CPU
time, installation apart.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

IMAGES, TEST, SIDE = 40, 8, 112  # images, those to test on, their side in pixels
MOST_COMMANDS, MOST_SECONDS = 8, 600.0
QUESTION = "Where is the nodule?"
TRAIN = [
    "segrl data check data",
    "accelerate launch mine/train_grpo.py --data data --quick",
    f'segrl predict runs/core_seg_quick new.png "{QUESTION}" -o out',
]
CONVERT = {
    "pairs": f'segrl data convert pairs pictures data --lesion nodule --query "{QUESTION}" --test_fraction 0.2',
    "coco": f'segrl data convert coco annotations.json pictures data --query "{QUESTION}" --test_fraction 0.2',
    "nnunet": f'segrl data convert nnunet Dataset001_Nodules data --query "{QUESTION}"',
    "hf": "segrl data convert hf nodules data --columns picture=image label=mask question=query",
}


def picture(number: int) -> tuple[Image.Image, np.ndarray]:
    """A bright ellipse on grey noise, and its mask, (H, W) bool."""
    rng = np.random.default_rng(number)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    middle, radii = rng.uniform(0.25, 0.75, 2) * SIDE, rng.uniform(0.08, 0.2, 2) * SIDE
    mask = ((rows - middle[0]) / radii[0]) ** 2 + ((columns - middle[1]) / radii[1]) ** 2 < 1
    grey = rng.normal(80, 18, (SIDE, SIDE)) + 90 * mask
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)), mask


# ---- layouts, as other programs write them ---------------------------------------------------------------------------


def write_pairs(folder: Path) -> None:
    """`images/x.png` beside `masks/x.png`."""
    for kind in ("images", "masks"):
        (folder / "pictures" / kind).mkdir(parents=True)
    for n in range(IMAGES):
        image, mask = picture(n)
        image.save(folder / "pictures" / "images" / f"case_{n:02d}.png")
        Image.fromarray(mask).save(folder / "pictures" / "masks" / f"case_{n:02d}.png")


def write_coco(folder: Path) -> None:
    """One JSON file with run lengths."""
    from pycocotools import mask as coco

    (folder / "pictures").mkdir()
    content: dict[str, list] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "nodule"}]}
    for n in range(IMAGES):
        image, mask = picture(n)
        image.save(folder / "pictures" / f"case_{n:02d}.png")
        content["images"].append({"id": n, "file_name": f"case_{n:02d}.png", "width": SIDE, "height": SIDE})
        lengths: Any = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        known = {"bbox": coco.toBbox(lengths).tolist(), "area": int(mask.sum()), "iscrowd": 0}
        lengths["counts"] = lengths["counts"].decode("ascii")
        content["annotations"].append({"id": n, "image_id": n, "category_id": 1, "segmentation": lengths, **known})
    (folder / "annotations.json").write_text(json.dumps(content))


def write_nnunet(folder: Path) -> None:
    """`imagesTr`, `labelsTr`, `imagesTs`, `labelsTs` and `dataset.json`."""
    home = folder / "Dataset001_Nodules"
    for n in range(IMAGES):
        image, mask = picture(n)
        part = "Ts" if n >= IMAGES - TEST else "Tr"
        for kind in ("images", "labels"):
            (home / f"{kind}{part}").mkdir(parents=True, exist_ok=True)
        image.save(home / f"images{part}" / f"case_{n:02d}_0000.png")
        Image.fromarray(mask.astype(np.uint8)).save(home / f"labels{part}" / f"case_{n:02d}.png")
    labels = {"background": 0, "nodule": 1}
    described = {"channel_names": {"0": "ultrasound"}, "labels": labels, "numTraining": IMAGES - TEST}
    (home / "dataset.json").write_text(json.dumps({**described, "file_ending": ".png"}))


def write_hf(folder: Path) -> None:
    """A `DatasetDict` on disk whose columns have other names."""
    from datasets import Dataset, DatasetDict

    def row(n: int) -> dict:
        image, mask = picture(n)
        return {"picture": image, "label": Image.fromarray(mask), "question": QUESTION, "lesion": "nodule"}

    parts = {"train": range(IMAGES - TEST), "test": range(IMAGES - TEST, IMAGES)}
    made: Any = {name: Dataset.from_list([row(n) for n in numbers]) for name, numbers in parts.items()}
    DatasetDict(made).save_to_disk(str(folder / "nodules"))


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "pairs": write_pairs,
    "coco": write_coco,
    "nnunet": write_nnunet,
    "hf": write_hf,
}


# ---- an environment that has the wheel alone -------------------------------------------------------------------------


def install(work: Path) -> dict[str, str]:
    """Build the wheel, install it, and return the environment in which commands run."""
    root = Path(__file__).parents[1]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", work, root], check=True, cwd=work
    )
    (wheel,) = work.glob("segrl-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", work / "venv"], check=True)
    binaries = work / "venv" / "bin"
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([binaries / "python", "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    Path(own, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    began = time.monotonic()
    subprocess.run([*pip, "--python", binaries / "python", "install", "--no-deps", "--no-index", wheel], check=True)
    print(f"pip install {wheel.name}   # {time.monotonic() - began:.1f} s, {wheel.stat().st_size / 1e6:.1f} MB, "
          "dependencies apart")  # fmt: skip
    # what pip writes for a dependency that it installs itself
    launcher = binaries / "accelerate"
    launcher.write_text(f"#!{binaries / 'python'}\nfrom accelerate.commands.accelerate_cli import main\nmain()\n")
    launcher.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = {**kept, "PATH": f"{binaries}{os.pathsep}{kept['PATH']}", "HF_HUB_OFFLINE": "1"}
    script = "import segrl; print(segrl.__file__)"
    where = subprocess.run(["python", "-c", script], env=environment, cwd=work, capture_output=True, text=True,
                           check=True).stdout  # fmt: skip
    assert str(work / "venv") in where, where
    return environment


def seconds() -> tuple[float, float]:
    """Wall and CPU seconds of finished child processes so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic(), used.ru_utime + used.ru_stime


def begin(layout: str, work: Path, environment: dict[str, str]) -> dict:
    """Go from a layout to a mask; return what it took."""
    folder = work / layout
    folder.mkdir()
    LAYOUTS[layout](folder)
    image, truth = picture(IMAGES + 1)
    image.save(folder / "new.png")
    commands = ["segrl init core_seg mine", CONVERT[layout], *TRAIN]
    print(f"\n{layout}: {IMAGES} images")
    wall = cpu = 0.0
    for command in commands:
        before = seconds()
        done = subprocess.run(shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True)
        took = [after - earlier for after, earlier in zip(seconds(), before, strict=True)]
        print(f"  {command}   # {took[0]:.0f} s, {took[1]:.0f} s CPU", flush=True)
        if done.returncode:
            raise SystemExit(f"{command}: status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        wall, cpu = wall + took[0], cpu + took[1]
    record = json.loads((folder / "out" / "predictions.jsonl").read_text())
    mask = None if record["mask"] is None else np.asarray(Image.open(folder / record["mask"])) > 0
    found = {"layout": layout, "commands": len(commands) + 1, "seconds": wall, "cpu_seconds": cpu}
    found |= {"status": record["status"], "foreground": record["foreground"], "dice": None}
    if mask is not None and mask.any():
        found["dice"] = float(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))
    print(f"  mask: {found['foreground']} of {truth.size} pixels, Dice {found['dice']}; answer: {record['answer']}")
    return found


def join(folder: Path, path: Path) -> None:
    """Put the new image and its answer beside each other."""
    overlay = Image.open(folder / "out" / "new_overlay.png").convert("RGB")
    image = Image.open(folder / "new.png").convert("RGB").resize(overlay.size)
    both = Image.new("RGB", (2 * overlay.width + 12, overlay.height), "white")
    both.paste(image, (0, 0))
    both.paste(overlay, (overlay.width + 12, 0))
    both.save(path)


def main() -> None:
    """Run, print, and check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=sorted(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--work", type=Path, help="new folder that is kept; default: a temporary one")
    parser.add_argument("--picture", type=Path, help="file for the image and the answer of the last layout")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="newcomer-")) if options.work is None else options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    try:
        environment = install(work)
        found = [begin(layout, work, environment) for layout in options.layouts]
        if options.picture is not None:
            join(work / options.layouts[-1], options.picture)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(found, indent=2))
    wrong = [
        one["layout"]
        for one in found
        if one["dice"] is None or one["commands"] > MOST_COMMANDS or one["cpu_seconds"] > MOST_SECONDS
    ]
    if wrong:
        raise SystemExit(f"not reached by {', '.join(wrong)}")


if __name__ == "__main__":
    main()
