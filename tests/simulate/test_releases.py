"""The simulator's nodes of earlier releases, held against what those releases sent and kept (tests/compat/fixtures)."""

import base64
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from meerkat_mq.core import metrics as m
from meerkat_mq.node.state import decode_update, encode_update
from meerkat_mq.simulate.federation import Federation
from meerkat_mq.simulate.reached import EARLIER, UP_TO_DATE
from meerkat_mq.simulate.release import LATER_KEYS
from meerkat_mq.simulate.run import TAKES_PART, judge, play
from meerkat_mq.simulate.schedule import MAX_STEP, Schedule, ScheduledFault, make_schedule
from meerkat_mq.wire.descriptor import RunDescriptor, decode_control
from meerkat_mq.wire.frames import decode
from meerkat_mq.worlds.quiet import quiet

FIXTURES = Path(__file__).parents[1] / "compat" / "fixtures"
RELEASES = sorted(LATER_KEYS)
OPTIONAL = {"task"}  # which the toy engine of the fixtures has none of


def files(release: str) -> Iterator[tuple[str, bytes]]:
    """The files of a release's fixtures."""
    for fixture in sorted(FIXTURES.glob(f"{release}-*.tar.xz")):
        with tarfile.open(fixture) as tar:
            for member in tar:
                if (file := tar.extractfile(member)) is not None:
                    yield member.name, file.read()


@cache
def carried(release: str) -> list[tuple[str, bytes]]:
    """(topic without its prefix, payload) of what a release's federations sent."""
    lines = [line for name, data in files(release) if name.endswith("carried.jsonl") for line in data.splitlines()]
    return [(topic.split("/", 3)[3], base64.b64decode(payload)) for topic, payload in map(json.loads, lines)]


def shape(topic: str, payload: bytes) -> tuple[str, ...]:
    """What a message of a node is made of: its keys, or the type of its frame and the optional parts."""
    if topic.endswith("/status"):
        return ("status", *sorted(json.loads(payload)))
    frame = decode(payload)
    parts = [part for part in ("seeds", "values", "entries_from", "welcome") if getattr(frame, part, None)]
    return (type(frame).__name__, *parts)


def with_earlier(release: str, *, bounded: bool = False, values: int = 0) -> Schedule:
    """Three nodes, of which the first, of an earlier release, leaves some times; two are enough."""
    schedule = make_schedule(0, ("leave",))
    rules = {"min_nodes": 2, "directions": 1, "quorum": 0.5}
    if bounded:
        rules["max_step"] = MAX_STEP
    absences = tuple(ScheduledFault("leave", "n0", 1.0 + 2 * at, 1.5, 0.5) for at in range(8))
    settings = schedule.settings.model_copy(update=rules)
    values_config = settings.values.model_copy(update={"accept": values > 0})
    settings = settings.model_copy(update={"values": values_config})
    return replace(schedule, nodes=3, settings=settings, faults=absences, earlier=release, values=values, keeps=True)


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_knows_all_keys_of_a_descriptor_but_the_later_ones(release: str) -> None:
    descriptors = [payload for topic, payload in carried(release) if topic == "run"]
    today = {field.alias or name for name, field in RunDescriptor.model_fields.items()}
    for payload in descriptors:
        assert json.loads(payload).keys() | OPTIONAL == today - LATER_KEYS[release]
        decode_control(payload, RunDescriptor)


@pytest.mark.parametrize("release", RELEASES)
def test_a_kept_update_is_the_same_file(release: str) -> None:
    runs = [decode_control(payload, RunDescriptor) for topic, payload in carried(release) if topic == "run"]
    kept = [data for name, data in files(release) if name.endswith("/update")]
    assert len(kept) == 3
    for data in kept:
        (run,) = {run for run in runs if run.run_id == data[8:24]}
        update = decode_update(data, run)
        assert update is not None
        assert encode_update(run, update) == data


@pytest.mark.parametrize("values", [0, 1])
@pytest.mark.parametrize("release", RELEASES)
def test_an_earlier_node_sends_nothing_that_its_release_did_not(release: str, values: int) -> None:
    federation = Federation(with_earlier(release, values=values))
    with quiet():
        play(federation)
    sent = {shape(message.topic, message.payload) for message in federation.broker.passed if "/up/n0/" in message.topic}
    known = {shape(topic, payload) for topic, payload in carried(release) if topic.startswith("up/")}
    assert {"Update", "status"} <= {kind for kind, *_ in sent}
    assert sent <= known


@pytest.mark.parametrize("release", RELEASES)
def test_an_earlier_node_takes_part_and_may_be_brought_up_to_date(release: str) -> None:
    history, found = judge(with_earlier(release))
    assert found == []
    assert (history.reached[EARLIER], history.reached[UP_TO_DATE]) == (1, 1)


def test_a_release_takes_no_part_in_a_run_with_a_key_that_it_does_not_know() -> None:
    schedule = replace(with_earlier("04a8509", bounded=True), faults=())
    history, found = judge(schedule)
    assert [violation.checker for violation in found] == [TAKES_PART]
    assert history.finished
    assert history.reached[m.UNDECODABLE.of("UnknownKey")] > 0
    assert judge(replace(schedule, earlier="2f02a63"))[1] == []


def test_schedules_have_nodes_of_every_release_in_runs_that_they_can_read() -> None:
    schedules = [make_schedule(seed) for seed in range(500)]
    assert {schedule.earlier for schedule in schedules} == {"", *RELEASES}
    bounded = {(schedule.earlier, schedule.settings.max_step == MAX_STEP) for schedule in schedules}
    assert bounded == {("", False), ("", True), ("2f02a63", False), ("2f02a63", True), ("04a8509", False)}
