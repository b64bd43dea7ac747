"""The embedded broker: Mosquitto as a child process, amqtt where there is none."""

from meerkat_mq.broker.embedded import EmbeddedBroker, Program, embedded_broker, installed_program

__all__ = ["EmbeddedBroker", "Program", "embedded_broker", "installed_program"]
