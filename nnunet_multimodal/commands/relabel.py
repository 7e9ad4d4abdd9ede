"""``nnunet_multimodal relabel``: predict, correct, accept, retrain."""

from __future__ import annotations

import argparse
import getpass
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_multimodal.commands.convert import label_name, natural_number
from nnunet_multimodal.errors import UsageError

if TYPE_CHECKING:
    from nnunet_multimodal.relabel.accept import Accepted
    from nnunet_multimodal.relabel.project import Project

DESCRIPTION = """\
Grow a labelled data set in cycles: the model proposes, people correct, the next model learns from it.

A PROJECT is a folder with one ledger. Images stay where they are; accepted masks are copied into it and never deleted.
Each step is done whole or not at all: after a crash or a power cut, run the same command again."""

EXAMPLE = """\
nnunet_multimodal relabel init P --images IMAGES --labels LABELS --label-names liver=1 spleen=2
nnunet_multimodal relabel train P
nnunet_multimodal relabel propose P -n 20
nnunet_multimodal relabel accept P --who "Dr. A" --minutes p7=12
nnunet_multimodal relabel report P"""

TRAINER = "nnUNetTrainerMRSegmentator"
FOLDS = ("0", "1", "2", "3", "4")
ORDERS = ("uncertainty", "random", "first")  # relabel/ranking.py, which a test compares
_STEPS: dict[str, tuple[str, str, str]] = {
    "init": (
        "make a project, or add new images to one",
        """\
        Registers the images of a folder (.nii.gz, .nii, .nrrd, .mha, DICOM series; a case is named by its file or
        its series' folder), the labels, the masks that are good already, and a model to start with. A model's labels
        are matched by name. Run again, it adds what is new.""",
        "nnunet_multimodal relabel init P --images MR --labels MR_LABELS --label-names liver=1 --modality MR\n"
        "nnunet_multimodal relabel init P --images MR --model RESULTS/Dataset001_CT/nnUNetTrainer__nnUNetPlans__2d",
    ),
    "propose": (
        "predict the pool and make packages of the next cases to correct",
        """\
        Predicts with the project's newest model, chooses, and writes PROJECT/batches/batch_NNN: for each case the
        image, the proposed mask, where the model doubts, and a picture; colours for ITK-SNAP and 3D Slicer; a page of
        all. What was predicted before an interruption is kept. For several machines: --shards N prints their
        commands.""",
        "nnunet_multimodal relabel propose P -n 50 --order uncertainty\nnnunet_multimodal relabel propose P --shards 4",
    ),
    "accept": (
        "take corrected masks",
        """\
        Takes the masks that were saved in the open batches, or all masks of DIR (CASE.nii.gz, CASE_mask.nrrd,
        CASE/mask.nii.gz). Each is checked first: grid, values, empty masks, organs that the proposal had, left and
        right. What looks wrong but is meant is accepted with --confirm CASE. What nobody saved is left alone.""",
        "nnunet_multimodal relabel accept P --who 'Dr. A' --minutes 12\n"
        "nnunet_multimodal relabel accept P CORRECTED --confirm p3 --minutes p3=25 p4=8",
    ),
    "reject": (
        "take cases out of pool and training",
        "Rejected cases are neither proposed nor trained on, until undo brings them back.",
        "nnunet_multimodal relabel reject P p3 p7 --reason 'motion'",
    ),
    "undo": (
        "take back the last step",
        """\
        Takes back the last accept, reject, propose or train, or the last event of the cases that you name. Nothing is
        deleted: undoing is written down, too, and masks stay in the project. Where you do not know whether an undo was
        interrupted before or after it was done, --event names what is to be undone (see log), once.""",
        "nnunet_multimodal relabel undo P\nnnunet_multimodal relabel undo P p3\n"
        "nnunet_multimodal relabel undo P --event 12",
    ),
    "log": (
        "show what happened, newest first",
        "Shows the events of the ledger: who did what and when, and what was taken back.",
        "nnunet_multimodal relabel log P -n 20\nnnunet_multimodal relabel log P --case p3 --json",
    ),
    "status": (
        "show how the project stands",
        "Counts cases, batches and trainings, and names labels that the newest model does not know yet.",
        "nnunet_multimodal relabel status P\nnnunet_multimodal relabel status P --verify --json",
    ),
    "train": (
        "train the next model on what is accepted",
        """\
        Makes nnU-Net's next data set from all accepted masks and trains it with nnU-Net's own commands. A case keeps
        its fold for ever; new ones go to the smallest fold of their modality. The plans of the first cycle are kept
        (PROJECT/plans.json; edit them to change the network or the settings), each fold starts from its own weights of
        the cycle before, and only new or changed cases are preprocessed. Interrupted, the same command goes on. While
        it trains, masks can be accepted; they come with the next cycle.""",
        "nnunet_multimodal relabel train P -tr nnUNetTrainerMRSegmentator_250epochs --folds 0 1\n"
        "nnunet_multimodal relabel train P --dry-run",
    ),
    "report": (
        "write the learning curve and the effort",
        "Writes report.html, cases.csv, organs.csv and report.json: how good the proposals of each cycle were, how\n"
        "much was left to correct, and the worst cases.",
        "nnunet_multimodal relabel report P -o REPORT",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(dest="step", metavar="STEP", required=True, title="steps")
    for name, (what, description, example) in _STEPS.items():
        step = steps.add_parser(
            name,
            help=what,
            description=textwrap.dedent(description),
            epilog="example:\n" + textwrap.indent(example, "  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        step.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show an error's traceback")
        step.add_argument("project", type=Path, metavar="PROJECT", help="folder of the project")
        _ARGUMENTS[name](step)
        if name not in ("log", "status", "report"):
            step.add_argument(
                "--wait",
                type=_seconds,
                default=0.0,
                metavar="SECONDS",
                help="for another process (default: not at all)",
            )
            step.add_argument("--who", default=None, metavar="NAME", help="for the ledger (default: your login)")


def _init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of images; they stay there")
    parser.add_argument("--labels", type=Path, metavar="DIR", help="masks that are good already, named as their images")
    parser.add_argument("--model", type=Path, metavar="DIR", help="result folder of nnU-Net to start with")
    names = parser.add_mutually_exclusive_group()
    names.add_argument(
        "--label-names", type=label_name, nargs="+", metavar="NAME=ID", help="the organs (default: the model's)"
    )
    names.add_argument("--labels-json", type=Path, metavar="FILE", help='a dataset.json or {"liver": 1, ...}')
    parser.add_argument("--modality", metavar="NAME", help="of all these images, such as MR")
    parser.add_argument(
        "--pattern", metavar="REGEX", help="searched in an image's path; its groups modality and patient are the case's"
    )


def _propose_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-n", dest="count", type=_positive, default=50, metavar="N", help="cases (default: %(default)s)"
    )
    parser.add_argument("--order", choices=ORDERS, default="uncertainty", help="default: %(default)s")
    parser.add_argument(
        "--candidates", type=_positive, metavar="N", help="predict and rank only N of the pool, drawn by chance"
    )
    shards = parser.add_mutually_exclusive_group()
    shards.add_argument("--shards", type=_positive, metavar="N", help="print the commands for N machines")
    shards.add_argument("--part", type=_part, metavar="K/N", help="predict the K-th of N parts; chooses nothing")
    how = parser.add_argument_group("prediction")
    how.add_argument("-device", "--device", choices=("cuda", "cpu", "mps"), help="default: cuda if there is one")
    how.add_argument("-step_size", type=_share, default=0.5, metavar="SHARE", help="of a tile (default: %(default)s)")
    how.add_argument("--disable_tta", action="store_true", help="no mirroring: faster, a little worse")
    how.add_argument(
        "--processes", type=natural_number, metavar="N", help="that prepare images, and as many that write; 0: none"
    )


def _accept_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "masks", type=Path, nargs="?", metavar="DIR", help="folder of masks (default: the open batches)"
    )
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="only these")
    parser.add_argument("--minutes", nargs="+", default=[], metavar="[CASE=]MIN", help="of work: for each, or by case")
    parser.add_argument("--confirm", nargs="+", default=[], metavar="CASE", help="what looks wrong with it is meant")
    parser.add_argument("--unchanged", action="store_true", help="also proposals that nobody has saved, as they are")


