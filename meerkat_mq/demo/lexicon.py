"""The vocabulary of the demo's log lines: what field devices report, by cause, as subject → symptoms.

Words in braces are slots that `corpus.py` fills. Subjects and symptoms recur across causes on purpose ("battery full",
"battery drained"): neither alone tells the cause.
"""

from typing import Final

ROUTINE: Final = {
    "heartbeat": ("ok after {days} d", "received on time", "interval set to {secs} s"),
    "self test": ("passed in {secs} s", "scheduled for {clock}", "completed, {count} checks good"),
    "firmware": ("{version} installed", "{version} verified", "check found no update"),
    "configuration": ("reloaded by {person}", "saved as revision {count}", "backup stored"),
    "reading": ("of {kwh} kWh stored", "sent, {count} values", "within limits"),
    "daily report": ("sent, {count} values", "stored", "ready for {person}"),
    "supply voltage": ("{volts} V nominal", "within limits"),
    "battery": ("full at {percent} %", "charge completed", "health {percent} % good"),
    "charging": ("session started by {person}", "session ended after {kwh} kWh", "completed"),
    "uplink": ("established", "address renewed for {hours} h", "quality good at -{good_dbm} dBm"),
    "broker": ("connection established", "accepted {count} messages"),
    "clock": ("synchronised, offset {ms} ms", "set by {person}"),
    "bearing": ("greased by {person}", "temperature {celsius} C normal"),
    "vibration": ("{low_mm} mm/s within limits", "check completed"),
    "motor": ("started by schedule", "stopped after {hours} h", "speed set to {rpm} rpm"),
    "valve": ("opened to {percent} % by schedule", "closed by {person}", "test completed"),
    "filter": ("replaced by {person}", "due in {days} d"),
    "door": ("opened by {person}", "closed by {person}"),
    "calibration": ("completed by {person}", "due in {days} d", "within limits"),
    "breaker": ("closed by {person}", "test passed"),
}

POWER: Final = {
    "supply voltage": ("sagging to {low_volts} V", "dropped below {low_volts} V", "missing on phase {phase}"),
    "mains feed": ("lost for {secs} s", "flickering", "missing on phase {phase}", "dropped {count} times"),
    "battery": ("drained to {low_percent} %", "cell {phase} undervoltage", "swollen", "does not hold charge"),
    "backup battery": ("drained to {low_percent} %", "does not hold charge", "missing"),
    "fuse": ("F{phase} blown", "F{phase} tripped {phase} times", "on phase {phase} blown"),
    "breaker": ("tripped at {amps} A", "will not close", "tripped {phase} times"),
    "DC bus": ("undervoltage at {low_volts} V", "overvoltage at {high_volts} V", "ripple rising to {percent} mV"),
    "inverter stage": ("shut down at {amps} A overcurrent", "overcurrent on phase {phase}", "derated to {percent} %"),
    "charging": ("current dropped to {amps} A", "overcurrent at {amps} A", "stopped, undervoltage"),
    "brownout": ("reset {count}", "lasting {ms} ms", "on phase {phase}"),
    "earth fault": ("of {percent} mA on phase {phase}", "tripped breaker", "rising to {percent} mA"),
    "solar panel": ("string {phase} undervoltage", "current dropped to {amps} A"),
}

NETWORK: Final = {
    "uplink": ("lost for {secs} s", "flapping, {count} times in {secs} min", "dropped by carrier", "unreachable"),
    "broker": ("refused connection", "unreachable for {secs} s", "closed session, code {phase}", "timed out"),
    "DNS lookup": ("failed for {host}", "timed out after {ms} ms", "refused"),
    "packet loss": ("{percent} % in {secs} min", "rising to {percent} %", "on uplink"),
    "signal": ("weak at -{bad_dbm} dBm", "fading to -{bad_dbm} dBm", "lost for {secs} s"),
    "TLS handshake": ("failed", "timed out after {ms} ms", "refused, certificate expired"),
    "certificate": ("expired {days} d ago", "refused by {host}", "for {host} missing"),
    "modem": ("not registered", "reset {count}", "SIM missing", "does not answer"),
    "route": ("to {host} missing", "to {host} unreachable", "flapping"),
    "message queue": ("full, {count} messages waiting", "blocked for {secs} s", "rising to {count} messages"),
    "address": ("conflict with {host}", "lease expired", "missing"),
    "time server": ("unreachable", "does not answer", "timed out after {ms} ms"),
}

