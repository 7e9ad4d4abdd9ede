"""What only referring can do, beside what copying the reference's organs without any training would do.

    python benchmarks/referring.py --phantom DIR --model RESULT_FOLDER --subjects phantom_032 phantom_033 --work DIR
    python benchmarks/referring.py ... --open-model RESULT_FOLDER      (also part 6)
    python benchmarks/referring.py ... --parts 1 3 -- -device cpu      (what follows -- goes to refer)

DIR is made by `nnunet_multimodal phantom`: images/CONTRAST/SUBJECT.nii.gz and labels/CONTRAST/SUBJECT.nii.gz. The
subjects must not have been trained on. Every segmentation is made by `nnunet_multimodal refer`, from scribbles that
`nnunet_multimodal scribbles simulate` draws on the reference contrast. Parts:

    1 the same subject's reference     4 moved content, other slice grids
    2 another patient's reference      5 a mirrored body, exchanged names of the kidneys
    3 few scribbled slices             6 an organ that was never labelled in training (--open-model)

Beside each: the same scribbles grown by a random walker on the reference and copied by position, and the reference's
true organs copied alike (on the slices that are scribbled). What is there from an earlier run is not done again.
Without a model only the copies are measured. Writes benchmarks/results/referring.json and referring.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from copying import (
    copy_by_order,
    copy_by_position,
    exchange,
    exchanged_share,
    fill_slices,
    mirror,
    only_middle_slice,
    other_grid,
    outlined_where_scribbled,
    shift_content,
    walk_volume,
)
from main_job import ENDING, link, run, set_environment
from tqdm import tqdm

from nnunet_multimodal.conversion.images import Volume, read_labels, read_volume, written_whole
from nnunet_multimodal.data.sides import sided_pairs
from nnunet_multimodal.evaluation.measures import measure

# what is written down as the name of a method
REFER, WALKER, TRUTH = "refer", "random walker, copied", "true mask, copied"
SHIFTS = (3, 6, 12)  # mm along both axes of the plane: 2, 4 and 8 voxels of 1.6 mm
NSD_TOLERANCE_MM = 3.0  # about a pixel of the coarsest contrast


@dataclass(frozen=True)
class Condition:
    """One way to ask: which scribbles, of whom, for which targets."""

    part: int
    name: str
    says: str
    prompt: str = "every_1"  # folder of reference and scribbles
    targets: str = "plain"  # folder of target images and their labels
    other: bool = False  # the next subject is the reference
    matching: str = "auto"
    reach: float = 0.0
    open: bool = False  # asked of the --open-model, for its unlabelled organ


CONDITIONS = (
    Condition(1, "same", "the subject's own reference, every slice scribbled"),
    Condition(2, "other_order", "another patient's reference, slices matched by order", other=True, matching="order"),
    Condition(2, "other_position", "another patient's reference, matched by position", other=True, matching="position"),
    # slices are 6 mm: beyond the outer scribbles as many as were left out between two
    Condition(3, "every_3", "every 3rd slice scribbled, --reach 12", prompt="every_3", reach=12),
    Condition(3, "every_5", "every 5th slice scribbled, --reach 24", prompt="every_5", reach=24),
    Condition(3, "middle_12", "one slice of each organ scribbled, --reach 12", prompt="middle", reach=12),
    Condition(3, "middle_24", "one slice of each organ scribbled, --reach 24", prompt="middle", reach=24),
    *(
        Condition(4, f"shift_{n}", f"target moved by {n} mm along both axes of the plane", targets=f"shift_{n}")
        for n in SHIFTS
    ),
    Condition(4, "thick", "target cut into slices 1.5 times as thick, offset by half a slice", targets="thick"),
    Condition(4, "turned", "target on a grid turned by 5 degrees in its plane", targets="turned"),
    Condition(4, "tilted", "target on a grid tilted by 5 degrees", targets="tilted"),
    Condition(5, "mirrored", "reference, scribbles and target mirrored", prompt="mirrored", targets="mirrored"),
    Condition(5, "exchanged", "scribble names of left and right exchanged", prompt="exchanged", targets="exchanged"),
    Condition(6, "open", "never labelled organ, scribbled alone", prompt="open", open=True),
    Condition(6, "open_among", "never labelled organ, scribbled with the labelled ones", open=True),
    *(
        Condition(6, f"open_shift_{n}", f"alone, target moved by {n} mm", "open", f"shift_{n}", open=True)
        for n in SHIFTS
    ),
    Condition(
        6, "open_other", "alone, another patient's reference, by order", "open", other=True, matching="order", open=True
    ),
)


@dataclass(frozen=True)
class Bench:
    """What was asked for on the command line, checked."""

    phantom: Path
    work: Path
    subjects: list[str]
    contrasts: list[str]
    reference: str
    organs: dict[str, int]
    open_organ: str | None
    far: float  # mm
    beta: float

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Labels of left and right."""
        return [(self.organs[a], self.organs[b]) for a, b in sided_pairs(list(self.organs))]

    def image(self, contrast: str, subject: str) -> Path:
        return self.phantom / "images" / contrast / f"{subject}{ENDING}"

    def label(self, contrast: str, subject: str) -> Path:
        return self.phantom / "labels" / contrast / f"{subject}{ENDING}"

    def folder(self, condition: Condition) -> str:
        """Where a condition's files lie; another unlabelled organ is another condition."""
        return f"{condition.name}_{self.open_organ}" if condition.open else condition.name

    def references(self, condition: Condition) -> Iterator[tuple[str, str]]:
        """Each subject and the one that is its reference."""
        others = self.subjects[1:] + self.subjects[:1]
        return zip(self.subjects, others if condition.other else self.subjects)


