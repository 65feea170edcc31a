"""Which host a name means, and which names are none."""

import pytest

from autocompress.core.errors import InputError
from autocompress.device.adb import AdbHost
from autocompress.device.hosts import open_host, parse_hosts
from autocompress.device.local import LocalHost
from autocompress.device.ssh import SshHost
from tests.device.conftest import profile_of


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("local", LocalHost),
        ("ssh:pi@10.0.0.2", SshHost),
        ("ssh:pi@board.local:2222", SshHost),
        ("adb:ABC123", AdbHost),
        ("adb:192.168.1.5:5555", AdbHost),
        ("ssh:pi@a,ssh:pi@b:22", SshHost),
    ],
)
def test_a_name_is_a_host_of_its_kind(name: str, kind: type) -> None:
    with open_host(name, profile_of("fake")) as host:
        assert type(host) is kind


def test_several_hosts_have_commas_between_them() -> None:
    assert parse_hosts("ssh:pi@a,ssh:pi@b:22") == ("ssh:pi@a", "ssh:pi@b:22")
    assert parse_hosts("local") == ("local",)


@pytest.mark.parametrize(
    "name",
    [
        "", "LOCAL", "pi@board", "ssh:board", "ssh:@board", "ssh:pi@", "ssh:pi@board:", "ssh:pi@board:0",
        "ssh:pi@board:70000", "ssh:pi@board:2 2", "ssh:-oProxyCommand=x@board", "ssh:pi@-oProxyCommand=x",
        "ssh:pi@board;reboot", "ssh:$(reboot)@board", "ssh:pi@`reboot`", "ssh:pi@board\n", "ssh:pi@a b", "ssh:pi@böard",
        "adb:", "adb:-d", "adb:A;B", "adb:A B", "adb:$(reboot)", "local,", "local,tcp:x",
    ],
)  # fmt: skip
def test_what_is_no_host_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"a host is 'local', 'ssh:user@host\[:port\]' or 'adb:SERIAL', got "):
        parse_hosts(name)


def test_a_device_is_named_once() -> None:
    with pytest.raises(InputError, match="name 'ssh:pi@a' once"):
        parse_hosts("ssh:pi@a,ssh:pi@a")
