"""The scripts of ``dataset_conversion/`` on made-up DICOM, PNG and NIfTI trees of the real layouts."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from tiny_data import make_image, make_label, save

from nnunet_multimodal.conversion.dicom import list_files, read_series, stack_masks
from nnunet_multimodal.conversion.images import read_labels, read_volume
from nnunet_multimodal.errors import DataProblem, UsageError

SCRIPTS = Path(__file__).resolve().parents[2] / "dataset_conversion"
GREYS = np.array([0, 63, 126, 189, 252], np.uint8)
SIZE, SLICES = 12, 5  # pixels, slices


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_case(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Image and labels 0..4 [Z, Y, X]; every slice and side of it is different."""
    rng = np.random.default_rng(seed)
    image = rng.integers(1, 400, (SLICES, SIZE, SIZE)).astype(np.int16)
    labels = rng.integers(0, 5, (SLICES, SIZE, SIZE)).astype(np.uint8)
    return image, labels


def write_dicom(path: Path, plane: np.ndarray, z: float, spacing: float = 1.5, uid: str = "1") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(plane[None])
    image.SetSpacing((spacing, spacing, 1.0))
    for tag, value in {
        "0008|0060": "MR",
        "0020|000e": f"1.2.826.0.1.{uid}",  # a series of its own for every slice, as in CHAOS
        "0020|0032": f"-30\\-40\\{z}",
        "0020|0037": "1\\0\\0\\0\\1\\0",
        "0018|0050": "6",
    }.items():
        image.SetMetaData(tag, value)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(path.with_suffix(".dcm")))
    writer.Execute(image)
    path.with_suffix(".dcm").rename(path)


def write_series(folder: Path, volume: np.ndarray, name: str, descending: bool = False, step: float = 6.0) -> None:
    """Slices named 1 to n; the volume's first slice is the lowest, and the last file if ``descending``."""
    for z, plane in enumerate(volume):
        number = len(volume) - z if descending else z + 1
        write_dicom(folder / name.format(number), plane, 10 + step * z, uid=str(number))


