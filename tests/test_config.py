"""Configuration files: what is wrong is named, in one line, with file, key and remedy."""

from pathlib import Path

import pytest

from meerkat_mq.config import NodeConfig, ServerConfig, load_config
from meerkat_mq.errors import ConfigError

NODE = 'id = "a"\nfederation = "f"\ndata = "rows.jsonl"\nstate_dir = "state"\n'
SERVER = 'federation = "f"\nstate_dir = "state"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "the.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_paths_are_taken_from_the_folder_of_the_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, NODE + '[broker]\nurl = "mqtts://b"\nca_file = "/etc/ca.pem"\n'), NodeConfig)
    assert (config.data, config.state_dir) == (tmp_path / "rows.jsonl", tmp_path / "state")
    assert config.broker.ca_file == Path("/etc/ca.pem")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("hf:rows:train", "hf:{folder}/rows:train"),
        ("hf:rows,default:train[:5]", "hf:{folder}/rows,default:train[:5]"),
        ("hf:imdb:test", "hf:imdb:test"),
        ("hf:nyu-mll/glue,sst2:validation", "hf:nyu-mll/glue,sst2:validation"),
        ("hf:/data/rows:train", "hf:/data/rows:train"),
    ],
)
def test_a_data_set_is_a_folder_beside_the_file_or_a_hub_id(tmp_path: Path, given: str, found: str) -> None:
    (tmp_path / "rows").mkdir()
    text = NODE.replace("rows.jsonl", given)
    assert load_config(write(tmp_path, text), NodeConfig).data == found.format(folder=tmp_path)
    text = SERVER + f'[evaluation]\ndata = "{given}"\n'
    evaluation = load_config(write(tmp_path, text), ServerConfig).evaluation
    assert evaluation is not None
    assert evaluation.data == found.format(folder=tmp_path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ('"hf:imdb"', "data: must be hf:<folder or hub id>[,<config>]:<split>, not 'hf:imdb'"),
        ('"hf::train"', "data: must be hf:<folder or hub id>[,<config>]:<split>"),
        ("5", "data: input is not a valid path, not 5"),
    ],
)
def test_data_that_is_no_source(tmp_path: Path, given: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, NODE.replace('"rows.jsonl"', given)), NodeConfig)
    assert words in str(caught.value)


def test_a_whole_server_file(tmp_path: Path) -> None:
    text = SERVER + '[rounds]\ncount = 7\nquorum = 1\n[model]\nsource = "m"\n[evaluation]\ndata = "v.jsonl"\n'
    config = load_config(write(tmp_path, text), ServerConfig)
    assert (config.rounds.count, config.rounds.quorum, config.rounds.directions) == (7, 1.0, None)
    assert config.evaluation is not None
    assert config.evaluation.data == tmp_path / "v.jsonl"


