"""EdgeClient, the device's public face: it composes the stations between a sensor batch and the front's update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

import numpy.typing as npt

from edge_sdk import steps, storing
from edge_sdk.backlog import Backlog, BacklogLimits
from edge_sdk.budget import Allowance, Budget
from edge_sdk.bundle import Bundle
from edge_sdk.decisions import Absence, Decision, decide, question, without_server
from edge_sdk.errors import ConfigError, RefusedError, TransportError
from edge_sdk.exchange import Exchange
from edge_sdk.figures import Figures
from edge_sdk.front import Front, FrontState
from edge_sdk.logs import log
from edge_sdk.plan import Plan
from edge_sdk.presence import Presence
from edge_sdk.state import MemoryState, State
from edge_sdk.station import Loaded, Station
from edge_sdk.status import Condition, Status
from edge_sdk.steps import TrainStep
from edge_sdk.streaming import WindowDecider, WindowDecision
from edge_sdk.transport import Connection, Transport
from edge_sdk.update import Updater, Updates
from edge_sdk.windows import Windowing

__all__ = ["EdgeClient"]


class EdgeClient(Figures):
    """A device in a fleet: trains its front layers and asks for decisions over a transport.

    Whatever stops the device, the next client on the same state goes on where it was: a step that waits for its reply
    is sent again, byte for byte, before anything new.

    Args:
        bundle: what export made.
        transport: how the broker is reached: a ``Connection``, or a function that makes a transport; then the client
            connects when it needs to, in the background, and may be started again after ``stop``. Or a transport (a
            ``PahoTransport``, a ``MemoryTransport`` in tests), which serves from ``start`` to ``stop``, once.
        device: the device's name in the fleet, ``[A-Za-z0-9_-]{1,64}``.
        fleet: the fleet's name.
        state: where front and outbox are kept; by default in memory, which no restart survives. The caller closes it.
        codec: ``float32`` or ``float16`` activations on the wire, unless the bundle packs them into few bits.
        chunk_bytes: largest payload of one MQTT message; keep it below the broker's limit.
        resend_s: first pause before a step is sent again; it doubles up to 8 times of this.
        give_up_s: how long the server may stay silent while a step waits.
        threads: threads of onnxruntime.
        train_epsilon: perturbation budget of training steps in place of the bundle's; 0 trains on unperturbed inputs
            (protocol P2), which sends unprotected activations: to measure only. Keep it over a restart.
        decision_s: how long ``infer`` and ``stream`` wait for the server's decision.
        budget: how much the device may use its radio.
        updates: where other bundles come from while the client runs: between two steps it goes over to the one that its
            server announces, or after ``reload`` to its store's current one; ``bundle`` is the one to begin with.
        on_turn: called in the client's thread at least once a second for as long as it works or waits.

    Attributes:
        status: what the client is doing, and its counts of windows.

    Raises:
        ConfigError: a name that no topic can carry.
        BundleError: this onnxruntime cannot run the bundle.
    """

    def __init__(
        self,
        bundle: Bundle,
        transport: Connection | Transport | Callable[[], Transport],
        *,
        device: str,
        fleet: str = "default",
        state: State | None = None,
        codec: str = "float32",
        chunk_bytes: int = 65536,
        resend_s: float = 5.0,
        give_up_s: float = 300.0,
        threads: int = 1,
        train_epsilon: float | None = None,
        decision_s: float = 10.0,
        budget: Budget | None = None,
        updates: Updates | None = None,
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        if not 0 < decision_s < float("inf"):
            raise ConfigError(f"decision_s is {decision_s}: give a positive number of seconds")
        self.status = Status()
        self._budget = budget or Budget()
        self._device = device
        self._decision_s = decision_s
        kept: State = MemoryState(FrontState(0, dict(bundle.initial))) if state is None else state
        most = self._budget.max_bytes_per_hour
        exchange = Exchange(
            _maker(transport, f"psgl-{fleet}-{device}") if isinstance(transport, Connection) else transport,
            fleet=fleet,
            device=device,
            session=kept.session,
            bundle=bundle.id,
            resend_s=resend_s,
            give_up_s=give_up_s,
            allowance=None if most is None else Allowance(most, kept),
            on_turn=on_turn,
        )
        loaded = Loaded(bundle, Front(bundle, threads=threads, noise_key=kept.noise_key))
        super().__init__(Station(loaded, kept, exchange, codec, chunk_bytes, train_epsilon, threads))
        self._exchange, self._state = exchange, kept
        again = isinstance(transport, Connection) or callable(transport)
        updater = None if updates is None else Updater(self._station, updates)
        self._presence = Presence(self._station, self.status, again=again, updater=updater)
        self.status.listen(self._tell_condition)

    @property
    def bundle(self) -> Bundle:
        """The bundle that runs."""
        return self._station.bundle

    @property
    def budget(self) -> Budget:
        """How much the device may use its radio."""
        return self._budget

    @property
    def station(self) -> Station:
        """The client's parts, as its stations take them."""
        return self._station

    @property
    def device(self) -> str:
        """The device's name in the fleet."""
        return self._device

    @property
    def state(self) -> State:
        """Where the front and the steps in flight are kept."""
        return self._state

    @property
    def front(self) -> FrontState:
        """The front as of the last finished step."""
        return self._state.front

    @property
    def connected(self) -> bool:
        """Whether there is a connection to the broker now."""
        return self._exchange.connected

    @property
    def plan(self) -> Plan:
        """The latest announcement of the server.

        Raises:
            ConfigError: the client was not started.
        """
        return self._station.plan

    def __enter__(self) -> EdgeClient:
        if not self._presence.again:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, *, wait_s: float = 60.0) -> Plan:
        """Connect, announce the device, wait for the server's announcement and join its run.

        Args:
            wait_s: how long to wait for a server that trains this bundle.

        Raises:
            TransportError: no broker, or no server within ``wait_s``.
            RefusedError: the server trains another bundle, which this device does not follow, or another run than an
                unfinished one that the state holds.
        """
        return self._presence.start(wait_s)

    def stop(self) -> None:
        """Say goodbye and close the transport; never raises."""
        self._presence.stop()

    def tell(self, **fields: Any) -> None:
        """Publish the device's state (retained): status, progress and whatever figures it has.

        Raises:
            TransportError: the broker takes no more.
        """
        self._exchange.tell(**fields)

    def listen(self, timeout_s: float) -> Plan:
        """Wait for what the server announces, at most this long; the plan as it is then.

        Raises:
            RefusedError: the server ended the run.
        """
        self._exchange.listen(timeout_s)
        return self.plan

    def interrupt(self) -> None:
        """Make whoever waits for the server raise KeyboardInterrupt soon; from any thread or a signal handler."""
        self._exchange.interrupt()

    def finish_run(self) -> None:
        """Note that this device is through with the run, so that the next run may begin on this state."""
        self._state.note({"done": 1})

    def resume(self) -> TrainStep | None:
        """Finish what a stopped device left: answer every step of the outbox.

        Returns:
            The training step that was in flight, if there was one and the server took it.

        Raises:
            RefusedError, TransportError: as in ``train_step``.
        """
        self._presence.need_plan()
        done = None
        for outbox in self._state.outbox:
            if outbox.kind == "train":
                done = steps.finish_training(self._station, outbox, None)
            elif outbox.kind == "front":
                steps.finish_synchronising(self._station, outbox)
        self.flush()
        return done

    def train_step(self, x: npt.ArrayLike, y: npt.ArrayLike, *, samples: int | None = None) -> TrainStep | None:
        """Send one batch's activations, wait for the gradient, update the front.

        Args:
            x: (N, *input_shape) in [0, 1].
            y: integer labels (N).
            samples: how many training samples the device has, by which the server may weigh it.

        Returns:
            The answered step, or None when the run has all its rounds and wants no more.

        Raises:
            BatchError: the batch does not fit the bundle.
            ConfigError: the bundle's front is frozen: use ``store``.
            RefusedError: the server refused the step.
            StateError: the disk refuses.
            TransportError: the server was silent for ``give_up_s``.
        """
        if self.bundle.manifest.frozen:
            raise ConfigError(
                "the bundle's front is frozen: start the server with --fronts frozen and hand samples over with store()"
            )
        batch = self._station.batch(x)
        labels = self._station.labels(y, len(batch))
        self._presence.need_plan()
        if self._state.outbox:
            self.resume()
        if self._station.count("synchronise"):
            self.synchronise(samples=samples)
        elif self.plan.fronts == "shared" and self.plan.front > self._station.count("front"):
            self.synchronise(give=False)  # a mean was made while this device was away
        started = time.monotonic()
        done = steps.train(self._station, batch, labels, samples)
        if done is not None:
            log("step", **self._record(started), step=done.step, round=done.round, resent=done.resent)
        return done

    def synchronise(self, *, give: bool = True, samples: int | None = None) -> None:
        """Give the front away and take what the server makes of all fronts: their mean, or a predecessor's front.

        Args:
            give: False only asks for the current one.
            samples: the front's weight in the mean.

        Raises:
            RefusedError, StateError, TransportError: as in ``train_step``.
        """
        self._presence.need_plan()
        steps.synchronise(self._station, give=give, samples=samples)

    def store(self, x: npt.ArrayLike, y: npt.ArrayLike, *, first: int, total: int) -> None:
        """Hand samples to the server, once: of a frozen front, which needs no gradient. Does not wait for the reply.

        Args:
            x: (N, *input_shape) in [0, 1].
            y: integer labels (N).
            first: number of the first of them among the device's ``total`` samples, from 0.

        Raises:
            BatchError: the batch does not fit the bundle.
            OutboxFullError: too many wait for the server and the state's policy is ``refuse``.
            RefusedError, StateError, TransportError: as in ``train_step``.
        """
        batch = self._station.batch(x)
        labels = self._station.labels(y, len(batch))
        self._presence.need_plan()
        started = time.monotonic()
        storing.store(self._station, batch, labels, first=first, total=total)
        log("stored", **self._record(started), samples=first + len(batch))

    def flush(self) -> None:
        """Wait until everything that was stored has its reply.

        Raises:
            RefusedError, StateError, TransportError: as in ``train_step``.
        """
        if self._state.outbox:
            self._presence.need_plan()
            storing.flush(self._station)

    def ask(self, x: npt.ArrayLike, *, epsilon: float | None = None) -> Decision:
        """The server's decision on a batch, and no other's; the guide's decision takes the place of a label.

        A question is not kept: who asked is gone after a restart.

        Args:
            x: (N, *input_shape) in [0, 1].
            epsilon: perturbation budget in place of the bundle's. 0 sends unprotected activations: to measure only.

        Raises:
            BatchError, RefusedError, StateError, TransportError: as in ``train_step``.
        """
        batch = self._station.batch(x)
        self._presence.need_plan()
        forward = self._station.front.forward(self._state.front, batch, None, training=False, epsilon=epsilon)
        return decide(self._station, forward, question(self._station, forward), None)

    def infer(self, x: npt.ArrayLike, *, within_s: float | None = None) -> Decision:
        """A decision on a batch, in any weather: the server's, or the guide's where the server cannot be asked.

        Where the bundle has no guide either, the decision is ``none``; ``Decision.by`` and ``why`` say so. The batch is
        not kept. A client that was made with a ``Connection`` connects in the background meanwhile.

        Args:
            x: (N, *input_shape) in [0, 1].
            within_s: how long to wait for the server, in place of ``decision_s``.

        Raises:
            BatchError: the batch does not fit the bundle.
            StateError: the disk refuses.
        """
        started = time.monotonic()
        batch = self._station.batch(x)
        why = self._presence.absence()  # which may change the bundle
        forward = self._station.front.forward(self._state.front, batch, None, training=False)
        try:
            if not why:
                asked = question(self._station, forward)
                decision = decide(self._station, forward, asked, self._decision_s if within_s is None else within_s)
                log("decided", **self._record(started), samples=len(batch), state="server")
                return decision
        except Absence as exc:
            why = exc.why
        except (RefusedError, TransportError) as exc:
            why = self._presence.excuse(exc)
        decision = without_server(self._station, forward, why)
        log("decided", **self._record(started), samples=len(batch), state=decision.by, why=why)
        return decision

    def stream(
        self,
        source: Iterable[Any],
        *,
        windowing: Windowing | None = None,
        limits: BacklogLimits | None = None,
        silent_s: float | None = None,
        most: int = 32,
    ) -> Iterator[WindowDecision]:
        """Decisions on the windows of a source as its samples arrive, each as ``infer`` gives it.

        The source is read in a thread of its own; what it gives while the network is slow waits in a bounded backlog.
        Windows that wait are decided together. A window that must not be used (``FAULTS``) is never sent, its decision
        is ``none``.

        Args:
            source: gives ``Window`` objects or samples, see ``edge_sdk.sources``.
            windowing: makes windows of samples; its (channels, length) is the bundle's input_shape. Needed where the
                source gives samples.
            limits: of the backlog.
            silent_s: a sensor that says nothing for so long is ``sensor-silent``; it goes on when it is back.
            most: windows of one question, 1 to the bundle's max_batch.

        Raises:
            BatchError: the source failed, after the decision on its last window.
            ConfigError: the windows do not fit the bundle.
            StateError: the disk refuses.
        """
        manifest = self.bundle.manifest
        if windowing is not None and (windowing.channels, windowing.length) != manifest.input_shape:
            raise ConfigError(
                f"windows are {windowing.channels}x{windowing.length} (channels x length), "
                f"the bundle takes {'x'.join(map(str, manifest.input_shape))}: correct the windowing or the bundle"
            )
        if not 1 <= most <= manifest.max_batch:
            raise ConfigError(f"most is {most}: give 1 to {manifest.max_batch} windows")
        backlog = Backlog(
            source, windowing=windowing, input_range=manifest.input_range, limits=limits, silent_s=silent_s
        )
        return self._stream(backlog, most)

    def turn(self) -> None:
        """Whoever works beside the client calls this at least once a second, between two steps.

        Raises:
            KeyboardInterrupt: after ``interrupt``.
            StateError: the disk refuses, after ``reload``.
        """
        self._presence.turn()

    def reload(self) -> None:
        """Go over to the store's current bundle at the next ``turn``; from any thread or a signal handler."""
        self._presence.reload()

    @property
    def updating(self) -> bool:
        """Whether the client waits for a part of the bundle that the server announces."""
        return self._presence.updating

    def look(self) -> None:
        """Take what the broker and the server have to say, without waiting; connects in the background."""
        self._presence.look()

    def hang_up(self) -> None:
        """Disconnect until the next question, where the client can connect again."""
        self._presence.hang_up()

    def pause(self, pause_s: float) -> None:
        """Do nothing for so long, but what ``turn`` does."""
        self._presence.pause(pause_s)

    def wake(self, wait_s: float) -> None:
        """Connect in the background and wait so long for the first attempt."""
        self._presence.wake(wait_s)

    def _stream(self, backlog: Backlog, most: int) -> Iterator[WindowDecision]:
        try:
            yield from WindowDecider(self._station, self._presence, self.status, self.infer).decide(
                backlog, every_s=self._budget.connect_every_s, wait_s=self._decision_s, most=most
            )
        finally:
            backlog.close()

    def _record(self, started_s: float) -> dict[str, float]:
        return {**self.traffic.sizes, "seconds": time.monotonic() - started_s}

    def _tell_condition(self, condition: Condition) -> None:
        log("state", state=condition.value, why=condition.sentence)
        self._exchange.note(condition=condition.value)


def _maker(connection: Connection, client_id: str) -> Callable[[], Transport]:
    def make() -> Transport:
        from edge_sdk.paho_transport import PahoTransport

        return PahoTransport(connection, client_id)

    return make
