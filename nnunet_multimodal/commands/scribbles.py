"""``nnunet_multimodal scribbles``: what was drawn on images becomes a data set, or is simulated from label maps."""

from __future__ import annotations

import argparse

from nnunet_multimodal.commands import scribbles_fingerprint, scribbles_import, scribbles_simulate
from nnunet_multimodal.commands.convert import add_kind

DESCRIPTION = """\
import       images and the scribbles that somebody drew on them become a data set that is trained from scribbles alone
simulate     draw scribbles inside label maps: as files to test or to look at, or at once as such a data set
fingerprint  make the CT statistics of such a data set from what was drawn, before nnU-Net plans"""

EXAMPLE = """\
nnunet_multimodal scribbles import --images images --scribbles scribbles --unlabelled 4 -d 603 --dense labels
nnunet_multimodal scribbles simulate --labels labelsTr -o scribbles --every 3"""

_ACTIONS = {"import": scribbles_import, "simulate": scribbles_simulate, "fingerprint": scribbles_fingerprint}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, title="actions")
    for name, module in _ACTIONS.items():
        module.add_arguments(add_kind(actions, name, module.WHAT, module.DESCRIPTION, module.EXAMPLE))


def run(args: argparse.Namespace) -> int:
    code: int = _ACTIONS[args.action].run(args)
    return code