@pytest.mark.parametrize(
    ("url", "host", "port", "tls"),
    [
        ("mqtt://broker", "broker", 1883, False),
        ("mqtts://broker", "broker", 8883, True),
        ("mqtt://10.0.0.1:7/", "10.0.0.1", 7, False),
        ("mqtt://[::1]:9", "::1", 9, False),
        ("mqtts://[fe80::1%eth0]", "fe80::1%eth0", 8883, True),
        ("MQTTS://Broker", "broker", 8883, True),
    ],
)
def test_broker_addresses(tmp_path: Path, url: str, host: str, port: int, tls: bool) -> None:
    broker = load_config(write(tmp_path, NODE + f'[broker]\nurl = "{url}"\n'), NodeConfig).broker
    assert (broker.host, broker.port, broker.tls) == (host, port, tls)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (NodeConfig, NODE.replace('"a"', '"a b"'), ["id: ", "not 'a b'", "letters, digits, '_' and '-'"]),
        (NodeConfig, NODE.replace('"a"', '"a/b"'), ["id: ", "not 'a/b'"]),
        (NodeConfig, NODE.replace('"a"', '""'), ["id: "]),
        (NodeConfig, NODE.replace('"a"', f'"{"a" * 65}"'), ["id: "]),
        (NodeConfig, NODE.replace('"a"', '"a\\n"'), ["id: "]),
        (NodeConfig, NODE.replace('"f"', '"f#"'), ["federation: ", "not 'f#'"]),
        (NodeConfig, NODE.replace('id = "a"\n', ""), ["id: is missing; add the key"]),
        (NodeConfig, NODE + "colour = 3\n", ["colour: is unknown; remove the key or mend its spelling"]),
        (NodeConfig, NODE.replace("data =", "dta ="), ["dta: is unknown; write 'data', or remove the key"]),
        (ServerConfig, SERVER + "[rounds]\nmin_node = 3\n", ["rounds.min_node: is unknown; write 'min_nodes', or"]),
        (ServerConfig, SERVER + "[round]\nmin_nodes = 3\n", ["round: is unknown; write 'rounds', or remove the key"]),
        (NodeConfig, NODE + "threads = 0\n", ["threads: ", "greater than or equal to 1", "not 0"]),
        (NodeConfig, NODE + f"threads = 0x{'f' * 5000}\n", ["threads: ", "not an integer of 20000 bits"]),
        (NodeConfig, NODE + 'threads = "many"\n', ["threads: ", "valid integer", "not 'many'"]),
        (NodeConfig, NODE + 'device = "gpu"\n', ["device: ", "not 'gpu'"]),
        (NodeConfig, NODE + 'broker = "here"\n', ["broker: ", "not 'here'"]),
        (NodeConfig, NODE + '[broker]\nurl = "http://x"\n', ["broker.url: must be mqtt://host[:port]", "'http://x'"]),
        (NodeConfig, NODE + '[broker]\nurl = "mqtt://x:port"\n', ["broker.url: "]),
        (NodeConfig, NODE + '[broker]\nurl = "mqtt://x:70000"\n', ["broker.url: "]),
        (NodeConfig, NODE + '[broker]\nurl = "embedded"\n', ["broker: ", "is for servers; give the address"]),
        (ServerConfig, SERVER + "[rounds]\nquorum = 0\n", ["rounds.quorum: ", "greater than 0", "not 0"]),
        (ServerConfig, SERVER + "[rounds]\nlr = nan\n", ["rounds.lr: ", "finite", "not nan"]),
        (ServerConfig, SERVER + "[rounds]\nround = 3\n", ["rounds.round: is unknown"]),
        (
            ServerConfig,
            SERVER + "[early_stopping]\nevery = 1\n",
            [
                "early_stopping.every: must be 0, or at least 2: where every round calibrates, nobody does fewer",
                "not 1",
            ],
        ),
        (ServerConfig, SERVER + "[evaluation]\nevery = 3\n", ["evaluation.data: is missing"]),
        (ServerConfig, SERVER + '[values]\naccept = "yes"\n', ["values.accept: input should be a valid boolean"]),
        (ServerConfig, SERVER + "once = 1\n", ["once: input should be a valid boolean, not 1"]),
        (ServerConfig, SERVER.replace('"state"', '"\\u0000"'), ["state_dir: must not hold a NUL character"]),
        (
            ServerConfig,
            SERVER + '[rounds]\nmode = "buffered"\nstaleness = "constant"\nstaleness_exponent = 2\n',
            ['rounds: staleness_exponent does nothing with staleness = "constant"'],
        ),
        (NodeConfig, NODE + "schedule = 3\n", ["schedule: must be a table, not 3"]),
        (NodeConfig, NODE + '[schedule]\nevery_s = "1h"\n', ["schedule.every_s: ", "valid number"]),
        (NodeConfig, NODE + "[schedule]\nevery_s = 0.5\n", ["schedule.every_s: ", "not 0.5"]),
        (
            NodeConfig,
            NODE + "[schedule]\nevery_s = 30\nawake_s = 31\n",
            ["schedule: awake_s = 31 is more than every_s = 30"],
        ),
        (
            NodeConfig,
            NODE + "[policy]\nmin_eps = 2\n",
            ["policy: min_eps = 2 is more than max_eps = 1: no run would be allowed"],
        ),
        (
            NodeConfig,
            NODE + "[policy]\nmin_lr = 0.1\nmax_lr = 0.01\n",
            ["policy: min_lr = 0.1 is more than max_lr = 0.01: no run would be allowed"],
        ),
        (NodeConfig, NODE + '[limits]\nallow = "true"\n', ["limits.allow: must be an array, not 'true'"]),
        (NodeConfig, NODE + "[limits]\nallow = []\n", ["limits.allow: must have at least one item, not []"]),
        (NodeConfig, NODE + '[limits]\nallow = ["true", "a\\u0000b"]\n', ["limits.allow: must not hold a NUL"]),
        (
            ServerConfig,
            SERVER + "[values]\naccept = true\n[broker]\nmax_packet_bytes = 65536\n",
            ["file: broker.max_packet_bytes must be 66560 or more with values.accept = true"],
        ),
        (
            NodeConfig,
            NODE + 'uplink = "values"\n[broker]\nmax_packet_bytes = 66559\n',
            ['file: broker.max_packet_bytes must be 66560 or more with uplink = "values"'],
        ),
        (ServerConfig, "federation = \n", ["is not TOML", "line 1", "docs/configuration.md"]),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(
    tmp_path: Path, kind: type[NodeConfig] | type[ServerConfig], text: str, words: list[str]
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, kind)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("given", "awake_s"), [("30", 30), ("1.5", 1.5), ("60", 60), ("3600\nawake_s = 5", 5), ("3600", 60)]
)
def test_a_short_schedule_is_awake_all_the_time(tmp_path: Path, given: str, awake_s: float) -> None:
    schedule = load_config(write(tmp_path, NODE + f"[schedule]\nevery_s = {given}\n"), NodeConfig).schedule
    assert schedule is not None
    assert schedule.awake_s == awake_s


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read \(No such file or directory\); give the path"):
        load_config(tmp_path / "none.toml", NodeConfig)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path, NodeConfig)
    (tmp_path / "latin.toml").write_bytes(b'id = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml: is not TOML"):
        load_config(tmp_path / "latin.toml", NodeConfig)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('url = "mqtt://user:s3cret@host:1883"', "broker.url: must hold no user and password: put them into broker.us"),
        ('url = "mqtt://user:s3#cr/et@host"', "broker.url: must hold no user and password"),
        ('url = "mqtt://user:s3cret%40host"', "broker.url: must hold no user and password"),
        ('url = "user:s3cret@host"', "broker.url: must hold no user and password"),
        ('url = "mqtt://user:s3cret"', "broker.url: the port must be a number from 1 to 65535"),
        ('url = "mqtt://host:0"', "broker.url: the port must be a number from 1 to 65535, not 'mqtt://host:0'"),
        ('url = "mqtt://host:65536"', "broker.url: the port must be a number from 1 to 65535"),
        ('url = "mqtt://host:"', "broker.url: the port must be a number from 1 to 65535"),
        ('url = "mqtt://host:1_883"', "broker.url: the port must be a number from 1 to 65535"),
        (
            'url = "mqtt://host#x"',
            "broker.url: must be mqtt://host[:port], mqtts://host[:port] or embedded: what comes",
        ),
        ('url = "mqtt://host?password=s3cret"', "broker.url: must be mqtt://host[:port]"),
        ('url = "mqtt://host/topic"', "broker.url: must be mqtt://host[:port]"),
        ('url = "mqtt://"', "broker.url: must be mqtt://host[:port]"),
        ('url = "mqtt://::1:1883"', "an IPv6 address in brackets: mqtt://[::1]:1883"),
        ('url = "mqtt://[host]"', "broker.url: holds brackets, and no IPv6 address in them"),
        ('url = " mqtt://host"', "broker.url: must hold no white space"),
        ('url = "mqtt://ho st"', "broker.url: must hold no white space"),
        ('url = "mqtt://host\\n"', "broker.url: must hold no white space"),
        ('password = "s3cret"', "broker.password: is not sent without a user name: add broker.username"),
        ('username = ""\npassword = "s3cret"', "broker.username: must have at least one character"),
        ('url = "mqtts://h"\nkey_file = "k"', "broker.key_file: does nothing without its certificate: add broker.cert"),
        ('ca_file = "ca.pem"', "broker.ca_file: does nothing without TLS: write mqtts:// in broker.url, or remove it"),
        ('cert_file = "c"\nkey_file = "k"', "broker.cert_file: does nothing without TLS"),
        ('url = "embedded"\nusername = "u"', 'broker.username: does nothing with url = "embedded": remove it'),
        ('url = "embedded"\nca_file = "c"', 'broker.ca_file: does nothing with url = "embedded": remove it'),
        ('give_up = "sometimes"', "broker.give_up: input should be 'first-start', 'never' or 'always'"),
    ],
)
def test_what_a_broker_would_not_be_told_is_refused_by_key_without_a_secret(
    tmp_path: Path, lines: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, SERVER + f"[broker]\n{lines}\n"), ServerConfig)
    assert words in str(caught.value)
    assert not any(part in str(caught.value) for part in ("s3", "cr/et", "cret"))


