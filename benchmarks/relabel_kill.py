"""SIGKILL at random moments over all commands of relabel, and what holds after each.

    python benchmarks/relabel_kill.py [--kills 50] [--seed 0]

After each kill the project is opened: ledger against events, every mask against its name, every accepted mask still
accepted, no half file under a name that counts. Then the same command is started again, to be killed again or to run to
its end, which has to succeed. The commands run in forked processes (tests/relabel/test_kill.py); nnU-Net's programs are
stood in for here, and a real training is killed in tests/relabel/test_real_cycle.py.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in ("relabel", "inference"):
    sys.path.insert(0, str(HERE.parent / "tests" / folder))

from common import write_result  # noqa: E402
from test_kill import Story, accepted, check, killed, run_to_the_end  # noqa: E402
from test_training import Programs  # noqa: E402

from nnunet_multimodal.relabel import training  # noqa: E402


def run_loudly(*words: str) -> None:
    """The same once more, for what it says."""
    from nnunet_multimodal.cli import main as command

    command(["relabel", *words, "--debug"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("nnUNet_")]:
        del os.environ[name]
    training.run_program = Programs()  # type: ignore[assignment]
    dice = random.Random(args.seed)
    lasted: dict[str, float] = {}
    alive: Counter[str] = Counter()
    tried = 0
    while alive.total() < args.kills:
        with tempfile.TemporaryDirectory() as name:
            story = Story(Path(name))
            for number in range(len(story.commands())):
                words = story.commands()[number]
                story.between(words[0])
                there = (story.place / "relabel.sqlite").exists()
                before = accepted(story.place) if there and words[0] != "init" else {}
                for _ in range(3 if words[0] in lasted else 0):
                    tried += 1
                    alive[words[0]] += killed(dice.uniform(0.0, lasted[words[0]]), *words)
                    if words[0] != "init":
                        check(story.place, before, words[0])
                code, seconds = run_to_the_end(*words)
                if code and not (words[0] == "train" and code == 2):  # killed after its last step: nothing left to do
                    run_loudly(*words)
                    raise SystemExit(f"{words} ended with {code}")
                check(story.place, before, words[0])
                lasted.setdefault(words[0], seconds)
            left = [path for path in story.place.rglob("*") if ".partial" in path.name]
            # Three proposed, or five where the command had ended before it was killed: the second time proposes more.
            packages = {package.name for package in story.place.glob("batches/batch_*/p*")}
            if left or set(accepted(story.place)) != {*story.workshop.names[:5], *packages}:
                raise SystemExit(f"left: {left}; accepted: {accepted(story.place)}")
        print(f"{alive.total()} kills: {dict(alive)}", flush=True)
    measured = {
        "kills": alive.total(),
        "while_running": dict(alive),
        "started_to_be_killed": tried,
        "lost": 0,
        "half": 0,
    }
    print(write_result("relabel_kill", measured, f"seed {args.seed}; a kill counts if the command was still running"))


if __name__ == "__main__":
    main()
