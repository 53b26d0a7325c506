"""A device takes over the bundle that its server announces, whole and good, or keeps its own and says why."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk import topics, update
from edge_sdk.budget import Budget
from edge_sdk.bundle import MANIFEST, Bundle, load_bundle, write_bundle
from edge_sdk.bundle_store import BundleStore
from edge_sdk.cli import run_parser
from edge_sdk.client import EdgeClient
from edge_sdk.errors import ConfigError, RefusedError, StateError, TransportError
from edge_sdk.front import Front, FrontState
from edge_sdk.memory_transport import MemoryBroker, MemoryTransport
from edge_sdk.run_options import open_state, read_bundle
from edge_sdk.signing import PublicKey, SigningKey, generate
from edge_sdk.sources import array_windows
from edge_sdk.state import DEVICE, MemoryState, OutboxStep
from edge_sdk.update import PART_BYTES, Updates
from edge_sdk.wire import Message, encode
from tests.edge_sdk.test_client import decision_for, scripted_server
from tests.edge_sdk.test_streaming import Sensor, until

X = np.random.default_rng(1).random((2, 1, 8, 8), np.float32)
Answer = Callable[[Message, int], list[Message]]


@dataclass(frozen=True)
class Made:
    """A bundle's file."""

    path: Path
    bundle: Bundle
    data: bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("signed")
    generate(made / "key.pem")
    generate(made / "stranger.pem")
    return made


@pytest.fixture(scope="module")
def made(built: dict[str, Any], folder: Path) -> dict[str, Made]:
    """Bundles by name, each signed if not told otherwise; ``b`` has parts enough."""
    origin = built["paper"]
    with zipfile.ZipFile(origin.path) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name != MANIFEST}
    found = {}
    for name, key, changes in (
        ("a", "key", {"learning_rate": 0.01}),
        ("b", "key", {"learning_rate": 0.02}),
        ("other", "key", {"learning_rate": 0.03}),
        ("unsigned", None, {"learning_rate": 0.04}),
        ("strange", "stranger", {"learning_rate": 0.05}),
        ("classes", "key", {"classes": ("x", "y", "z")}),
    ):
        path, signer = folder / f"{name}.psgl", key and SigningKey(folder / f"{key}.pem")
        write_bundle(path, replace(origin.bundle.manifest, **changes), files, sign_key=signer)
        found[name] = Made(path, load_bundle(path), path.read_bytes())
    assert len(found["b"].data) > PART_BYTES
    return found


@pytest.fixture
def store(made: dict[str, Made], tmp_path: Path) -> BundleStore:
    """Its current bundle is ``a``."""
    one = BundleStore(tmp_path / "store")
    one.install(made["a"].path)
    return one


def part_of(message: Message, data: bytes, **changes: Any) -> Message:
    first = message.fields["first"]
    part = np.frombuffer(data[first : first + message.fields["most"]], np.uint8)
    fields = {"bundle": message.fields["bundle"], "first": first, "total": len(data)} | changes
    return Message("part", message.run, message.session, message.step, fields, {"part": part})


def handing_out(data: bytes) -> Answer:
    return lambda m, n: [part_of(m, data) if m.kind == "fetch" else decision_for(m)]


def client_of(
    broker: MemoryBroker, bundle: Bundle, store: BundleStore, folder: Path, *, most: float = 64e6, **options: Any
) -> EdgeClient:
    options = {"resend_s": 0.05, "give_up_s": 10.0, "decision_s": 5.0} | options
    updates = Updates(store, PublicKey(folder / "key.pub.pem"), True, most)
    return EdgeClient(
        bundle, lambda: MemoryTransport(broker, "d1"), device="d1", fleet="ward", updates=updates, **options
    )


def test_a_device_follows_the_announcement(made: dict[str, Made], store: BundleStore, folder: Path) -> None:
    broker, new = MemoryBroker(), made["b"]
    state = MemoryState(FrontState(7, dict(made["a"].bundle.initial)))
    state.begin(OutboxStep(state.next_step(), "store", (b"old",)))
    session, key = state.session, state.noise_key
    with scripted_server(broker, new.bundle.id, handing_out(new.data)) as seen:
        with client_of(broker, made["a"].bundle, store, folder, state=state) as client:
            client.start(wait_s=5)
            decision = client.infer(X)
    assert client.bundle.id == new.bundle.id and store.names() == (new.bundle.id, made["a"].bundle.id)
    assert decision.by == "server"
    fetched = [message.fields["first"] for message in seen if message.kind == "fetch"]
    assert fetched == list(range(0, len(new.data), PART_BYTES))
    assert (state.outbox, state.front.version, state.session, state.noise_key) == ((), 0, session, key)
    assert {message.kind for message in seen} == {"fetch", "infer"}, "the old outbox is never sent"
    assert not any(path.name.startswith("tmp") for path in store.folder.iterdir())


