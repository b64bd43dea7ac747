"""What befalls a simulated federation: for each name, how it strikes and how it heals."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from meerkat_mq.core.path import digest
from meerkat_mq.simulate import attacks
from meerkat_mq.simulate.federation import TOPICS, Federation
from meerkat_mq.simulate.history import CORRUPT_THETA, Injected
from meerkat_mq.simulate.node import SimulatedNode
from meerkat_mq.simulate.reached import struck
from meerkat_mq.simulate.schedule import ALL, SERVER, ScheduledFault
from meerkat_mq.wire.descriptor import NodeStatus, ServerState, decode_control
from meerkat_mq.wire.frames import encode
from meerkat_mq.wire.messages import Chunk, Header, Round, Update, Values
from meerkat_mq.worlds.broker import KEEP_ALIVE_S, Client, LinkConditions, VirtualMessage
from meerkat_mq.worlds.server import ServerProcess

CRASH_WITHIN = 40  # effects
LOST_S = 0.5  # of commits that a disk did not keep, at most
EARLIER_RUN = bytes(range(100, 116))
Act = Callable[[Federation, ScheduledFault], None]


def inflict(federation: Federation, fault: ScheduledFault) -> None:
    """Put a fault on the agenda: its strike, and its healing."""
    (strike, heal), clock = FAULTS[fault.name], federation.clock

    def begin() -> None:
        injected = Injected(fault.name, fault.target, clock.now(), clock.now() + fault.lasts)
        federation.history.faults.append(injected)
        federation.reached[struck(fault.name)] += 1
        federation.reached[struck(fault.name, for_good=True)] += fault.lasts == math.inf
        if fault.is_a_loss:
            federation.lost.add(fault.target)
        strike(federation, fault)

    if fault.name in ("restore", "lost fsync"):
        known = fault.at * fault.detail if fault.name == "restore" else max(0.0, fault.at - LOST_S * fault.detail)
        clock.at(known, partial(federation.take_backup, fault))
    if fault.name == "split brain":
        clock.at(fault.at + fault.lasts / 2, federation.start_server)
    clock.at(fault.at, begin)
    clock.at(fault.at + fault.lasts, partial(heal, federation, fault))


def leave_behind(federation: Federation) -> None:
    """What an earlier run retained."""
    run, broker = EARLIER_RUN.hex(), federation.broker
    state = ServerState(status="finished", run=run, term=7, server_id="e" * 16, link=1, host="gone", round=9)
    ghost = NodeStatus(status="online", boot=9, link=9, host="gone", run=run, rows=3).encode()
    descriptor = federation.world.run.descriptor.model_copy(update={"run": run, "mask": "e" * 32})
    for topic, payload in (
        (TOPICS.server, state.encode()),
        (TOPICS.run, descriptor.encode()),
        (TOPICS.round, encode(_foreign_round(federation))),
        (TOPICS.up("n0", "status"), ghost),
        (TOPICS.up("ghost", "status"), ghost),
    ):
        broker.retained[topic] = VirtualMessage(topic, payload, retain=True)


def _process(federation: Federation, fault: ScheduledFault) -> SimulatedNode | ServerProcess:
    return federation.server if fault.target == SERVER else federation.nodes[fault.target]


def _clients(federation: Federation, fault: ScheduledFault) -> list[Client]:
    if fault.target == ALL:
        nodes = (node for name, node in federation.nodes.items() if name not in federation.lost)
        return [federation.server.client, *(node.client for node in nodes)]
    return [_process(federation, fault).client]


# --- processes ------------------------------------------------------------------------------------------------------


def _crash(federation: Federation, fault: ScheduledFault) -> None:
    _process(federation, fault).crash_in = int(fault.detail * CRASH_WITHIN)


def _start_again(federation: Federation, fault: ScheduledFault) -> None:
    process = _process(federation, fault)
    federation.revive(process)
    process.crash_in = None


def _leave(federation: Federation, fault: ScheduledFault) -> None:
    node = federation.nodes[fault.target]
    if node.alive:
        node.leave()


def _freeze(federation: Federation, fault: ScheduledFault) -> None:
    process = _process(federation, fault)
    if not process.alive or process.frozen:
        return
    process.freeze()
    client = process.client

    def miss() -> None:
        if process.frozen:
            client.cut = True
            federation.broker.break_link(client)

    federation.clock.at(federation.clock.now() + KEEP_ALIVE_S, miss)


def _thaw(federation: Federation, fault: ScheduledFault) -> None:
    federation.thaw(*(federation.servers if fault.target == SERVER else [federation.nodes[fault.target]]))


def _corrupt(federation: Federation, fault: ScheduledFault) -> None:
    node, faults, number = federation.nodes[fault.target], federation.history.faults, -1
    struck = replace(faults.pop(), name=CORRUPT_THETA, ended=math.inf)
    if not node.alive or node.healed is not None:
        return
    number = len(faults)
    faults.append(struck)
    node.corrupt()

    def healed() -> None:
        faults[number] = replace(struck, ended=federation.clock.now())

    node.healed = healed


# --- disks ----------------------------------------------------------------------------------------------------------


def _fill(federation: Federation, fault: ScheduledFault, *, heals: bool = False) -> None:
    disk = federation.ledger if fault.target == SERVER else federation.nodes[fault.target].disk
    disk.is_full = not heals


def _damage_snapshots(federation: Federation, fault: ScheduledFault) -> None:
    """Torn, or with a flipped bit."""
    files = federation.ledger.files
    for version, blob in list(files.items()):
        files[version] = _damaged(blob, federation.chance)


def _damage_ledger(federation: Federation, fault: ScheduledFault) -> None:
    """A bit flips in an entry, and a server starts on it.

    It ends in words, or, where a snapshot has taken the entry in, gives it to nobody.
    """
    versions = list(federation.ledger.entries)
    if versions:
        federation.stop_servers()
        federation.flip(versions[min(int(fault.detail * len(versions)), len(versions) - 1)])  # `detail` may be 1
        federation.clock.at(federation.clock.now() + 0.01, lambda: federation.revive(federation.server))


def _repair_ledger(federation: Federation, fault: ScheduledFault) -> None:
    federation.unflip()
    federation.revive(federation.server)


def _damaged(data: bytes, chance: random.Random) -> bytes:
    """A part of the bytes, or all of them with a flipped bit."""
    place = chance.randrange(len(data)) if data else 0
    if chance.random() < 0.5 or not data:
        return data[:place]
    return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]


# --- links ----------------------------------------------------------------------------------------------------------


def _part(federation: Federation, fault: ScheduledFault, *, heals: bool = False) -> None:
    for client in _clients(federation, fault):
        (federation.broker.rejoin if heals else federation.broker.part)(client)


def _worsen(federation: Federation, fault: ScheduledFault) -> None:
    conditions = {
        "lose": LinkConditions(lose=0.6 * fault.detail),
        "duplicate": LinkConditions(duplicate=fault.detail),
        "delay": LinkConditions(delay=3.0 * fault.detail),
        "reorder": LinkConditions(delay=fault.detail, reorder=0.5),
        "partition up": LinkConditions(lose=1.0, only="up"),
        "partition down": LinkConditions(lose=1.0, only="down"),
    }[fault.name]
    for client in _clients(federation, fault):
        client.conditions = conditions


def _clear(federation: Federation, fault: ScheduledFault) -> None:
    """Links are good again; where messages were lost, TCP has given the connection up."""
    for client in _clients(federation, fault):
        lost = client.conditions is not None and client.conditions.lose > 0
        client.conditions = None
        if lost:
            federation.broker.break_link(client)


def _broker_up(federation: Federation, fault: ScheduledFault) -> None:
    federation.broker.up = True


# --- messages -------------------------------------------------------------------------------------------------------


def _replay(federation: Federation, fault: ScheduledFault) -> None:
    passed, chance = federation.broker.passed, federation.chance
    for _ in range(1 + int(20 * fault.detail) if passed else 0):
        message = chance.choice(passed)
        if not _is_of_an_earlier_process(federation, message):
            federation.broker.spread(message)


def _corrupt_messages(federation: Federation, fault: ScheduledFault) -> None:
    """Messages from before come again, damaged; control messages only torn: nothing protects JSON from a forger."""
    passed, chance = federation.broker.passed, federation.chance
    for _ in range(1 + int(20 * fault.detail) if passed else 0):
        message = chance.choice(passed)
        is_frame = message.payload[:1] != b"{"
        payload = _damaged(message.payload, chance) if is_frame else message.payload[: len(message.payload) // 2]
        federation.broker.spread(replace(message, payload=payload))


def _forge(federation: Federation, message: VirtualMessage, chunk: Chunk) -> None:
    """Before a chunk comes another in its place, whose checksum is right: only the blob's hash tells."""
    place = federation.chance.randrange(len(chunk.data))
    data = chunk.data[:place] + bytes([chunk.data[place] ^ 1]) + chunk.data[place + 1 :]
    federation.broker.spread(replace(message, payload=encode(replace(chunk, data=data))))