def _reject_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cases", nargs="+", metavar="CASE")
    parser.add_argument("--reason", default="", metavar="TEXT", help="for the ledger")


def _undo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cases", nargs="*", metavar="CASE", help="only the last event of these")
    parser.add_argument(
        "--event", type=_positive, metavar="N", help="only the command of this event; if it is undone already, nothing"
    )


def _log_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-n", dest="count", type=_positive, default=20, metavar="N", help="events (default: %(default)s)"
    )
    parser.add_argument("--all", action="store_true", help="all events")
    parser.add_argument("--case", metavar="CASE", help="of this case only")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verify", action="store_true", help="read every mask and used image again; exit code 4 if wrong"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-tr", "--trainer", default=TRAINER, metavar="NAME", help="default: %(default)s")
    parser.add_argument("-c", "--configuration", default="3d_fullres", metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--folds", nargs="+", choices=(*FOLDS, "all"), default=[*FOLDS], metavar="FOLD", help="default: all five",
    )  # fmt: skip
    parser.add_argument(
        "--plan", nargs=argparse.REMAINDER, default=[], metavar="...",
        help="the rest of the line goes to nnUNetv2_plan_experiment, in the first cycle",
    )  # fmt: skip
    parser.add_argument(
        "--model-plans",
        action="store_true",
        help="in the first cycle, the starting model's plans instead: all its weights fit",
    )
    parser.add_argument("-device", "--device", choices=("cuda", "cpu", "mps"), help="default: cuda if there is one")
    parser.add_argument(
        "--processes", type=natural_number, metavar="N", help="that preprocess (default: cores, up to 8)"
    )
    parser.add_argument(
        "--restart", action="store_true", help="leave the open cycle, begin anew with what is accepted now"
    )
    parser.add_argument("--again", action="store_true", help="even if nothing was accepted since the last training")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--dry-run", action="store_true", help="print the commands, for a job array; change nothing")
    which.add_argument("--prepare-only", action="store_true", help="data set, plans and preprocessing, no training")
    which.add_argument("--collect", action="store_true", help="enter folds that were trained by such jobs")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="default: PROJECT/report")


