"""Meerkat-MQ: fine-tune language models across unreliable devices over plain MQTT."""

__version__ = "0.1.0"
