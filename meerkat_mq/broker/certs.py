"""A federation's folder of certificates: its CA, what that signed or revoked, and Mosquitto's ACL."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from meerkat_mq.broker.authority import CA, CERTIFICATE, CRL, KEY, Authority, Issued, alternative, write
from meerkat_mq.errors import ConfigError
from meerkat_mq.wire.topics import OBSERVER_NAME, SERVER_NAME, Topics, check_identifier

__all__ = [
    "CA",
    "CERTIFICATE",
    "CRL",
    "KEY",
    "OBSERVER_NAME",
    "SERVER_NAME",
    "Authority",
    "Issued",
    "mosquitto_acl",
    "revoke_certificates",
    "write_certificates",
]

ACL, NODES = "acl", "nodes"

_HOMES = {SERVER_NAME: "server", OBSERVER_NAME: "observer"}


def write_certificates(
    folder: Path,
    *,
    federation: str | None = None,
    hosts: Sequence[str] = (),
    nodes: Sequence[str] = (),
    days: int = 397,
    ca_days: int = 3650,
    renew: bool = False,
) -> Iterator[Issued]:
    """Write what is asked for below a folder, with a new CA where it has none; gives each certificate as it is written.

    `ca/` holds the CA, `broker/` the broker's certificate, Mosquitto's ACL and the list of revoked certificates,
    `server/` the server's certificate, `observer/` one for people who look, `nodes/<id>/` a node's, with its id as
    common name.

    Args:
        folder: may exist.
        federation: makes the certificates of server and observer, and the ACL.
        hosts: makes the broker's certificate, for these names and addresses.
        nodes: ids to make a certificate for.
        days: validity of certificates.
        ca_days: validity of a new CA.
        renew: replace certificates that are there; never the CA, never the ACL.

    Raises:
        ConfigError: a name is not legal, a certificate is there already, or a file cannot be read or written; nothing
            was written then, unless the disk failed.
    """
    wanted: list[tuple[Path, str, Sequence[str]]] = []
    acl_file = folder / "broker" / ACL
    if federation is not None:
        acl = mosquitto_acl(federation)
        if acl_file.exists() and not acl_file.read_text(encoding="utf-8", errors="replace").startswith(acl):
            problem = f"is not the ACL that this version writes for the federation {federation!r}"
            raise ConfigError(str(acl_file), problem, "name the federation of this folder, or move it away")
        wanted += [(folder / home, name, ()) for name, home in _HOMES.items()]
    if hosts:
        for host in hosts:
            alternative(host)
        wanted.append((folder / "broker", "broker", hosts))
    wanted += [(folder / NODES / check_identifier(node, "--node"), node, ()) for node in dict.fromkeys(nodes)]
    for place, _, _ in wanted:
        if (place / CERTIFICATE).exists() and not renew:
            raise ConfigError(str(place), "holds a certificate already", "add --renew to replace it")
    if any((folder / "ca" / name).exists() for name in (CERTIFICATE, KEY)):
        authority = Authority.load(folder / "ca")
    else:
        authority = Authority.create(folder / "ca", days=ca_days)
        yield Issued(folder / "ca", authority.certificate.not_valid_after_utc)
    if federation is not None and not acl_file.exists():
        write(acl_file, acl.encode())
    if federation is not None or hosts or (folder / "broker").is_dir():
        _hand_over_the_list(folder)
    for place, name, alternatives in wanted:
        yield authority.issue(place, name, days=days, hosts=alternatives)


def revoke_certificates(folder: Path, names: Sequence[str]) -> dict[str, int]:
    """Revoke all certificates that these names were given; the broker's copy of the list follows.

    Args:
        folder: as `write_certificates` left it.
        names: ids of nodes, or the user name of the server or the observer.

    Returns:
        For each name, how many of its certificates were not revoked before.

    Raises:
        ConfigError: a name was given no certificate, or a file cannot be read or written; then nothing
            was revoked, unless the disk failed.
    """
    if not (folder / "ca").is_dir():
        raise ConfigError(str(folder), "holds no CA", "give the folder that meerkat certs made, and then the ids")
    authority = Authority.load(folder / "ca")
    places = {name: folder / _HOMES.get(name, f"{NODES}/{name}") for name in names}
    issued = {name: authority.issued_to(name, place=place) for name, place in places.items()}
    for name, serials in issued.items():
        if not serials:
            raise ConfigError("ID", f"{name!r} was given no certificate by {folder / 'ca'}", "check FOLDER and ID")
    before = authority.revoked().keys()
    authority.revoke(serial for serials in issued.values() for serial in sorted(serials))
    _hand_over_the_list(folder)
    return {name: len(serials - before) for name, serials in issued.items()}


def _hand_over_the_list(folder: Path) -> None:
    """Give the broker the CA's list of revoked certificates."""
    write(folder / "broker" / CRL, (folder / "ca" / CRL).read_bytes())


def mosquitto_acl(federation: str) -> str:
    """Mosquitto's ACL for a federation; its users are the node ids, and the server.

    Raises:
        ConfigError: the federation's name is not legal.
    """
    topics = Topics(federation)
    common = (topics.server, topics.run, topics.round, topics.values, f"{topics.root}/blob/#")
    own = f"{topics.root}/up/%u"
    lines = [
        f"# Federation {federation}: a node writes three topics, and reads its status, its answers and what is common.",
        f"pattern readwrite {own}/status",
        f"pattern write {own}/update",
        f"pattern write {own}/want",
        f"pattern read {topics.root}/down/%u/#",
        *(f"pattern read {topic}" for topic in common),
        "",
        f"user {SERVER_NAME}",
        f"topic readwrite {topics.root}/#",
        "",
        f"user {OBSERVER_NAME}",
        f"topic read {topics.root}/#",
    ]
    return "\n".join(lines) + "\n"