_ARGUMENTS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "init": _init_arguments,
    "propose": _propose_arguments,
    "accept": _accept_arguments,
    "reject": _reject_arguments,
    "undo": _undo_arguments,
    "log": _log_arguments,
    "status": _status_arguments,
    "train": _train_arguments,
    "report": _report_arguments,
}


def run(args: argparse.Namespace) -> int:
    if getattr(args, "who", "") is None:
        try:
            args.who = getpass.getuser()
        except (KeyError, OSError):  # in a container, a user may have no name
            args.who = "unknown"
    steps = {
        "init": _init, "propose": _propose, "accept": _accept, "reject": _reject, "undo": _undo, "log": _log,
        "status": _status, "train": _train, "report": _report,
    }  # fmt: skip
    return steps[args.step](args)


def _open(args: argparse.Namespace) -> Project:
    from nnunet_multimodal.relabel.project import Project

    return Project(args.project, getattr(args, "wait", 0.0))


# --- the steps -------------------------------------------------------------------------------------------------------


def _init(args: argparse.Namespace) -> int:
    from nnunet_multimodal.conversion.dataset import labels_from_json
    from nnunet_multimodal.relabel.start import init

    labels = None
    if args.labels_json is not None:
        labels = labels_from_json(args.labels_json)
    elif args.label_names is not None:
        labels = dict(args.label_names)
        if len(labels) < len(args.label_names):
            raise UsageError("--label-names has a name more than once.")
    begun = init(
        args.project, args.images, labels, args.labels, args.model, args.modality, args.pattern, args.who, args.wait
    )
    print(f"{begun.new_images} new images, {begun.images} in all: {args.project}")
    if args.labels is not None:
        print(f"{len(begun.accepted.accepted)} labels accepted, {len(begun.accepted.same)} were accepted before")
        for case, doubts in begun.accepted.confirmed.items():
            print(f"{case}: accepted; worth a look: {'; '.join(doubts)}")
    if begun.model is not None:
        print(f"starts from {begun.model}")
    _say_failed(begun.accepted.failed)
    return 1 if begun.accepted.failed else 0


