"""Files that somebody has made to harm whoever opens them, one of each kind."""

import os
import subprocess
import sys

from tests.conftest import ROOT


def test_one_file_of_each_kind_is_refused_in_a_line_in_time_and_in_memory() -> None:
    command = [sys.executable, "-m", "tests.hostile", "--files", "0", "--seed", "0", "--fast"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 not refused as they must be" in done.stdout
