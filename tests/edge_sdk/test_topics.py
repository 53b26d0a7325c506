from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import topics
from edge_sdk.errors import ConfigError, WireError
from edge_sdk.topics import Topic

NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True).filter(lambda name: name != "all")
BAD_NAMES = ["", "a" * 65, "all", "a/b", "+", "#", "a b", "a\n", "ä", "a.b", "\x00", "a+", "٣"]


@given(NAMES, NAMES)
def test_what_is_built_is_parsed(fleet: str, device: str) -> None:
    assert topics.parse(topics.up_state(fleet, device)) == Topic(fleet, "up", device, "state")
    assert topics.parse(topics.up_step(fleet, device)) == Topic(fleet, "up", device, "step")
    assert topics.parse(topics.down_step(fleet, device)) == Topic(fleet, "down", device, "step")
    assert topics.parse(topics.down_model(fleet)) == Topic(fleet, "down", "all", "model")


def test_topics_are_spelled_as_documented() -> None:
    assert topics.up_state("f", "d") == "psgl/v1/f/up/d/state"
    assert topics.up_step("f", "d") == "psgl/v1/f/up/d/step"
    assert topics.down_step("f", "d") == "psgl/v1/f/down/d/step"
    assert topics.down_model("f") == "psgl/v1/f/down/all/model"
    assert topics.every_state("f") == "psgl/v1/f/up/+/state"
    assert topics.every_step("f") == "psgl/v1/f/up/+/step"


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        topics.check_name(name)
    for build in (topics.up_state, topics.up_step, topics.down_step):
        with pytest.raises(ConfigError):
            build("fleet", name)
        with pytest.raises(ConfigError):
            build(name, "device")
    for every in (topics.down_model, topics.every_state, topics.every_step):
        with pytest.raises(ConfigError):
            every(name)


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "psgl/v1",
        "psgl/v1/f/up/d",
        "psgl/v1/f/up/d/step/x",
        "psgl/v2/f/up/d/step",
        "x/psgl/v1/f/up/d/step",
        "/psgl/v1/f/up/d/step",
        "psgl/v1/f/side/d/step",
        "psgl/v1/f/down/d/state",
        "psgl/v1/f/down/d/model",
        "psgl/v1/f/up/all/step",
        "psgl/v1/f/up/all/model",
        "psgl/v1/f/down/all/step",
        "psgl/v1/all/down/all/model",
        "psgl/v1/f/up/+/step",
        "psgl/v1/f/up/d\n/step",
        "psgl/v1//up/d/step",
    ],
)
def test_foreign_topics_are_refused(topic: str) -> None:
    with pytest.raises(WireError) as caught:
        topics.parse(topic)
    assert caught.value.reason == "topic"


@given(st.text(max_size=100) | st.text(max_size=60).map(lambda rest: f"psgl/v1/{rest}"))
def test_any_text_is_parsed_or_refused(topic: str) -> None:
    try:
        parsed = topics.parse(topic)
    except WireError:
        return
    assert topic == f"psgl/v1/{parsed.fleet}/{parsed.direction}/{parsed.device}/{parsed.channel}"
