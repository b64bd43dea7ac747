"""Whoever owns a topic with a will: what is found there, and what it means."""

from meerkat_mq.rounds.presence import Ownership, Presence


def connected(owner: str = "b", *, link: int = 1) -> Presence:
    presence = Presence(owner)
    presence.connected(link)
    return presence


def test_our_own_state_is_ours() -> None:
    assert connected().judge("b", 1, online=True, retained=False) is Ownership.OURS


def test_a_late_will_of_an_earlier_link_overwrote_us() -> None:
    presence = connected(link=1)
    presence.disconnected()
    presence.connected(2)
    assert presence.judge("b", 1, online=False, retained=False) is Ownership.OVERWRITTEN
    assert presence.judge("b", 1, online=True, retained=False) is Ownership.OVERWRITTEN
    assert presence.judge("b", 2, online=False, retained=False) is Ownership.OVERWRITTEN
    assert presence.judge("b", 2, online=True, retained=False) is Ownership.OURS


def test_a_cleared_or_unreadable_state_overwrote_us() -> None:
    presence = connected()
    assert presence.judge(None, 0, online=False, retained=False) is Ownership.OVERWRITTEN
    presence.disconnected()
    assert presence.judge(None, 0, online=False, retained=True) is Ownership.OVERWRITTEN


def test_whoever_stands_there_at_our_first_connection_came_before_us() -> None:
    presence = Presence("b")
    assert presence.judge("a", 7, online=True, retained=True) is Ownership.OVERWRITTEN
    presence.connected(1)
    presence.disconnected()
    assert presence.judge("a", 9, online=False, retained=True) is Ownership.OVERWRITTEN
    assert presence.judge("a", 9, online=True, retained=False) is Ownership.OVERWRITTEN


def test_a_stranger_found_on_reconnecting_came_after_us() -> None:
    for online in (True, False):
        presence = connected("a")
        presence.disconnected()
        assert presence.judge("b", 5, online=online, retained=True) is Ownership.REPLACED


def test_a_broken_first_attempt_is_not_a_connection() -> None:
    presence = Presence("b")
    presence.disconnected()
    assert presence.judge("a", 7, online=True, retained=True) is Ownership.OVERWRITTEN


def test_a_stranger_who_is_born_while_we_are_connected_replaced_us_but_its_late_death_did_not() -> None:
    assert connected("a").judge("b", 5, online=True, retained=False) is Ownership.REPLACED
    assert connected("a").judge("b", 5, online=False, retained=False) is Ownership.OVERWRITTEN
