"""`kan-client infer`: files in, files out, and what is told of a file that is wrong."""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from protos import inference_pb2 as pb
from serving.client.tensors import count_nan_rows
from serving.server import Server
from tests.bare import A, Bare, N, answering, received
from tests.conftest import ROOT, STATE_DICTS, run_module
from tests.servers import WAIT_S
from tests.shells import Shell, bare, shell, without_waiting

__all__ = ["bare", "shell"]

MODEL = ("--model", "m")
UNIFORM = STATE_DICTS[0]


def csv_of(array: NDArray[Any], header: str = "") -> str:
    text = io.StringIO()
    np.savetxt(text, array, "%.9g", delimiter=",", header=header, comments="")
    return text.getvalue()


def read_csv(content: bytes) -> NDArray[np.float32]:
    found: NDArray[np.float32] = np.loadtxt(io.BytesIO(content), np.float32, delimiter=",", ndmin=2)
    return found


def test_a_file_of_rows_becomes_a_file_of_answers(server: Server, tmp_path: Path) -> None:
    x, y = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(x, UNIFORM.x.astype(np.float64))
    arguments = ["--model", UNIFORM.name, "--input", str(x), "--output", str(y)]
    done = run_module("serving.client", "infer", "--address", server.address, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert without_waiting(done.stderr).startswith(f"{len(UNIFORM.x)} rows in ")
    found = np.load(y)
    assert (np.abs(found - UNIFORM.y64) <= 1e-5 * np.maximum(1, np.abs(UNIFORM.y64))).all()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(csv_of(A), id="numbers alone"),
        pytest.param(csv_of(A, "left,right"), id="names in front"),
        pytest.param("\ufeff" + csv_of(A, '"left","right"').replace("\n", "\r\n"), id="Windows"),
        pytest.param("\n" + csv_of(A) + "\n\n", id="empty lines around"),
    ],
)
def test_a_csv_is_read_with_names_or_without(shell: Shell, tmp_path: Path, text: str) -> None:
    (tmp_path / "x.csv").write_text(text, encoding="utf-8", newline="")
    found = read_csv(shell.infer("--input", tmp_path / "x.csv"))
    np.testing.assert_array_equal(found, 2 * A)


