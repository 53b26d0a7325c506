from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edge_sdk.batch import Samples
from edge_sdk.codec import compress, expand
from edge_sdk.front import Front, FrontState
from server_sdk.audit.attacks import Averaging, Knowledge, LearnedDecoder
from server_sdk.audit.metrics import likeness
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
