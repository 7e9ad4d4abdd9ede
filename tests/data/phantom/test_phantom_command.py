"""``nnunet_multimodal phantom`` as a user types it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from nnunet_multimodal.data.phantom import CONTRASTS, PhantomOptions, write
from nnunet_multimodal.errors import EnvironmentProblem

COARSE = ("--spacing", "6", "6", "14", "-j", "1")


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.nii.gz"))
    }


def test_files_labels_and_description(tmp_path: Path, run_command):
    done = run_command("phantom", "out", "--subjects", 1, "--contrasts", "T1w,CT", "--organs", "aorta", *COARSE)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert sorted(digests(out)) == [
        f"{kind}/{contrast}/phantom_000.nii.gz" for kind in ("images", "labels") for contrast in ("CT", "T1w")
    ]
    description = json.loads((out / "phantom.json").read_text(encoding="utf-8"))
    assert description["subjects"] == ["phantom_000"]
    assert description["labels"]["spleen"] == 4 and description["labels"]["aorta"] == 5
    image = nib.load(out / "images/T1w/phantom_000.nii.gz")
    labels = nib.load(out / "labels/T1w/phantom_000.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.header["qform_code"] == image.header["sform_code"] == 1
    assert image.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(image.header.get_zooms(), (6, 6, 14), rtol=1e-6)
    np.testing.assert_array_equal(image.affine, labels.affine)
    assert set(np.unique(labels.dataobj)) == {0, 1, 2, 3, 4, 5}
    assert np.asarray(nib.load(out / "images/CT/phantom_000.nii.gz").dataobj).min() < -900


def test_same_seed_same_bytes_however_it_is_run(tmp_path: Path, run_command):
    run_command("phantom", "a", "--subjects", 2, "--contrasts", "T1w", "T2w", *COARSE)
    run_command("phantom", "b", "--subjects", 2, "--contrasts", "T1w", "T2w", *COARSE[:-1], "2")
    assert len(digests(tmp_path / "a")) == 8
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    run_command("phantom", "c", "--subjects", 1, "--contrasts", "T1w", "--seed", 1, *COARSE)
    key = "images/T1w/phantom_000.nii.gz"
    assert digests(tmp_path / "c")[key] != digests(tmp_path / "a")[key]


def test_goes_on_and_keeps_what_is_there(tmp_path: Path, run_command):
    run_command("phantom", "a", "--subjects", 1, "--contrasts", "T1w", *COARSE)
    first = tmp_path / "a/images/T1w/phantom_000.nii.gz"
    stamp = first.stat().st_mtime_ns
    done = run_command("phantom", "a", "--subjects", 2, "--contrasts", "T1w", *COARSE)
    assert done.returncode == 0
    assert first.stat().st_mtime_ns == stamp
    assert json.loads((tmp_path / "a/phantom.json").read_text(encoding="utf-8"))["subjects"] == [
        "phantom_000",
        "phantom_001",
    ]
    assert "same_grid" not in (tmp_path / "a/phantom.json").read_text(encoding="utf-8")  # as before there was that
    other = run_command("phantom", "a", "--subjects", 2, "--contrasts", "T1w", "--same-grid", *COARSE)
    assert other.returncode == 2 and "same_grid None" in other.stderr
    other = run_command("phantom", "a", "--subjects", 2, "--contrasts", "T1w", "--noise", "0", *COARSE)
    assert other.returncode == 2
    assert "noise 1.0" in other.stderr and "another folder" in other.stderr


def test_wrong_usage_is_told_and_writes_nothing(tmp_path: Path, run_command):
    for arguments, words in (
        (("--contrasts", "T1w,T2"), ("unknown contrast 'T2'", "Did you mean T2w", *CONTRASTS)),
        (("--organs", "heart"), ("unknown organ 'heart'", "stomach")),
        (("--spacing", "0", "1", "1"), ("--spacing", "0.2 or more")),
        (("--noise", "nan"), ("--noise nan",)),
        (("--contrasts", ","), ("no contrast is named",)),
        (("--subjects", "0"), ("--subjects must be at least 1",)),
    ):
        done = run_command("phantom", "out", *arguments)
        assert done.returncode == 2
        assert all(word in done.stderr for word in words), done.stderr
        assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    done = run_command("phantom", "mine", "--subjects", 1)
    assert done.returncode == 2 and "not empty" in done.stderr
    (tmp_path / "file").write_text("")
    done = run_command("phantom", "file", "--subjects", 1)
    assert done.returncode == 2 and "is a file" in done.stderr
    for content in ("{", "[]", "{}"):
        (tmp_path / "mine/phantom.json").write_text(content)
        done = run_command("phantom", "mine", "--subjects", 1)
        assert done.returncode == 2 and "phantom.json" in done.stderr and "another folder" in done.stderr


def test_a_killed_process_is_told_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = PhantomOptions(contrasts=("T1w",), spacing=(6.0, 6.0, 14.0))
    monkeypatch.setattr(write, "_write_subject", die)
    with pytest.raises(EnvironmentProblem, match="memory ran out"):
        list(write.write_phantom(tmp_path / "out", 2, options, processes=2))
    assert json.loads((tmp_path / "out/phantom.json").read_text(encoding="utf-8"))["subjects"] == []


def die(job: tuple) -> str:
    """What the system does to a process when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
    return ""
