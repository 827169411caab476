"""Keys and the door: who gets in over CURVE, what a key file must look like, and what a client needs."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading

import pytest
import zmq

from bus_support import PATIENCE, quote, wait_until
from security_support import Gate, frame, pair
from tapebus import Config, Publisher, Runtime
from tapebus.cli import main
from tapebus.curve import Door, Keys, as_client, client_keys, generate, parse_keys, public_key, server_keys
from tapebus.errors import ConfigError, UsageError
from tapebus.security import Identity, Rights, Security

#: Milliseconds in which a refused client must have got nowhere; the right one needs a few.
REFUSED_MS = 400


@pytest.fixture
def gate(data_dir):
    made = []

    def make(*identities):
        made.append(Gate("curve", data_dir, *identities))
        return made[-1]

    yield make
    for each in made:
        each.close()


class Port:
    """A guarded socket of one kind, and clients that try to get in."""

    def __init__(self, kind: int, allowed: Keys, domain: str):
        self.here, self.far = zmq.Context(), zmq.Context()
        self.kind = kind
        self.keys = pair()
        identity = Identity("me", key=allowed.public.decode(), publish=["*"], subscribe=["*"])
        self.door = Door(self.here, self.keys, Rights(Security(identities=[identity])))
        self.door.open()
        self.socket = self.here.socket(kind)
        self.socket.linger = 0
        self.door.guard(self.socket, domain)
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")

    def gets_in(self, keys: Keys | None, wait_ms: int) -> bool:
        """Whether a client with `keys` can exchange a message."""
        other = {zmq.ROUTER: zmq.DEALER, zmq.PULL: zmq.PUSH, zmq.XPUB: zmq.SUB}[self.kind]
        with self.far.socket(other) as client:
            client.linger = 0
            if keys is not None:
                as_client(client, keys)
            if other == zmq.SUB:
                client.subscribe(b"x")
            client.connect(f"tcp://127.0.0.1:{self.port}")
            if other != zmq.SUB:
                client.send(b"hello")
            if not self.socket.poll(wait_ms):
                return False
            self.socket.recv_multipart()
            return True

    def close(self):
        self.far.destroy(linger=0)
        self.socket.close(0)
        self.door.close()
        self.here.term()


@pytest.fixture(params=[(zmq.ROUTER, "publish"), (zmq.PULL, "publish"), (zmq.XPUB, "subscribe")], ids=str)
def port(request):
    client = pair()
    made = Port(request.param[0], client, request.param[1])
    made.client = client._replace(server=made.keys.public)
    yield made
    made.close()


def test_the_right_key_gets_in(port):
    assert port.gets_in(port.client, 20_000)


@pytest.mark.parametrize("who", ["unknown key", "no key", "wrong server key", "the server's key as its own"])
def test_anybody_else_does_not_get_in(port, who):
    keys = {
        "unknown key": pair(port.keys.public),
        "no key": None,
        "wrong server key": port.client._replace(server=pair().public),
        "the server's key as its own": port.keys._replace(server=port.keys.public),
    }[who]
    assert not port.gets_in(keys, REFUSED_MS)
    assert port.gets_in(port.client, 20_000), "the door still works"


def test_refused_clients_that_try_again_and_again_do_not_fill_the_log(caplog, monkeypatch):
    door = Door(zmq.Context.instance(), pair(), Rights(Security()))
    for _ in range(1000):
        assert not door.callback("publish", pair().public)
    assert len(caplog.records) == 1
    monkeypatch.setattr(door, "_tell_at", 0.0)
    door.callback("subscribe", b"k" * 40)
    assert caplog.messages[1:] == [
        f"refused a connection to subscribe with the key {'k' * 40}, 999 more since the last such line"
    ]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_while_the_authenticator_is_dead_nobody_gets_in_and_mending_helps(port, monkeypatch):
    def fail(domain, key):
        raise RuntimeError("killed by the test")

    with monkeypatch.context() as patch:
        patch.setattr(port.door, "callback", fail)
        assert not port.gets_in(port.client, REFUSED_MS)
        wait_until(lambda: not port.door._authenticator.is_alive(), "the authenticator to die")
    assert not port.gets_in(port.client, REFUSED_MS)
    port.door.mend()
    assert port.gets_in(port.client, 20_000)


def test_without_any_authenticator_nobody_gets_in(port):
    port.door.close()
    assert not port.gets_in(port.client, REFUSED_MS)


@pytest.mark.parametrize(("publish", "subscribe"), [(["a"], []), ([], ["a"])])
def test_a_key_opens_only_the_doors_it_has_rights_behind(publish, subscribe):
    client = pair()
    for kind, domain, rights in ((zmq.ROUTER, "publish", publish), (zmq.XPUB, "subscribe", subscribe)):
        port = Port(kind, client, domain)
        identity = Identity("me", key=client.public.decode(), publish=publish, subscribe=subscribe)
        port.door._rights = Rights(Security(identities=[identity]))
        try:
            assert port.gets_in(client._replace(server=port.keys.public), 20_000 if rights else REFUSED_MS) == bool(
                rights
            )
        finally:
            port.close()


def test_an_identity_may_have_two_keys_while_one_is_replaced(gate):
    old, new = pair(), pair()
    here = gate(Identity("nobody"), Identity("mt5", key=[old.public.decode(), new.public.decode()], publish=["a"]))
    for keys in (old, new):
        push = here.connect(zmq.PUSH, keys._replace(server=here.server.public))
        push.send(frame("a", "b"))
        assert here.commit() == ["a"]


# -- files -----------------------------------------------------------------------------------------------------


def test_generated_files_are_private_complete_and_never_overwritten(tmp_path):
    bus_public, bus_secret = generate(tmp_path, "bus")
    public, secret = generate(tmp_path, "mt5", str(bus_public))
    assert [stat.S_IMODE(each.stat().st_mode) for each in (public, secret)] == [0o644, 0o600]
    keys = client_keys(secret)
    assert keys.server.decode() == public_key(str(bus_public))
    assert keys.public.decode() == public_key(str(public))
    assert server_keys({"file": str(bus_secret)}).public == keys.server
    before = secret.read_text()
    for taken in (public, secret):
        other = public if taken is secret else secret
        moved = other.rename(tmp_path / "moved")
        with pytest.raises(UsageError, match="not overwritten"):
            generate(tmp_path, "mt5")
        moved.rename(other)
    assert secret.read_text() == before
    assert keys.secret.decode() not in repr(keys)


def test_a_link_in_the_way_of_a_new_key_is_not_followed(tmp_path):
    (tmp_path / "bus.key_secret").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError):
        generate(tmp_path, "bus")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["../bus", "", "a/b", "a b", "x" * 101])
def test_a_key_name_is_a_plain_name(tmp_path, name):
    with pytest.raises(UsageError):
        generate(tmp_path, name)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o601, 0o666])
def test_a_secret_file_that_others_may_open_is_refused(tmp_path, mode):
    _, secret = generate(tmp_path, "bus")
    secret.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        server_keys({"file": str(secret)})
    with pytest.raises(ConfigError, match="chmod 600"):
        client_keys(secret)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_a_secret_file_of_another_user_is_refused(tmp_path, monkeypatch):
    _, secret = generate(tmp_path, "bus")
    os.chown(secret, 4242, 4242)
    with pytest.raises(ConfigError, match="uid 4242"):
        server_keys({"file": str(secret)})


@pytest.mark.parametrize("text", ["", "nonsense", 'secret-key = "short"', "x" * 39, "\x00" * 40, "é" * 40])
def test_a_file_that_holds_no_key_is_refused_without_repeating_it(tmp_path, text):
    file = tmp_path / "bad"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="keygen") as caught:
        server_keys({"file": str(file)})
    assert not text or text not in str(caught.value)


def test_a_pipe_or_a_directory_instead_of_a_key_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ConfigError):
            server_keys({"file": str(path)})


def test_the_secret_may_come_from_a_variable_and_never_from_the_configuration(monkeypatch):
    keys = pair()
    monkeypatch.setenv("BUS_KEY", keys.secret.decode())
    assert server_keys({"env": "BUS_KEY"}).public == keys.public
    for wrong in ({}, {"value": keys.secret.decode()}, {"env": "NOT_SET_ANYWHERE"}):
        with pytest.raises(ConfigError) as caught:
            server_keys(wrong)
        assert keys.secret.decode() not in str(caught.value)


def test_a_client_key_without_its_bus_says_what_to_add(tmp_path):
    _, secret = generate(tmp_path, "mt5")
    with pytest.raises(ConfigError, match="server-key"):
        client_keys(secret)
    assert parse_keys(secret.read_text(), "x").server == b""


# -- a whole bus -----------------------------------------------------------------------------------------------


@pytest.fixture
def remote(data_dir, free_ports):
    """A bus that listens on every address behind keys; the key files of two clients and the ports."""
    ports = free_ports(3)
    bus_public, bus_secret = generate(data_dir, "bus")
    files = {name: generate(data_dir, name, str(bus_public)) for name in ("mt5", "stranger")}
    file = data_dir / "c.toml"
    file.write_text(
        f"[bus]\ndata_dir='{data_dir}/d'\npublish_heartbeat=false\n[listen]\nfeed='tcp://0.0.0.0:{ports[0]}'\n"
        f"ingest='tcp://0.0.0.0:{ports[1]}'\nacked='tcp://0.0.0.0:{ports[2]}'\n"
        f"[plugins]\nenabled=['schema','store']\n[security]\nkey={{file='{bus_secret}'}}\n"
        f"[[security.identities]]\nname='mt5'\nkey='{public_key(str(files['mt5'][0]))}'\n"
        "publish=['market_data','trade_*']\nsubscribe=['signal_*']\n"
    )
    with Runtime(Config.load(file, environ={})) as runtime:
        yield runtime, {name: str(secret) for name, (_, secret) in files.items()}, ports, file


def test_a_publisher_with_its_key_is_stored_and_its_rights_hold(remote):
    runtime, keys, ports, _ = remote
    with Publisher("mt5", f"tcp://127.0.0.1:{ports[2]}", key=keys["mt5"]) as publisher:
        publisher.publish("market_data", quote(1))
        publisher.publish("fire_command", {"fire_id": "x"})
        publisher.publish("trade_executed", {"fire_id": "f1"})
        assert publisher.flush(PATIENCE)
        assert publisher.stats()["rejected"] == {"ingest.topic_denied": 1}
    stats = runtime.stats()
    assert (stats["bus"]["stored"], stats["bus"]["unexplained"]) == (2, 0)


def test_a_publisher_with_another_key_or_none_gets_nowhere_and_harms_nobody(remote):
    runtime, keys, ports, _ = remote
    endpoint = f"tcp://127.0.0.1:{ports[2]}"
    for key in (keys["stranger"], None):
        publisher = Publisher("stranger", endpoint, key=key)
        publisher.publish("market_data", quote(1))
        assert not publisher.flush(0.5)
        assert publisher.stats()["connected"] is False
        publisher.close()
    assert runtime.stats()["bus"]["received"] == 0
    with Publisher("mt5", endpoint, key=keys["mt5"]) as publisher:
        publisher.publish("market_data", quote(1))
        assert publisher.flush(PATIENCE)


def test_the_key_of_a_publisher_comes_from_the_environment_for_a_bus_elsewhere_only(remote, monkeypatch):
    _, keys, ports, _ = remote
    monkeypatch.setenv("TAPEBUS_KEY", keys["mt5"])
    assert Publisher("x", f"tcp://10.0.0.1:{ports[2]}")._keys == client_keys(keys["mt5"])
    assert Publisher("x", f"tcp://127.0.0.1:{ports[2]}")._keys is None
    monkeypatch.setenv("TAPEBUS_KEY", "/does/not/exist")
    with pytest.raises(ConfigError, match="/does/not/exist"):
        Publisher("x", "tcp://10.0.0.1:1")


def test_a_remote_subscriber_sees_what_it_may_read_however_much_it_asks_for(remote):
    runtime, keys, ports, _ = remote
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.linger, socket.rcvtimeo = 0, int(PATIENCE * 1000)
        as_client(socket, client_keys(keys["mt5"]))
        socket.subscribe(b"")
        socket.connect(f"tcp://127.0.0.1:{ports[0]}")
        wait_until(lambda: runtime.feed._subscriptions, "the subscription")
        for n in range(3):
            runtime.publish("market_data", quote(n))
            runtime.publish("signal_expired", {"signal_id": f"s{n}"})
        topics = [socket.recv_multipart()[0] for _ in range(3)]
        assert topics == [b"bitten.signal_expired"] * 3
        assert socket.poll(0) == 0


def test_the_commands_publish_and_tail_work_with_a_key(remote, capsys):
    runtime, keys, ports, file = remote
    tail = subprocess.Popen(
        [sys.executable, "-m", "tapebus", "tail", "--feed", f"tcp://127.0.0.1:{ports[0]}", "--key", keys["mt5"]],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: runtime.feed._subscriptions, "the subscription")
        given = ["--endpoint", f"tcp://127.0.0.1:{ports[2]}", "--key", keys["mt5"]]
        assert main(["publish", "market_data", "symbol=EURUSD", "bid=1.1", "ask=1.2", *given]) == 0
        assert main(["publish", "signal_expired", "signal_id=s1", *given]) == 1
        assert "1 refused by the bus (ingest.topic_denied 1)" in capsys.readouterr().err
        assert main(["--config", str(file), "publish", "signal_expired", "signal_id=s2"]) == 0, "the owner, over ipc"
        assert '"signal_id":"s2"' in tail.stdout.readline()
        given[-1] = keys["stranger"]
        assert main(["publish", "market_data", "symbol=A", *given, "--timeout", "0.5"]) == 1
        assert "check that it knows your key" in capsys.readouterr().err
    finally:
        tail.kill()
        tail.communicate()


def test_keygen_makes_the_key_that_the_configuration_asks_for(tmp_path, capsys):
    file = tmp_path / "tapebus.toml"
    file.write_text("[bus]\ndata_dir='tape'\n[listen]\nacked='tcp://0.0.0.0:5573'\n")
    assert main(["--config", str(file), "check"]) == 78
    assert main(["--config", str(file), "keygen", "bus"]) == 0
    assert (tmp_path / "tape" / "keys" / "bus.key_secret").exists()


def test_keygen_writes_into_the_data_directory_or_where_it_is_told(tmp_path, capsys):
    assert main(["--data-dir", str(tmp_path / "d"), "keygen", "bus"]) == 0
    secret = tmp_path / "d" / "keys" / "bus.key_secret"
    assert str(secret) in capsys.readouterr().out
    assert stat.S_IMODE(secret.parent.stat().st_mode) == 0o700
    assert main(["keygen", "mt5", "--dir", str(tmp_path), "--server", str(secret.with_suffix(".key"))]) == 0
    assert client_keys(tmp_path / "mt5.key_secret").server == server_keys({"file": str(secret)}).public
    assert main(["keygen", "mt5", "--dir", str(tmp_path)]) == 2
    assert main(["keygen", "x", "--dir", str(tmp_path), "--server", "nothing"]) == 78
    out = capsys.readouterr()
    assert secret.read_text().split('secret-key = "')[1][:40] not in out.out + out.err


def test_the_door_lets_go_of_its_context(data_dir):
    before = threading.active_count()
    gate = Gate("curve", data_dir, Identity("me", publish=["a"]))
    gate.close()
    assert threading.active_count() <= before