def write_chaos(root: Path, patient: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """CHAOS numbers slices from head to foot, and the odd T1DUAL numbers are the out-phase."""
    image, labels = make_case(seed)
    folder = root / "Train_Sets" / "MR" / patient
    for phase, offset, factor in (("InPhase", 0, 1), ("OutPhase", 1, 2)):
        for z in range(SLICES):
            number = 2 * (SLICES - z) - offset
            path = folder / "T1DUAL" / "DICOM_anon" / phase / f"IMG-0004-{number:05d}.dcm"
            write_dicom(path, factor * image[z], 10 + 6 * z, uid=str(number))
    for z in range(SLICES):
        number = 2 * (SLICES - z)
        path = folder / "T1DUAL" / "Ground" / f"IMG-0004-{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(sitk.GetImageFromArray(GREYS[labels[z]]), str(path))
    return image, labels


def in_lps(path: Path) -> np.ndarray:
    """[Z, Y, X] with x to the left and y to the back, as the DICOM slices above are stored."""
    return read_volume(path).data[:, ::-1, ::-1]


def test_chaos(tmp_path: Path, nnunet_folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    truth = {patient: write_chaos(tmp_path / "CHAOS", patient, seed) for seed, patient in enumerate(("1", "13"))}
    out = tmp_path / "out"
    assert load("chaos").main([str(tmp_path / "CHAOS"), "-o", str(out), "-d", "601"]) == 0
    for patient, (image, labels) in truth.items():
        case = f"chaos{int(patient):02d}.nii.gz"
        assert (in_lps(out / "images" / case) == image).all()
        assert (in_lps(out / "labels" / case) == labels).all()
        assert read_volume(out / "images" / case).spacing == (6, 1.5, 1.5)
        lowest = nibabel.load(out / "images" / case).affine @ (0, 0, 0, 1)
        assert np.allclose(lowest[:3], (30, 40, 10))  # -30, -40, 10 in LPS
    content = json.loads(
        (Path(nnunet_folders["nnUNet_raw"]) / "Dataset601_CHAOS" / "dataset.json").read_text(encoding="utf-8")
    )
    assert content["labels"] == {"background": 0, "liver": 1, "right_kidney": 2, "left_kidney": 3, "spleen": 4}
    assert content["numTraining"] == 2


def test_chaos_out_phase_pairs_by_order(tmp_path: Path) -> None:
    """Its files have other numbers than the labels, which carry those of the in-phase."""
    image, labels = write_chaos(tmp_path / "CHAOS", "1", 0)
    chaos, out = load("chaos"), tmp_path / "out"
    assert chaos.main([str(tmp_path / "CHAOS"), "-o", str(out), "--contrast", "t1out"]) == 0
    assert (in_lps(out / "images" / "chaos01.nii.gz") == 2 * image).all()
    assert (in_lps(out / "labels" / "chaos01.nii.gz") == labels).all()
    with pytest.raises(UsageError, match="made with other settings"):
        chaos.main([str(tmp_path / "CHAOS"), "-o", str(out), "--contrast", "t1in"])


def test_chaos_bad_patient_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for patient in ("1", "2"):
        write_chaos(tmp_path / "CHAOS", patient, 0)
    ground = tmp_path / "CHAOS" / "Train_Sets" / "MR" / "1" / "T1DUAL" / "Ground"
    sitk.WriteImage(sitk.GetImageFromArray(np.full((SIZE, SIZE), 90, np.uint8)), str(ground / "IMG-0004-00002.png"))
    assert load("chaos").main([str(tmp_path / "CHAOS"), "-o", str(tmp_path / "out")]) == 1
    assert "grey values 90, expected 0, 55..70" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out" / "images").iterdir()] == ["chaos02.nii.gz"]
    assert [path.name for path in (tmp_path / "out" / "labels").iterdir()] == ["chaos02.nii.gz"]


def write_duke(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    root.mkdir()
    (root / "SegmentationKey.csv").write_text("DLDS,Series,Label\n1,3,a\n1,7,b\n2,3,a\n")
    types = "Label,Series Description,SeriesMap\na,T1 pre-contrast,pre\nb,T2 fat sat,t2\n"
    (root / "SequenceTypes.csv").write_text(types)
    truth = {}
    for seed, (patient, series) in enumerate((("0001", "3"), ("0001", "7"), ("0002", "3"))):
        image, labels = make_case(seed)
        mask = (labels == 1).astype(np.uint8) * 255
        folder = root / "Segmentation" / "Segmentation" / patient / series
        write_series(folder / "images", image, "{}.dicom", descending=seed == 1)
        write_series(folder / "masks", mask, "{}.dicom", descending=seed == 1)
        truth[f"duke{patient}_{series}"] = image, mask > 0
    return truth


def test_duke_liver(tmp_path: Path, nnunet_folders: dict[str, str]) -> None:
    truth = write_duke(tmp_path / "Duke")
    out, duke = tmp_path / "out", load("duke_liver")
    assert duke.main([str(tmp_path / "Duke"), "-o", str(out), "--contrast", "Pre", "-d", "602"]) == 0
    assert sorted(path.name for path in (out / "images").iterdir()) == ["duke0001_3.nii.gz", "duke0002_3.nii.gz"]
    assert duke.main([str(tmp_path / "Duke"), "-o", str(tmp_path / "all"), "--contrast", "all"]) == 0
    for case, (image, mask) in truth.items():
        assert (in_lps(tmp_path / "all" / "images" / f"{case}.nii.gz") == image).all()
        assert (in_lps(tmp_path / "all" / "labels" / f"{case}.nii.gz") == mask).all()
    folder = Path(nnunet_folders["nnUNet_raw"]) / "Dataset602_DukeLiver"
    assert json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["labels"] == {"background": 0, "liver": 1}


def test_duke_liver_lists_contrasts(tmp_path: Path) -> None:
    write_duke(tmp_path / "Duke")
    duke = load("duke_liver")
    with pytest.raises(UsageError, match=r"a/pre/T1 pre-contrast \(2\), b/t2/T2 fat sat \(1\)"):
        duke.main([str(tmp_path / "Duke"), "-o", str(tmp_path / "out")])
    with pytest.raises(UsageError, match="Unknown contrast 'dwi'"):
        duke.main([str(tmp_path / "Duke"), "-o", str(tmp_path / "out"), "--contrast", "dwi"])
    assert not (tmp_path / "out").exists()


def test_generic_folder(tmp_path: Path, nnunet_folders: dict[str, str]) -> None:
    for case in ("p1", "p 2"):
        save(tmp_path / "data" / case / "T1.nii.gz", make_image())
        save(tmp_path / "data" / case / "seg.nii.gz", make_label() // 2 * 255)
    words = [str(tmp_path / "data"), "-o", str(tmp_path / "out"), "--images", "{case}/T1.nii.gz"]
    words += ["--labels", "{case}/seg.nii.gz", "--map", "255=1", "-d", "603", "--label-names", "spleen=1"]
    assert load("generic_folder").main(words) == 0
    assert (tmp_path / "out" / "images" / "p 2.nii.gz").resolve() == tmp_path / "data" / "p 2" / "T1.nii.gz"
    mapped = read_labels(tmp_path / "out" / "labels" / "p1.nii.gz").data
    assert (mapped == read_labels(tmp_path / "data" / "p1" / "seg.nii.gz").data // 255).all() and mapped.any()
    assert (Path(nnunet_folders["nnUNet_raw"]) / "Dataset603_Folder" / "labelsTr" / "p 2.nii.gz").exists()


def test_generic_folder_never_drops_a_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "data" / "p1_T1.nii.gz", make_image())
    save(tmp_path / "data" / "p1_seg.nii.gz", make_label())
    words = [str(tmp_path / "data"), "-o", str(tmp_path / "out"), "--images", "{case}_T1.nii.gz"]
    words += ["--labels", "{case}_seg.nii.gz", "--map", "1=1"]
    assert load("generic_folder").main(words) == 4
    assert "found 2 (48 voxels), declared 0, 1" in capsys.readouterr().err
    assert [*(tmp_path / "out" / "images").iterdir()] == []


def test_generic_folder_lists_cases_that_are_alone(tmp_path: Path) -> None:
    save(tmp_path / "p1_T1.nii.gz", make_image())
    save(tmp_path / "p2_seg.nii.gz", make_label())
    with pytest.raises(DataProblem, match="2 cases lack their image or their label: p1, p2"):
        load("generic_folder").find_cases(tmp_path, "{case}_T1.nii.gz", "{case}_seg.nii.gz", None)


def test_script_as_a_user_runs_it(tmp_path: Path, run_python: Callable) -> None:
    result = run_python(SCRIPTS / "duke_liver.py", tmp_path, "-o", "out")
    assert result.returncode == 4
    assert "SegmentationKey.csv is missing" in result.stderr and "Traceback" not in result.stderr


def remove_slice(folder: Path) -> None:
    (folder / "3.dcm").unlink()


def second_series(folder: Path) -> None:
    write_dicom(folder / "9.dcm", np.zeros((SIZE, SIZE), np.int16), 16, uid="9")


def other_spacing(folder: Path) -> None:
    write_dicom(folder / "9.dcm", np.zeros((SIZE, SIZE), np.int16), 40, spacing=2, uid="9")


def text_file(folder: Path) -> None:
    (folder / "notes.txt").write_text("hello")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_slice, r"lacks slices: a gap of 12\.00 mm after 16\.00 mm, expected 6\.00"),
        (second_series, r"two series: two slices lie at 16\.00 mm"),
        (other_spacing, r"two series: 9\.dcm and 1\.dcm differ"),
        (text_file, r"Cannot read .*notes\.txt as DICOM"),
    ],
)
def test_bad_series(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    write_series(tmp_path, make_case()[0], "{}.dcm")
    damage(tmp_path)
    with pytest.raises(DataProblem, match=message):
        read_series(tmp_path)


def test_masks_out_of_order_are_noticed(tmp_path: Path) -> None:
    """Masks that state positions, named in the other direction than the slices."""
    image, labels = make_case()
    write_series(tmp_path / "images", image, "{}.dcm")
    write_series(tmp_path / "masks", labels, "{}.dcm", descending=True)
    with pytest.raises(DataProblem, match=r"not in the order of their slices: positions differ by up to 24\.0 mm"):
        stack_masks(read_series(tmp_path / "images"), tmp_path / "masks")


def test_masks_of_another_count_or_size(tmp_path: Path) -> None:
    image, labels = make_case()
    write_series(tmp_path / "images", image, "{}.dcm")
    series = read_series(tmp_path / "images")
    write_series(tmp_path / "few", labels[1:], "{}.dcm")
    with pytest.raises(DataProblem, match=r"holds 4 masks, .* has 5 slices"):
        stack_masks(series, tmp_path / "few")
    write_series(tmp_path / "small", labels[:, :9], "{}.dcm")
    with pytest.raises(DataProblem, match=r"has \(12, 9\) pixels, its slice has \(12, 12\)"):
        stack_masks(series, tmp_path / "small")


def test_files_in_natural_order(tmp_path: Path) -> None:
    for name in ("10", "2", "1", ".hidden", "DICOMDIR"):
        (tmp_path / name).touch()
    assert [path.name for path in list_files(tmp_path)] == ["1", "2", "10"]


def test_real_ct_series(data_dir: Path) -> None:
    """20 slices from a scanner, against SimpleITK's own series reader."""
    series = read_series(data_dir / "dicom_ct")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(data_dir / "dicom_ct")))
    expected = reader.Execute()
    assert np.allclose(series.image.GetSpacing(), expected.GetSpacing(), rtol=1e-3)
    assert np.allclose(series.image.GetOrigin(), expected.GetOrigin(), atol=1e-3)
    assert np.allclose(series.image.GetDirection(), expected.GetDirection(), atol=1e-6)
    assert (sitk.GetArrayFromImage(series.image) == sitk.GetArrayFromImage(expected)).all()
