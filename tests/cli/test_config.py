"""The configuration file: what it can say, and that everything which is wrong with it is told at once."""

import datetime
import re
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdq.cli.serve.config_reader import Problems, keys_of, read_table
from nbdq.cli.serve.settings import Settings
from tests.support.cli import run_nbdq
from tests.support.configured import configured
from tests.support.pki import Authority
from tests.support.serving import serve
from tests.support.tools import execute, requires, run

DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"
EXAMPLE = Path(__file__).parents[2] / "examples" / "nbdq.toml"

pytestmark = requires("qemu-img")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    return path


def check(tmp_path: Path, text: str) -> tuple[int, str, list[str]]:
    """Exit status of --check-config, what is served, and what is wrong."""
    path = tmp_path / "nbdq.toml"
    path.write_text(text)
    before = {entry: entry.stat().st_mtime_ns for entry in tmp_path.rglob("*")}
    result = run_nbdq("serve", "--config", path, "--check-config")
    assert {entry: entry.stat().st_mtime_ns for entry in tmp_path.rglob("*")} == before, "something was written"
    return result.exit_code, result.stdout, [line.removeprefix("nbdq: ") for line in result.stderr.splitlines()]


def problems(tmp_path: Path, text: str) -> list[str]:
    status, shown, found = check(tmp_path, text)
    assert (status, shown) == (1, "")
    prefix = f"{tmp_path}/nbdq.toml: "
    return [line.removeprefix(prefix) for line in found]


def test_a_sound_file_is_summed_up(image: Path, tmp_path: Path) -> None:
    text = f'[[export]]\nimage = "{image}"\n[[export]]\nimage = "{image}"\nname = "again"\nread-only = true\n'
    status, shown, found = check(tmp_path, text)
    assert (status, found) == (0, [])
    assert shown == f"export 'disk': {image} (writable)\nexport 'again': {image} (read-only)\n"


