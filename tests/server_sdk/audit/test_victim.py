from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from edge_sdk.batch import Samples
from edge_sdk.codec import compress, expand
from edge_sdk.front import Front, FrontState
from edge_sdk.wire import Assembler, Message, decode_frame, encode
from server_sdk.audit.attacks import Averaging, Knowledge, LearnedDecoder, WhiteBox
from server_sdk.audit.metrics import likeness
from server_sdk.audit.twin import Twin
from server_sdk.audit.victim import Victim
from server_sdk.errors import ModelError


def test_it_sends_what_the_device_sends_with_the_defence_on(
    built: dict[str, Any], samples: Callable[[int, int], Samples]
) -> None:
    bundle = built["paper"].bundle
    front, x = FrontState(0, dict(bundle.initial)), samples(300, 5).x
    seen = Victim(bundle, front, codec="float16").send(x)
    batch = x[256:].astype(np.float32) / 255
    own = Front(bundle).forward(front, batch, None, training=False).activations
    assert np.array_equal(seen[256:], expand("a", *compress(own, "float16"))), "in batches, with the codec's loss"
    bare = Victim(bundle, front).send(x, epsilon=0.0)
    assert np.abs(bare - seen).mean() > 0.1 * seen.std(), "the perturbation is on unless it is switched off"


def test_another_front_is_refused(built: dict[str, Any]) -> None:
    bundle = built["vanilla"].bundle
    with pytest.raises(ModelError, match="not of this bundle"):
        Victim(bundle, FrontState(0, {**bundle.initial, "p.more": np.zeros(1, np.float32)}))


def test_noise_is_the_same_for_the_same_front_and_averages_out_over_versions(
    built: dict[str, Any], samples: Callable[[int, int], Samples]
) -> None:
    bundle = built["gaussian"].bundle
    front, x = FrontState(3, dict(bundle.initial)), samples(40, 5).x
    victim, other = (Victim(bundle, front, codec="float32", key=bytes([one]) * 32) for one in (1, 2))
    bare = victim.send(x, noise=0.0)
    once = victim.send(x) - bare
    assert np.array_equal(victim.send(x) - bare, once), "again and again the same"
    assert abs(once.std() - 1) < 0.02
    assert abs(np.corrcoef(once.ravel(), (other.send(x) - bare).ravel())[0, 1]) < 0.02, "each device its own"
    assert abs((victim.send(x, sends=16) - bare).std() - 0.25) < 0.01


def test_averaging_sees_what_noise_hides(built: dict[str, Any], samples: Callable[[int, int], Samples]) -> None:
    bundle = built["gaussian"].bundle
    front = FrontState(0, dict(bundle.initial))
    victim, foe = (Victim(bundle, front, key=bytes([one]) * 32) for one in (1, 2))
    own, x = (samples(n, s).x.astype(np.float32) / 255 for n, s in ((400, 1), (60, 2)))
    decoder = LearnedDecoder("mlp", epochs=15, width=8)
    found = []
    for attack in (decoder, Averaging(decoder, 64)):
        knowledge = Knowledge(own, foe.send(own, sends=attack.sends))
        found.append(likeness(attack.rebuild(knowledge, victim.send(x, sends=attack.sends), seed=0), x).nmse)
    assert found[1] < 0.9 * found[0], found


@pytest.mark.parametrize("profile", ["hardened", "quantised"])
def test_what_is_packed_is_seen_as_the_server_decodes_it(
    profile: str, built: dict[str, Any], samples: Callable[[int, int], Samples]
) -> None:
    bundle = built[profile].bundle
    front, x, key = FrontState(0, dict(bundle.initial)), samples(30, 5).x, bytes([3]) * 32
    victim = Victim(bundle, front, key=key)
    batch = x.astype(np.float32) / 255
    own = Front(bundle, noise_key=key).forward(front, batch, None, training=False).activations
    message = Message("infer", "r", "s", 1, {"front": 0}, {"activations": own})
    (frame,) = encode(message, codec=bundle.manifest.packing)
    arrived = Assembler().add(decode_frame(frame))
    seen = victim.send(x)
    assert arrived is not None and np.array_equal(arrived.tensors["activations"], seen)
    bare, exact = victim.send(x, noise=0.0), victim.activations(x)
    assert len(np.unique(bare)) <= 16 and len(np.unique(exact)) > 100, "without noise it is packed still"
    span = bundle.manifest.span or (float(exact.min()), float(exact.max()))
    assert np.abs(bare - exact).max() <= (span[1] - span[0]) / 15 / 2 + 1e-6


def test_a_frozen_front_sends_the_same_and_is_supposed_to_send_it_anew(
    built: dict[str, Any], samples: Callable[[int, int], Samples]
) -> None:
    bundle = built["hardened"].bundle
    victim, x = Victim(bundle, FrontState(0, dict(bundle.initial))), samples(6, 5).x
    assert np.array_equal(victim.send(x), victim.send(x))
    bare = victim.activations(x)
    once, often = (np.abs(victim.send(x, sends=sends) - bare).mean() for sends in (1, 25))
    assert often < once / 3


@pytest.mark.parametrize("profile", ["vanilla", "gaussian", "quantised", "hardened"])
def test_a_twin_computes_the_front_and_has_a_gradient(
    profile: str, built: dict[str, Any], samples: Callable[[int, int], Samples]
) -> None:
    bundle = built[profile].bundle
    front = FrontState(0, dict(bundle.initial))
    victim = Victim(bundle, front)
    twin = Twin(victim, front)
    x = torch.from_numpy(samples(5, 5).x.astype(np.float32) / 255).requires_grad_()
    sent = twin.send(x)
    assert np.allclose(sent.detach().numpy(), victim.activations(x.detach().numpy()), atol=1e-4)
    sent.square().sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    broken = FrontState(0, {**front.tensors, "p.conv1.weight": front.tensors["p.conv1.weight"] + 1})
    with pytest.raises(ModelError, match="not compute"):
        Twin(_Other(victim), broken)
    assert twin.send(x).shape[1:] == bundle.manifest.cut_shape


class _Other:
    """A victim whose front is another than the one that is said."""

    def __init__(self, victim: Victim) -> None:
        self.bundle, self.activations = victim.bundle, victim.activations


def test_a_search_through_a_vector_cut_comes_nearer(
    built: dict[str, Any], samples: Callable[[int, int], Samples]
) -> None:
    bundle = built["hardened"].bundle
    front = FrontState(0, dict(bundle.initial))
    victim, foe = (Victim(bundle, front, key=bytes([one]) * 32) for one in (1, 2))
    own, x = (samples(n, s).x.astype(np.float32) / 255 for n, s in ((40, 1), (8, 2)))
    attack = WhiteBox(steps=30)
    assert attack.fits(bundle.manifest.cut_shape, twin=True)
    assert not LearnedDecoder("convolution").fits(bundle.manifest.cut_shape)
    twin = Twin(foe, front)
    wanted = victim.activations(x)
    found = attack.rebuild(Knowledge(own, foe.send(own, noise=0.0), twin), wanted, seed=0)
    start = np.repeat(own.mean(axis=0, keepdims=True), len(x), axis=0)
    far, near = (float(np.square(foe.activations(each) - wanted).mean()) for each in (start, found))
    assert near < 0.5 * far
