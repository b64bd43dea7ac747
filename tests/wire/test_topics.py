import pytest

from meerkat_mq.errors import ConfigError
from meerkat_mq.wire.topics import Topics, check_identifier

TOPICS = Topics("plant-7")


def test_topics_are_those_of_the_specification() -> None:
    assert TOPICS.server == "meerkat/v1/plant-7/server"
    assert TOPICS.run == "meerkat/v1/plant-7/run"
    assert TOPICS.round == "meerkat/v1/plant-7/round"
    assert TOPICS.blob(b"\x01\xab", 3) == "meerkat/v1/plant-7/blob/01ab/3"
    assert TOPICS.blob(b"\x01\xab", "+") == "meerkat/v1/plant-7/blob/01ab/+"
    assert TOPICS.up("pump_3", "update") == "meerkat/v1/plant-7/up/pump_3/update"
    assert TOPICS.up("+", "status") == "meerkat/v1/plant-7/up/+/status"
    assert TOPICS.reply("pump_3") == "meerkat/v1/plant-7/down/pump_3/reply"


def test_a_topic_of_a_node_is_read_back() -> None:
    assert TOPICS.parse_up(TOPICS.up("pump_3", "want")) == ("pump_3", "want")


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "meerkat/v1/plant-7/up/pump",
        "meerkat/v1/plant-7/up/pump/status/x",
        "meerkat/v1/plant-7/up/pu mp/status",
        "meerkat/v1/plant-7/up//status",
        "meerkat/v1/plant-7/down/pump/reply",
        "meerkat/v1/plant-8/up/pump/status",
        "pump/status",
    ],
)
def test_other_topics_are_none(topic: str) -> None:
    assert TOPICS.parse_up(topic) is None


@pytest.mark.parametrize("value", ["", "a b", "a/b", "a+", "#", "ü", "x" * 65, "pump\n", "a.b", "a\0"])
def test_illegal_ids_are_named(value: str) -> None:
    with pytest.raises(ConfigError, match="not a legal id"):
        check_identifier(value, "node.id")
    with pytest.raises(ConfigError):
        Topics(value)


def test_legal_ids_are_returned() -> None:
    for value in ("a", "x" * 64, "Pump_3-b"):
        assert check_identifier(value, "node.id") == value