def test_no_error_shows_a_password(tmp_path: Path) -> None:
    for text in (
        "username = 'u'\npassword = 4711\n",
        'username = "u"\npassword = "4711"\nkeep_alive_s = 0\n',
        'username = "u"\npassword = "4711"\nurl = "embedded"\n',
        "password = 4711\n",
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(write(tmp_path, NODE + "[broker]\n" + text), NodeConfig)
        assert "4711" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"broker: must be a table, not 'mqtt://\*\*\*@host'"):
        load_config(write(tmp_path, NODE + 'broker = "mqtt://user:4711@host"\n'), NodeConfig)
    text = NODE + '[broker]\nusername = "u"\npassword = "4711"\n'
    assert "4711" not in repr(load_config(write(tmp_path, text), NodeConfig))


def test_a_byte_order_mark_is_none_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text(
        '\ufeffid = "a"\nfederation = "f"\ndata = "d"\nstate_dir = "s"\n', encoding="utf-8"
    )
    assert load_config(tmp_path / "node.toml", NodeConfig).id == "a"


def test_a_user_without_a_password_and_one_file_for_certificate_and_key_are_taken(tmp_path: Path) -> None:
    text = NODE + '[broker]\nurl = "mqtts://h"\nusername = "u"\ncert_file = "both.pem"\n'
    broker = load_config(write(tmp_path, text), NodeConfig).broker
    assert (broker.username, broker.password, broker.key_file) == ("u", None, None)


def test_a_path_that_no_file_system_takes_is_refused(tmp_path: Path) -> None:
    text = 'id = "a"\nfederation = "f"\ndata = "%s"\nstate_dir = "s"\n' % ("x" * 3000)
    (tmp_path / "node.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"node\.toml: data: must be a path that can exist: .*, not .*; see docs"):
        load_config(tmp_path / "node.toml", NodeConfig)
