from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edge_sdk.batch import Samples
from edge_sdk.codec import compress, expand
from edge_sdk.front import Front, FrontState
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