# --- inputs ----------------------------------------------------------------------------------------------------------


def write(path: Path, data: np.ndarray, affine: np.ndarray) -> None:
    """An array [Z, Y, X] as a file; whole or not at all."""
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(data.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    with written_whole(path) as temporary:
        nibabel.save(image, temporary)


def read_organs(path: Path, bench: Bench) -> Volume:
    """A label map with only the organs of this benchmark."""
    volume = read_labels(path)
    ours = np.isin(volume.data, [*bench.organs.values()])
    return replace(volume, data=np.where(ours, volume.data, 0).astype(np.uint8))


def middle_plane(bench: Bench, subject: str) -> float:
    """x of the sagittal plane through the centre of the subject's reference image, in mm."""
    reference = read_volume(bench.image(bench.reference, subject))
    centre = (np.array(reference.data.shape[::-1]) - 1) / 2
    return float((reference.affine @ [*centre, 1.0])[0])


def make_scribbles(bench: Bench, every: int) -> None:
    """`scribbles simulate` on the reference labels of all subjects that have none yet."""
    output = bench.work / f"scribbles/every_{every}"
    waiting = [subject for subject in bench.subjects if not (output / f"{subject}{ENDING}").exists()]
    if not waiting:
        return
    labels = bench.work / "scribbles/labels"
    for subject in waiting:
        link(bench.label(bench.reference, subject), labels / f"{subject}{ENDING}")
    ids = [str(label) for label in bench.organs.values()]
    run("nnunet_multimodal", "scribbles", "simulate", "--labels", labels, "-o", output, "--seed", "1", "--every", every,
        "--organs", *ids)  # fmt: skip


def make_prompt(bench: Bench, kind: str, subject: str) -> Path:
    """A folder with reference, scribbles and truth (the reference's labels)."""
    folder = bench.work / "prompts" / (f"open_{bench.open_organ}" if kind == "open" else kind) / subject
    if (folder / f"truth{ENDING}").exists():
        return folder
    every = kind if kind.startswith("every") else "every_1"
    image = read_volume(bench.image(bench.reference, subject))
    truth = read_organs(bench.label(bench.reference, subject), bench)
    drawn = read_labels(bench.work / "scribbles" / every / f"{subject}{ENDING}").data
    data, labels, affine = image.data, truth.data, image.affine
    if kind == "middle":
        drawn = only_middle_slice(drawn)
    elif kind == "open":
        drawn = np.where(drawn == bench.organs[str(bench.open_organ)], drawn, 0)
    elif kind == "exchanged":
        drawn, labels = exchange(drawn, bench.pairs), exchange(labels, bench.pairs)
    elif kind == "mirrored":
        plane = middle_plane(bench, subject)
        (data, affine), (drawn, _), (labels, _) = (mirror(a, image.affine, plane) for a in (data, drawn, labels))
    write(folder / f"reference{ENDING}", data, affine)
    write(folder / f"scribbles{ENDING}", drawn.astype(np.uint8), affine)
    write(folder / f"truth{ENDING}", labels, affine)  # last: it says that all are there
    return folder


def make_targets(bench: Bench, kind: str, subject: str) -> tuple[dict[str, Path], dict[str, Path]]:
    """The target images and their labels, by contrast."""
    folder = bench.work / "targets" / kind / subject
    images = {contrast: folder / f"{contrast}{ENDING}" for contrast in bench.contrasts}
    labels = {contrast: folder / "labels" / f"{contrast}{ENDING}" for contrast in bench.contrasts}
    for contrast in bench.contrasts:
        if labels[contrast].exists():
            continue
        image, truth = read_volume(bench.image(contrast, subject)), read_organs(bench.label(contrast, subject), bench)
        data, drawn, affine = alter(bench, kind, subject, contrast, image, truth)
        write(images[contrast], data, affine)
        write(labels[contrast], drawn, affine)
    return images, labels


def alter(
    bench: Bench, kind: str, subject: str, contrast: str, image: Volume, truth: Volume
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image and labels of a target, both altered alike, and their affine."""
    data, drawn, affine = image.data, truth.data, image.affine
    if kind.startswith("shift"):
        signs = np.random.default_rng(zlib.crc32(f"{subject} {contrast}".encode())).choice([-1, 1], size=2)
        steps = [round(float(kind.split("_")[1]) / spacing) for spacing in image.spacing[1:]]  # whole voxels
        offset = (0, steps[0] * int(signs[0]), steps[1] * int(signs[1]))
        return shift_content(data, offset), shift_content(drawn, offset, fill=0), affine
    if kind in ("thick", "turned", "tilted"):
        how: dict[str, Any] = {
            "thick": {"thickness": 1.5, "offset": 0.5},
            "turned": {"degrees": 5.0},
            "tilted": {"degrees": 5.0, "turn_axis": 0},
        }[kind]
        new, shape = other_grid(affine, data.shape, **how)
        return (
            np.rint(copy_by_position(data, affine, new, shape, order=1)).astype(np.int16),
            copy_by_position(drawn, affine, new, shape),
            new,
        )
    if kind == "mirrored":
        plane = middle_plane(bench, subject)
        mirrored, new = mirror(data, affine, plane)
        return mirrored, mirror(drawn, affine, plane)[0], new
    if kind == "exchanged":
        return data, exchange(drawn, bench.pairs), affine
    return data, drawn, affine


# --- answers ---------------------------------------------------------------------------------------------------------


def place(condition: Condition, subject: str, reference: str) -> str:
    """Folder of a subject within a condition; names the reference where it is another patient's."""
    return f"{subject}_by_{reference}" if condition.other else subject


def refer(bench: Bench, condition: Condition, model: Path, more: list[str]) -> Path:
    """`refer` for all subjects of a condition; the folder of its results."""
    subjects = bench.work / "subjects" / bench.folder(condition)
    output = bench.work / "refer" / model_key(model) / bench.folder(condition)
    complete = True
    for subject, reference in bench.references(condition):
        folder = place(condition, subject, reference)
        prompt = make_prompt(bench, condition.prompt, reference)
        for name in ("reference", "scribbles"):
            link(prompt / f"{name}{ENDING}", subjects / folder / f"{name}{ENDING}")
        for contrast, image in make_targets(bench, condition.targets, subject)[0].items():
            link(image, subjects / folder / f"{contrast}{ENDING}")
            complete &= (output / folder / f"{contrast}{ENDING}").exists()
    if not complete:
        try:
            run("nnunet_multimodal", "refer", "--subjects", subjects, "-o", output, "-m", model, "--continue",
                "--no-overlays", "--reach", condition.reach, "--matching", condition.matching, *more)  # fmt: skip
        except subprocess.CalledProcessError as error:
            if error.returncode != 1:  # 1: some targets failed; the table shows how many there are
                raise
    return output


def model_key(model: Path) -> str:
    """Names a trained model: its folder and which weights are in it now."""
    weights = sorted(model.glob("fold_*/checkpoint_final.pth"))
    if not weights:
        raise SystemExit(f"{model} holds no fold_*/checkpoint_final.pth: no trained model.")
    state = [f"{path.resolve()} {path.stat().st_mtime_ns} {path.stat().st_size}" for path in weights]
    return f"{model.name}_{hashlib.sha1(' '.join(state).encode()).hexdigest()[:8]}"


def walked(bench: Bench, prompt: Path) -> Volume:
    """The random walker's outlines on the reference, kept beside it."""
    path = prompt / f"walker_{bench.far:g}_{bench.beta:g}{ENDING}"
    if not path.exists():
        image, drawn = read_volume(prompt / f"reference{ENDING}"), read_labels(prompt / f"scribbles{ENDING}")
        far = bench.far / float(np.mean(image.spacing[1:]))  # pixels
        write(path, walk_volume(image.data, drawn.data, far, bench.beta).astype(np.uint8), image.affine)
    return read_labels(path)


def copies(
    bench: Bench, condition: Condition, prompt: Path, targets: dict[str, Path]
) -> Iterator[tuple[str, str, Any]]:
    """(method, contrast, label map on the target's grid) of both ways to copy."""
    drawn = read_labels(prompt / f"scribbles{ENDING}")
    truth = read_labels(prompt / f"truth{ENDING}")
    outlines = {WALKER: walked(bench, prompt).data, TRUTH: outlined_where_scribbled(truth.data, drawn.data)}
    for method, outline in outlines.items():
        filled = fill_slices(outline, drawn.data, condition.reach, drawn.spacing[0])
        for contrast, path in targets.items():
            target = read_labels(path)
            if condition.matching == "order":
                yield method, contrast, copy_by_order(filled, drawn.spacing, target.data.shape, target.spacing)
            else:
                yield method, contrast, copy_by_position(filled, drawn.affine, target.affine, target.data.shape)


# --- measures --------------------------------------------------------------------------------------------------------


def measure_one(found: np.ndarray, truth: Volume, bench: Bench) -> dict[str, Any]:
    """DSC and NSD of each organ (NaN where neither has it), and how many sided voxels got the other side's label."""
    of_organs = measure(found, truth.data, truth.spacing, bench.organs, NSD_TOLERANCE_MM)
    return {
        "organs": {name: {"DSC": values.dsc, "NSD": values.nsd} for name, values in of_organs.items()},
        "exchanged": exchanged_share(found, truth.data, bench.pairs),
    }


def kept(path: Path, contrasts: list[str], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """{method: {contrast: measures}} of an earlier run if it had all these contrasts, else what ``make()`` gives."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not content or any(set(contrasts) - set(of_contrasts) for of_contrasts in content.values()):
        content = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(content))
    return {method: {c: of_contrasts[c] for c in contrasts} for method, of_contrasts in content.items()}


def measure_copies(bench: Bench, condition: Condition, subject: str, reference: str) -> dict[str, Any]:
    """{method: {contrast: measures}} of one subject."""
    prompt = make_prompt(bench, condition.prompt, reference)
    labels = make_targets(bench, condition.targets, subject)[1]
    result: dict[str, Any] = {WALKER: {}, TRUTH: {}}
    for method, contrast, found in copies(bench, condition, prompt, labels):
        result[method][contrast] = measure_one(found, read_labels(labels[contrast]), bench)
    return result


def measure_answers(bench: Bench, condition: Condition, subject: str, folder: Path) -> dict[str, Any]:
    """{contrast: measures} of one subject; contrasts that ``refer`` could not do are left out."""
    labels = make_targets(bench, condition.targets, subject)[1]
    return {
        contrast: measure_one(read_labels(folder / f"{contrast}{ENDING}").data, read_labels(path), bench)
        for contrast, path in labels.items()
        if (folder / f"{contrast}{ENDING}").exists()
    }


def run_condition(bench: Bench, condition: Condition, model: Path | None, more: list[str]) -> dict[str, Any]:
    """{method: {contrast: {subject: measures}}}."""
    result: dict[str, Any] = {}
    output = refer(bench, condition, model, more) if model else None
    for subject, reference in tqdm([*bench.references(condition)], desc=condition.name, disable=None):
        folder = place(condition, subject, reference)
        cache = bench.work / "measured" / bench.folder(condition) / folder
        of_methods = kept(
            cache / f"copies_{bench.far:g}_{bench.beta:g}.json",
            bench.contrasts,
            lambda s=subject, r=reference: measure_copies(bench, condition, s, r),
        )
        if output is not None and model is not None:
            answers = measure_answers(bench, condition, subject, output / folder)
            of_methods = {REFER: answers, **of_methods}
        for method, of_contrasts in of_methods.items():
            for contrast, values in of_contrasts.items():
                result.setdefault(method, {}).setdefault(contrast, {})[subject] = values
    return result


def summarise(of_subjects: dict[str, Any], organs: list[str]) -> dict[str, Any]:
    """Means over the subjects for each organ, and over these organs."""
    of_organs = {}
    for organ in organs:
        rows = [values["organs"][organ] for values in of_subjects.values()]
        of_organs[organ] = {key: mean([row[key] for row in rows]) for key in rows[0]}
    shares = [values["exchanged"] for values in of_subjects.values()]
    keys = next(iter(of_organs.values()))
    return {
        **{key: mean([row[key] for row in of_organs.values()]) for key in keys},
        "exchanged": mean(shares),
        "organs": of_organs,
        "subjects": {s: {o: values["organs"][o] for o in organs} for s, values in of_subjects.items()},
    }


def mean(values: list[float]) -> float:
    """Without the NaN; NaN of nothing else."""
    known = [value for value in values if not np.isnan(value)]
    return round(float(np.mean(known)), 4) if known else float("nan")


def without_nan(content: Any) -> Any:
    """None for NaN, which JSON does not know."""
    if isinstance(content, dict):
        return {key: without_nan(value) for key, value in content.items()}
    return None if isinstance(content, float) and np.isnan(content) else content


# --- report ----------------------------------------------------------------------------------------------------------

HEADINGS = {
    1: "The subject's own reference",
    2: "Another patient's reference",
    3: "Few scribbled slices",
    4: "Targets that lie otherwise than their headers say, or on another grid",
    5: "Left and right",
    6: "An organ that was never labelled in training",
}


def markdown(results: dict[str, Any], bench: Bench) -> str:
    """A table for each part: mean DSC over organs and subjects, a column for each contrast."""
    lines = [
        f"Mean DSC of {len(bench.subjects)} subjects that were not trained on; reference contrast {bench.reference}. "
        f"`others` is the mean of the other contrasts. Both copies need no training.",
    ]
    for part in sorted({row["part"] for row in results.values()}):
        organ = f" ({bench.open_organ})" if part == 6 else ""
        sides = part in (1, 5) and bool(bench.pairs)
        head = ["", "", *bench.contrasts, "others", *(["exchanged"] if sides else [])]
        lines += ["", f"**{part}. {HEADINGS[part]}{organ}**", "", row_of(head), row_of(["---"] * len(head))]
        for row in (row for row in results.values() if row["part"] == part):
            says = row["says"]
            for method, of_contrasts in row["methods"].items():
                dsc = {contrast: values["DSC"] for contrast, values in of_contrasts.items()}
                cells = [cell(of_contrasts.get(contrast), len(bench.subjects)) for contrast in bench.contrasts]
                cells.append(number(mean([value for contrast, value in dsc.items() if contrast != bench.reference])))
                if sides:
                    cells.append(f"{100 * mean([values['exchanged'] for values in of_contrasts.values()]):.1f} %")
                lines.append(row_of([says, method, *cells]))
                says = ""  # once is enough
    return "\n".join(lines) + "\n"


def row_of(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def cell(values: dict[str, Any] | None, subjects: int) -> str:
    """The mean DSC; with the number of subjects where some are missing."""
    if values is None:
        return "-"
    done = len(values["subjects"])
    return number(values["DSC"]) + (f" ({done} of {subjects})" if done < subjects else "")


def number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"


# --- command line ----------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phantom", type=Path, required=True, metavar="DIR")
    parser.add_argument("--subjects", nargs="+", required=True, metavar="NAME", help="not trained on")
    parser.add_argument("--model", type=Path, metavar="DIR", help="result folder of nnUNetTrainerCrossMR")
    parser.add_argument("--open-model", type=Path, metavar="DIR", help="one that was trained without an organ")
    parser.add_argument("--open-organ", metavar="NAME", help="default: the one that the open model was not taught")
    parser.add_argument("--organs", nargs="+", metavar="NAME", help="default: what the model was taught, else all")
    parser.add_argument("--reference", default="T1w", metavar="CONTRAST")
    parser.add_argument("--contrasts", nargs="+", metavar="CONTRAST", help="targets; default: all of the phantom")
    parser.add_argument("--parts", type=int, nargs="+", choices=range(1, 7), default=list(range(1, 7)))
    parser.add_argument(
        "--conditions", nargs="+", choices=[c.name for c in CONDITIONS], metavar="NAME", help="of these"
    )
    parser.add_argument("--work", type=Path, default=Path("referring"), metavar="DIR")
    # both were chosen on the T1w of phantom_000 to phantom_003, which no test uses
    parser.add_argument("--far", type=float, default=48.0, help="random walker: background beyond so many mm")
    parser.add_argument("--beta", type=float, default=2000.0, help="random walker: how much an edge stops it")
    parser.add_argument("--name", default="referring", help="of the result files")
    parser.add_argument("refer_options", nargs="*", metavar="-- OPTION", help="after --: more options for refer")
    return parser.parse_args()


def check(args: argparse.Namespace) -> Bench:
    """Reads what the phantom and the models say about themselves."""
    content = json.loads((args.phantom / "phantom.json").read_text(encoding="utf-8"))
    known = {name: int(label) for name, label in content["labels"].items() if int(label) > 0}
    taught = taught_organs(args.model) if args.model else None
    names = args.organs or [name for name in known if taught is None or name in taught]
    organs = {name: known[name] for name in names}
    if taught is not None and any(taught.get(name) != label for name, label in organs.items()):
        raise SystemExit(f"{args.model} was taught {taught}; the phantom says {organs}. Choose --organs that agree.")
    open_organ = args.open_organ
    if args.open_model and open_organ is None:
        left = [name for name in organs if name not in taught_organs(args.open_model)]
        if len(left) != 1:
            raise SystemExit(f"{args.open_model} was not taught {left}; choose one with --open-organ.")
        open_organ = left[0]
    bench = Bench(
        args.phantom.resolve(), args.work.resolve(), sorted(args.subjects), args.contrasts or content["contrasts"],
        args.reference, organs, open_organ, args.far, args.beta,
    )  # fmt: skip
    for subject in bench.subjects:
        for contrast in {bench.reference, *bench.contrasts}:
            for path in (bench.image(contrast, subject), bench.label(contrast, subject)):
                if not path.exists():
                    raise SystemExit(f"{path} does not exist.")
    if len(bench.subjects) < 2 and 2 in args.parts:
        raise SystemExit("part 2 takes another patient's reference: name at least two --subjects.")
    first = read_volume(bench.image(bench.reference, content["subjects"][0]))
    made = zlib.crc32(np.ascontiguousarray(first.data).tobytes())  # another phantom may come to lie in the same place
    same = {"phantom": str(bench.phantom), "crc": made, "reference": bench.reference, "organs": organs}
    settings = bench.work / "settings.json"
    before = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else same
    if before != same:
        raise SystemExit(f"{bench.work} was begun with {before}, now {same}: choose another --work.")
    bench.work.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(same))
    return bench


def taught_organs(model: Path) -> dict[str, int]:
    labels = json.loads((model / "dataset.json").read_text(encoding="utf-8"))["labels"]
    return {name: label for name, label in labels.items() if isinstance(label, int) and label > 0}


def main() -> None:
    args = parse()
    bench = check(args)
    set_environment(bench.work)
    for every in (1, 3, 5):
        make_scribbles(bench, every)
    results: dict[str, Any] = {}
    for condition in CONDITIONS:
        if args.conditions and condition.name not in args.conditions:
            continue
        if condition.part not in args.parts or (condition.part == 6 and bench.open_organ is None):
            continue
        if condition.part == 5 and not bench.pairs:
            continue  # nothing that could be exchanged
        model = args.open_model if condition.open else args.model
        of_methods = run_condition(bench, condition, model.resolve() if model else None, args.refer_options)
        organs = [str(bench.open_organ)] if condition.open else list(bench.organs)
        results[condition.name] = {
            "part": condition.part,
            "says": condition.says,
            "methods": {m: {c: summarise(v, organs) for c, v in by.items()} for m, by in of_methods.items()},
        }
    from common import RESULTS, write_result

    text = markdown(results, bench)
    print(text)
    note = (
        f"phantom {bench.phantom.name}, {len(bench.subjects)} subjects, reference {bench.reference}, scribbles by "
        f"`scribbles simulate --seed 1`; random walker: background beyond {bench.far:g} mm, beta {bench.beta:g}"
    )
    models = {"model": args.model and args.model.name, "open_model": args.open_model and args.open_model.name}
    content = {**models, "open_organ": bench.open_organ, "subjects": bench.subjects, "conditions": results}
    print(write_result(args.name, without_nan(content), note))
    with written_whole(RESULTS / f"{args.name}.md") as temporary:
        temporary.write_text(text)


if __name__ == "__main__":
    main()
