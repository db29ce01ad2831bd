"""Train vision-language models that reason in words and answer with a segmentation mask.

Names are imported on first use, so `import segrl` loads neither torch nor transformers. A new export is one line in the
type-checking block and its name in `_EXPORTS`; `tests/test_package.py` fails when the two differ.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# module: the names it gives to the top level
_EXPORTS = {
    "config": ["SegGRPOConfig", "SegSFTConfig"],
    "dense": ["DenseLoss"],
    "evaluation": ["evaluate", "evaluate_constant_mask"],
    "frames": ["Frame", "frame_for"],
    "heads": [
        "AnswerProbe",
        "LinearAdapter",
        "MLPAdapter",
        "MaskHead",
        "SegTokenProbe",
        "SemanticGuidedAdapter",
        "attach_mask_head",
    ],
    "inference": ["ReasoningSegmenter"],
    "parsing": ["parse_completion"],
    "prediction": ["Prediction", "Status", "Target", "VolumeTarget"],
    "rewards": ["Reward", "list_rewards", "load_reward", "make_reward", "register_reward", "weighted_sum"],
    "segmenters": ["Sam2Segmenter", "Segmenter", "VolumePropagator"],
    "sft": ["SegSFTTrainer"],
    "trainer": ["SegGRPOTrainer"],
    "volume_evaluation": ["evaluate_volumes"],
    "volume_inference": ["VolumeSegmenter"],
}
_SUBMODULES = [
    "boxes",
    "data",
    "errors",
    "evaluation",
    "frames",
    "losses",
    "masks",
    "matching",
    "metrics",
    "report",
    "rewards",
    "volumes",
]

if TYPE_CHECKING:  # `X as X` marks a public re-export for type checkers
    from segrl import boxes as boxes
    from segrl import data as data
    from segrl import errors as errors
    from segrl import evaluation as evaluation
    from segrl import frames as frames
    from segrl import losses as losses
    from segrl import masks as masks
    from segrl import matching as matching
    from segrl import metrics as metrics
    from segrl import report as report
    from segrl import rewards as rewards
    from segrl import volumes as volumes
    from segrl.config import SegGRPOConfig as SegGRPOConfig
    from segrl.config import SegSFTConfig as SegSFTConfig
    from segrl.dense import DenseLoss as DenseLoss
    from segrl.evaluation import evaluate as evaluate
    from segrl.evaluation import evaluate_constant_mask as evaluate_constant_mask
    from segrl.frames import Frame as Frame
    from segrl.frames import frame_for as frame_for
    from segrl.heads import AnswerProbe as AnswerProbe
    from segrl.heads import LinearAdapter as LinearAdapter
    from segrl.heads import MaskHead as MaskHead
    from segrl.heads import MLPAdapter as MLPAdapter
    from segrl.heads import SegTokenProbe as SegTokenProbe
    from segrl.heads import SemanticGuidedAdapter as SemanticGuidedAdapter
    from segrl.heads import attach_mask_head as attach_mask_head
    from segrl.inference import ReasoningSegmenter as ReasoningSegmenter
    from segrl.parsing import parse_completion as parse_completion
    from segrl.prediction import Prediction as Prediction
    from segrl.prediction import Status as Status
    from segrl.prediction import Target as Target
    from segrl.prediction import VolumeTarget as VolumeTarget
    from segrl.rewards import Reward as Reward
    from segrl.rewards import list_rewards as list_rewards
    from segrl.rewards import load_reward as load_reward
    from segrl.rewards import make_reward as make_reward
    from segrl.rewards import register_reward as register_reward
    from segrl.rewards import weighted_sum as weighted_sum
    from segrl.segmenters import Sam2Segmenter as Sam2Segmenter
    from segrl.segmenters import Segmenter as Segmenter
    from segrl.segmenters import VolumePropagator as VolumePropagator
    from segrl.sft import SegSFTTrainer as SegSFTTrainer
    from segrl.trainer import SegGRPOTrainer as SegGRPOTrainer
    from segrl.volume_evaluation import evaluate_volumes as evaluate_volumes
    from segrl.volume_inference import VolumeSegmenter as VolumeSegmenter
else:  # hidden from type checkers, which would otherwise accept any attribute
    _HOME = {name: module for module, names in _EXPORTS.items() for name in names}
    __all__ = ["__version__", *sorted(_HOME), *_SUBMODULES]

    def __getattr__(name):
        if name in _HOME:
            value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        elif name in _SUBMODULES:
            value = import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value  # the next look-up is an ordinary one
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
