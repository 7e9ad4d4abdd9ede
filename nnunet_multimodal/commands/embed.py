"""``nnunet_multimodal embed``: the text embeddings of a data set, made once and stored beside its plans."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_multimodal.errors import DataProblem, EnvironmentProblem, UsageError

if TYPE_CHECKING:
    from nnunet_multimodal.text import TextEmbeddings

DESCRIPTION = """\
Encode a sentence about each organ in each modality of a data set, for nnUNetTrainerMulModSeg.

The labels and the modality table come from dataset.json. The embeddings go to text_embeddings.npz beside the plans,
where the trainer finds them; without that file it uses one-hot codes. Training copies them into the checkpoint, so
prediction needs neither the file nor open_clip. Templates: V1 "A photo of a [organ].", V2 "There is a [organ] in this
[modality].", V3 "A [modality] imaging of a [organ].", or your own text with {organ} and {modality}."""

EXAMPLE = """\
nnunet_multimodal embed 602
nnunet_multimodal embed 602 --encoder biomedclip --words postcava="inferior vena cava"
nnunet_multimodal embed 602 --from-file txt_encoding.pth --names organ_names.txt --words aorta=Arota
nnunet_multimodal embed 602 --one-hot"""

TRAINER = "nnUNetTrainerMulModSeg"
PAIRS = 5  # shown in the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="id or name of the data set, such as 602")
    text = parser.add_argument_group("encode text (default)")
    text.add_argument("--template", metavar="T", help="V1, V2, V3 or your own text (default: V3)")
    text.add_argument("--encoder", metavar="NAME", help="of open_clip, or biomedclip (default: ViT-B-32)")
    text.add_argument("--pretrained", metavar="TAG", help="which weights of the encoder (default: openai)")
    text.add_argument("--checkpoint", type=Path, metavar="FILE", help="these weights, instead of a download")
    text.add_argument(
        "--words", nargs="+", default=[], metavar="NAME=TEXT", help="say TEXT for a label or modality, or in a file"
    )
    text.add_argument("--normalise", action="store_true", help="scale each embedding to length 1")
    other = parser.add_argument_group("or take what there is")
    other.add_argument("--from-file", type=Path, metavar="FILE", help=".npz, .safetensors, or a tensor as .pth")
    other.add_argument("--names", type=Path, metavar="FILE", help="names of a tensor's rows, one a line")
    other.add_argument(
        "--file-modalities", nargs="+", metavar="NAME", help="of a tensor [modality, organ, E], in its order"
    )
    other.add_argument("--one-hot", action="store_true", help="a code of its own for each pair, no text")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write .npz or .safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.add_argument("--json", action="store_true", help="print what was made as JSON")