def test_noise_is_of_one_bundle(built: dict[str, Any]) -> None:
    noisy = built["hardened"].bundle
    again = replace(noisy, id="0" * 32)
    sent = []
    for bundle in (noisy, again, noisy):
        front = Front(bundle, noise_key=bytes(32))
        sent.append(front.forward(front.initial_state(), X, None, training=False).activations)
    assert np.array_equal(sent[0], sent[2]) and not np.array_equal(sent[0], sent[1])


@pytest.mark.parametrize(
    ("name", "serve", "why"),
    [
        ("unsigned", None, "is not signed"),
        ("strange", None, "was not signed with the key"),
        ("b", lambda m, made: [part_of(m, made["other"].data)], "not the announced"),
        ("b", lambda m, made: [part_of(m, made["b"].data[:-200])], "not a whole bundle"),
        ("b", lambda m, made: [part_of(m, made["b"].data, total=len(made["b"].data) + m.step)], "contradict"),
        ("b", lambda m, made: [part_of(m, made["b"].data, first=1)], "contradict"),
        ("b", lambda m, made: [part_of(m, made["b"].data, bundle="x")], "contradict"),
        ("b", lambda m, made: [part_of(m, made["b"].data, total=5)], "contradict"),
        ("b", lambda m, made: [part_of(m, made["b"].data, total=65_000_000)], "see --update-mb"),
        ("b", lambda m, made: [Message("stored", m.run, m.session, m.step, {"samples": 1})], "answered with 'stored'"),
        ("b", lambda m, made: [Message("refused", m.run, m.session, m.step, {"reason": "kind"})], r"\(kind\)"),
        ("classes", None, "has classes .* start the device anew"),
    ],
)
def test_what_must_not_run_is_refused_once_and_the_guide_goes_on(
    name: str, serve: Any, why: str, made: dict[str, Made], store: BundleStore, folder: Path
) -> None:
    broker, new, before = MemoryBroker(), made[name], made["a"].bundle

    def answer(message: Message, copy: int) -> list[Message]:
        found: list[Message] = serve(message, made) if serve else [part_of(message, new.data)]
        return found

    with scripted_server(broker, new.bundle.id, answer) as seen:
        with client_of(broker, before, store, folder) as client:
            with pytest.raises(RefusedError, match=why) as caught:
                client.start(wait_s=5)
            assert caught.value.reason == "bundle" and new.bundle.id in str(caught.value)
            asked = len(seen)
            with pytest.raises(RefusedError, match=why):
                client.start(wait_s=5)
            decision = client.infer(X)
            told = client.station.exchange._status["update"]
        assert len(seen) == asked, "it is not fetched again"
    assert (decision.by, decision.why) == ("guide", "no-server")
    assert new.bundle.id in told
    assert client.bundle is before and store.names() == (before.id, None)
    assert load_bundle(store.current).id == before.id


def test_a_server_that_goes_in_the_middle_and_comes_back(
    made: dict[str, Made], store: BundleStore, folder: Path
) -> None:
    broker, new = MemoryBroker(), made["b"]

    def silent(message: Message, copy: int) -> list[Message]:
        return [part_of(message, new.data)] if not message.fields["first"] else []

    with client_of(broker, made["a"].bundle, store, folder, give_up_s=0.3) as client:
        with scripted_server(broker, new.bundle.id, silent) as seen:
            with pytest.raises(TransportError, match="no reply"):
                client.start(wait_s=5)
            assert client.bundle.id == made["a"].bundle.id and len(seen) >= 3
        with scripted_server(broker, new.bundle.id, handing_out(new.data)) as seen:
            client.start(wait_s=5)
            assert client.bundle.id == new.bundle.id
        assert seen[-1].fields["first"] == PART_BYTES, "what has come is not fetched again"


