# SPDX-License-Identifier: Apache-2.0
"""The program as it is run: its standard streams and its interruption."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from genperf.cli.main import main

GENPERF = [sys.executable, "-m", "genperf"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def features(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((20, 3)))
    return [*GENPERF, "fid", "a.npy", "a.npy"]


def shell(folder, command, redirection):
    """Run the command with redirected streams, as POSIX shells do."""
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *command], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full does not exist")
@pytest.mark.parametrize(
    ("redirection", "code", "sentence"),
    [
        (">/dev/full", 2, "genperf: stdout cannot be written to: No space left on device."),
        (">&-", 2, "genperf: stdout cannot be written to: it is closed."),
    ],
)
def test_result_is_printed_to_stderr_if_stdout_fails(features, tmp_path, redirection, code, sentence):
    done = shell(tmp_path, features, redirection)
    assert done.returncode == code
    lines = done.stderr.splitlines()
    assert lines[0] == sentence
    assert lines[1].startswith("Frechet distance ")
    assert lines[-1].endswith("20 samples of 3 features, a.npy")


def test_broken_pipe(features, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        done = subprocess.run(features, cwd=tmp_path, env=ENVIRONMENT, stdout=broken, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 141
        assert done.stderr.startswith("Frechet distance ")
        done = subprocess.run([*GENPERF, "systems"], env=ENVIRONMENT, stdout=broken, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 141
        assert done.stderr == ""


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_stderr_that_fails_loses_no_result(features, tmp_path, redirection):
    np.save(tmp_path / "few.npy", np.random.default_rng(0).random((3, 3)))  # a warning is printed
    done = shell(tmp_path, [*features[:-1], "few.npy"], redirection)
    assert done.returncode == 0
    assert done.stdout.startswith("Frechet distance ")
    assert "genperf:" not in done.stdout
    assert done.stderr == ""
    done = shell(tmp_path, [*features[:-1], "missing.npy"], redirection)
    assert done.returncode == 2
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("name", "encoding"), [(b"f\xff.npy", "utf-8"), ("données.npy".encode(), "ascii"), ("画像.npy".encode(), "latin-1")]
)
def test_paths_that_stdout_cannot_encode(features, tmp_path, name, encoding):
    path = os.path.join(os.fsencode(tmp_path), name)
    try:
        os.rename(tmp_path / "a.npy", path)
    except OSError:
        pytest.skip("the file system does not have such names")
    command = [*map(os.fsencode, GENPERF), b"fid", name, name]
    done = subprocess.run(command, cwd=tmp_path, env={**ENVIRONMENT, "PYTHONIOENCODING": encoding}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"Frechet distance ")
    assert b"\\" in done.stdout


def test_interrupt_during_imports(tmp_path):
    # torch imports this file first, and waits in it.
    (tmp_path / "torch.py").write_text("import pathlib, time\npathlib.Path('started').touch()\ntime.sleep(60)\n")
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    process = subprocess.Popen(GENPERF, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (tmp_path / "started").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed == ""
    assert errors == "genperf: interrupted.\n"


def test_library_keeps_its_signal_handler():
    code = "import signal, genperf; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["fid", "", "b"], "A"),
        (["fid", "a", ""], "B"),
        (["fid", "a", "b", "--weights", ""], "--weights"),
        (["fid", "a", "--save-stats", ""], "--save-stats"),
        (["train", "vae", "--data", ""], "--data"),
        (["train", "vae", "--out", ""], "--out"),
        (["sample", ""], "RUN_FOLDER"),
        (["sample", "run", "--out", ""], "--out"),
        (["sample", "run", "--data", ""], "--data"),
        (["evaluate", ""], "RUN_FOLDER"),
        (["evaluate", "run", "--data", ""], "--data"),
        (["evaluate", "run", "--weights", ""], "--weights"),
        (["bench", "--out", ""], "--out"),
        (["bench", "--compare", ""], "--compare"),
        (["bench", "--name", ""], "--name"),
    ],
)
def test_empty_paths_are_no_current_folder(arguments, option, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert f"argument {option}: must be the path of a file or folder, got ''" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["fid", "a", "b", "--seed", str(2**64)],
            "--seed: must be a whole number of at least 0 and at most 18446744073709551615, got '18446",
        ),
        (["train", "vae", "--seed", "9" * 5000], "--seed: must be a whole number"),
        (["sample", "run", "--seed", str(2**64)], "--seed: must be"),
        (["evaluate", "run", "--seed", str(2**64)], "--seed: must be"),
        (["evaluate", "run", "--samples", str(2**31)], "--samples: must be a whole number of at least 2 and at most 2147483647, got"),
        (["sample", "run", "--n", "9" * 100], "--n: must be a whole number of at least 1 and at most 2147483647, got '9999"),
        (["sample", "run", "--labels", f"1,{2**31}"], "--labels: must be whole numbers"),
        (["train", "vae", "--epochs", str(2**31)], "--epochs: must be"),
        (["train", "vae", "--dim", str(2**31)], "--dim: must lie in -2147483647 ... 2147483647, got '2147483648'"),
        (["fid", "a", "b", "--workers", "1025"], "--workers: must be a whole number of at least 1 and at most 1024, got '1025'"),
        (["fid", "a", "b", "--size", "100000x8"], "--size: must be below 100000 pixels a side, got '100000x8'"),
    ],
)
def test_numbers_have_upper_bounds(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert sentence in capsys.readouterr().err


def test_too_large_for_memory(tmp_path, capsys):
    np.savez(tmp_path / "images.npz", images=np.zeros((12, 8, 8), np.uint8))
    code = main(
        [
            "train",
            "vae",
            "--data",
            str(tmp_path / "images.npz"),
            "--dim",
            str(2**31 - 1),
            "--hidden",
            str(2**20),
            "--out",
            str(tmp_path / "r"),
        ]
    )
    assert code == 2
    assert capsys.readouterr().err.startswith("genperf: there is not enough memory: ")