def test_all_that_is_wrong_is_told_in_one_run_each_with_its_place(image: Path, tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        f"""
        [server]
        pidfile = "x"
        [[listen]]
        port = "many"
        [limits]
        process-bytes = "64 elephants"
        connections = 0
        [[export]]
        image = 5
        [[export]]
        name = "vm"
        read_only = true
        discard = "no"
        backing = ["qcow3:x"]
        [[export]]
        image = "{image}"
        access = {{ networks = ["10.0.0.1/8"] }}
        rate = {{ burst = 0 }}
        """,
    )
    assert found == [
        "listen 1: port: is a string, but must be a whole number",
        "export 1: image: is a whole number, but must be a string",
        "export 2 (\"vm\"): unknown key 'read_only'; did you mean 'read-only'?",
        "export 2 (\"vm\"): discard: is 'no', but must be 'unmap' or 'ignore'",
        'export 2 ("vm"): image is missing',
        "export 2 (\"vm\"): backing: 'qcow3:x' is not qcow2:PATH, raw:PATH or none",
        f"export 3 (\"{image}\"): access: '10.0.0.1/8' is not a network such as 192.0.2.0/24: "
        "10.0.0.1/8 has host bits set",
        f'export 3 ("{image}"): rate: rates must not be negative, and a burst must be positive; '
        "a rate of 0 is no limit",
        "limits: process-bytes: '64 elephants' is not a size; "
        "write bytes or a number with a suffix of k, M, G, T, P, E",
        "server: unknown key 'pidfile'; did you mean 'pid-file'?",
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "nothing is served"),
        ("[[exports]]\n", "unknown key 'exports'; did you mean 'export'?"),
        ("export = 3\n", "export: is a whole number, but must be a list"),
        ("[export]\n", "export: is a table, but must be a list"),
        ("[[export]]\nimage = \n", "Invalid value (at line 2, column 9)"),
        ("\x00", "Invalid"),
        ('[[export]]\nimage = "none"\n', 'export 1 ("none"): none: there is no such file'),
        ('[[export-directory]]\npath = "none"\n', 'export-directory 1 ("none"): none: there is no such directory'),
        ('[[export]]\nimage = "IMAGE"\n[[export]]\nimage = "IMAGE"\n', "another export has the name 'disk', too"),
        ('[[export-directory]]\npath = "."\nrescan-seconds = 0.01\n', "rescan-seconds: 0.01 is less than 0.1"),
        ('[[export]]\nimage = "IMAGE"\nmax-connections = -1\n', "max-connections: must not be negative"),
        ('[[export]]\nimage = "IMAGE"\nmax-connections = true\n', "is true or false, but must be a whole number"),
        ('[[export]]\nimage = "IMAGE"\nimage-2 = 2026-01-01\n', "unknown key 'image-2'; did you mean 'image'?"),
        ('[[export]]\nimage = "IMAGE"\ndiscard = "ignore"\ndetect-zeroes = "unmap"\n', "discard ignore forbids"),
        ('[[export]]\nimage = "IMAGE"\naccess = { users = ["no one"] }\n', "there is no user 'no one'"),
        ('[[export]]\nimage = "IMAGE"\n[limits]\ndrain-seconds = inf\n', "drain-seconds: must be finite"),
        (f'[[export]]\nimage = "IMAGE"\n[limits]\ndrain-seconds = {10**400}\n', "does not fit into 64 bits"),
        (f'[[export]]\nimage = "IMAGE"\n[limits]\nprocess-bytes = "{10**30}G"\n', "does not fit into 64 bits"),
        ('[[export]]\nimage = "IMAGE"\n[[listen]]\nport = 65536\n', "port: 65536 is not in the range 0 to 65535"),
        ('[[export]]\nimage = "IMAGE"\n[[listen]]\nmode = "999"\n', "'999' is not an octal file mode such as 0660"),
        ('[[export]]\nimage = "IMAGE"\n[[listen]]\nsocket = "s"\nmode = 0600\n', 'modes stand in quotes, as in "0660"'),
        (
            '[[export]]\nimage = "IMAGE"\n[[listen]]\nsocket = "s"\nport = 1\n',
            'listen 1 ("s"): a unix socket has no port',
        ),
        ('[[export]]\nimage = "IMAGE"\n[[listen]]\nsocket = ""\n', "listen 1: '' is no name for a file"),
        ('[[export]]\nimage = "IMAGE"\n[server]\npid-file = "/"\n', "pid-file: '/' is no name for a file"),
        ('[[export]]\nimage = "IMAGE"\n[metrics]\nlisten = "host:x"\n', "metrics: 'host:x' is neither ADDRESS:PORT"),
        ('[[export-directory]]\npath = "."\nraw = [".qcow2"]\n', ".qcow2 cannot be the suffix of qcow2 and of raw"),
    ],
)
def test_a_mistake_is_one_line(text: str, complaint: str, image: Path, tmp_path: Path) -> None:
    found = problems(tmp_path, text.replace("IMAGE", str(image)))
    assert any(complaint in line for line in found), found


def test_what_a_start_would_refuse_of_an_image_is_found_without_one(image: Path, tmp_path: Path) -> None:
    text = f'[[export]]\nimage = "{image}"\n'
    assert "no internal snapshot 'x'" in problems(tmp_path, text + 'snapshot = "x"\n')[0]
    assert "x" in problems(tmp_path, text + 'bitmaps = ["x"]\n')[0]
    assert "4096" in problems(tmp_path, text + f'description = "{"x" * 4097}"\n')[0]
    data = bytearray(image.read_bytes())
    data[79] |= 2  # marked as corrupt
    image.write_bytes(data)
    assert "is marked as corrupt" in problems(tmp_path, text)[0]
    assert check(tmp_path, text + "read-only = true\n")[0] == 0
    image.write_bytes(b"nothing")
    assert "not a QCOW2 image" in problems(tmp_path, text)[0]


