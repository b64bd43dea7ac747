import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat_mq.errors import BadValue, TooLarge, UnknownKey, WireError
from meerkat_mq.runtime.join import check_descriptor
from meerkat_mq.wire.descriptor import (
    MAX_CONTROL_BYTES,
    ControlMessage,
    NodeStatus,
    RunDescriptor,
    ServerState,
    TaskDescription,
    decode_control,
)

KINDS: tuple[type[ControlMessage], ...] = (TaskDescription, RunDescriptor, ServerState, NodeStatus)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda item: st.lists(item, max_size=3) | st.dictionaries(st.text(max_size=9), item, max_size=4),
    max_leaves=8,
)

TASK: dict[str, Any] = {
    "name": "sst2",
    "fields": ["sentence"],
    "template": "{sentence} It was",
    "label_words": [" terrible", " great"],
    "text": "{sentence}",
    "descriptions": ["bad", "good"],
}
RUN: dict[str, Any] = {
    "federation": "plant-7",
    "run": "0" * 32,
    "engine": "toy",
    "model": "toy",
    "dtype": "float32",
    "fingerprint": "0" * 64,
    "tokenizer": "0" * 64,
    "mask": "ab" * 16,
    "mask_bytes": 100,
    "mask_chunks": 1,
    "weights": 10,
    "stream": "mk1",
    "rounds": 10,
    "local_steps": 1,
    "directions": 2,
    "lr": 1e-3,
    "eps": 1e-3,
    "batch_size": 4,
    "digest_every": 1,
}
STATUS: dict[str, Any] = {"status": "online", "boot": 1, "link": 2, "host": "pump"}


def run(**other: Any) -> RunDescriptor:
    return decode_control(json.dumps({**RUN, **other}).encode(), RunDescriptor)


def status(**other: Any) -> NodeStatus:
    return decode_control(json.dumps({**STATUS, **other}).encode(), NodeStatus)


def test_a_run_without_and_with_a_task_round_trips() -> None:
    for descriptor in (run(), run(engine="transformers", task=TASK)):
        assert decode_control(descriptor.encode(), RunDescriptor) == descriptor
    assert run().mask_hash == b"\xab" * 16
    assert run().run_id == bytes(16)


def test_servers_are_ordered_by_term_then_id() -> None:
    def server(term: int, server_id: str) -> ServerState:
        return ServerState(
            status="online", run="0" * 32, term=term, server_id=server_id, link=0, host="hub", round=0
        )  # fmt: skip

    ranks = [server(1, "f" * 16).rank, server(2, "0" * 16).rank, server(2, "1" * 16).rank]
    assert ranks == sorted(ranks)


@pytest.mark.parametrize(
    "other",
    [
        {"protocol": 2},
        {"federation": "a/b"},
        {"federation": "plant\n"},
        {"run": "0" * 31},
        {"run": "G" * 32},
        {"mask": "AB" * 16},
        {"engine": "cuda;"},
        {"weights": 0},
        {"weights": 2**26 + 1},
        {"rounds": 0},
        {"local_steps": 1001},
        {"directions": 4097},
        {"directions": 1000, "local_steps": 13},
        {"directions": 13, "local_steps": 100, "perturbations": 10},
        {"local_steps": 101, "perturbations": 10},
        {"perturbations": 0},
        {"dtype": "float64"},
        {"lr": 0},
        {"lr": -1.0},
        {"eps": 1e400},
        {"eps": "0.001"},
        {"stream": "mk2"},
        {"unknown": 1},
        {"task": {**TASK, "label_words": ["only one"]}},
        {"task": {**TASK, "descriptions": ["a", "b", "c"]}},
    ],
    ids=str,
)
def test_a_wrong_field_is_named(other: dict[str, Any]) -> None:
    assert run()
    with pytest.raises(BadValue) as caught:
        check_descriptor(run(**other), "plant-7")
    assert caught.value.where.startswith("RunDescriptor")
    assert "\n" not in str(caught.value)
    if len(other) == 1:
        assert next(iter(other)) in caught.value.where


@pytest.mark.parametrize("key", RUN)
def test_no_key_is_guessed(key: str) -> None:
    with pytest.raises(BadValue) as caught:
        decode_control(json.dumps({name: value for name, value in RUN.items() if name != key}).encode(), RunDescriptor)
    assert caught.value.where == f"RunDescriptor.{key}"


def test_a_key_has_one_name_on_the_wire() -> None:
    younger = {"perturbations", "mode", "max_staleness", "values"}
    assert json.loads(run().encode()).keys() == RUN.keys() | younger | {"protocol"}
    with pytest.raises(UnknownKey, match=r"^RunDescriptor\.count: "):
        run(count=10)


@pytest.mark.parametrize(
    ("message", "kind", "words"),
    [
        (RUN, RunDescriptor, "a newer server sent it; update this program"),
        (STATUS, NodeStatus, "a newer node sent it; update this program"),
    ],
)
def test_an_unknown_key_says_which_side_to_update(
    message: dict[str, Any], kind: type[ControlMessage], words: str
) -> None:
    payload = json.dumps({**message, "clip": 1.0} | dict.fromkeys([*message][:1])).encode()
    with pytest.raises(UnknownKey) as caught:
        decode_control(payload, kind)
    assert str(caught.value) == f"{kind.__name__}.clip: is a key that this release does not know: {words}"


@pytest.mark.parametrize(
    "other",
    [
        {"boot": 2**32},
        {"boot": -1},
        {"boot": "1"},
        {"boot": True},
        {"boot": 1.5},
        {"host": "x" * 256},
        {"status": "up"},
    ],
    ids=str,
)
def test_types_are_not_guessed(other: dict[str, Any]) -> None:
    assert status().boot == 1
    with pytest.raises(BadValue):
        status(**other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"\xff",
        b"{",
        b"null",
        b"[" * 60_000,
        b'"\\ud800"',
        b"9" * 60_000,
        b'{"host":"\xff"}',
        b"\0",
        b'{"status":NaN}',
    ],
    ids=range(10),
)
def test_junk_is_refused(kind: type[ControlMessage], junk: bytes) -> None:
    with pytest.raises(BadValue, match=kind.__name__):
        decode_control(junk, kind)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(KINDS), st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_refused_in_one_line(kind: type[ControlMessage], junk: bytes) -> None:
    with pytest.raises(WireError) as caught:
        decode_control(junk, kind)
    assert str(caught.value).isprintable()


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([(STATUS, NodeStatus), ({**RUN, "task": TASK}, RunDescriptor)]))
def test_a_changed_message_round_trips_or_is_refused(
    data: st.DataObject, case: tuple[dict[str, Any], type[ControlMessage]]
) -> None:
    good, kind = case
    key = data.draw(st.sampled_from(sorted(good)) | st.text(max_size=12))
    payload = json.dumps({**good, key: data.draw(JSON)}).encode()
    try:
        found = decode_control(payload, kind)
    except WireError:
        return
    assert decode_control(found.encode(), kind) == found


def test_hostile_keys_do_not_flood_the_log() -> None:
    payload = json.dumps({**STATUS, "a\n" * 10_000: 1}).encode()
    with pytest.raises(BadValue) as caught:
        decode_control(payload, NodeStatus)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_long_messages_are_refused() -> None:
    with pytest.raises(TooLarge):
        decode_control(b" " * (MAX_CONTROL_BYTES + 1), NodeStatus)
