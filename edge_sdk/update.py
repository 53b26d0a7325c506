"""Another bundle on a device that runs: the server's announced one, fetched part by part, or the store's current one.

Nothing changes before the whole bundle is here and good: signed, whole, what was announced, computing on this machine
what was recorded, fit for this device's samples. Then the store changes in one step, and the device's state in another.
A device that stops between the two goes on with the store's bundle at its next start (``SqliteState``'s ``related``).
"""

from __future__ import annotations

import errno
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from edge_sdk.bundle import Bundle
from edge_sdk.bundle_store import BundleStore
from edge_sdk.errors import BundleError, ConfigError, RefusedError, StateError, TransportError
from edge_sdk.logs import log, warn
from edge_sdk.signing import PublicKey
from edge_sdk.state import OutboxStep
from edge_sdk.station import Loaded, Station
from edge_sdk.wire import Message

__all__ = ["PART_BYTES", "Updater", "Updates"]

PART_BYTES = 61440
"""Of one part: with its envelope below the default chunk, and on a slow link there before the question is repeated."""

_TELLS = 10  # how often the log says how far a fetch is
_RETRY_S = 300.0  # after which a disk that refused is tried again


@dataclass(frozen=True)
class Updates:
    """Where a device's bundles come from while it runs.

    Attributes:
        store: its current bundle is the one to run.
        public_key: of who signs bundles; None: no signature is asked for.
        follow: fetch the bundle that the server announces. A bundle is a program: this needs ``public_key``.
        max_bytes: of a bundle that is fetched.

    Raises:
        ConfigError: ``follow`` without a key, or a limit that is not positive.
    """

    store: BundleStore
    public_key: PublicKey | None = None
    follow: bool = False
    max_bytes: float = 64e6

    def __post_init__(self) -> None:
        if self.follow and self.public_key is None:
            raise ConfigError("a bundle is a program: --update needs --public-key (or PSGL_PUBLIC_KEY)")
        if not 0 < self.max_bytes < math.inf:
            raise ConfigError(f"a bundle of at most {self.max_bytes} bytes: give a positive number")


@dataclass
class _Fetch:
    """A bundle that is under way.

    Attributes:
        goal: id of the bundle and of the server's life; parts of two lives are not mixed.
        file: what has come, without a name in the store's folder: it goes with the process, whatever happens.
        total: bytes of the whole, 0 while no part has come.
        asked: number of the step that waits for its part.
    """

    goal: tuple[str, str]
    file: IO[bytes]
    total: int = 0
    asked: int | None = None


