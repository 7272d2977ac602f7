"""Clients made before event loops, used in several of them, and on both sides of a fork.

What forks is a process of its own, without threads of the tests': each test is a script.
"""

import subprocess
import sys
import textwrap

import pytest

from tests.bare import Bare, answering
from tests.conftest import ROOT
from tests.servers import WAIT_S

_MAY_FORK = ("-W", "ignore:This process:DeprecationWarning")  # of Python 3.12: it has threads
_PROLOGUE = """
import asyncio, gc, os, signal, sys, threading
import numpy as np
from serving.client import AsyncKanClient, ClientError, KanClient
from tests.bare import A, N

ADDRESS = sys.argv[1]
INPUTS, EXPECTED = {"a": A, "n": N}, A + N[:, None]


def right(found):
    np.testing.assert_array_equal(found, EXPECTED)
    return "right"


def ask(client):
    return right(client.infer("pair", INPUTS, output="total"))


async def ask_aio(client):
    return right(await client.infer("pair", INPUTS, output="total"))


def forked(do):
    '''Print what a child makes of it; the child ends as Python does, with all its destructors.'''
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # it would wait for ever
        try:
            print(do())
        except ClientError as error:
            print(f"{type(error).__name__}: {error}")
        gc.collect()
        sys.exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        print("child ended with", status)
"""


def run(script: str) -> list[str]:
    """Run a script against a server of another process; return the lines that it prints."""
    with answering(Bare()) as port:
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-W", "error", *_MAY_FORK, "-c",
             _PROLOGUE + textwrap.dedent(script), f"127.0.0.1:{port}"],
            cwd=ROOT, capture_output=True, text=True, timeout=2 * WAIT_S,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


def test_an_async_client_may_be_made_before_its_loop_and_used_in_several() -> None:
    assert run("""
        client = AsyncKanClient(ADDRESS)
        for _ in range(3):
            print(asyncio.run(ask_aio(client)))

        async def ask_and_close():
            async with client:
                return await ask_aio(client)

        print(asyncio.run(ask_and_close()))
        try:
            asyncio.run(ask_aio(client))
        except ClientError as error:
            print(type(error).__name__)
    """) == ["right"] * 4 + ["Closed"]


def test_an_async_client_may_be_used_in_two_loops_at_a_time() -> None:
    assert run("""
        client, both, found = AsyncKanClient(ADDRESS), threading.Barrier(2), []

        async def ask_twice():
            await ask_aio(client)
            await asyncio.to_thread(both.wait)
            found.append(await ask_aio(client))
            await asyncio.to_thread(both.wait)

        threads = [threading.Thread(target=asyncio.run, args=[ask_twice()]) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        asyncio.run(client.close())
        print(*found)
    """) == ["right right"]


def test_an_async_client_without_a_loop_says_so() -> None:
    (told,) = run("""
        client = AsyncKanClient(ADDRESS)
        try:
            client.infer("pair", INPUTS).send(None)
        except ClientError as error:
            print(error)
    """)
    assert "expected a running event loop of asyncio, found none; await the call within" in told


def test_clients_that_were_not_used_before_a_fork_work_after_it() -> None:
    assert run("""
        sync, aio = KanClient(ADDRESS), AsyncKanClient(ADDRESS)
        forked(lambda: ask(sync))
        forked(lambda: asyncio.run(ask_aio(aio)))
        print(ask(sync), asyncio.run(ask_aio(aio)))
    """) == ["right", "right", "right right"]


def test_a_client_that_was_used_before_a_fork_says_what_to_do_and_a_new_one_works() -> None:
    told, new, new_aio, parents = run("""
        client = KanClient(ADDRESS)
        ask(client)
        forked(lambda: ask(client))
        forked(lambda: ask(KanClient(ADDRESS)))
        forked(lambda: asyncio.run(ask_aio(AsyncKanClient(ADDRESS))))
        print(ask(client))
    """)
    assert told.startswith("Forked: 127.0.0.1:")
    assert "make a client in this process" in told
    assert (new, new_aio, parents) == ("right", "right", "right")


def test_an_async_client_that_was_open_at_a_fork_says_what_to_do_and_that_works() -> None:
    told, another, sync, parents, closed = run("""
        client = AsyncKanClient(ADDRESS)
        asyncio.run(ask_aio(client))
        forked(lambda: asyncio.run(ask_aio(client)))
        forked(lambda: asyncio.run(ask_aio(AsyncKanClient(ADDRESS))))
        forked(lambda: ask(KanClient(ADDRESS)))
        print(asyncio.run(ask_aio(client)))
        asyncio.run(client.close())
        forked(lambda: asyncio.run(ask_aio(AsyncKanClient(ADDRESS))))
    """)
    assert told == another
    assert told.startswith("Forked: 127.0.0.1:")
    assert "close it before the fork, use KanClient here, or start the process with" in told
    assert (sync, parents, closed) == ("right", "right", "right")


@pytest.mark.parametrize("aio", [False, True])
def test_a_child_that_closes_or_drops_a_client_does_not_end_its_parents_connection(
    aio: bool,
) -> None:
    kind, call, close = (
        ("AsyncKanClient", "asyncio.run(ask_aio(client))", "asyncio.run(client.close())")
        if aio
        else ("KanClient", "ask(client)", "client.close()")
    )
    found = run(f"""
        client = {kind}(ADDRESS)
        {call}

        def close():
            global client
            {close}
            client = None
            gc.collect()
            return "closed"

        for _ in range(3):
            forked(close)
            print({call})
    """)
    assert found == ["closed", "right"] * 3
