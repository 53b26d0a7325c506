"""Bundles on a device: the current one and the one before, changed in one step that a crash cannot split.

A store is a folder::

    <id>.psgl     bundles, each under its id
    state         a link to a folder "set-<n>", which is what an install or rollback replaces, by one rename
    set-<n>/      current, previous: links to bundles
    current       a link to state/current, made once: the path to run

Each step leaves either the state before or the state after, whatever the instant at which the power goes: bundles and
sets are written and synced before the link to them moves (POSIX ``rename`` replaces atomically), and what nothing
points at is removed only afterwards, by this install or the next.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO

from edge_sdk.bundle import Bundle, load_bundle
from edge_sdk.errors import BundleError, StateError
from edge_sdk.signing import PublicKey
from edge_sdk.verification import verify

__all__ = ["BundleStore"]

_BUNDLE = re.compile(r"[0-9a-f]{32}\.psgl")
_SET = re.compile(r"set-([0-9]{1,9})")
_NEW = ".new"


class BundleStore:
    """A folder with the current bundle of a device and the one before.

    Args:
        folder: made where it does not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    @property
    def current(self) -> Path:
        """Path of the current bundle; it stays the same from install to install."""
        return self._folder / "current"

    def names(self) -> tuple[str | None, str | None]:
        """Ids of the current bundle and of the one before, None where there is none."""
        current, previous = (self._linked(name) for name in ("current", "previous"))
        return current and current.removesuffix(".psgl"), previous and previous.removesuffix(".psgl")

    @property
    def folder(self) -> Path:
        """The folder; it may not exist yet."""
        return self._folder

    def load(self, *, public_key: PublicKey | None = None) -> Bundle:
        """Read the current bundle.

        Raises:
            BundleError: there is none, or it must not be used.
        """
        if self.names()[0] is None:
            raise BundleError(
                f"the store {self._folder} holds no bundle: psgl-edge install net.psgl --store {self._folder}"
            )
        return load_bundle(self.current, public_key=public_key)

    def install(
        self,
        source: str | Path | IO[bytes],
        *,
        public_key: PublicKey | None = None,
        check: Callable[[Bundle], None] = lambda bundle: None,
    ) -> Bundle:
        """Verify a bundle and make it the current one; the current one becomes the previous one.

        The bundle is copied first and the copy is verified, so that what is checked is what will run: signature,
        hashes, and the parity vectors on this machine. To install the current one again changes nothing.

        Args:
            source: the bundle: its path, or a file that is open for reading.
            public_key: of who signs bundles, or None: no signature is asked for.
            check: called with the bundle before it is made current; whatever it raises leaves everything as it was.

        Returns:
            The bundle.

        Raises:
            BundleError: it must not be used, or does not compute here what was recorded; nothing has changed.
            StateError: the store cannot be written; nothing has changed.
        """
        with self._held():
            fresh = self._folder / f"bundle{_NEW}"
            _copy(source, fresh)
            bundle = load_bundle(fresh, public_key=public_key)
            found = verify(bundle, runs=1)
            if not found.passed:
                failed = ", ".join(each.graph for each in found.checks if not each.passed)
                what = source if isinstance(source, str | Path) else f"bundle {bundle.id}"
                raise BundleError(
                    f"{what} does not compute on this machine what was recorded at export (graph {failed}): "
                    "psgl-edge verify says by how much; upgrade onnxruntime or export the bundle again"
                )
            check(bundle)
            name = f"{bundle.id}.psgl"
            fresh.replace(self._folder / name)
            _sync(self._folder)
            before = self._linked("current")
            if before != name:
                self._switch(name, before)
            self._make_entrance()
            self._tidy()
        return bundle

    def rollback(
        self,
        *,
        public_key: PublicKey | None = None,
        check: Callable[[Bundle], None] = lambda bundle: None,
    ) -> Bundle:
        """Make the previous bundle current and the current one previous.

        Args:
            public_key, check: as for ``install``.

        Returns:
            The bundle that is current now.

        Raises:
            BundleError: there is no previous bundle, or it must not be used; nothing has changed.
            StateError: the store cannot be written; nothing has changed.
        """
        with self._held():
            current, previous = self._linked("current"), self._linked("previous")
            if current is None or previous is None:
                raise BundleError(f"{self._folder} holds no bundle before the current one: install one instead")
            bundle = load_bundle(self._folder / previous, public_key=public_key)
            if f"{bundle.id}.psgl" != previous:
                raise BundleError(f"{self._folder / previous} is another bundle than its name says: install it again")
            check(bundle)
            self._switch(previous, current)
            self._make_entrance()
            self._tidy()
        return bundle

    def _linked(self, name: str) -> str | None:
        """File name of the bundle that a link of the present set points at."""
        try:
            target = (self._folder / "state" / name).readlink().name
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise StateError(f"the store {self._folder} cannot be read: {exc.strerror or exc}") from exc
        if not _BUNDLE.fullmatch(target):
            raise StateError(f"{self._folder / 'state' / name} is no link of a store: move the folder away and install")
        return target

    def _switch(self, current: str, previous: str | None) -> None:
        """Write a new set, then let the one link point at it."""
        numbers = [int(match[1]) for entry in self._folder.iterdir() if (match := _SET.fullmatch(entry.name))]
        made = self._folder / f"set-{max(numbers, default=0) + 1}"
        made.mkdir()
        (made / "current").symlink_to(Path("..") / current)
        if previous is not None:
            (made / "previous").symlink_to(Path("..") / previous)
        _sync(made)
        _sync(self._folder)
        self._link("state", made.name)

    def _make_entrance(self) -> None:
        if not self.current.is_symlink():
            self._link("current", "state/current")

    def _link(self, name: str, target: str) -> None:
        fresh = self._folder / f"{name}{_NEW}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        fresh.replace(self._folder / name)
        _sync(self._folder)

    def _tidy(self) -> None:
        """Remove what nothing points at; what cannot be removed now is removed by the next install."""
        present = str((self._folder / "state").readlink())
        kept = {self._linked("current"), self._linked("previous")}
        for entry in list(self._folder.iterdir()):
            with suppress(OSError):
                if _SET.fullmatch(entry.name) and entry.name != present:
                    shutil.rmtree(entry)
                elif (_BUNDLE.fullmatch(entry.name) and entry.name not in kept) or entry.name.endswith(_NEW):
                    entry.unlink()

    @contextmanager
    def _held(self) -> Iterator[None]:
        """One install at a time; what the disk refuses becomes a StateError."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield
            finally:
                os.close(lock)
        except BlockingIOError as exc:
            raise StateError(f"another program changes the store {self._folder}: wait for it") from exc
        except OSError as exc:
            raise StateError(f"the store {self._folder} cannot be written: {exc.strerror or exc}") from exc


def _copy(source: str | Path | IO[bytes], target: Path) -> None:
    with _opened(source) as stream, target.open("wb") as copy:
        shutil.copyfileobj(stream, copy)
        copy.flush()
        os.fsync(copy.fileno())


def _opened(source: str | Path | IO[bytes]) -> AbstractContextManager[IO[bytes]]:
    """The bundle's bytes; a file that was given open stays so."""
    if not isinstance(source, str | Path):
        return nullcontext(source)
    try:
        return Path(source).open("rb")
    except FileNotFoundError as exc:
        raise BundleError(f"there is no bundle at {source}: make one with psgl-export build") from exc
    except OSError as exc:
        raise BundleError(f"{source} cannot be read: {exc.strerror or exc}") from exc


def _sync(folder: Path) -> None:
    """Wait until the disk has a folder's entries."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
