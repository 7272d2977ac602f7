"""`python -m kan_ops`: say whether the operator library was built, and where it is.

Exit codes: 0 it is there, 1 it is not.
"""

import sys

import kan_ops


def main() -> int:
    """Run the command."""
    path = kan_ops.library_path()
    if path is None:
        print(kan_ops.NOT_BUILT, file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