def _propose(args: argparse.Namespace) -> int:
    from nnunet_multimodal.inference.workers import processes_for
    from nnunet_multimodal.relabel.propose import how_to_predict, predict_part, propose, write_todo

    device = args.device or _best_device()
    processes = processes_for(device, args.count) if args.processes is None else args.processes
    if args.part is not None:
        part, of = args.part
        outcome = predict_part(args.project, part, of, processes, device)
        print(f"{outcome.cases} predicted, {len(outcome.failed)} failed")
    elif args.shards is not None:
        count = write_todo(_open(args), device, not args.disable_tta, args.step_size)
        print(f"# {count} cases to predict, one line a machine, then the last one")
        for part in range(1, args.shards + 1):
            print(f"nnunet_multimodal relabel propose {_quoted(args.project)} --part {part}/{args.shards}")
        print(f"nnunet_multimodal relabel propose {_quoted(args.project)} -n {args.count} --order {args.order}")
        return 0
    else:
        project = _open(args)

        def how(model: dict[str, Any]) -> Any:
            return how_to_predict(project, model, device, not args.disable_tta, args.step_size, processes)

        outcome = propose(project, args.count, args.order, args.who, how, args.candidates)
        if outcome.batch is not None:
            print(f"{outcome.cases} cases: {outcome.batch / 'index.html'}")
            print(f"Correct the masks, then: nnunet_multimodal relabel accept {_quoted(args.project)}")
    for message in outcome.messages:
        print(message)
    _say_failed(outcome.failed)
    if outcome.failed:
        print("Repair these images, or reject the cases.", file=sys.stderr)
    return 1 if outcome.failed else 0


def _accept(args: argparse.Namespace) -> int:
    from nnunet_multimodal.relabel.accept import Accepted, accept_masks, masks_in, masks_of_batches, minutes_of

    project = _open(args)
    outcome = Accepted()
    with project.changing("accept"):
        project.tidy()
        if args.masks is None:
            masks = masks_of_batches(project, outcome, args.unchanged)
        else:
            names = [row["name"] for row in project.ledger.all("SELECT name FROM cases")]
            masks = masks_in(args.masks, names, outcome)
        if args.cases is not None:
            absent = [case for case in args.cases if case not in masks]
            if absent:
                raise UsageError(f"no mask to accept of {', '.join(absent[:10])}; there are: {_some(masks)}.")
            masks = {case: masks[case] for case in args.cases}
            outcome.failed = {key: value for key, value in outcome.failed.items() if key in masks}
        accept_masks(project, masks, args.who, outcome, minutes_of(args.minutes, masks), args.confirm)
    _say_accepted(outcome, args)
    return 1 if outcome.failed or outcome.doubtful else 0


def _say_accepted(outcome: Accepted, args: argparse.Namespace) -> None:
    print(f"{len(outcome.accepted)} accepted" + (f": {_some(outcome.accepted)}" if outcome.accepted else ""))
    if outcome.same:
        print(f"{len(outcome.same)} were accepted before, with this mask: {_some(outcome.same)}")
    if outcome.untouched:
        print(f"{len(outcome.untouched)} not saved since they were proposed, left alone: {_some(outcome.untouched)}")
        print("  To accept proposals as they are: --unchanged, with --cases for some of them")
    for case, doubts in outcome.confirmed.items():
        print(f"{case}: accepted, as you confirm, although {'; '.join(doubts)}")
    for case, remarks in outcome.remarks.items():
        print(f"{case}: accepted; worth a look: {'; '.join(remarks)}")
    for case, doubts in outcome.doubtful.items():
        print(f"not accepted: {case}: {'; '.join(doubts)}. If that is meant: --confirm {case}", file=sys.stderr)
    _say_failed(outcome.failed, "not accepted")


