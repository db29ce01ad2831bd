"""Builds on a cluster of two local Ray nodes, in a process of its own: `ray_builds.py FOLDER URL FAILING_URL`.

Prints the number of nodes, what a limit says, and whether Ray is still connected at the end.
"""

import importlib
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from curation_build import settings
from test_curation_ray import DIFFICULTY

from segrl.curation.case import read_cases
from segrl.curation.difficulty import find_difficulty
from segrl.curation.engine import connected
from segrl.curation.judgements import judge_texts
from segrl.curation.texts import write_texts
from segrl.errors import SegRLError

ray: Any = importlib.import_module("ray")  # of an extra
Cluster: Any = importlib.import_module("ray.cluster_utils").Cluster


def main(folder: Path, url: str, failing: str) -> None:
    cases = read_cases(folder.parent / "cases.jsonl")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    ray.init(cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    try:
        print("nodes", len(ray.nodes()), "cpus", int(ray.cluster_resources()["CPU"]))
        with connected("ray"):
            find_difficulty(cases, DIFFICULTY, folder, engine="ray")
            text, judge = settings(url)
            write_texts(cases, text, folder, engine="ray")
            judge_texts(cases, judge, folder, text=text, engine="ray")
        few = replace(text, writer=replace(text.writer, url=failing, max_calls=3))  # type: ignore[arg-type]
        try:
            write_texts(cases, few, folder.with_name("limited"), engine="ray")
        except SegRLError as error:
            print("limit", error)
        print("connected", ray.is_initialized())
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
