import io

import pytest
from rich.console import Console

from meerkat_mq.mqtt.message import MessageCount
from meerkat_mq.observe.events import RoundClosed, RunFinished, RunStarted
from meerkat_mq.observe.live import Live
from tests.observe.made_up import DIGEST, a_descriptor, a_judgement, a_round, evaluated


def a_run(live: Live, rounds: int, *, every: int) -> None:
    live.note("scoring the mask")
    live(RunStarted(a_descriptor()))
    live(evaluated(0, 0.581))
    for version in range(1, rounds + 1):
        live(a_round(version - 1, loss=1.25, seconds=version / 2))
        if version % every == 0:
            live(evaluated(version, 0.6 + version / (10 * rounds)))
    live(RunFinished(rounds, rounds / 2, DIGEST, {"node-0": MessageCount()}, {}))


def plain(rounds: int, *, every: int) -> list[str]:
    console = Console(file=io.StringIO(), width=40)
    with Live(console, rounds=rounds, nodes=4) as live:
        a_run(live, rounds, every=every)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_without_a_terminal_every_line_says_its_figures() -> None:
    assert plain(2, every=2) == [
        "scoring the mask",
        "waiting for 4 nodes …",
        "0 of 2 rounds: accuracy 58.1 % (majority 31.0 %) on 1,000 held-out rows",
        "1 of 2 rounds (50%): loss 1.2500, 4 of 4 nodes online, 208 B up, 0.5 s",
        "2 of 2 rounds (100%): loss 1.2500, 4 of 4 nodes online, 416 B up, 1.0 s",
        "2 of 2 rounds: accuracy 70.0 % (from 58.1 %) on 1,000 held-out rows",
        f"2 rounds in 1.0 s, theta's digest {DIGEST}",
    ]


def judged() -> list[RoundClosed]:
    found = tuple(a_judgement(f"node-{index}", early_stopped=index == 2) for index in range(4))
    return [a_round(0, judgements=found), a_round(1)]


def test_early_stopped_nodes_are_named_when_they_are_found_and_from_then_on() -> None:
    console = Console(file=io.StringIO(), width=40)
    with Live(console, rounds=2, nodes=4) as live:
        for event in judged():
            live(event)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "round 0: 4 nodes calibrated, early-stopped: node-2",
        "1 of 2 rounds (50%): loss 1.0000, 4 of 4 nodes online, 208 B up, 0.4 s, early-stopped: node-2",
        "2 of 2 rounds (100%): loss 1.0000, 4 of 4 nodes online, 416 B up, 0.7 s, early-stopped: node-2",
    ]


def test_on_a_terminal_the_last_picture_names_them() -> None:
    console = on_a_terminal()
    with Live(console, rounds=2, nodes=4) as live:
        for event in judged():
            live(event)
    assert isinstance(console.file, io.StringIO)
    assert " · 0.7 s · early-stopped: node-2" in console.file.getvalue()


@pytest.mark.parametrize("rounds", [20, 110, 1000])
def test_without_a_terminal_a_line_comes_every_5_percent(rounds: int) -> None:
    lines = [line for line in plain(rounds, every=10_000) if "loss" in line]
    assert [line.split("(")[1].split(")")[0] for line in lines] == [f"{share}%" for share in range(5, 105, 5)]


def test_without_a_terminal_there_is_no_control_character() -> None:
    assert all(line.isprintable() for line in plain(40, every=10))


def test_a_hostile_stage_cannot_steer_the_terminal() -> None:
    console = Console(file=io.StringIO())
    with Live(console, rounds=1, nodes=1) as live:
        live.note("loading [bold]x[/nope]\x1b[2J :smile:")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "loading [bold]x[/nope]�[2J :smile:\n"


def on_a_terminal(*, dumb: bool = False) -> Console:
    environment = {"TERM": "dumb" if dumb else "xterm-256color"}
    return Console(file=io.StringIO(), force_terminal=True, width=100, _environ=environment)


def test_on_a_terminal_the_last_picture_has_all_figures() -> None:
    console = on_a_terminal()
    with Live(console, rounds=40, nodes=4) as live:
        a_run(live, 40, every=10)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "40/40" in shown
    assert "accuracy 70.0 % (from 58.1 %) · loss 1.2500 · 4 of 4 nodes online · 8.32 kB up · 20 s" in shown


def test_on_a_terminal_stages_come_before_and_after_the_rounds() -> None:
    console = on_a_terminal()
    with Live(console, rounds=1, nodes=1) as live:
        for event in (RunStarted(a_descriptor()), a_round(0)):
            live(event)
        live.note("comparing")
        assert isinstance(console.file, io.StringIO)
        assert "comparing" in console.file.getvalue()
    assert "waiting for 1 node …" in console.file.getvalue()
    assert "comparing" not in console.file.getvalue().splitlines()[-1]


def test_an_error_leaves_the_terminal_in_order() -> None:
    console = on_a_terminal()
    with pytest.raises(RuntimeError), Live(console, rounds=1, nodes=1):
        raise RuntimeError
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().endswith("\x1b[?25h")


def test_a_dumb_terminal_gets_lines() -> None:
    console = on_a_terminal(dumb=True)
    with Live(console, rounds=1, nodes=1) as live:
        live(a_round(0))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "1 of 1 rounds (100%): loss 1.0000, 4 of 1 nodes online, 208 B up, 0.4 s\n"