def _reject(args: argparse.Namespace) -> int:
    from nnunet_multimodal.relabel.accept import reject

    rejected = reject(_open(args), args.cases, args.who, args.reason)
    print(f"{len(rejected)} rejected" + (f": {_some(rejected)}" if rejected else "; they were already"))
    return 0


def _undo(args: argparse.Namespace) -> int:
    project = _open(args)
    with project.changing("undo"), project.ledger.transaction():
        events = project.ledger.last_events(args.cases, args.event)
        project.ledger.undo(events, args.who)
    if not events:
        print(f"event {args.event} is undone already, or nothing that can be undone")
        return 0
    names = {row["id"]: row["name"] for row in project.ledger.all("SELECT id, name FROM cases")}
    kinds = sorted({event["kind"] for event in events})
    cases = [names[event["case_id"]] for event in events if event["case_id"] is not None]
    print(f"undone: {', '.join(kinds)}" + (f" of {len(cases)} cases: {_some(cases)}" if cases else ""))
    return 0


def _log(args: argparse.Namespace) -> int:
    from nnunet_multimodal.relabel.status import log

    events = log(_open(args), None if args.all else args.count, args.case)
    if args.json:
        print(json.dumps(events, indent=2))
        return 0
    for event in events:
        undone = f"  (undone by {event['undone_by']})" if event["undone_by"] else ""
        what = " ".join(filter(None, [event["kind"], event["case"] or "", _in_short(event)]))
        print(f"{event['id']:6d}  {event['time']}  {event['who']}  {what}{undone}")
    return 0


def _in_short(event: dict[str, Any]) -> str:
    details = event["details"]
    if event["kind"] == "accept":
        if details["start"]:
            return "as a first label"
        if details["changed"] is None:
            return f"{details['voxels']} voxels, without a proposal"
        return f"{details['changed']} voxels changed of {details['voxels']}, proposed by cycle {details['cycle']}"
    if event["kind"] == "propose":
        return f"in batch {details['batch']}, doubt {details['score']:.3f}"
    if event["kind"] == "undo":
        return f"{details['undone']} ({event['undoes']})"
    return ", ".join(
        f"{key} {value}" for key, value in details.items() if isinstance(value, (int, str)) and value != ""
    )


def _status(args: argparse.Namespace) -> int:
    from nnunet_multimodal.relabel.status import status, verify

    project = _open(args)
    content = status(project)
    problems = verify(project) if args.verify else []
    if args.json:
        print(json.dumps(content | ({"problems": problems} if args.verify else {}), indent=2))
    else:
        print("\n".join(_describe(content, args.project)))
        if args.verify:
            print("verified: nothing is wrong" if not problems else f"{len(problems)} problems:")
            print("\n".join(f"  - {problem}" for problem in problems), end="\n" if problems else "")
    return 4 if problems else 0


def _describe(content: dict[str, Any], place: Path) -> list[str]:
    states = content["states"]
    lines = [f"{content['cases']} cases: " + ", ".join(f"{number} {state}" for state, number in states.items())]
    for name, of_states in content["modalities"].items():
        lines.append(f"  {name}: " + ", ".join(f"{number} {state}" for state, number in of_states.items()))
    model = content["model"]
    if model is None:
        lines.append("no model yet")
    else:
        lines.append(f"model: cycle {model['cycle']} ({model['folder']}); {content['predicted']} of the pool predicted")
    table = [["batch", "cycle", "order", "cases", "to correct", "accepted"]]
    table += [[str(value) for value in batch.values()] for batch in content["batches"]]
    lines += _table(table) if len(table) > 1 else []
    table = [["training", "state", "cases", "cases of folds", "trained folds", "trainer"]]
    for each in content["cycles"]:
        folds = ",".join(map(str, each["folds"].values()))
        trained = ",".join(each["trained_folds"])
        table.append([str(each["cycle"]), each["state"], str(each["cases"]), folds, trained, each["trainer"]])
    lines += _table(table) if len(table) > 1 else []
    stale = content["stale"]
    if stale["changed"] or stale["new"]:
        lines.append(
            f"{len(stale['changed'])} labels changed and {len(stale['new'])} new since the data of cycle "
            f"{stale['cycle']}: nnunet_multimodal relabel train {_quoted(place)}"
        )
        lines += [f"  changed: {_some(stale['changed'])}"] if stale["changed"] else []
    if content["open_cycle"] is not None:
        lines.append(f"cycle {content['open_cycle']} was begun and is not trained: relabel train goes on with it")
    return lines


