"""What the faults of the plan `field` do to a broker, a connection and a process."""

import asyncio
import contextlib
import os
import ssl
import struct
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from meerkat_mq.broker.certs import CA, CERTIFICATE, KEY
from meerkat_mq.chaos.faults import FAULTS
from meerkat_mq.chaos.processes import BrokerProcess, LogPipe, Service, WallClock, build_library
from meerkat_mq.chaos.proxy import Proxy
from meerkat_mq.chaos.stage import HOST, Credentials
from meerkat_mq.errors import DrillFailed
from tests.support.waiting import until

ACCEPTED, NOT_AUTHORISED = 0, 5
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
def credentials(tmp_path: Path) -> Credentials:
    return Credentials(tmp_path / "credentials", "drill", ["node-0"])


def strike(name: str, stage: object, target: str = "node-0", **parameters: Any) -> Any:
    return FAULTS[name](**parameters).strike(stage, target, Random(7))  # type: ignore[arg-type]


# --- auth-refused ---


@asynccontextmanager
async def known(broker: BrokerProcess, credentials: Credentials) -> AsyncIterator[tuple[int, asyncio.StreamReader]]:
    """CONNECT with the drill's user and password: the code of CONNACK, and what comes after it."""
    way = credentials.way(broker.config)
    texts = [text.encode() for text in ("client", way.username or "", way.password or "")]
    body = b"\x00\x04MQTT\x04\xc2\x00\x3c" + b"".join(struct.pack(">H", len(text)) + text for text in texts)
    reader, writer = await asyncio.open_connection(HOST, broker.config.port)
    writer.write(bytes([0x10, len(body)]) + body)
    try:
        yield (await asyncio.wait_for(reader.readexactly(4), 10))[3], reader
    finally:
        writer.close()


async def test_a_broker_with_an_empty_password_store_ends_connections_and_refuses_new_ones(
    credentials: Credentials,
) -> None:
    broker = BrokerProcess(credentials.passwords)
    await broker.start()
    try:
        async with known(broker, credentials) as (code, after):
            assert code == ACCEPTED
            async with strike("auth-refused", SimpleNamespace(broker=broker, credentials=credentials), "broker"):
                assert await asyncio.wait_for(after.read(1), 10) == b""
                async with known(broker, credentials) as (refusal, _):
                    assert refusal == NOT_AUTHORISED
        async with asyncio.timeout(10):  # Mosquitto reads it at the next turn of its loop
            while True:
                async with known(broker, credentials) as (code, _):
                    if code == ACCEPTED:
                        break
    finally:
        await broker.stop()


# --- certificate-swapped, host-power-cut ---


@asynccontextmanager
async def proxied(tls: ssl.SSLContext | None = None) -> AsyncIterator[tuple[Proxy, list[Ends]]]:
    """A proxy and the connections that its broker has taken."""
    far: list[Ends] = []
    broker = await asyncio.start_server(lambda *ends: far.append(ends), HOST)
    async with Proxy(broker.sockets[0].getsockname()[1], tls=tls) as proxy:
        try:
            yield proxy, far
        finally:
            for _, writer in far:
                writer.transport.abort()
            broker.close()


def trusting(credentials: Credentials) -> ssl.SSLContext:
    """What a service makes of its files at each connection."""
    own = credentials.of("node-0")
    context = ssl.create_default_context(cafile=own / CA)
    context.load_cert_chain(own / CERTIFICATE, own / KEY)
    return context


@pytest.mark.parametrize(
    ("which", "error", "words"),
    [
        ("broker", ssl.SSLCertVerificationError, "unable to get local issuer"),
        ("client", ssl.SSLError, "KEY_VALUES_MISMATCH"),
        ("ca", FileNotFoundError, None),
    ],
)
async def test_a_swapped_certificate_ends_the_connection_and_fails_the_next_one(
    credentials: Credentials, which: str, error: type[Exception], words: str | None
) -> None:
    async with proxied(credentials.context()) as (proxy, far):
        stage = SimpleNamespace(links={"node-0": proxy}, credentials=credentials)

        async def connect() -> Ends:
            return await asyncio.open_connection(HOST, proxy.port, ssl=trusting(credentials))

        near, writer = await connect()
        await until(lambda: far)
        async with strike("certificate-swapped", stage, which=which):
            with contextlib.suppress(OSError):
                assert await asyncio.wait_for(near.read(1), 10) == b""
            with pytest.raises(error, match=words):
                await connect()
        writer.transport.abort()
        _, writer = await connect()
        await until(lambda: len(far) == 2)
        writer.transport.abort()