def test_another_life_of_the_server_is_fetched_from_the_start_and_asked_again(
    made: dict[str, Made], store: BundleStore, folder: Path
) -> None:
    broker, new = MemoryBroker(), made["b"]
    life = MemoryTransport(broker, "announcer")
    life.open(None)
    half = handing_out(new.data[:PART_BYTES] + bytes(len(new.data) - PART_BYTES))
    with client_of(broker, made["a"].bundle, store, folder) as client:
        with scripted_server(broker, new.bundle.id, half):
            with pytest.raises(RefusedError, match="refused"):
                client.start(wait_s=5)
        with scripted_server(broker, new.bundle.id, handing_out(new.data)) as seen:
            fields = {"bundle": new.bundle.id, "status": "training", "rounds": 4, "evaluate_every": 0, "batch": 6}
            (frame,) = encode(Message("model", "run-1", "", 0, {**fields, "server": "second"}))
            life.publish(topics.down_model("ward"), frame, retain=True)
            until(lambda: client.look() or client.bundle.id == new.bundle.id)
            assert seen[0].fields["first"] == 0
    life.close()


def test_the_bundle_before_is_not_fetched(made: dict[str, Made], store: BundleStore, folder: Path) -> None:
    broker = MemoryBroker()
    store.install(made["b"].path)
    with scripted_server(broker, made["a"].bundle.id, lambda m, n: []) as seen:
        with client_of(broker, made["b"].bundle, store, folder) as client:
            client.start(wait_s=5)
    assert client.bundle.id == made["a"].bundle.id and seen == []
    assert store.names() == (made["a"].bundle.id, made["b"].bundle.id)


class Full:
    """A file on a disk without room."""

    def __init__(self, **options: Any) -> None:
        pass

    def tell(self) -> int:
        return 0

    def write(self, data: bytes) -> int:
        return 0

    def close(self) -> None:
        pass


def read_only(**options: Any) -> Any:
    raise OSError(30, "Read-only file system")


