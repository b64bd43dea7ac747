"""The embedded broker: Mosquitto as a child process, amqtt where there is none."""
