"""`segrl push`: a run on the hub."""

from __future__ import annotations

import argparse
from typing import Any

from segrl.cli.output import OK, add_command

__all__ = ["add_push_command"]


def add_push_command(areas: Any, *parents: argparse.ArgumentParser) -> None:
    """Add `segrl push` to the areas of the command."""
    text = "upload a run to the hub, with a model card: model or adapter, mask head, segmenter and prompt settings"
    command = add_command(
        *(areas, "push", text, *parents),
        more="Only safetensors and JSON leave: no answers or pictures of the test data, no pickles, no command line.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  hf auth login\n  segrl push runs/mine user/name --private --licence apache-2.0\n"
               "  segrl push runs/lora user/name --merge\n  segrl push runs/mine user/name --card_only > card.md\n"
               '  segrl eval --model user/name --data path/to/folder',
    )  # fmt: skip
    command.add_argument("run_folder", metavar="RUN", help="a run's output_dir or checkpoint")
    command.add_argument("repository", metavar="OWNER/NAME", help="name of the repository on the hub")
    command.add_argument("--private", action="store_true", help="let only its owner see a new repository")
    command.add_argument("--merge", action="store_true", help="fold an adapter into its base model")
    command.add_argument("--overwrite", action="store_true", help="add a commit to a repository that exists")
    command.add_argument(
        "--base", metavar="OWNER/NAME", help="model that the run began with, where it does not know it"
    )
    command.add_argument("--licence", "--license", metavar="ID", help="such as apache-2.0; default: that of the base")
    command.add_argument("--data", metavar="TEXT", help="name of the training data in the card; default: that of the "
                         "run's --data, without its folders")  # fmt: skip
    command.add_argument("--card_only", action="store_true", help="print the card, and upload nothing")
    command.set_defaults(run=_push)


def _push(arguments: argparse.Namespace) -> int:
    from segrl.publishing import model_card, run_files
    from segrl.reports.terminal import say

    named = {name: getattr(arguments, name) for name in ("base", "licence", "data")}
    if arguments.card_only:
        run_files(arguments.run_folder)
        say(model_card(arguments.run_folder, arguments.repository, **named))
        return OK
    from segrl.inference import push

    address = push(
        arguments.run_folder,
        arguments.repository,
        merge=arguments.merge,
        private=arguments.private,
        overwrite=arguments.overwrite,
        **named,
    )
    say(f"Uploaded: {address}")
    say(f"Load it with segrl.inference.load({arguments.repository!r}), or name it where a run is asked for.")
    return OK