def _forge_chunks(federation: Federation, fault: ScheduledFault, *, heals: bool = False) -> None:
    federation.saw_chunk = (lambda message, chunk: None) if heals else partial(_forge, federation)


def _is_of_an_earlier_process(federation: Federation, message: VirtualMessage) -> bool:
    """Whether it is a node's status before its present start: a broker gives no session what was live before it."""
    node, kind = TOPICS.parse_up(message.topic) or ("", "")
    process = federation.nodes.get(node)
    if kind != "status" or process is None:
        return False
    return decode_control(message.payload, NodeStatus).boot != process.boot


def _earlier_run(federation: Federation, fault: ScheduledFault) -> None:
    broker, round_ = federation.broker, _foreign_round(federation)
    broker.spread(VirtualMessage(TOPICS.round, encode(round_)))
    for name, node in federation.nodes.items():
        update = Update(round_.header, node.boot, bytes(8), 1.0, (1.0,))
        broker.spread(VirtualMessage(TOPICS.up(name, "update"), encode(update)))


def _foreign_round(federation: Federation) -> Round:
    settings = federation.history.settings
    header = Header.of(EARLIER_RUN, 9, len(federation.ledger.entries), settings.mask_hash)
    return Round(header, True, settings.local_steps, settings.directions, settings.eps, 1000, asked=frozenset(range(8)))


