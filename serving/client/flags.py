"""The flags that say how to reach servers, and what they come to; each command has them.

Read before anything is imported that takes time: only what is asked for is imported.
"""

import argparse
import math
from contextlib import suppress
from difflib import get_close_matches
from itertools import takewhile
from typing import Any

_ALIKE = 0.8  # of two names, by difflib: a typing error, not another word


class Parser(argparse.ArgumentParser):
    """Tells of a flag that there is not, and which one may be meant.

    argparse would tell of it only once all is there that is required, which it may stand for.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Read words as argparse does, beginning with the flags among them.

        Raises:
            SystemExit: They are wrong, or help was asked for.
        """
        known = list(self._option_string_actions)
        for word in takewhile(lambda word: word != "--", args or ()):
            flag = word.partition("=")[0]
            if word.startswith("--") and not any(one.startswith(flag) for one in known):
                nearest = get_close_matches(flag, known, n=1, cutoff=_ALIKE)
                meant = "".join(f"; did you mean {one}?" for one in nearest)
                self.error(f"unrecognized arguments: {flag}{meant}")
        return super().parse_known_args(args, namespace)


def way(timeout_s: float, timeout_of: str) -> Parser:
    """Make the flags, as a parent of a command's parser.

    Args:
        timeout_s: Default of `--timeout-s`.
        timeout_of: What that is for.
    """
    parser = Parser(add_help=False)
    group = parser.add_argument_group("servers")
    group.add_argument(
        "--address", default="127.0.0.1:8001", metavar="A[,B]",
        help="host:port, several of them, or dns:///name:port (127.0.0.1:8001)",
    )  # fmt: skip
    group.add_argument("--tls", action="store_true", help="use TLS; the next four do, too")
    group.add_argument("--ca", metavar="FILE", help="PEM of who vouches for the server")
    group.add_argument("--cert", metavar="FILE", help="PEM of this client's certificate")
    group.add_argument("--key", metavar="FILE", help="PEM of its key")
    group.add_argument("--server-name", metavar="NAME", help="in the server's certificate")
    group.add_argument("--token-file", metavar="FILE", help="a bearer token, read at every call")
    group.add_argument(
        "--timeout-s", type=positive, default=timeout_s, metavar="S",
        help=f"{timeout_of} ({timeout_s:g})",
    )  # fmt: skip
    return parser


def reached_by(arguments: argparse.Namespace) -> dict[str, Any]:
    """Give what the flags say, as `connection_to` and the clients take it."""
    from serving.client.credentials import Tls

    files_of_tls = (arguments.ca, arguments.cert, arguments.key, arguments.server_name)
    tls = Tls(*files_of_tls) if arguments.tls or any(files_of_tls) else None
    return {"addresses": arguments.address, "tls": tls, "token_file": arguments.token_file}


def positive(text: str) -> float:
    """Read a number above 0.

    Raises:
        ArgumentTypeError: It is none.
    """
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
