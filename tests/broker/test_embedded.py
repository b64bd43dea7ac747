"""The embedded broker: there when it says so, gone when we are."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from structlog.testing import capture_logs

from meerkat_mq.broker import embedded
from meerkat_mq.broker.embedded import Program, embedded_broker
from meerkat_mq.config import BrokerConfig
from meerkat_mq.errors import BrokerError, MissingExtra
from tests.support.mosquitto import HOST, free_port
from tests.support.peer import peer
from tests.support.proxy import Proxy
from tests.support.waiting import until


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


async def serving(process: subprocess.Popen[bytes], port: int) -> psutil.Process:
    """The broker's process, once it serves."""
    await until(lambda: accepts(port))
    (broker,) = psutil.Process(process.pid).children()
    return broker


@pytest.mark.parametrize("program", ["mosquitto", "amqtt"])
async def test_round_trip(program: Program) -> None:
    async with embedded_broker(program=program) as broker:
        assert broker.program == program
        async with peer(broker.config, "a", [("x", 1)]) as a:
            await a.session.publish("x", b"1")
            await a.session.publish("x", b"2", retain=True)
            await until(lambda: a.payloads == [b"1", b"2"])
    assert not psutil.pid_exists(broker.pid)
    assert not accepts(broker.config.port)


async def test_other_settings_of_the_configuration_stay() -> None:
    async with embedded_broker(BrokerConfig(url="embedded", keep_alive_s=7)) as broker:
        assert broker.config.keep_alive_s == 7
        assert broker.config.url == f"mqtt://{HOST}:{broker.config.port}"


async def test_mosquitto_is_preferred_and_amqtt_is_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    async with embedded_broker() as broker:
        assert broker.program == "mosquitto"
    monkeypatch.setattr(embedded, "_mosquitto", lambda: None)
    with capture_logs() as logs:
        async with embedded_broker() as broker:
            assert broker.program == "amqtt"
    assert any("no keep-alive enforcement" in entry["event"] for entry in logs if entry["log_level"] == "warning")


async def test_with_neither_program_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_mosquitto", lambda: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"neither mosquitto nor amqtt.*meerkat-mq\[embedded\]"):
        async with embedded_broker():
            pytest.fail("there is no broker")


async def test_it_ends_with_a_body_that_fails() -> None:
    with pytest.raises(ZeroDivisionError):
        async with embedded_broker() as broker:
            raise ZeroDivisionError
    assert not psutil.pid_exists(broker.pid)


async def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BrokerError, match=rf"^{HOST}:{port}: mosquitto ended .*in use.*choose another"):
            async with embedded_broker(port=port):
                pytest.fail("that port is somebody else's")


async def test_a_port_that_somebody_takes_meanwhile_is_chosen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        ports = [taken.getsockname()[1], free_port()]
        expected = ports[1]
        monkeypatch.setattr(embedded, "_free_port", lambda: ports.pop(0))
        async with embedded_broker() as broker:
            assert broker.config.port == expected


async def test_its_death_is_reported() -> None:
    with capture_logs() as logs:
        async with embedded_broker() as broker:
            watch = asyncio.create_task(broker.watch())
            os.kill(broker.pid, signal.SIGKILL)
            with pytest.raises(BrokerError, match=rf"{broker.config.port}: mosquitto ended with code -9"):
                await asyncio.wait_for(watch, 5)
    assert [entry["code"] for entry in logs if entry["log_level"] == "error"] == [-9]


async def test_ctrl_c_in_a_terminal_does_not_reach_it() -> None:
    """We must be able to say farewell first."""
    async with embedded_broker() as broker:
        assert os.getpgid(broker.pid) != os.getpgid(0)


async def test_its_end_at_our_wish_is_no_error() -> None:
    with capture_logs() as logs:
        async with embedded_broker():
            pass
    assert not [entry for entry in logs if entry["log_level"] == "error"]


async def test_a_broker_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_PATIENCE_S", 0.02)
    async with embedded_broker() as broker:
        os.kill(broker.pid, signal.SIGSTOP)
    assert not psutil.pid_exists(broker.pid)


async def test_it_keeps_everything_for_a_stalled_reader() -> None:
    async with (
        embedded_broker() as broker,
        Proxy(broker.config.port) as proxy,
        peer(proxy.config, "a", [("x", 1)]) as a,
        peer(broker.config, "b") as b,
    ):
        proxy.freeze()
        for i in range(1500):
            b.session.publish("x", b"%d" % i)
        await b.session.drain(20)
        proxy.thaw()
        await until(lambda: len(a.messages) == 1500)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_command_runs_until_told_to_stop(number: signal.Signals) -> None:
    port = free_port()
    with command(port) as process:
        broker = await serving(process, port)
        async with peer(BrokerConfig(url=f"mqtt://{HOST}:{port}"), "a") as a:
            assert a.up
        process.send_signal(number)
        assert await asyncio.to_thread(process.wait, 5) == 0
        assert not broker.is_running()


async def test_the_command_says_when_the_port_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        with command(taken.getsockname()[1]) as process:
            assert await asyncio.to_thread(process.wait, 10) == BrokerError.exit_code
            assert process.stderr is not None
            assert "in use" in process.stderr.read().decode()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
async def test_the_broker_dies_with_its_parent_even_when_that_is_killed() -> None:
    port = free_port()
    with command(port) as process:
        broker = await serving(process, port)
        process.kill()
        await until(lambda: not broker.is_running() or broker.status() == psutil.STATUS_ZOMBIE, within_s=5)


async def test_the_shipped_configuration_is_ready_to_run() -> None:
    shipped = (Path(__file__).parents[2] / "broker" / "mosquitto.conf").read_text()
    port = free_port()
    assert "listener 1883 127.0.0.1\n" in shipped
    for rule in ("set_tcp_nodelay true", "max_queued_messages 0", "user mosquitto"):
        assert f"\n{rule}\n" in shipped
    assert {"set_tcp_nodelay true", "max_queued_messages 0"} <= set(embedded._mosquitto_config(port, None).splitlines())
    program = embedded._mosquitto()
    assert program is not None
    with _Killed([program, "-c", "/dev/stdin"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        process.stdin.write(shipped.replace("listener 1883", f"listener {port}").encode())
        process.stdin.close()
        async with peer(BrokerConfig(url=f"mqtt://{HOST}:{port}"), "a", [("x", 1)]) as a:
            await a.session.publish("x", b"1")
            await until(lambda: a.payloads == [b"1"])


def command(port: int) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-W", "error", "-m", "meerkat_mq.broker", "--port", str(port)]
    return _Killed(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


class _Killed(subprocess.Popen[bytes]):
    """Gone at the end of its `with`, whatever happened inside."""

    def __exit__(self, *exc: object) -> None:
        self.kill()
        super().__exit__(*exc)  # type: ignore[arg-type]