def _hostile(federation: Federation, fault: ScheduledFault) -> None:
    """A node sends what no node of ours would."""
    node, chance = federation.nodes[fault.target], federation.chance
    if not federation.history.rounds:
        return
    for _ in range(1 + int(5 * fault.detail)):
        update = _nasty(federation, node, chance.choice)
        federation.history.updates.append((federation.clock.now(), node.name, update))
        federation.broker.spread(VirtualMessage(TOPICS.up(node.name, "update"), encode(update)))


def _poison(federation: Federation, fault: ScheduledFault, *, heals: bool = False) -> None:
    """A node answers with 10 to a million times what it would."""
    federation.nodes[fault.target].factor = 1.0 if heals else 10.0 ** (1.0 + 5.0 * fault.detail)


def _nasty(federation: Federation, node: SimulatedNode, choose: Callable[..., float]) -> Update:
    settings, header = federation.history.settings, federation.history.rounds[-1][1].header
    whole = settings.perturbations * settings.steps_of(header.version)
    version = max(header.version + int(choose((0, 0, 0, 0, -1, -2, 1, 7))), 0)
    entries = [closed.entry for closed in list(federation.ledger.entries.values())[:version]]
    theta_0 = digest(federation.history.mask.theta_0)
    right = next((entry.digest for entry in reversed(entries) if any(entry.digest)), theta_0)
    odd = choose((math.nan, math.inf, -math.inf, 1e30, 3e38, 1.0, 5.0, 1e-30))
    count = int(choose((whole, whole, whole, 2, 1)))
    update = Update(
        replace(header, term=header.term + int(choose((0, 0, 0, 0, 0, -1, 1, 5))), version=version),
        node.boot,
        right[:8] if choose((0, 0, 1)) == 0 else bytes(8),
        choose((1.0, 1.0, math.nan)),
        (odd,) * count,
        (1,) * count if choose((0, 0, 0, 1)) else None,
    )
    nowhere = Values(bytes(16), 100, 1)
    return replace(update, scalars=(), seeds=None, values=nowhere) if choose((0, 0, 0, 0, 1)) else update


# How each kind strikes, and how it heals.
FAULTS: dict[str, tuple[Act, Act]] = {
    "crash": (_crash, _start_again),
    "leave": (_leave, _start_again),
    "freeze": (_freeze, _thaw),
    "split brain": (_freeze, _thaw),
    "restore": (Federation.restore, _start_again),
    "corrupt theta": (_corrupt, lambda federation, fault: None),
    "partition": (_part, partial(_part, heals=True)),
    "partition up": (_worsen, _clear),
    "partition down": (_worsen, _clear),
    "lose": (_worsen, _clear),
    "duplicate": (_worsen, _clear),
    "delay": (_worsen, _clear),
    "reorder": (_worsen, _clear),
    "broker crash": (lambda federation, _: federation.broker.crash(), _broker_up),
    "replay": (_replay, _replay),
    "stale run": (_earlier_run, _earlier_run),
    "hostile": (_hostile, _hostile),
    "poison": (_poison, partial(_poison, heals=True)),
    "corrupt messages": (_corrupt_messages, _corrupt_messages),
    "forged chunks": (_forge_chunks, partial(_forge_chunks, heals=True)),
    "disk full": (_fill, partial(_fill, heals=True)),
    "lost fsync": (Federation.restore, _start_again),
    "flood": (attacks.flood, attacks.flood),
    "forged terms": (attacks.forge_terms, lambda federation, fault: None),
    "invented ids": (attacks.invent_ids, partial(attacks.invent_ids, heals=True)),
    "damaged snapshots": (_damage_snapshots, _damage_snapshots),
    "damaged ledger": (_damage_ledger, _repair_ledger),
}