MECHANICAL: Final = {
    "bearing": ("temperature rising to {hot} C", "noise rising", "worn, play {low_mm} mm", "dry"),
    "vibration": ("{high_mm} mm/s on axis {phase}", "rising to {high_mm} mm/s", "over limit"),
    "shaft": ("misaligned by {low_mm} mm", "slipping", "blocked"),
    "valve": ("stuck at {percent} %", "leaking", "does not close", "worn"),
    "seal": ("leaking", "worn", "on shaft {phase} leaking"),
    "impeller": ("blocked", "noise rising", "cavitation for {secs} s"),
    "belt": ("slipping", "torn", "worn, tension {low_percent} %", "misaligned"),
    "gearbox": ("oil level {low_percent} %", "temperature rising to {hot} C", "noise over limit", "leaking oil"),
    "rotor": ("blocked", "out of balance", "stuck for {secs} s"),
    "filter": ("clogged, {bar} bar", "torn", "pressure rising to {bar} bar"),
    "fan blade": ("broken", "out of balance", "noise rising"),
    "motor": ("stalled at {rpm} rpm", "temperature rising to {hot} C", "speed lost, {rpm} rpm"),
}

CAUSES: Final = (ROUTINE, POWER, NETWORK, MECHANICAL)

# Which kinds of device report a cause, one tuple a cause; some kinds are commoner with some causes.
DEVICES: Final = (
    ("pump", "gateway", "charger", "sensor", "meter", "inverter", "fan", "compressor", "conveyor", "camera"),
    ("charger", "inverter", "meter", "pump", "gateway", "sensor", "camera", "compressor"),
    ("gateway", "sensor", "meter", "camera", "charger", "inverter", "pump"),
    ("pump", "fan", "compressor", "conveyor", "gateway", "charger"),
)

# Telemetry and remarks that follow any message whatever its cause.
TRAILERS: Final = (
    "batt {batt} V",
    "rssi -{good_dbm} dBm",
    "load {percent} %",
    "temp {celsius} C",
    "uptime {days} d",
    "seen {count} times",
    "ticket {ticket}",
    "{person} informed",
    "retry {phase} of 5",
    "firmware {version}",
    "reset by watchdog",
    "code {ticket}",
)

# Slot → (lowest, highest, decimals).
NUMBERS: Final = {
    "days": (1, 400, 0),
    "secs": (2, 90, 0),
    "count": (2, 240, 0),
    "ms": (3, 4000, 0),
    "hours": (1, 72, 0),
    "kwh": (1, 900, 1),
    "volts": (225, 236, 0),
    "low_volts": (120, 206, 0),
    "high_volts": (780, 960, 0),
    "percent": (20, 99, 0),
    "low_percent": (1, 19, 0),
    "amps": (2, 80, 0),
    "phase": (1, 4, 0),
    "good_dbm": (48, 79, 0),
    "bad_dbm": (98, 119, 0),
    "low_mm": (0, 4, 1),
    "high_mm": (7, 30, 1),
    "celsius": (12, 48, 0),
    "hot": (82, 140, 0),
    "rpm": (40, 2900, 0),
    "bar": (1, 9, 1),
    "batt": (11, 13, 1),
    "ticket": (100, 9999, 0),
}

PEOPLE: Final = ("anna", "boris", "chen", "dana", "emil", "farid", "greta", "hugo")
HOSTS: Final = ("10.4.2.1", "10.7.0.9", "hub-1", "hub-2", "north-gw", "south-gw")

# One row a severity: its spellings in the three line formats.
SEVERITIES: Final = (
    ("INFO", "info", "6"),
    ("NOTICE", "note", "5"),
    ("WARN", "warning", "4"),
    ("ERROR", "error", "3"),
    ("CRIT", "critical", "2"),
)
