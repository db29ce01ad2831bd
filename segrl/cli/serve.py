"""`segrl serve`: a run behind a page in the browser and an HTTP endpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from segrl.cli.output import OK, add_command, positive

__all__ = ["add_serve_command"]


def add_serve_command(areas: Any, *parents: argparse.ArgumentParser) -> None:
    """Add `segrl serve` to the areas of the command."""
    text = "ask a run in the browser, and by HTTP: upload an image or volume and a question, get text, boxes and mask"
    command = add_command(
        *(areas, "serve", text, *parents), more="Needs the extra demo.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  segrl serve runs/mine\n"
               "  curl -F file=@image.png -F 'question=Where is the nodule?' http://127.0.0.1:7860/api/predict\n"
               "  curl -F file=@image.png -F 'question=Where is the nodule?' -o mask.png \\\n"
               "    'http://127.0.0.1:7860/api/predict?format=mask'",
    )  # fmt: skip
    command.add_argument("run_folder", metavar="RUN", help="a run's output_dir or checkpoint, or owner/name on the hub")
    command.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on; 0.0.0.0 lets "
                         "other machines ask (default: 127.0.0.1)")  # fmt: skip
    command.add_argument(
        "--port", type=int, default=7860, metavar="N", help="port to listen on; 0: a free one (default: 7860)"
    )
    command.add_argument("--max_size_mb", type=float, default=64, metavar="X", help="largest upload (default: 64)")
    command.add_argument("--time_limit", type=float, default=120, metavar="S", help="seconds until a question is "
                         "given up, with its time in the queue (default: 120)")  # fmt: skip
    command.add_argument(
        "--max_waiting", type=positive, default=32, metavar="N", help="questions that may wait (default: 32)"
    )
    command.add_argument("--examples", type=Path, metavar="FOLDER", help="files that the page offers, with their "
                         "questions in questions.json; default: samples of the run, where only this machine "
                         "reaches the server")  # fmt: skip
    command.add_argument("--device", metavar="NAME", help="default: cuda if there is one, else cpu")
    command.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    from segrl.serving import ServingSettings, serve

    names = ("host", "port", "max_size_mb", "time_limit", "max_waiting")
    settings = ServingSettings(**{name: getattr(arguments, name) for name in names})
    serve(arguments.run_folder, settings, examples=arguments.examples, device=arguments.device)
    return OK
