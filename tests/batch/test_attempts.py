"""What counts against a part: processes that died over it, in this session, on a node that is still there."""

from __future__ import annotations

from batch.attempts import IN_ACTOR, LOADING, Attempt, Attempts

NODES = {"a", "b"}


def on(process: int, node: str = "a") -> Attempt:
    return Attempt(f"p{process}", node)


def test_two_processes_that_died_over_a_part_count_against_it_alone() -> None:
    attempts = Attempts(lambda: NODES)
    assert [attempts.begin(7, on(i)) for i in range(4)] == [0, 1, 2, 3]
    assert attempts.begin(8, on(4)) == 0
    assert IN_ACTOR == 2


def test_a_part_that_ended_and_comes_again_has_killed_nobody() -> None:
    """Ray asks again for an answer that was lost with the node that held it."""
    attempts = Attempts(lambda: NODES)
    for i in range(5):
        assert attempts.begin(7, on(i)) == 0
        attempts.end(7, on(i), scored=i % 2 == 0)


def test_the_same_process_that_begins_again_has_not_died() -> None:
    attempts = Attempts(lambda: NODES)
    assert [attempts.begin(7, on(1)) for _ in range(3)] == [0, 0, 0]


def test_lost_nodes_never_count_not_even_if_the_loss_is_noticed_late() -> None:
    alive = {"a", "b"}
    attempts = Attempts(lambda: alive)
    attempts.begin(7, on(1, "a"))
    assert attempts.begin(7, on(2, "b")) == 1  # its process is gone, its node not yet
    alive.remove("a")
    assert attempts.begin(7, on(3, "b")) == 1  # the death of 2 alone
    alive.remove("b")
    alive.add("c")
    assert attempts.begin(7, on(4, "c")) == 0


def test_a_new_session_starts_from_nothing() -> None:
    old, new = Attempts(lambda: NODES), Attempts(lambda: NODES)
    for i in range(3):
        old.begin(7, on(i))
    assert new.begin(7, on(9)) == 0


def test_what_a_zombie_says_does_not_count() -> None:
    attempts = Attempts(lambda: NODES)
    attempts.begin(7, on(1))
    attempts.begin(7, on(2))
    attempts.rows(7, on(2), 10)
    attempts.rows(7, on(1), 99)
    attempts.end(7, on(1), scored=True)
    assert attempts.under_way() == {7: 10}
    assert attempts.begin(7, on(3)) == 2  # 2 had not ended


def test_rows_are_told_until_the_driver_has_the_part() -> None:
    attempts = Attempts(lambda: NODES)
    for part in 1, 2, 3:
        attempts.begin(part, on(part))
        attempts.rows(part, on(part), part * 10)
    attempts.end(1, on(1), scored=True)
    attempts.end(2, on(2), scored=False)
    assert attempts.under_way() == {1: 10, 3: 30}
    assert attempts.under_way([1]) == {3: 30}
    assert attempts.begin(3, on(4)) == 1
    assert attempts.under_way() == {}


def test_deaths_while_loading_count_by_node_until_one_load_succeeds() -> None:
    attempts = Attempts(lambda: NODES)
    assert [attempts.load("x", on(i)) for i in range(LOADING)] == [0, 1, 2]
    assert attempts.load("y", on(8)) == 2  # several actors of a node load at once: nobody died of that
    assert attempts.load("z", on(9, "b")) == 0
    attempts.loaded("y", on(8))
    assert attempts.load("w", on(10)) == 0
