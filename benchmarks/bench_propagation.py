"""Cost of propagating box prompts through volumes, beside the `sam2` package's own video predictor.

    python benchmarks/bench_propagation.py [--model tiny] [--answers 16] [--volumes 4] [--boxes 2] [--rounds 3]

The work of one reward call: G answers to each of several volumes, each naming a slice near a lesion and some boxes on
it. The package propagates answer by answer, forwards and backwards from a fresh state, as MedSAM2's inference does; the
slices that both see are resized beforehand in its case and within the measurement in ours. The two take turns (A B A B
...); printed are medians, their ratio, how many slices each encoded, and the share of voxels in which they differ (the
package keeps its memories in bfloat16).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings

import numpy as np
import sam2.sam2_video_predictor as package
import torch

from segrl.segmenters import PropagationRequest, Sam2Segmenter, VolumePropagator
from segrl.segmenters.sam2 import sam2_config

MODELS = {
    "tiny": sam2_config("tiny"),
    "hiera_tiny_512": sam2_config("sam2.1_hiera_tiny", image_size=512),
}


def reward_call(arguments: argparse.Namespace) -> list[PropagationRequest]:
    """Answers that name slices within 3 of the middle of their volume."""
    rng = np.random.default_rng(0)
    requests = []
    for number in range(arguments.volumes):
        volume = rng.integers(0, 256, (arguments.depth, 256, 256), dtype=np.uint8)
        for _ in range(arguments.answers // arguments.volumes):
            corner = rng.integers(20, 150, (arguments.boxes, 2))
            boxes = np.concatenate([corner, corner + rng.integers(20, 80, (arguments.boxes, 2))], axis=1)
            index = arguments.depth // 2 + int(rng.integers(-3, 4))
            requests.append(PropagationRequest(volume, f"volume {number}", index, boxes.astype(np.float64)))
    return requests


class PackagePredictor:
    """The package's predictor on the same weights, fed with tensors instead of files."""

    def __init__(self, segmenter: Sam2Segmenter, reach: int) -> None:
        package.load_video_frames = lambda video_path, **_: video_path
        package.tqdm = lambda order, **_: order
        predictor = copy.deepcopy(segmenter.sam)
        predictor.__class__ = package.SAM2VideoPredictor
        predictor.fill_hole_area, predictor.non_overlap_masks = 0, False
        predictor.clear_non_cond_mem_around_input = predictor.add_all_frames_to_correct_as_cond = False
        predictor.binarize_mask_from_pts_for_mem_enc = True
        predictor.sam_mask_decoder.dynamic_multimask_via_stability = True
        self.predictor, self.segmenter, self.reach, self.encoded = predictor, segmenter, reach, 0
        predictor.image_encoder.register_forward_hook(self._count)

    def _count(self, module, inputs, output) -> None:
        self.encoded += len(inputs[0])

    def frames(self, requests: list[PropagationRequest]) -> dict[int, torch.Tensor]:
        volumes = {id(request.volume): request.volume for request in requests}
        return {name: torch.stack([self.segmenter.preprocess(s) for s in v]) for name, v in volumes.items()}

    def __call__(self, requests: list[PropagationRequest], frames: dict[int, torch.Tensor]) -> list[np.ndarray]:
        masks = []
        for request in requests:
            mask = np.zeros(request.volume.shape, dtype=bool)
            for reverse in (False, True):
                state = self.predictor.init_state((frames[id(request.volume)], *request.volume.shape[1:]))
                for number, box in enumerate(request.boxes):
                    self.predictor.add_new_points_or_box(state, request.slice_index, number, box=box)
                for index, _, logits in self.predictor.propagate_in_video(
                    state, request.slice_index, self.reach, reverse
                ):
                    mask[index] |= (logits[:, 0] > 0).any(0).cpu().numpy()
            masks.append(mask)
        return masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--volumes", type=int, default=4, help="distinct volumes; answers / volumes is G")
    parser.add_argument("--boxes", type=int, default=2)
    parser.add_argument("--depth", type=int, default=64)
    parser.add_argument("--reach", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    segmenter = Sam2Segmenter(MODELS[arguments.model]).eval().to(arguments.device)
    with torch.no_grad():  # random scores of objects are about 0: let them be seen
        segmenter.sam.sam_mask_decoder.pred_obj_score_head.layers[-1].bias += 5
    requests = reward_call(arguments)
    ours, theirs = VolumePropagator(segmenter, reach=arguments.reach), PackagePredictor(segmenter, arguments.reach)
    frames = theirs.frames(requests)
    times: dict[str, list[float]] = {"segrl": [], "sam2": []}
    masks: dict[str, list[np.ndarray]] = {}
    for _ in range(arguments.rounds):
        for name, run in (("segrl", lambda: ours(requests)), ("sam2", lambda: theirs(requests, frames))):
            start = time.perf_counter()
            masks[name] = run()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    encoded = {"segrl": ours.encoded_slices / arguments.rounds, "sam2": theirs.encoded / arguments.rounds}
    differ = np.mean([(a != b).mean() for a, b in zip(masks["segrl"], masks["sam2"], strict=True)])
    print(vars(arguments), f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in times:
        each = ", ".join(f"{value:.2f}" for value in times[name])
        print(f"{name:6} {medians[name]:8.2f} s (median of {each})   {encoded[name]:.0f} slices encoded")
    print(f"sam2 / segrl: {medians['sam2'] / medians['segrl']:.2f}   voxels that differ: {differ:.2e}")


if __name__ == "__main__":
    main()
