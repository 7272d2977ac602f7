"""When balancers are told that requests can be sent."""

from serving.readiness import Readiness


def test_it_takes_a_model_all_others_and_no_farewell() -> None:
    own: list[bool] = []
    told: list[bool] = []
    readiness = Readiness(others=False, on_own_change=own.append)
    readiness.watch(told.append)
    readiness.serve(True)
    assert (own, told[-1]) == ([True], False)
    readiness.hear(True)
    assert told[-1] is readiness.ready is True
    readiness.serve(False)
    assert (own, told[-1]) == ([True, False], False)
    readiness.serve(True)
    readiness.hear(False)
    assert (own, told[-1]) == ([True, False, True], False)
    readiness.hear(True)
    readiness.drain()
    assert (own, told[-1]) == ([True, False, True, False], False)
    readiness.serve(True)
    assert readiness.ready is False


def test_one_alone_waits_for_no_others() -> None:
    readiness = Readiness()
    readiness.serve(True)
    assert readiness.ready


def test_it_is_not_ready_while_requests_wait_and_nothing_runs() -> None:
    readiness = Readiness()
    readiness.serve(True)
    readiness.stall(True)
    assert not readiness.ready
    readiness.stall(False)
    assert readiness.ready
