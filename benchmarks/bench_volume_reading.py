"""Time and memory of reading one scan with six structures: 512 x 512 x 300 voxels, six rows of a data set.

    python benchmarks/bench_volume_reading.py [--depth 300]

Each measurement runs in a process of its own. Printed are seconds, the highest memory of the process above that before
reading (MiB, `ru_maxrss`), and the arrays that are kept afterwards (MiB, each counted once).
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from segrl.data import CaseReader, load_volumes, read_label, write_manifest

STRUCTURES = 6
MIB = 2**20


def make(folder: Path, depth: int) -> list[dict[str, Any]]:
    """Write a scan in Hounsfield units with noise, its label in two types, and a manifest."""
    rng = np.random.default_rng(0)
    voxels, labels = np.empty((512, 512, depth), np.int16), np.zeros((512, 512, depth), np.uint8)
    for z in range(depth):
        voxels[..., z] = np.repeat(rng.integers(-1000, 1000, (32, 32)), 16, 0).repeat(16, 1)
        voxels[..., z] += rng.integers(-20, 20, (512, 512), np.int16)
    for value in range(1, STRUCTURES + 1):
        labels[60 * value : 60 * value + 50, 100:400, depth // 4 : depth // 2] = value
    affine = np.diag([0.7, 0.7, 1.0, 1.0])
    nib.save(nib.Nifti1Image(voxels, affine), folder / "scan.nii.gz")
    nib.save(nib.Nifti1Image(labels, affine), folder / "label.nii.gz")
    nib.save(nib.Nifti1Image(labels.astype(np.float64), affine), folder / "float64.nii.gz")
    row = {"image": "scan.nii.gz", "label": "label.nii.gz", "modality": "CT"}
    structures = range(1, STRUCTURES + 1)
    write_manifest(folder, [{**row, "lesion": f"structure {value}", "label_value": value} for value in structures])
    return list(map(dict, load_volumes(folder, validate=False)))  # type: ignore[arg-type]


def read_rows(rows: list[dict[str, Any]]) -> list[np.ndarray]:
    read = CaseReader()
    return [array for case in map(read, rows) for array in (case.grey, case.mask) if array is not None]


def check_folder(rows: list[dict[str, Any]]) -> list[np.ndarray]:
    load_volumes(Path(rows[0]["scan"]).parent)
    return []


def read_float64(rows: list[dict[str, Any]]) -> list[np.ndarray]:
    return [read_label(Path(rows[0]["scan"]).with_name("float64.nii.gz"), None, 1)]


def measure(work: Any, rows: list[dict[str, Any]]) -> tuple[float, float, float]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    arrays = work(rows)
    seconds = time.perf_counter() - start
    kept = {id(array): array.nbytes for array in arrays}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return seconds, peak / 1024, sum(kept.values()) / MIB


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=300, help="slices")
    depth = parser.parse_args().depth
    # Also the writing has a process: the highest memory of a process is at first that of its parent.
    pool = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    with tempfile.TemporaryDirectory() as folder, pool:
        rows = pool.apply(make, (Path(folder), depth))
        for work in (check_folder, read_rows, read_float64):
            seconds, peak, kept = pool.apply(measure, (work, rows))
            print(f"{work.__name__}: {seconds:.1f} s, {peak:.0f} MiB above the start, {kept:.0f} MiB kept")
