"""aiomqtt and paho do not promise the private attributes that `mqtt/connection.py` uses: they are looked at here."""

import ast
import inspect
import tomllib
from pathlib import Path

import aiomqtt
import pytest
from paho.mqtt.client import Client as PahoClient

from meerkat_mq.mqtt import connection
from meerkat_mq.mqtt.connection import _Client

OVERRIDDEN = ("_on_socket_open", "_on_socket_register_write", "_client_connect")


def private_attributes() -> tuple[set[str], set[str]]:
    """What `_Client` uses of its own object, and of paho's client in it."""
    own, paho = set[str](), set[str]()
    classes = [node for node in ast.parse(inspect.getsource(connection)).body if isinstance(node, ast.ClassDef)]
    (client,) = (node for node in classes if node.name == "_Client")
    for node in ast.walk(client):
        if isinstance(node, ast.Attribute):
            of = ast.unparse(node.value)
            own |= {node.attr} if of in ("self", "super()") and node.attr.startswith("_") else set()
            paho |= {node.attr} if of in ("self._client", "client") else set()
    return own, paho


async def test_what_is_used_is_there() -> None:
    client = aiomqtt.Client("127.0.0.1")
    own, paho = private_attributes()
    assert {"_client", "_connected", "_disconnected", "_loop", "_misc_loop"} <= own
    assert {"_sock_close", "loop_read", "loop_write", "on_disconnect"} <= paho
    assert [name for name in sorted(own) if not hasattr(client, name) and name not in vars(_Client)] == []
    assert [name for name in sorted(paho) if not hasattr(client._client, name)] == []
    assert isinstance(client._client, PahoClient)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_is_overridden_is_called_as_before(name: str) -> None:
    theirs, ours = (inspect.signature(getattr(of, name)).parameters for of in (aiomqtt.Client, _Client))
    assert list(theirs) == list(ours)


def test_only_minor_versions_are_allowed_that_were_tried() -> None:
    table = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    needs = {text.partition(">")[0]: text for text in table["project"]["dependencies"]}
    assert (needs["aiomqtt"], needs["paho-mqtt"]) == ("aiomqtt>=2.5.1,<2.6", "paho-mqtt>=2.1,<2.3")