def _train(args: argparse.Namespace) -> int:
    from nnunet_multimodal.registry import parse_trainer_name, suggest
    from nnunet_multimodal.relabel import training
    from nnunet_multimodal.relabel.cycles import Options, describe_options, describe_stale, open_cycle

    if args.trainer.startswith("nnUNetTrainer") and parse_trainer_name(args.trainer) is None:
        near = suggest(args.trainer)
        stem = args.trainer.partition("_")[0]
        if near is not None and stem != "nnUNetTrainer" and not args.trainer.startswith("nnUNetTrainer_"):
            print(f"note: {args.trainer} is none of this package's trainers (did you mean {near}?)", file=sys.stderr)
    if "all" in args.folds and len(args.folds) > 1:
        raise UsageError("--folds all trains one model on everything; it does not go with other folds.")
    folds = tuple(sorted(set(args.folds)))
    if args.model_plans and args.plan:
        raise UsageError("--plan plans anew, --model-plans does not: leave one of them out.")
    device = args.device or _best_device()
    options = Options(args.trainer, args.configuration, folds, tuple(args.plan), device, args.model_plans)
    project = _open(args)
    if args.model_plans and project.plans.is_file():
        print(f"note: {project.plans} are the project's plans; --model-plans changes nothing", file=sys.stderr)
    if args.dry_run:
        print("\n".join(training.dry_run(project, options)))
        return 0
    with project.working("train", "train"):
        project.tidy(training=True)
        if args.collect and open_cycle(project) is None:
            raise UsageError("no cycle is open, so there is nothing to collect; see: relabel status.")
        cycle = training.begin(project, options, args.who, args.restart, args.again)
        print(f"cycle {cycle.number}: {cycle.cases} cases, {describe_options(cycle.options)}")
        for line in describe_stale(cycle, args.project):
            print(line)
        for fold, (source, warning) in training.starting_checkpoints(project, folds).items():
            print(f"  fold {fold} starts from {source}" + (f"\n  warning: {warning}" if warning else ""))
        if not args.collect:
            processes = min(8, training.processors()) if args.processes is None else args.processes
            count = training.prepare(project, cycle, processes)
            print(f"  {count} cases preprocessed, {cycle.cases - count} kept from before")
            if args.prepare_only:
                print(f"plans: {project.plans}; the lines that train: --dry-run")
                return 0
            training.train_folds(project, cycle)
        training.finish(project, cycle, args.who)
    print(f"cycle {cycle.number} is trained. Next: nnunet_multimodal relabel propose {_quoted(args.project)}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from nnunet_multimodal.relabel.report import write_report

    project = _open(args)
    output = args.output or project.folder / "report"
    content = write_report(project, output)
    for row in content["curve"]:
        dsc, saved = ("-" if row[key] is None else f"{row[key]:.3f}" for key in ("dsc", "saved"))
        print(f"cycle {row['cycle']}: {row['cases']} cases, DSC {dsc}, share of edited voxels saved {saved}")
    print(output / "report.html")
    return 0


# --- small helpers ---------------------------------------------------------------------------------------------------


def _say_failed(failed: dict[str, str], what: str = "failed") -> None:
    for name, problem in failed.items():
        print(f"{what}: {problem if name in problem else f'{name}: {problem}'}", file=sys.stderr)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _some(names: Any) -> str:
    from nnunet_multimodal.conversion.dataset import first_names

    return first_names([*names])


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"'{text}': expected 1, 2, 3, ...")
    return int(text)


def _part(text: str) -> tuple[int, int]:
    part, slash, of = text.partition("/")
    if not (slash and part.isdigit() and of.isdigit() and 1 <= int(part) <= int(of)):
        raise argparse.ArgumentTypeError(f"'{text}': expected K/N such as 2/4")
    return int(part), int(of)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}': expected seconds, 0 or more")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected a number above 0, at most 1")
    return value
