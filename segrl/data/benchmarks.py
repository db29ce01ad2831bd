"""Public benchmarks: what to get where, under which terms, and the command that reads it. Nothing is ever fetched."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BENCHMARKS", "Benchmark"]


@dataclass(frozen=True)
class Benchmark:
    """One public data set.

    Attributes:
        what: What it holds.
        place: Where it is to be had, and on which terms; terms are to be read there.
        command: What turns it into a folder that trains and is evaluated on.
        conventions: Evaluators whose numbers are published on it, by their names in
            `segrl.evaluation.conventions.CONVENTIONS`.
        seen: Whether the layout was checked against the download, rather than against public loaders.

    Example:
        >>> BENCHMARKS["reasonseg"].conventions, BENCHMARKS["reasonseg"].seen
        (('lisa', 'vision_reasoner'), False)
    """

    what: str
    place: str
    command: str
    conventions: tuple[str, ...] = ()
    seen: bool = False


BENCHMARKS: dict[str, Benchmark] = {
    "reasonseg": Benchmark(
        "photographs with implicit questions, regions to ignore; train, val, test",
        "linked from github.com/dvlab-research/LISA; for research",
        "segrl data convert reasonseg ReasonSeg/ DESTINATION",
        ("lisa", "vision_reasoner"),
    ),
    "refcoco": Benchmark(
        "RefCOCO, RefCOCO+, RefCOCOg: expressions about one object of a COCO image",
        "github.com/lichengunc/refer for refs and instances; cocodataset.org for train2014, under COCO's terms",
        "segrl data convert refcoco 'refs(unc).p' instances.json train2014/ DESTINATION",
        ("lisa", "vision_reasoner"),
    ),
    "grefcoco": Benchmark(
        "expressions about any number of objects of a COCO image, none included",
        "github.com/henghuiding/gRefCOCO; cocodataset.org for train2014, under COCO's terms",
        "segrl data convert refcoco 'grefs(unc).json' instances.json train2014/ DESTINATION",
        ("rela",),
    ),
    "biomedparse": Benchmark(
        "BiomedParseData: images of nine modalities, masks named by their target",
        "huggingface.co/datasets/microsoft/BiomedParseData; each set has a licence of its own",
        "segrl data convert biomedparse BiomedParseData/ DESTINATION",
    ),
    "medsegbench": Benchmark(
        "35 sets of medical images at 128, 256 and 512 px",
        "linked from github.com/zekikus/MedSegBench; each set has a licence of its own",
        "segrl data convert medsegbench SET_256.npz DESTINATION --lesion NAME",
    ),
    "sa_med2d_20m": Benchmark(
        "SA-Med2D-20M: slices and images of ten modalities, a mask for each instance; no split: divide by case",
        "huggingface.co/datasets/OpenGVLab/SA-Med2D-20M; each set has a licence of its own",
        "segrl data convert sa_med2d SAMed2Dv1/ DESTINATION --sets NAME --test_fraction 0.2",
    ),
    "mmr": Benchmark(
        "MMR: questions about objects and parts of COCO images, several masks to an answer",
        "github.com/jdg900/MMR; cocodataset.org for the images, under COCO's terms",
        "segrl data convert mmr MMR_test_mixed.json COCO/ DESTINATION",
        ("mmr",),
    ),
    "cvc_clinicdb": Benchmark(
        "612 frames of 31 colonoscopy sequences with polyps; no published split: divide by sequence",
        "polyp.grand-challenge.org/CVCClinicDB; for research",
        "segrl data convert pairs CVC-ClinicDB/ DESTINATION --lesion polyp --modality Endoscopy",
    ),
    "tnscui2020": Benchmark(
        "3,644 ultrasound images of thyroid nodules",
        "tn-scui2020.grand-challenge.org; its terms forbid passing it on",
        "segrl data convert pairs TNSCUI2020/ DESTINATION --lesion nodule --modality Ultrasound --anatomy Thyroid",
    ),
    "m3d_seg": Benchmark(
        "CT volumes of 25 sets with labels",
        "huggingface.co/datasets/GoodBaiBai88/M3D-Seg; each set has a licence of its own",
        "examples/medvol_r1/train_grpo.py --data M3D_Seg_npy/ --m3d_seg NAME",
        ("m3d", "unibiomed"),
    ),
    "comlesion_14k": Benchmark(
        "CORE-Seg's images, questions and reasoning",
        "announced by CORE-Seg; not seen. In any columns of a Hugging Face data set:",
        "segrl data convert hf PATH DESTINATION --columns THEIRS=OURS ...",
        ("core_seg",),
    ),
}
