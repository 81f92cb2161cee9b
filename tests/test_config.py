"""The configuration: what it accepts, and what it says about what it does not."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr, ValidationError

from edge_asr import config as config_module
from edge_asr import config_mqtt, config_server
from edge_asr.config import (
    BUNDLED_MODEL,
    SOURCE_KINDS,
    Config,
    FileSourceConfig,
    MicrophoneSourceConfig,
    StdinSourceConfig,
)
from edge_asr.config_fields import Section
from edge_asr.config_reader import PATH_KEYS, load_config, show_config
from edge_asr.config_server import HttpConfig
from edge_asr.errors import ConfigError

EXAMPLE = Path(__file__).parents[1] / "config.yaml"
WriteConfig = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> WriteConfig:
    def write_config(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_config


def problems(
    path: Path | None = None, overrides: tuple[str, ...] = (), environ: dict[str, str] | None = None
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, environ or {})
    return str(caught.value).splitlines()


def keys(data: Any, prefix: str = "") -> Iterator[str]:
    for key, value in data.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.")


def test_without_any_input_everything_has_its_default() -> None:
    config = load_config(environ={})
    assert config == Config()
    assert config.model == BUNDLED_MODEL
    assert config.mqtt.live_for_s == 5
    assert config.segment.max_s == 30
    assert config.gates.min_confidence is None


def test_config_yaml_names_every_key_with_its_default() -> None:
    data = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    assert list(keys(data)) == list(keys(Config().model_dump()))
    assert load_config(EXAMPLE, environ={}) == Config(http=HttpConfig())  # the tests have it off


def test_config_yaml_comments_every_key() -> None:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    own_words = {"host", "password_file", "reconnect_max_s", "mqtt", "engine", "segment", "budget", "log"}
    for before, line in itertools.pairwise(lines):
        key = re.match(r" *(\w+):", line)
        if key and key[1] not in own_words:
            assert before.lstrip().startswith("#"), f"{key[1]} has no comment above it"


def test_the_example_sources_in_config_yaml_name_every_key_of_a_source() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    example = re.search(r"^#   sources:\n(#     .*\n)+", text, re.MULTILINE)
    assert example
    data = yaml.safe_load(re.sub(r"^#   ", "", example[0], flags=re.MULTILINE))
    assert {source["kind"]: set(source) for source in data["sources"]} == {
        kind: set(model.model_fields) for kind, model in SOURCE_KINDS.items()
    }
    assert len(Config.model_validate(data).sources) == 3


def path_keys(section: type[Section]) -> Iterator[tuple[str, ...]]:
    for key, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from ((key, *rest) for rest in path_keys(info.annotation))
        elif "Path" in str(info.annotation):
            yield (key,)


def test_every_path_key_is_known_to_be_relative_to_the_file() -> None:
    sections = {name: getattr(Config(), name) for name in Config.model_fields}
    found: set[tuple[str, ...]] = {(name,) for name, value in sections.items() if isinstance(value, Path)}
    for name, value in sections.items():
        if isinstance(value, Section):
            found |= {(name, *key) for key in path_keys(type(value))}
    found |= {("sources", "*", key) for key, info in FileSourceConfig.model_fields.items() if info.annotation is Path}
    assert found == set(PATH_KEYS)


def test_every_section_explains_itself() -> None:
    modules = {**vars(config_module), **vars(config_mqtt), **vars(config_server)}
    models = [value for value in modules.values() if isinstance(value, type) and issubclass(value, Section)]
    assert len(models) > 8
    assert all(model.__doc__ for model in models)


def test_options_rise_above_environment_above_file_above_default(write: WriteConfig) -> None:
    path = write("mqtt: {host: file, port: 1, base: file}\n")
    environ = {"EDGE_ASR_MQTT__PORT": "2", "EDGE_ASR_MQTT__BASE": "environment", "OTHER": "x"}
    config = load_config(path, ["mqtt.base=option"], environ)
    assert (config.mqtt.host, config.mqtt.port, config.mqtt.base) == ("file", 2, "option")
    assert config.mqtt.keepalive_s == 30


def test_environment_sets_top_level_keys_and_entries_of_lists() -> None:
    environ = {"EDGE_ASR_DEVICE_ID": "hall", "EDGE_ASR_SOURCES__0__KIND": "stdin"}
    config = load_config(environ=environ)
    assert config.device_id == "hall"
    assert config.sources == (StdinSourceConfig(),)


def test_sources_can_be_given_whole_and_entry_by_entry() -> None:
    whole = load_config(None, ["sources=[{kind: file, path: /a.wav}, {kind: stdin}]"], {})
    single = load_config(None, ["sources.0.kind=file", "sources.0.path=/a.wav", "sources.1.kind=stdin"], {})
    changed = load_config(None, ["sources=[{kind: file, path: /b.wav}, {kind: stdin}]", "sources.0.path=/a.wav"], {})
    assert whole == single == changed
    assert isinstance(whole.sources[0], FileSourceConfig)
    assert whole.sources[0].realtime


def test_phrases_can_be_given_whole_and_one_by_one() -> None:
    whole = load_config(None, ["segment.phrases=[开灯, turn on the light]"], {})
    single = load_config(None, ["segment.phrases.0=开灯", "segment.phrases.1=turn on the light"], {})
    assert whole.segment.phrases == single.segment.phrases == ("开灯", "turn on the light")
    assert load_config(None, ["segment.phrases.0=110"], {}).segment.phrases == ("110",)


def test_text_from_outside_the_file_is_taken_as_it_stands() -> None:
    overrides = ["mqtt.username=yes", "mqtt.password=0123", "device_id=12", "mqtt.client_id=null"]
    config = load_config(None, overrides, {})
    assert config.mqtt.username == "yes"
    assert config.mqtt.read_password() == "0123"
    assert config.device_id == "12"
    assert config.mqtt.client_id is None


def test_relative_paths_belong_to_the_folder_of_the_file(write: WriteConfig, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s\n")
    path = write("model: models/a\nmqtt: {username: u, password_file: secret}\nsources: [{kind: file, path: a.wav}]\n")
    config = load_config(path, ["sources.1.kind=file", "sources.1.path=b.wav"], {})
    assert config.model == tmp_path / "models/a"
    assert load_config(write("model: ~/a\n"), environ={}).model == Path.home() / "a"
    assert [source.path for source in config.sources if source.kind == "file"] == [tmp_path / "a.wav", Path("b.wav")]
    assert config.mqtt.read_password() == "s"


def test_an_empty_file_and_an_empty_section_mean_defaults(write: WriteConfig) -> None:
    assert load_config(write(""), environ={}) == Config()
    assert load_config(write("mqtt:\n  # all below is commented out\nsources:\n"), environ={}) == Config()


def test_all_problems_are_reported_at_once_each_with_its_origin(write: WriteConfig) -> None:
    path = write("mqtt:\n  hots: x\n  port: 70000\nsegment:\n  max_s: 60\n")
    found = problems(path, ("drian_s=3", "nonsense"), {"EDGE_ASR_LOG__LEVEL": "loud", "EDGE_ASR_MQT__HOST": "x"})
    assert sorted(found) == sorted(
        [
            f"{path}:2: mqtt.hots: unknown key; did you mean 'mqtt.host'?",
            f"{path}:3: mqtt.port: should be less than or equal to 65535; got 70000",
            f"{path}:5: segment.max_s: should be less than or equal to 30; got 60",
            "-o drian_s: unknown key; did you mean 'drain_s'?",
            "-o nonsense: should be section.key=value, such as -o mqtt.port=1884",
            "EDGE_ASR_LOG__LEVEL: log.level: should be 'DEBUG', 'INFO', 'WARNING' or 'ERROR'; got 'loud'",
            "EDGE_ASR_MQT__HOST: mqt: unknown key; did you mean 'mqtt'?",
        ]
    )


def test_a_key_like_no_other_is_answered_with_the_known_ones() -> None:
    assert problems(None, ("log.x=1",)) == ["-o log.x: unknown key; known here: level, format"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mqtt: [unclosed\n", r":2: not valid YAML: expected ',' or '\]'"),
        ("a: b: c\n", ":1: not valid YAML: mapping values are not allowed here"),
        ("mqtt:\n\thost: x\n", ":2: not valid YAML: found character '\\\\t'"),
        ("text\n", "should hold 'key: value' lines"),
        ("drain_s: 1\nmqtt: {}\ndrain_s: 2\n", ":3: drain_s is given twice, see line 1; keep one"),
        ("mqtt: {password: 0123}\n", "mqtt.password: should be text; put the value in quotes"),
        ("mqtt: {host: }\n", "mqtt.host: has no value"),
        ("mqtt: 3\n", "mqtt: should hold keys, each with its value"),
        ("model: \x00\n", "not valid YAML"),
        ('model: "a\\0b"\n', ":1: model: should be a path, without a NUL character in it"),
        ('sources:\n- path: "a\\0b"\n', ":2: sources.0.path: should be a path, without a NUL character in it"),
        ("mqtt:\n  port: 2020-99-99\n", ":2: not valid YAML: cannot read the value '2020-99-99'; correct the line"),
        ("mqtt:\n  port: !!int abc\n", ":2: not valid YAML: cannot read the value 'abc'; correct the line"),
        ("drain_s: !!int ''\n", ":1: not valid YAML: cannot read the value ''; correct the line"),
        ("mqtt: {enabled: !!bool x}\n", ":1: not valid YAML: cannot read the value 'x'; correct the line"),
        ("drain_s: !!timestamp x\n", ":1: not valid YAML: cannot read the value 'x'; correct the line"),
        (f"drain_s: {'1' * 5000}\n", ":1: not valid YAML: cannot read the value '1111"),
        (f"drain_s: {':'.join(['30'] * 300)}.5\n", ":1: not valid YAML: cannot read the value '30:30"),
        ("a: &a {b: *a}\n", ": is nested too deeply, or a value holds itself; write it without"),
        ("sources: &a [*a]\n", ": is nested too deeply, or a value holds itself; write it without"),
        (f"drain_s: {'[' * 5000}\n", ": is nested too deeply, or a value holds itself; write it without"),
    ],
)
def test_a_wrong_file_is_explained_in_one_line(write: WriteConfig, text: str, message: str) -> None:
    path = write(text)
    (line,) = problems(path)
    assert line.startswith(str(path))
    assert re.search(message, line)


def test_a_missing_or_binary_file_is_explained_in_one_line(tmp_path: Path) -> None:
    (line,) = problems(tmp_path / "none.yaml")
    assert (
        line == f"{tmp_path}/none.yaml: cannot read it: No such file or directory; correct the path given to --config"
    )
    (line,) = problems(tmp_path)
    assert "Is a directory" in line
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (line,) = problems(tmp_path / "binary.yaml")
    assert "save it as UTF-8" in line


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("[{kind: tape}]", "sources.0.kind: should be 'file' or 'stdin' or 'microphone'; got 'tape'"),
        (
            "[{kind: microphone, path: a.wav}]",
            "sources.0.path: unknown key; known here: kind, device, channel, rate, name",
        ),
        ("[{kind: microphone, channel: 64}]", "sources.0.channel: should be less than or equal to 63; got 64"),
        ("[{kind: microphone, rate: 7999}]", "sources.0.rate: should be greater than or equal to 8000; got 7999"),
        (
            "[{kind: microphone}, {kind: microphone, device: default, channel: 1}]",
            "two sources are named 'microphone:default'; give each its own name",
        ),
        ("[{realtime: true}]", "sources.0.path: is required; set it"),
        ("[{path: a.wav, device: x}]", "sources.0.device: unknown key; known here: kind, path, realtime, name"),
        ("[{kind: file}]", "sources.0.path: is required; set it"),
        ("[{kind: stdin, path: a.wav}]", "sources.0.path: unknown key; known here: kind, name"),
        ("[{kind: stdin}, 7]", "sources.1: should hold keys, each with its value"),
        (
            "[{kind: file, path: a, relatime: no}]",
            "sources.0.relatime: unknown key; did you mean 'sources.0.realtime'?",
        ),
        ("{kind: stdin}", "should be a list, such as [{kind: stdin}]"),
        ("[{kind: stdin}, {kind: stdin}]", "standard input can be a source only once; remove the others"),
        (
            "[{kind: stdin, name: a}, {kind: file, path: b, name: a}]",
            "two sources are named 'a'; give each its own name",
        ),
    ],
)
def test_wrong_sources_are_explained(sources: str, message: str) -> None:
    (line,) = problems(None, (f"sources={sources}",))
    assert line.endswith(message)
    assert line.startswith("-o sources: ")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("mqtt.host.x=1", "-o mqtt.host.x: mqtt.host: should be a valid string"),
        ("sources.3.kind=stdin", "-o sources.3.kind: there is no such entry; set the entries before it first"),
        ("mqtt={host: a", "-o mqtt: the value is not valid YAML; put it in quotes"),
        ("mqtt.port=", "-o mqtt.port: has no value; set it, or remove the line to get the default"),
        ("mqtt.port=x", "-o mqtt.port: should be a valid integer; got 'x'"),
        ("mqtt.port=yes", "-o mqtt.port: should be a number, not yes or no"),
        ("gates.min_confidence=off", "-o gates.min_confidence: should be a number, not yes or no"),
        ("drain_s=no", "-o drain_s: should be a number, not yes or no"),
        ("mqtt.base=a/#", "-o mqtt.base: should be a topic"),
        ("drain_s=.nan", "-o drain_s: should be a finite number"),
        ("device_id=a/b", "-o device_id: should have 1 to 64 letters, digits, '-' or '_' and nothing else; got 'a/b'"),
        ("mqtt.password_file=/nowhere", "-o mqtt.password_file: cannot read /nowhere; create it or correct the path"),
        ("mqtt.reconnect_min_s=60", "mqtt.reconnect_max_s: is less than reconnect_min_s; raise it, or lower the other"),
        ("mqtt.base=a\udcffb", "-o mqtt.base: should be text in UTF-8"),
        ("mqtt.base=a\tb", "-o mqtt.base: should be text without control characters"),
        (f"mqtt.base={'b' * 201}", "-o mqtt.base: should have at most 200 characters"),
        ("mqtt.client_id=a\udcffb", "-o mqtt.client_id: should be text in UTF-8"),
        (f"mqtt.client_id={'声' * 21846}", "-o mqtt.client_id: should be at most 65535 bytes long"),
        ("mqtt.username=a\x01", "-o mqtt.username: should be text without control characters"),
        ("mqtt.host=a\udcffb", "-o mqtt.host: should be text in UTF-8"),
        ("mqtt.host=a\0b", "-o mqtt.host: should be text without control characters"),
        (f"mqtt.host={'h' * 64}", "-o mqtt.host: should be the name or address of a host"),
        ("mqtt.p\udcff=1", "-o mqtt.p\udcff: unknown key; keys are plain letters"),
        ("model=a\0b", "-o model: should be a path, without a NUL character in it"),
        ("mqtt.password_file=a\0b", "-o mqtt.password_file: should be a path, without a NUL character in it"),
        ("drain_s=2020-99-99", "-o drain_s: cannot read the value '2020-99-99'; correct it, or put it in quotes"),
        (f"drain_s={'1' * 5000}", "-o drain_s: cannot read the value '1111"),
        (f"mqtt.port=0x{'f' * 6000}", "-o mqtt.port: should be less than or equal to 65535; got a number of thousands"),
        (f"drain_s={'[' * 5000}", "-o drain_s: is nested too deeply"),
        (f"sources.{'1' * 5000}=1", "sources: should be a list"),
        ("segment.phrases=开灯", "-o segment.phrases: should be a list, such as [打开客厅灯]"),
        ("segment.phrases=[开灯, 。]", "segment.phrases.1: should be words, such as 打开客厅灯"),
        ("=1", "-o =1: should be section.key=value"),
    ],
)
def test_wrong_options_are_explained(option: str, message: str) -> None:
    (line,) = problems(None, (option,))
    assert message in line
    assert len(line) < 300


def test_a_password_that_cannot_be_sent_is_refused_and_not_shown() -> None:
    (line,) = problems(None, ("mqtt.username=u", "mqtt.password=secret\udcff"))
    assert line == "-o mqtt.password: should be text in UTF-8"


def test_what_mqtt_carries_is_accepted() -> None:
    overrides = [f"mqtt.base={'声' * 200}", "mqtt.host=fe80::1%eth0", "mqtt.client_id=küche 1"]
    assert load_config(None, overrides, {}).mqtt.base == "声" * 200
    assert load_config(None, ["mqtt.host=küche_1.lan"], {}).mqtt.host == "küche_1.lan"


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (
            ("mqtt.port=0", "mqtt.password=x"),
            ["-o mqtt.password: a password needs a username", "-o mqtt.port: should be greater"],
        ),
        (
            ("mqtt.port=0", "mqtt.reconnect_min_s=40"),
            ["-o mqtt.port: should be greater", "mqtt.reconnect_max_s: is less than reconnect_min_s"],
        ),
        (
            ("mqtt.username=", "mqtt.hots=x", "mqtt.password=x"),
            ["-o mqtt.hots: ", "-o mqtt.password: a password needs"],
        ),
        (("sources.0.pth=x",), ["-o sources.0.pth: unknown key; did you mean", "sources.0.path: is required"]),
        (
            ("sources=[{kind: stdin, name: a}, {kind: stdin, name: a}, {path: b, x: 1}]",),
            [
                "sources.2.x: unknown",
                "sources: standard input can be a source only once",
                "sources: two sources are named",
            ],
        ),
    ],
)
def test_one_wrong_key_hides_nothing_that_is_wrong_between_keys(options: tuple[str, ...], messages: list[str]) -> None:
    found = sorted(problems(None, options))
    assert len(found) == len(messages), found
    assert all(message in line for message, line in zip(messages, found, strict=True)), found


def test_a_key_of_thousands_of_parts_is_explained() -> None:
    found = problems(None, (f"drain_s{'.a' * 5000}=1",))
    assert "is nested too deeply" in found[0]
    assert all(len(line) < 300 for line in found)


def test_a_wrong_key_is_not_blamed_twice() -> None:
    assert len(problems(None, ("mqtt.username=[", "mqtt.username=x", "mqtt.reconnect_min_s=x"))) == 1
    assert len(problems(None, ("mqtt.reconnect_min_s=40", "mqtt.reconnect_max_s=9999"))) == 1


@pytest.mark.parametrize("device", ["1", "'1'", "' 0 '", "hw:1", "'hw:1,0'", "plughw:0", "'hw:CARD=1,DEV=0'"])
def test_a_microphone_is_not_named_by_a_number(device: str) -> None:
    (problem,) = problems(None, (f"sources=[{{kind: microphone, device: {device}}}]",))
    assert "sources.0.device: the numbers of devices change when one is plugged in; give a name" in problem


def test_a_microphone_is_named_by_what_stays() -> None:
    stable = ["default", "USB PnP Sound", "hw:CARD=Device,DEV=0", "/dev/snd/by-id/usb-1", "3M microphone"]
    given = [{"kind": "microphone", "device": device} for device in stable]
    sources = load_config(None, [], {}, sources=given).sources
    assert sources == tuple(MicrophoneSourceConfig(device=device) for device in stable)
    assert [source.source_name for source in sources if isinstance(source, MicrophoneSourceConfig)] == [
        f"microphone:{device}" for device in stable
    ]


def test_a_source_without_a_kind_is_a_file() -> None:
    config = load_config(None, ["sources.0.path=a.wav"], {})
    assert config.sources == (FileSourceConfig(path=Path("a.wav")),)


def test_sources_and_model_can_be_given_as_data(write: WriteConfig) -> None:
    strange = "a: \x7f'\udcff.wav"
    path = write("sources: [{kind: stdin}, {kind: stdin, name: x}]\nmodel: b\n")
    config = load_config(
        path,
        ["sources.0.realtime=false", "model=c"],
        {"EDGE_ASR_SOURCES__0__KIND": "tape"},
        sources=[{"kind": "file", "path": strange}, {"kind": "stdin"}],
        model=Path("null"),
    )
    assert config.sources == (FileSourceConfig(path=Path(strange), realtime=False), StdinSourceConfig())
    assert config.model == Path("null")


def test_what_is_given_as_data_is_named_in_errors() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [], {}, sources=[{"kind": "file", "path": "a\0"}], model=Path("b\0"))
    assert str(caught.value).splitlines() == [
        "--model: model: should be a path, without a NUL character in it",
        "--source: sources.0.path: should be a path, without a NUL character in it",
    ]


def test_without_a_checkout_the_missing_model_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nowhere = tmp_path / "engines" / "paraformer-tiny"
    monkeypatch.setattr(config_module, "BUNDLED_MODEL", nowhere)
    with pytest.raises(ConfigError, match="no model comes with the installed package; run: edge-asr models pull"):
        load_config(None, [], {})
    assert load_config(None, ["model=/models/own"], {}).model == Path("/models/own")


def test_secrets_are_masked_in_what_is_shown_and_in_errors(write: WriteConfig) -> None:
    config = load_config(None, ["mqtt.username=u", "mqtt.password=hunter2"], {})
    assert config.mqtt.password == SecretStr("hunter2")
    for shown in (show_config(config), repr(config), str(config.mqtt)):
        assert "hunter2" not in shown
        assert "**********" in shown
    for text in ("mqtt: {password: 13579}\n", "mqtt: {password: [13579]}\n", "mqtt: {password: 13579, x: 1}\n"):
        assert not any("13579" in line for line in problems(write(text)))
    assert not any("13579" in line for line in problems(None, ("mqtt.password=13579",)))


def test_a_password_stands_in_one_place_and_has_a_user(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    (line,) = problems(None, ("mqtt.username=u", "mqtt.password=p", f"mqtt.password_file={secret}"))
    assert "password and password_file are both set; keep one" in line
    (line,) = problems(None, ("mqtt.password=p",))
    assert "a password needs a username" in line


def test_what_is_shown_can_be_read_again(write: WriteConfig) -> None:
    config = load_config(None, ["sources=[{kind: file, path: /声.wav}]", "segment.preset=aggressive"], {})
    assert load_config(write(show_config(config)), environ={}) == config


def test_a_configuration_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(ValidationError):
        config.mqtt.port = 1


@pytest.mark.parametrize(
    ("host", "device_id"),
    [("hall", "hall"), ("hall.lan", "hall"), ("küche 1", "k_che_1"), ("", "edge"), ("x" * 80, "x" * 64)],
)
def test_the_default_device_id_is_the_host_name_in_plain_letters(
    monkeypatch: pytest.MonkeyPatch, host: str, device_id: str
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: host)
    assert Config().device_id == device_id


def test_tls_is_switched_on_by_a_word_or_a_file_and_has_its_own_port(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").touch()
    assert (Config().mqtt.tls.enabled, Config().mqtt.port) == (False, 1883)
    for tls in (True, {"enabled": True}, {"ca_file": tmp_path / "ca.pem"}):
        mqtt = Config.model_validate({"mqtt": {"tls": tls}}).mqtt
        assert (mqtt.tls.enabled, mqtt.port) == (True, 8883)
    off = Config.model_validate({"mqtt": {"tls": {"enabled": False, "ca_file": tmp_path / "ca.pem"}}}).mqtt
    assert (off.tls.enabled, off.port) == (False, 1883)
    assert Config.model_validate({"mqtt": {"tls": True, "port": 1884}}).mqtt.port == 1884


def test_the_version_of_mqtt_may_be_given_as_a_number() -> None:
    assert load_config(None, ["mqtt.protocol=5"], {}).mqtt.protocol == "5"
    assert Config.model_validate({"mqtt": {"protocol": 5}}).mqtt.protocol == "5"


def test_a_time_is_given_in_seconds_or_with_a_unit() -> None:
    for text, seconds in (("90", 90), ("90s", 90), ("30m", 1800), ("1.5h", 5400), ("7d", 604_800), ("0", 0)):
        assert load_config(None, [f"outbox.keep={text}"], {}).outbox.keep == seconds
    with pytest.raises(ConfigError, match=r"outbox.keep: should be a time such as 90s, 30m, 24h or 7d"):
        load_config(None, ["outbox.keep=1w"], {})


def test_user_and_password_come_from_files_or_from_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "name").write_text("from a file\n")
    mqtt = load_config(None, [f"mqtt.username_file={tmp_path / 'name'}", "mqtt.password=p"], {}).mqtt
    assert (mqtt.read_username(), mqtt.read_password()) == ("from a file", "p")
    assert (Config().mqtt.read_username(), Config().mqtt.read_password()) == (None, None)
    (tmp_path / "mqtt_username").write_text("hall\n")
    (tmp_path / "mqtt_password").write_text("secret\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert (Config().mqtt.read_username(), Config().mqtt.read_password()) == ("hall", "secret")
    assert load_config(None, ["mqtt.username=other"], {}).mqtt.read_username() == "other"


def test_blank_credentials_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit gives them a line's end where nobody has set them."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    for name in ("mqtt_username", "mqtt_password"):
        (tmp_path / name).write_text("\n")
    assert (Config().mqtt.read_username(), Config().mqtt.read_password()) == (None, None)
    with pytest.raises(ConfigError, match="a password needs a username"):
        load_config(None, ["mqtt.password=p"], {})