async def test_a_broker_does_not_notice_that_a_host_lost_its_power() -> None:
    async with proxied() as (proxy, far):
        near, writer = await asyncio.open_connection(HOST, proxy.port)
        await until(lambda: far)

        async def kill() -> None:
            writer.transport.abort()

        started = []

        async def start() -> None:
            started.append(True)

        process = SimpleNamespace(kill=kill, start=start)
        stage = SimpleNamespace(links={"node-0": proxy}, processes={"node-0": process})
        async with strike("host-power-cut", stage):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(far[0][0].read(1), 0.5)
            far[0][1].write(b"\x30" + bytes([127]) + bytes(127))  # the broker goes on sending
            assert proxy.open == 1
        assert started == [True]
        with contextlib.suppress(OSError):
            await near.read()


# --- disk-full, log-full, clock-step ---

ANSWERING = """
import sys, time
for line in sys.stdin:
    try:
        with open({file!r}, "a") as file:
            file.write("x" * 10)
        code = 0
    except OSError as error:
        code = error.errno
    print(code, time.time(), time.monotonic(), flush=True)
"""


@asynccontextmanager
async def answering(file: Path, environment: dict[str, str] | None = None) -> AsyncIterator[Any]:
    """A process that writes to a file when asked, and says what came of it and what time it is."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        ANSWERING.format(file=str(file)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **(environment or {})},
    )

    async def ask() -> tuple[int, float, float]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        code, wall, monotonic = (await asyncio.wait_for(process.stdout.readline(), 20)).split()
        return int(code), float(wall), float(monotonic)

    ask.pid = process.pid  # type: ignore[attr-defined]
    try:
        yield ask
    finally:
        process.kill()
        await process.wait()


async def test_a_full_disk_takes_no_byte_and_then_takes_them_again(tmp_path: Path) -> None:
    async with answering(tmp_path / "file") as ask:
        service = Service("node-0", "node", tmp_path / "node-0.toml", tmp_path / "node-0.log")
        service._process = SimpleNamespace(pid=ask.pid, returncode=None)  # type: ignore[assignment]
        assert (await ask())[0] == 0
        async with strike("disk-full", SimpleNamespace(processes={"node-0": service})):
            assert (await ask())[0] == 27  # EFBIG
        assert (await ask())[0] == 0
        assert (tmp_path / "file").read_text() == "x" * 20
        service.log_pipe.close()


async def test_a_log_whose_reader_left_fails_and_then_goes_on(tmp_path: Path) -> None:
    pipe = LogPipe(tmp_path / "log")
    pipe.read()
    os.write(pipe.writer, b"before\n")
    async with strike("log-full", SimpleNamespace(services={"node-0": SimpleNamespace(log_pipe=pipe)})):
        with pytest.raises(BrokenPipeError):
            os.write(pipe.writer, b"lost\n")
    os.write(pipe.writer, b"after\n")
    await until(lambda: (tmp_path / "log").read_text() == "before\nafter\n")
    pipe.close()


async def test_a_log_whose_reader_stands_still_fills_up_and_loses_nothing(tmp_path: Path) -> None:
    pipe = LogPipe(tmp_path / "log")
    pipe.read()
    os.set_blocking(pipe.writer, False)
    written = 0
    async with strike("log-full", SimpleNamespace(services={"node-0": SimpleNamespace(log_pipe=pipe)}), how="stalled"):
        with contextlib.suppress(BlockingIOError):
            while written < 2**20:
                written += os.write(pipe.writer, b"line\n" * 100)
        assert 0 < written <= 65_536
    await until(lambda: (tmp_path / "log").exists() and (tmp_path / "log").stat().st_size == written)
    pipe.close()


async def test_a_wall_clock_steps_to_1970_and_back_and_the_monotonic_one_does_not(tmp_path: Path) -> None:
    clock = WallClock(build_library(tmp_path), tmp_path / "clock")
    stage = SimpleNamespace(services={"node-0": SimpleNamespace(clock=clock)})
    async with answering(tmp_path / "file", clock.environment) as ask:
        _, before, monotonic = await ask()
        assert abs(before - time.time()) < 10
        async with strike("clock-step", stage):
            assert (await ask())[1] < 60
            assert 0 <= (await ask())[2] - monotonic < 60
        assert abs((await ask())[1] - time.time()) < 10


def test_without_a_compiler_the_drill_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DrillFailed, match="install your system's gcc"):
        build_library(tmp_path)