def test_a_check_minds_no_server_that_runs(image: Path, tmp_path: Path) -> None:
    with serve(image):
        assert check(tmp_path, f'[[export]]\nimage = "{image}"\n')[0] == 0


def test_options_besides_a_file_are_refused(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "nbdq.toml"
    path.write_text(f'[[export]]\nimage = "{image}"\n')
    for words, name in ((["-k", "x"], "-k"), (["-r"], "-r"), ([image], "IMAGE")):
        result = run_nbdq("serve", "--config", path, *words)
        assert result.exit_code == 2
        assert f"{name} cannot be given besides --config" in result.stderr


def test_a_check_of_options_finds_what_a_start_would_refuse(image: Path) -> None:
    result = run_nbdq("serve", image, image, "--check-config")
    assert result.exit_code == 1
    assert result.stderr == "nbdq: two exports are named 'disk'; give each a name of its own\n"
    for words, complaint in ((("--metrics", "host:x", image), "--metrics: 'host:x' is neither ADDRESS:PORT"),):
        result = run_nbdq("serve", *words)
        assert result.exit_code == 2
        assert complaint in result.stderr


def test_a_directory_that_a_service_manager_may_make_is_told_of_and_no_mistake(image: Path, tmp_path: Path) -> None:
    status, _, found = check(tmp_path, f'[[export]]\nimage = "{image}"\n[[listen]]\nsocket = "{tmp_path}/no/s"\n')
    assert (status, found) == (0, [f"listen 1: {tmp_path}/no/s: there is no directory {tmp_path}/no yet"])


def test_a_unix_socket_without_a_name_is_refused(image: Path) -> None:
    """The kernel would choose one that no client knows."""
    result = run_nbdq("serve", "-k", "", image)
    assert (result.exit_code, result.stderr) == (1, "nbdq: the path of a unix socket is empty\n")


def test_a_server_without_anything_to_serve_is_refused() -> None:
    assert "name an IMAGE, or --export-dir DIR, or --config FILE" in run_nbdq("serve").stderr


@requires("nbdinfo")
def test_an_export_can_be_the_default_of_clients_that_name_none(image: Path, tmp_path: Path) -> None:
    """P31."""
    other = tmp_path / "other.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", other, "2M")
    with configured(f'[[export]]\nimage = "{image}"\n[[export]]\nimage = "{other}"\ndefault = true\n') as server:
        assert server.names() == ["disk", "other"]
        assert run("nbdinfo", "--size", server.uri("")) == f"{2 << 20}\n"


@requires("nbdinfo", "qemu-io")
def test_one_image_may_have_several_exports_with_rights_of_their_own(image: Path) -> None:
    body = f'[[export]]\nimage = "{image}"\nname = "ro"\nread-only = true\n[[export]]\nimage = "{image}"\n'
    with configured(body) as server:
        assert [len(server("query-block")), server.names()] == [1, ["ro", "disk"]]
        run("qemu-io", "-f", "raw", "-c", "write -P 7 0 4k", server.uri("disk"))
        run("qemu-io", "-f", "raw", "-r", "-c", "read -P 7 0 4k", server.uri("ro"))
        assert "is_read_only: true" in run("nbdinfo", server.uri("ro"))