class Updater:
    """Changes the bundle of a device that runs.

    Args:
        station: the device's parts.
        updates: where bundles come from.
    """

    def __init__(self, station: Station, updates: Updates) -> None:
        self._station = station
        self._updates = updates
        self._fetch: _Fetch | None = None
        self._refused: tuple[tuple[str, str], str, float] | None = None

    def advance(self, wait_s: float) -> str:
        """Come one step nearer to the bundle that the server announces; to be called again until it runs here.

        Args:
            wait_s: how long to wait for a part.

        Returns:
            Empty, or why this device will not follow that announcement. It is not fetched again until the server is
            another, or announces another; where the store's disk refused, for five minutes.

        Raises:
            StateError: the disk refuses the device's state.
            TransportError: the server was silent for long.
        """
        plan = self._station.plan
        goal = plan.bundle, plan.server
        if not self._updates.follow:
            return "start it with --update to follow"
        if self._refused is not None and self._refused[0] == goal and time.monotonic() < self._refused[2]:
            return self._refused[1]
        loaded: list[Loaded] = []

        def check(bundle: Bundle) -> None:
            if bundle.id != plan.bundle:
                raise BundleError(f"it is bundle {bundle.id}, not the announced {plan.bundle}: look at the server")
            loaded.append(self._station.replacement(bundle))

        try:
            if not self._held(plan.bundle, check):
                file = self._fetched(goal, wait_s)
                if file is None:
                    return ""
                self._updates.store.install(file, public_key=self._updates.public_key, check=check)
        except StateError as exc:
            return self._refuse(goal, str(exc), time.monotonic() + _RETRY_S)
        except (BundleError, RefusedError) as exc:
            return self._refuse(goal, str(exc), math.inf)
        self.drop()
        self._switch(loaded[-1])
        return ""

    @property
    def under_way(self) -> bool:
        """Whether a part is waited for."""
        return self._fetch is not None and self._fetch.asked is not None

    def reload(self) -> None:
        """Run the store's current bundle from now on, which was installed or rolled back by hand.

        A device that follows its server keeps the bundle that the server announces.

        Raises:
            StateError: the disk refuses the device's state.
        """
        running = self._station.bundle.id
        try:
            bundle = self._updates.store.load(public_key=self._updates.public_key)
            if bundle.id == running:
                log("reload", bundle=running, why="this bundle runs already")
                return
            plan = self._station.exchange.plan
            if self._updates.follow and plan is not None and plan.bundle == running:
                raise BundleError("the server announces it, and --update follows the server")
            loaded = self._station.replacement(bundle)
        except (BundleError, StateError) as exc:
            warn("reload", bundle=running, why=f"this bundle goes on: {exc}")
            return
        self.drop()
        self._switch(loaded)

    def drop(self) -> None:
        """Forget what is under way."""
        fetch, self._fetch = self._fetch, None
        if fetch is not None:
            fetch.file.close()
            self._forget_question(fetch)

    def _held(self, bundle: str, check: Callable[[Bundle], None]) -> bool:
        """Make a bundle current that the store holds; False where it does not."""
        store, key = self._updates.store, self._updates.public_key
        current, previous = store.names()
        if bundle == current:
            check(store.load(public_key=key))
        elif bundle == previous:
            store.rollback(public_key=key, check=check)
        else:
            return False
        return True

    def _fetched(self, goal: tuple[str, str], wait_s: float) -> IO[bytes] | None:
        """The announced bundle's bytes, once all have come.

        Raises:
            BundleError, RefusedError: it is not to be had.
            StateError: the store's folder cannot be written.
            TransportError: the server was silent for long.
        """
        if self._fetch is not None and self._fetch.goal != goal:
            self.drop()
        if self._fetch is None:
            log("fetching", bundle=goal[0])
            self._fetch = _Fetch(goal, self._new_file())
        fetch, exchange = self._fetch, self._station.exchange
        try:
            if fetch.asked is None:
                self._ask(fetch)
                return None
            reply = exchange.reply_to(fetch.asked, wait_s)
            if reply is not None:
                self._take(fetch, reply.message)
            elif fetch.asked in exchange.waiting:
                return None
            if fetch.total and fetch.file.tell() == fetch.total:
                fetch.file.seek(0)
                return fetch.file
            self._ask(fetch)  # for the next part; or for the same one, on another connection
            return None
        except TransportError:
            self._forget_question(fetch)
            raise

    def _ask(self, fetch: _Fetch) -> None:
        station = self._station
        fields = {"bundle": fetch.goal[0], "first": fetch.file.tell(), "most": PART_BYTES}
        message = station.message("fetch", fields, {})
        fetch.asked = message.step
        station.exchange.send(OutboxStep(message.step, "fetch", station.frames(message)))

    def _forget_question(self, fetch: _Fetch) -> None:
        if fetch.asked is not None:
            self._station.exchange.forget([fetch.asked])
            fetch.asked = None

    def _take(self, fetch: _Fetch, message: Message) -> None:
        """Add a part that fits to what has come."""
        if message.kind != "part":
            raise BundleError(f"the server answered with {message.kind!r}: compare the versions of psgl")
        part, total, first = message.tensors["part"], int(message.fields["total"]), fetch.file.tell()
        if total > self._updates.max_bytes:
            raise BundleError(f"it has {total} bytes, this device takes {self._updates.max_bytes:.0f}: see --update-mb")
        expected = (fetch.goal[0], first, fetch.total or total)
        stated = (message.fields["bundle"], message.fields["first"], total)
        if stated != expected or len(part) > min(PART_BYTES, total - first):
            raise BundleError("the server's parts contradict each other: compare the versions of psgl")
        self._station.exchange.pay(len(part))
        try:
            if fetch.file.write(part.data) < len(part):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as exc:
            raise StateError(f"{self._updates.store.folder} cannot be written: {exc.strerror or exc}") from exc
        fetch.total = total
        if first * _TELLS // total < (first + len(part)) * _TELLS // total:
            log("fetching", bundle=fetch.goal[0], fetched=first + len(part), total=total)

    def _new_file(self) -> IO[bytes]:
        folder = self._updates.store.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryFile(dir=folder, buffering=0)
        except OSError as exc:
            raise StateError(f"{folder} cannot be written: {exc.strerror or exc}") from exc

    def _refuse(self, goal: tuple[str, str], why: str, until_s: float) -> str:
        self.drop()
        self._refused = goal, f"bundle {goal[0]} was refused: {why}", until_s
        warn("update-refused", bundle=goal[0], why=why)
        self._station.exchange.note(update=self._refused[1])
        return self._refused[1]

    def _switch(self, loaded: Loaded) -> None:
        station = self._station
        before, sent = station.bundle.id, station.count("samples_sent")
        station.switch(loaded)
        log("switched", bundle=loaded.bundle.id, samples=sent, why=f"it takes the place of {before}")
        station.exchange.note(update="")