def run(args: argparse.Namespace) -> int:
    from nnunet_multimodal.data.modality import ModalityTable
    from nnunet_multimodal.text.names import output_names

    _check_options(args)
    words = _pairs(args.words)
    name, source, preprocessed = _find_dataset(args.dataset)
    dataset_json = _read_json(source)
    labels = output_names(dataset_json.get("labels", {}), str(source))
    modalities = ModalityTable.from_dataset_json(dataset_json, str(source)).modalities
    output = _output(args, name, preprocessed)

    made = _make(args, modalities, labels, words)
    output.parent.mkdir(parents=True, exist_ok=True)
    made.save(output)
    content = _describe(made, output) | {"next": _next_steps(name, preprocessed)}
    if args.json:
        print(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        print(_table(made, content))
        for note in made.notes:
            print(f"note: {note}", file=sys.stderr)
    return 0


# --- what is asked for -----------------------------------------------------------------------------------------------


def _check_options(args: argparse.Namespace) -> None:
    """Options of two sources at once would leave one of them without effect."""
    if args.one_hot and args.from_file is not None:
        raise UsageError("--one-hot and --from-file are two sources of embeddings; take one.")
    options = {
        "--template": args.template,
        "--encoder": args.encoder,
        "--pretrained": args.pretrained,
        "--checkpoint": args.checkpoint,
        "--words": args.words or None,
        "--normalise": args.normalise or None,
        "--names": args.names,
        "--file-modalities": args.file_modalities,
    }
    of_file = {"--names", "--file-modalities"}
    if args.one_hot:
        source, refused = "--one-hot", {*options}
    elif args.from_file is not None:
        source, refused = "--from-file", {"--template", "--encoder", "--pretrained", "--checkpoint"}
    else:
        source, refused = "encoding text", of_file
    useless = [option for option, value in options.items() if option in refused and value is not None]
    if useless:
        hint = " They belong to --from-file." if set(useless) <= of_file else ""
        verb = "has" if len(useless) == 1 else "have"
        raise UsageError(f"{', '.join(useless)} {verb} no effect with {source}.{hint} Leave out what has none.")


def _pairs(words: list[str]) -> dict[str, str]:
    """``["aorta=Arota"]`` -> {"aorta": "Arota"}."""
    pairs: dict[str, str] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise UsageError(f"--words {word}: expected NAME=TEXT, such as postcava='inferior vena cava'.")
        if name in pairs:
            raise UsageError(f"--words has {name} more than once.")
        pairs[name] = text
    return pairs


def _find_dataset(wanted: str) -> tuple[str, Path, Path | None]:
    """Its full name, its dataset.json (preprocessed, else raw), and its preprocessed folder, whether it exists or not.

    The folder is None where only nnUNet_raw is set, which is enough with ``-o``.
    """
    from nnunet_multimodal.environment import find_raw_dataset, require_nnunet_path

    problem: EnvironmentProblem | None = None
    root: Path | None = None
    try:
        root = require_nnunet_path("nnUNet_preprocessed")
    except EnvironmentProblem as error:
        problem = error
    if root is not None:
        found = [
            path.parent for path in sorted(root.glob("Dataset*_*/dataset.json")) if _answers(path.parent.name, wanted)
        ]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise DataProblem(
                f"Data set {wanted} is ambiguous in {root}: {names}. Rename all but one, or give its name."
            )
        if found:
            return found[0].name, found[0] / "dataset.json", found[0]
    try:
        raw = find_raw_dataset(wanted)
    except EnvironmentProblem as error:
        raise problem or error from error
    except DataProblem as error:
        where = f" Nor is it preprocessed in {root}." if root is not None else ""
        raise DataProblem(f"{error}{where}") from error
    return raw.name, raw / "dataset.json", None if root is None else root / raw.name


def _answers(folder: str, wanted: str) -> bool:
    digits = folder.removeprefix("Dataset").partition("_")[0]
    return folder == wanted or (wanted.isdecimal() and digits.isdecimal() and int(digits) == int(wanted))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataProblem(f"{path} does not exist. Convert the data set first: nnunet_multimodal convert") from error
    except ValueError as error:
        raise DataProblem(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataProblem(f"{path} holds {type(content).__name__}, expected an object with labels.")
    return content


def _output(args: argparse.Namespace, name: str, preprocessed: Path | None) -> Path:
    from nnunet_multimodal.environment import require_nnunet_path
    from nnunet_multimodal.text import FILE_NAME

    if args.output is not None:
        output: Path = args.output
    else:
        output = (preprocessed or require_nnunet_path("nnUNet_preprocessed") / name) / FILE_NAME
    if output.suffix.lower() not in (".npz", ".safetensors"):
        raise UsageError(f"-o {output}: expected a name that ends in .npz or .safetensors.")
    if output.is_dir():
        raise UsageError(f"{output} is a folder, expected a file.")
    if output.exists() and not args.overwrite:
        raise UsageError(
            f"{output} exists. Models that are being trained may go by it; replace it with --overwrite, or write "
            "elsewhere with -o FILE."
        )
    return output


def _make(
    args: argparse.Namespace, modalities: tuple[str, ...], labels: tuple[str, ...], words: Mapping[str, str]
) -> TextEmbeddings:
    from nnunet_multimodal.text.templates import make_prompts

    if not args.one_hot and args.from_file is None:
        make_prompts(args.template or "V3", modalities, labels, words)  # complains before torch is imported
    from nnunet_multimodal.text import TextEmbeddings

    if args.one_hot:
        return TextEmbeddings.one_hot(modalities, labels)
    if args.from_file is not None:
        return TextEmbeddings.from_file(
            args.from_file,
            modalities,
            labels,
            args.names,
            file_modalities=args.file_modalities,
            words=words,
            normalise=args.normalise,
        )
    return TextEmbeddings.from_open_clip(
        modalities,
        labels,
        args.encoder or "ViT-B-32",
        args.pretrained,
        args.template or "V3",
        words=words,
        checkpoint=args.checkpoint,
        normalise=args.normalise,
    )


# --- what is said ----------------------------------------------------------------------------------------------------


def _describe(made: TextEmbeddings, output: Path) -> dict[str, Any]:
    cosines = made.cosines()
    pairs: list[dict[str, Any]] = []
    for first, one in enumerate(made.labels):
        for second in range(first + 1, len(made.labels)):
            values = [float(cosines[m, first, m, second]) for m in range(len(made.modalities))]
            if not any(map(math.isnan, values)):  # a background of zeros points nowhere
                pairs.append({"labels": [one, made.labels[second]], "cosine": dict(zip(made.modalities, values))})
    pairs.sort(key=lambda pair: -max(pair["cosine"].values()))
    between = []
    for first, one in enumerate(made.modalities):
        for second in range(first + 1, len(made.modalities)):
            same = [float(cosines[first, c, second, c]) for c in range(len(made.labels))]
            same = [value for value in same if not math.isnan(value)]
            if same:
                mean = sum(same) / len(same)
                entry = {"lowest": min(same), "mean": mean, "highest": max(same)}
                between.append({"modalities": [one, made.modalities[second]], **entry})
    return {
        "file": str(output),
        "encoder": made.encoder,
        "template": made.template,
        "normalised": made.normalised,
        "dimension": made.dimension,
        "modalities": [*made.modalities],
        "labels": [*made.labels],
        "prompts": [[*of_modality] for of_modality in made.prompts],
        "pairs": pairs,
        "same_organ_between_modalities": between,
        "notes": [*made.notes],
        "checksum": made.checksum,
    }


def _table(made: TextEmbeddings, content: Mapping[str, Any]) -> str:
    counts = f"{len(made.modalities)} modalities x {len(made.labels)} classes x {made.dimension}"
    lines = [f"{made.encoder}, {counts}{', length 1' if made.normalised else ''}"]
    # a file without modalities, or V1, has one sentence for all
    lines += [f"  {prompt}" for prompt in dict.fromkeys(text for row in made.prompts for text in row if text)]
    if not made.prompts:
        lines.append(f"  classes: {', '.join(made.labels)}")
    pairs, between = content["pairs"], content["same_organ_between_modalities"]
    if made.encoder == "one_hot":
        lines.append("  every code is at a right angle to every other, also between modalities")
        pairs, between = [], []
    if pairs:
        lines += ["", f"closest of {len(pairs)} pairs of classes (cosine; at 1 the text would not tell them apart)"]
        shown = pairs[:PAIRS]
        rows = [["", *made.modalities]]
        rows += [[" - ".join(p["labels"]), *(f"{v:.3f}" for v in p["cosine"].values())] for p in shown]
        means = [sum(p["cosine"][m] for p in pairs) / len(pairs) for m in made.modalities]
        rows.append([f"mean of all {len(pairs)}", *(f"{value:.3f}" for value in means)])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines += [
            "  " + "  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:]))]) for r in rows
        ]
    for entry in between:
        first, second = entry["modalities"]
        span = f"{entry['mean']:.3f} ({entry['lowest']:.3f} to {entry['highest']:.3f})"
        same = "; the text does not tell them apart" if entry["lowest"] > 1 - 1e-5 else ""
        lines.append(f"same class in {first} and {second}: {span}{same}")
    lines += ["", f"wrote {content['file']}", "next:", *(f"  {step}" for step in content["next"])]
    return "\n".join(line.rstrip() for line in lines)


def _next_steps(name: str, preprocessed: Path | None) -> list[str]:
    """The commands that train with it: planned first, if that was not done."""
    number = str(int(name.removeprefix("Dataset").partition("_")[0]))
    plans = [] if preprocessed is None else sorted(preprocessed.glob("*Plans*.json"))
    steps = [] if plans else [f"nnUNetv2_plan_and_preprocess -d {number} --verify_dataset_integrity"]
    configuration = "3d_fullres"
    if plans:
        try:
            known = json.loads(plans[0].read_text(encoding="utf-8"))["configurations"]
            configuration = configuration if configuration in known else next(iter(known))
        except (OSError, ValueError, KeyError, TypeError, StopIteration):
            pass  # nnU-Net will say what is wrong with its plans
    return [*steps, f"nnUNetv2_train {number} {configuration} 0 -tr {TRAINER}"]
