"""Sessions over MQTT 3.1.1: reconnect, outbox, markers."""

from meerkat_mq.mqtt.marker import Marker
from meerkat_mq.mqtt.message import Message, MessageCount, Will
from meerkat_mq.mqtt.session import Session
from meerkat_mq.mqtt.timeouts import Timeouts

__all__ = ["Marker", "Message", "MessageCount", "Session", "Timeouts", "Will"]