@pytest.mark.parametrize(("file", "why"), [(Full, "No space left"), (read_only, "Read-only file system")])
def test_a_store_that_takes_nothing_leaves_the_device_as_it_is(
    file: Any, why: str, made: dict[str, Made], store: BundleStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, new = MemoryBroker(), made["b"]
    monkeypatch.setattr(tempfile, "TemporaryFile", file)
    with scripted_server(broker, new.bundle.id, handing_out(new.data)):
        with client_of(broker, made["a"].bundle, store, folder) as client:
            with pytest.raises(RefusedError, match=why):
                client.start(wait_s=5)
            assert client.infer(X).by == "guide"
    assert store.names() == (made["a"].bundle.id, None)


def test_a_store_that_has_room_again_takes_the_bundle(
    made: dict[str, Made], store: BundleStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, new = MemoryBroker(), made["b"]
    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    monkeypatch.setattr(update, "_RETRY_S", 0.0)
    with scripted_server(broker, new.bundle.id, handing_out(new.data)):
        with client_of(broker, made["a"].bundle, store, folder) as client:
            with pytest.raises(RefusedError, match="No space left"):
                client.start(wait_s=5)
            monkeypatch.undo()
            client.start(wait_s=5)
            assert client.bundle.id == new.bundle.id and client.station.exchange._status["update"] == ""


def test_a_state_that_takes_nothing_leaves_the_old_bundle_running(
    made: dict[str, Made], store: BundleStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, new = MemoryBroker(), made["b"]
    state = MemoryState(FrontState(0, dict(made["a"].bundle.initial)))

    def refuse(*arguments: Any) -> None:
        raise StateError("the disk is full")

    monkeypatch.setattr(state, "change_bundle", refuse)
    with scripted_server(broker, new.bundle.id, handing_out(new.data)):
        with client_of(broker, made["a"].bundle, store, folder, state=state) as client:
            with pytest.raises(StateError, match="the disk is full"):
                client.start(wait_s=5)
    assert client.bundle.id == made["a"].bundle.id and store.names()[0] == new.bundle.id, "the next start ends it"


def test_what_is_fetched_is_paid_from_the_budget(made: dict[str, Made], store: BundleStore, folder: Path) -> None:
    broker, new = MemoryBroker(), made["b"]
    state = MemoryState(FrontState(0, dict(made["a"].bundle.initial)))
    budget = Budget(max_bytes_per_hour=60_000_000)
    with scripted_server(broker, new.bundle.id, handing_out(new.data)):
        with client_of(broker, made["a"].bundle, store, folder, state=state, budget=budget) as client:
            client.start(wait_s=5)
    assert state.counters[f"{DEVICE}allowance"] <= 10_000_000 - len(new.data) + 50_000, "some came back meanwhile"


def test_a_decision_never_waits_for_a_fetch(made: dict[str, Made], store: BundleStore, folder: Path) -> None:
    broker, new = MemoryBroker(), made["b"]
    with scripted_server(broker, new.bundle.id, lambda m, n: []):
        with client_of(broker, made["a"].bundle, store, folder) as client:
            client.wake(5)
            assert [client.infer(X).by for _ in range(5)] == ["guide"] * 5
            assert client.updating


def test_a_device_that_connects_now_and_then_stays_until_the_bundle_is_here(
    made: dict[str, Made], store: BundleStore, folder: Path
) -> None:
    broker, new, opened = MemoryBroker(), made["b"], []
    updates = Updates(store, PublicKey(folder / "key.pub.pem"), follow=True)

    def transport() -> MemoryTransport:
        opened.append(MemoryTransport(broker, "d1"))
        return opened[-1]

    sensor = Sensor()
    sensor.send(*array_windows(X[:1]))
    with scripted_server(broker, new.bundle.id, handing_out(new.data)):
        client = EdgeClient(
            made["a"].bundle,
            transport,
            device="d1",
            fleet="ward",
            updates=updates,
            budget=Budget(connect_every_s=0.1),
            on_turn=lambda: sensor.end() if client.bundle.id == new.bundle.id else None,
        )
        with client:
            decisions = list(client.stream(sensor))
    assert [each.by for each in decisions] == ["guide"] and len(opened) == 1


def test_a_device_that_stopped_between_the_stores_change_and_the_states_goes_on(
    made: dict[str, Made], store: BundleStore, tmp_path: Path
) -> None:
    line = ["--store", str(store.folder), "--device", "d1", "--state", str(tmp_path / "d1.sqlite")]
    arguments, notes = run_parser().parse_args(line), list[str]()

    def start() -> tuple[str, str]:
        bundle = read_bundle(arguments)
        with closing(open_state(arguments, bundle, on_note=notes.append)) as state:
            state.begin_run(f"run of {bundle.id}", state.front)
            return bundle.id, state.session

    first = start()
    store.install(made["b"].path)
    second = start()
    store.rollback()
    third = start()
    assert [first[0], second[0], third[0]] == [made[name].bundle.id for name in "aba"]
    assert first[1] == second[1] == third[1] and len(notes) == 2
    store.install(made["b"].path)
    store.install(made["other"].path)
    with pytest.raises(StateError, match="belongs to bundle"):
        start()


def test_following_needs_a_key(store: BundleStore) -> None:
    with pytest.raises(ConfigError, match="a bundle is a program: --update needs --public-key"):
        Updates(store, follow=True)
    with pytest.raises(ConfigError, match="give a positive number"):
        Updates(store, max_bytes=float("nan"))


def test_reload_keeps_what_the_server_announces(made: dict[str, Made], store: BundleStore, folder: Path) -> None:
    broker = MemoryBroker()
    with scripted_server(broker, made["a"].bundle.id, handing_out(b"")):
        with client_of(broker, made["a"].bundle, store, folder) as client:
            client.start(wait_s=5)
            store.install(made["b"].path)
            client.reload()
            client.turn()
            assert client.bundle.id == made["a"].bundle.id and client.infer(X).by == "server"


def test_reload_refuses_what_does_not_fit(made: dict[str, Made], store: BundleStore, folder: Path) -> None:
    with client_of(MemoryBroker(), made["a"].bundle, store, folder) as client:
        store.install(made["classes"].path)
        client.reload()
        client.turn()
        assert client.bundle.id == made["a"].bundle.id
        store.install(made["b"].path)
        client.turn()
        assert client.bundle.id == made["a"].bundle.id, "once asked, once done"
        client.reload()
        client.turn()
        assert client.bundle.id == made["b"].bundle.id
