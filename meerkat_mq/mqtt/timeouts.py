"""All waiting times of a session, in one object."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Timeouts:
    """Waiting times, in seconds.

    `answer_s`: for the broker's answer to SUBSCRIBE and to each QoS 1 message, counted anew from each packet that
    comes before it: on a slow link, an answer waits behind others. Then the connection counts as dead.
    """

    connect_s: float = 5.0  # for TCP and TLS together, and again for the broker's answer to CONNECT
    answer_s: float = 30.0
    longest_answer_s: float = 300.0  # for such an answer, whatever else comes
    flush_s: float = 2.0  # at an orderly end, for what still waits to be sent
    back_off_first_s: float = 1.0  # the pause after a failure is 0.1 to 1 times this; doubled after each more
    back_off_cap_s: float = 4.0  # the longest pause while the broker cannot be reached
    refused_cap_s: float = 60.0  # the longest pause where it refuses us, or ends each connection for the same reason
    stable_s: float = 5.0  # a connection that lived this long starts the back-off afresh
    echo_s: float = 5.0  # once nothing comes for so long, what we published on our own topic will not come back
