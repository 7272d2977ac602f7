"""The limit of any gRPC server: echo.cc, built here where Debian's libgrpc++-dev is installed.

Takes the flags of echo.py, and answers the same bytes.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("echo.cc")


def main() -> None:
    """Build the program, and become it."""
    parser = argparse.ArgumentParser(description="Answer ModelInfer without doing anything.")
    parser.add_argument("--model", type=Path, help="taken like the others' and not read")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for the program")
    parser.add_argument("--rows", type=int, default=1, help="of a response")
    parser.add_argument("--outputs", type=int, default=10, help="columns of a response")
    arguments = parser.parse_args()
    library = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "grpc++"], capture_output=True, text=True, check=False
    )
    if library.returncode:
        sys.exit("grpc++ is not installed; install libgrpc++-dev and pkg-config")
    program, answer = arguments.folder / "echo", arguments.folder / "answer"
    subprocess.run(
        ["g++", "-O2", "-std=c++17", str(SOURCE), "-o", str(program), *library.stdout.split()],
        check=True,
    )
    sys.path[0] = str(SOURCE.parents[2])
    from benchmarks.rivals.echo import response

    answer.write_bytes(response(arguments.rows, arguments.outputs))
    os.execv(program, [str(program), f"127.0.0.1:{arguments.port}", str(answer)])


if __name__ == "__main__":
    main()