def test_every_digit_of_an_answer_is_in_a_csv(shell: Shell, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((1000, 2)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    shell.infer("--input", tmp_path / "x.npy", "--output", tmp_path / "y.csv")
    np.testing.assert_array_equal(read_csv((tmp_path / "y.csv").read_bytes()), 2 * x)


@pytest.mark.parametrize("form", ["npy", "csv"])
def test_stdin_is_read(shell: Shell, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    content = io.BytesIO()
    if form == "npy":
        np.save(content, A)
    else:
        content.write(csv_of(A).encode())
    content.seek(0)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content))
    np.testing.assert_array_equal(read_csv(shell.infer("--input", "-")), 2 * A)


def test_a_bar_on_a_terminal_leaves_the_result_alone(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "x.npy", A)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes anything for a terminal
    monkeypatch.setenv("TERM", "xterm")
    np.testing.assert_array_equal(read_csv(shell.infer("--input", tmp_path / "x.npy")), 2 * A)
    assert "3/3" in shell.error


def test_a_large_array_is_not_read_all_at_once(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.client.files._LARGE", 1)
    np.save(tmp_path / "x.npy", np.asfortranarray(A))
    found = read_csv(shell.infer("--input", tmp_path / "x.npy"))
    np.testing.assert_array_equal(found, 2 * A)


def test_several_tensors_go_in_archives(
    capsysbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> None:
    x, y = tmp_path / "x.npz", tmp_path / "y.npz"
    np.savez(x, a=A, n=N)
    with answering(Bare()) as port:
        shell = Shell(f"127.0.0.1:{port}", Bare(), capsysbinary)
        shell.infer("--input", x, "--output", y)
        with np.load(y) as found:
            assert set(found) == {"total", "twice"}
            np.testing.assert_array_equal(found["total"], A + N[:, None])
        out = shell.infer("--input", x, "--output-tensor", "twice")
        np.testing.assert_array_equal(read_csv(out), 2 * A)
        shell.infer("--input", x, code=1)
        assert "expected one output, found ['total', 'twice']; choose with" in shell.error
        (tmp_path / "x.csv").write_text(csv_of(A))
        shell.infer("--input", tmp_path / "x.csv", "--output", y, code=1)
        assert "x.csv: expected inputs ['a', 'n'], found a CSV" in shell.error


def test_rows_with_nan_are_told_and_none_are_not(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "x.npy"
    x = np.zeros((40_000, 2))
    np.save(file, x)
    shell.infer("--input", file)
    assert shell.error.endswith(" s by 'pair', version 1\n")
    x[[0, 0, 16_383, 16_384, 39_999], [0, 1, 0, 1, 1]] = np.nan
    x[7] = np.inf, -np.inf  # which is not NaN, not even added up
    np.save(file, x)
    shell.infer("--input", file)
    assert shell.error.endswith(" s by 'pair', version 1; 4 with NaN\n")


def test_a_row_with_nan_in_several_inputs_is_one() -> None:
    x = np.zeros((3, 2, 2), np.float16)
    x[1, 1, 0] = x[2, 0, 0] = np.nan
    flat = np.array([0, np.nan, 0])
    assert count_nan_rows({"n": N, "x": x}) == 2
    assert count_nan_rows({"x": x, "flat": flat, "n": N}) == 2
    assert count_nan_rows({"n": N}) == 0
    assert count_nan_rows({"x": x[:0]}) == 0


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param("1,2\n3\n", "line 2: expected 2 numbers, found 1", id="columns"),
        pytest.param("a,b,c\n1,2,3\n", "line 2: expected 2 numbers, found 3", id="more columns"),
        pytest.param("a,b\n1,2\n\n3,x\n", "line 4: expected a number, found 'x'", id="no number"),
        pytest.param("a,b\n1,\n", "line 2: expected a number, found ''", id="nothing"),
        pytest.param("a,b\n", "expected lines of numbers, found none", id="names alone"),
        pytest.param("", "expected lines of numbers, found none", id="empty"),
        pytest.param(
            "1;2\n",
            "found none; semicolons seem to part its fields: put commas there\n",
            id="; alone",
        ),
        pytest.param(
            "a;b\n1;2\n", "line 2: expected 2 numbers, found 1; semicolons seem", id="semicolons"
        ),
        pytest.param(
            "a;b\n1,5;2,5\n", "commas there, and write decimals with a point\n", id="decimals"
        ),
        pytest.param("1,5;2,5\n", "--header no; semicolons seem to part", id="decimals alone"),
        pytest.param("a\tb\n1\t2\n", "found 1; tabs seem to part", id="tabs"),
        pytest.param("a b\n1.5 2.5\n3 4\n", "found 1; spaces seem to part", id="spaces"),
        pytest.param("a, b\n1, x y\n", "expected a number, found 'x y'\n", id="commas"),
        pytest.param("1,x\n1,2\n", "line 1: expected either names or numbers", id="both"),
        pytest.param("0,1\n5,6\n", "say which with --header yes", id="names that count"),
        pytest.param(b"\xff\xfe\x00", "found other bytes", id="bytes"),
        pytest.param(b"\x93NUMPY\x01", "expected an .npy of numbers, found a damaged", id="npy"),
        pytest.param(b"PK\x03\x04zip", "expected an .npz of numbers, found a damaged", id="npz"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_before_anything_is_sent(
    shell: Shell, tmp_path: Path, content: str | bytes, told: str
) -> None:
    file, output = tmp_path / "x", tmp_path / "y.npy"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    shell.infer("--input", file, "--output", output, code=1)
    assert shell.error.startswith(f"error: {file}: ")
    assert told in shell.error
    assert shell.error.count("\n") == 1
    assert not shell.servicer.requests
    assert list(tmp_path.iterdir()) == [file]


def test_arrays_of_other_columns_are_told_with_their_file(shell: Shell, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((5, 3)))
    shell.infer("--input", tmp_path / "x.npy", code=1)
    told = "x.npy: input 'a': expected shape [-1, 2] (-1 is any number), found [5, 3]"
    assert told in shell.error
    assert not shell.servicer.requests


def test_a_checkpoint_is_told_from_an_npz(shell: Shell, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "digits.pt")
    shell.infer("--input", tmp_path / "digits.pt", code=1)
    told = "expected an .npy, an .npz or a CSV of numbers, found a zip of other files\n"
    assert shell.error == f"error: {tmp_path / 'digits.pt'}: {told}"
    assert not shell.servicer.requests


def test_a_pickle_is_not_opened(shell: Shell, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[print, 1]], object), allow_pickle=True)
    shell.infer("--input", tmp_path / "x.npy", code=1)
    assert "Object arrays cannot be loaded" in shell.error


def test_header_says_what_cannot_be_told(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("0,1\n5,6\n")
    for header, expected in (("yes", [[10, 12]]), ("no", [[0, 2], [10, 12]])):
        out = shell.infer("--input", tmp_path / "x.csv", "--header", header)
        np.testing.assert_array_equal(read_csv(out), expected)


def test_whole_numbers_are_read_as_such(
    capsysbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> None:
    file, large = tmp_path / "n.csv", 2**53 + 1  # which no float64 is

    def first(response: pb.ModelInferResponse) -> None:
        response.Clear()

    servicer = Bare(inputs={"a": ("INT64", [-1, 2])}, outputs=("twice",), change=first)
    with answering(servicer) as port:
        shell = Shell(f"127.0.0.1:{port}", servicer, capsysbinary)
        file.write_text(f"{large},-3\n")
        shell.infer("--input", file, code=1)
        np.testing.assert_array_equal(received(servicer.requests[0])["a"], [[large, -3]])
        file.write_text("3.7,1\n")
        shell.infer("--input", file, code=1)
        assert "line 1: expected a whole number, found '3.7'" in shell.error
    assert len(servicer.requests) == 1


def test_an_output_is_whole_or_as_it_was(shell: Shell, bare: Bare, tmp_path: Path) -> None:
    output = tmp_path / "y.npy"
    output.write_bytes(b"before")
    np.save(tmp_path / "x.npy", np.zeros((3000, 2)))  # three messages

    def fail(response: pb.ModelInferResponse) -> None:
        if len(bare.requests) == 3:
            response.Clear()

    bare.change = fail
    shell.infer("--input", tmp_path / "x.npy", "--output", output, code=1)
    assert "expected outputs ['twice'], found []" in shell.error
    assert output.read_bytes() == b"before"
    assert {path.name for path in tmp_path.iterdir()} == {"x.npy", "y.npy"}


def test_a_signal_leaves_nothing_behind(bare: Bare, tmp_path: Path) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def hold(response: pb.ModelInferResponse) -> None:
        asked.set()
        go_on.wait(WAIT_S)

    bare.change = hold
    np.save(tmp_path / "x.npy", A)
    command = [sys.executable, "-m", "serving.client", "infer", "--model", "pair"]
    command += ["--input", str(tmp_path / "x.npy"), "--output", str(tmp_path / "y.npy")]
    with answering(bare) as port:
        command += ["--address", f"127.0.0.1:{port}"]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as popen:
            assert asked.wait(WAIT_S)
            assert len(list(tmp_path.iterdir())) == 2  # the second is not y.npy
            popen.terminate()
            _, error = popen.communicate(timeout=WAIT_S)
        go_on.set()
    assert popen.returncode == 128 + signal.SIGTERM
    assert without_waiting(error) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


def test_an_output_that_cannot_be_written_is_told_before_anything_is_sent(
    shell: Shell, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", A)
    (tmp_path / "folder.npy").mkdir()
    none, folder = tmp_path / "none" / "y.npy", tmp_path / "folder.npy"
    no_folder = f"there is no folder {none.parent}; check the path, or make the folder"
    for output, told in (
        (none, no_folder),
        (folder, "expected a file, found a folder; name a file in it"),
        (tmp_path / f"{'y' * 300}.npy", "File name too long; check the path"),
    ):
        shell.infer("--input", tmp_path / "x.npy", "--output", output, code=1)
        assert shell.error == f"error: {output}: {told}\n"
    assert not shell.servicer.requests


def test_an_input_that_cannot_be_read_is_told_with_what_to_do(shell: Shell, tmp_path: Path) -> None:
    none = tmp_path / "none" / "x.npy"
    for file, told in (
        (tmp_path / "x.npy", "no such file; check the path"),
        (none, f"there is no folder {none.parent}; check the path, or make the folder"),
        (tmp_path, "expected a file, found a folder; name a file in it"),
        (Path(), "expected a file, found a folder; name a file in it"),
    ):
        shell.infer("--input", file, code=1)
        assert shell.error == f"error: {file}: {told}\n"
    assert not shell.servicer.requests


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (errno.ENOSPC, "No space left on device; make room, or write it elsewhere"),
        (errno.EACCES, "Permission denied; choose another, or ask who owns it for the right to it"),
    ],
)
def test_an_output_that_fails_half_way_is_told_with_what_to_do(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, told: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("serving.client.files.write_outputs", fail)
    np.save(tmp_path / "x.npy", A)
    output = tmp_path / "y.npy"
    shell.infer("--input", tmp_path / "x.npy", "--output", output, code=1)
    assert shell.error == f"error: {output}: {told}\n"