@requires("nbdinfo", "certtool")
def test_exports_may_demand_an_identity_that_tls_proves(image: Path, tmp_path: Path) -> None:
    """P64, R-16."""
    authority = Authority(tmp_path / "ca")
    certificates = authority.server(tmp_path / "server")
    clients = [authority.client(tmp_path / name, name) for name in ("backup", "stranger")]
    body = f"""
        [tls]
        mode = "allow"
        certificates = "{certificates}"
        [[export]]
        image = "{image}"
        name = "open"
        [[export]]
        image = "{image}"
        name = "secret"
        access = {{ subjects = ["*CN=backup*"] }}
    """
    with configured(body) as server:
        assert server.names() == ["open"]
        words = [
            f"nbds+unix://localhost/secret?socket={server.server.socket}&tls-certificates={path}" for path in clients
        ]
        assert run("nbdinfo", "--size", words[0]) == f"{1 << 20}\n"
        assert "no export named 'secret'" in execute("nbdinfo", "--size", words[1]).stderr
        server.reload(body.replace("*CN=backup*", "*CN=stranger*"))
        assert run("nbdinfo", "--size", words[1]) == f"{1 << 20}\n"
        server.write(body.replace(str(certificates), str(tmp_path)))
        assert "server-cert.pem" in server.refusal("x-nbdq-reload")
        assert run("nbdinfo", "--size", words[1]) == f"{1 << 20}\n"


# The documentation.


def _sections() -> dict[str, Any]:
    """Name of a section → its class."""
    found = {}
    for key, (_, annotation) in keys_of(Settings).items():
        kinds = [kind for kind in (annotation, *get_args(annotation)) if is_dataclass(kind)]
        found[key] = kinds[0]
    return found


def _documented(text: str) -> dict[str, str]:
    """Key → default, from the tables in ``text``."""
    return dict(re.findall(r"^\| `([a-z0-9-]+)` \| (.*?) \|", text, re.M))


@pytest.mark.parametrize("section", sorted(set(_sections()) - {"limits"}))
def test_every_key_is_documented_with_its_default(section: str) -> None:
    kind = _sections()[section]
    heading = re.search(rf"^## `\[+{section}\]+`.*?(?=^## |\Z)", DOCS.read_text(), re.M | re.S)
    assert heading, f"section {section} is not documented"
    documented = _documented(heading[0])
    if section == "export-directory":
        shared = re.search(r"These keys a directory of exports.*?\n\n.*?\n\n", DOCS.read_text(), re.S)
        assert shared
        documented |= _documented(shared[0])
    for key, (field, _) in keys_of(kind).items():
        assert key in documented, f"[{section}] {key} is not documented"
        default = field.default
        if isinstance(default, bool):
            assert documented[key] == f"`{str(default).lower()}`", key
        elif default is MISSING and field.default_factory is MISSING:
            assert documented[key] == "must be given", key
    assert set(documented) == set(keys_of(kind)), "documented, but not there"


def test_limits_are_documented_where_their_reasons_are() -> None:
    assert "`nbdq serve --limit help`" in DOCS.read_text()


def test_the_example_is_sound(tmp_path: Path) -> None:
    text = EXAMPLE.read_text()
    for path in set(re.findall(r'"((?:/srv|/run)/[^"]*)"', text)):
        place = tmp_path / path[1:]
        if place.suffix:
            place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix == ".qcow2":
            run("qemu-img", "create", "-q", "-f", "qcow2", place, "1M")
        elif not place.suffix:
            place.mkdir(parents=True, exist_ok=True)
        text = text.replace(f'"{path}"', f'"{place}"')
    status, shown, found = check(tmp_path, text)
    assert (status, found) == (0, [])
    assert shown.count("export '") == EXAMPLE.read_text().count("[[export]]")


_KEYS = st.sampled_from([*keys_of(Settings), *(key for kind in _sections().values() for key in keys_of(kind)), "x", ""])
_VALUES = st.recursive(
    st.none().map(lambda _: datetime.date(2026, 1, 1))
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text(max_size=8)
    | st.sampled_from(["64M", "0660", "qcow2:x", "none", "unmap", "\0", "::1/64", "root"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.dictionaries(_KEYS, _VALUES, max_size=5))
def test_whatever_a_file_says_becomes_settings_or_problems(document: dict[str, Any]) -> None:
    found = Problems()
    read = read_table(Settings, document, "", found)
    assert (read is None) == bool(found)
    assert all(line.isprintable() for line in found), found
