"""The embedded broker: Mosquitto as a child process, amqtt where there is none."""

from meerkat_mq.lazily import lazily

TYPE_CHECKING = False
if TYPE_CHECKING:
    from meerkat_mq.broker.embedded import EmbeddedBroker, Program, embedded_broker, installed_program

__all__ = ["EmbeddedBroker", "Program", "embedded_broker", "installed_program"]

__getattr__ = lazily(__name__, dict.fromkeys(__all__, "embedded"))
