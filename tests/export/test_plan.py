"""Plans of sweeps: the example is read, and what is wrong is said with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_sdk.errors import ConfigError
from export.plan import ATTACKS, AttackOptions, Plan, read_plan
from server_sdk.audit.attacks import Averaging, LearnedDecoder, WhiteBox
from server_sdk.reference.profiles import PROFILES

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "audit" / "plan.toml"
GOOD = """\
[attack]
epochs = 3
[data.mine]
file = "mine.npz"
[profile.strong]
profile = "hardened"
recipe = {strength = 1, steps = 20}
[[stage]]
profiles = ["vanilla", "strong"]
data = ["mine"]
attacks = ["decoder_mlp"]
"""


def read(folder: Path, text: str) -> Plan:
    path = folder / "plan.toml"
    path.write_text(text)
    return read_plan(path)


def test_the_example_is_a_plan() -> None:
    plan = read_plan(EXAMPLE)
    assert set(plan.data) == {"mnist_10k", "breastmnist", "mitbih"} and len(plan.stages) == 6
    heart = plan.data["mitbih"]
    assert heart.file == EXAMPLE.parent / "mitbih_beats.npz" and (heart.rest, heart.group) == (0, "rec_train")
    assert plan.data["breastmnist"].merge == ("x_val", "y_val")
    assert plan.stages[0].profiles == ("vanilla", "hardened") and plan.attack.width == 32
    assert set(plan.profiles) == {name for stage in plan.stages for name in stage.profiles}
    assert set(PROFILES) == {each.profile for each in plan.profiles.values()}


def test_a_plan_may_give_a_profile_another_name_and_recipe(tmp_path: Path) -> None:
    plan = read(tmp_path, GOOD)
    strong = plan.profiles["strong"]
    assert (strong.profile, dict(strong.recipe)) == ("hardened", {"strength": 1, "steps": 20})


@pytest.mark.parametrize(
    ("was", "becomes", "words"),
    [
        ("epochs = 3", "epochs = 0", "attack: epochs is 0: give at least 1"),
        ("epochs = 3", "sends = 1", "sends is 1: give at least 2"),
        ("epochs = 3", 'epochs = "3"', "attack.epochs is '3': it must be int"),
        ("epochs = 3", "epochs = true", "attack.epochs is True: it must be int"),
        ("epochs = 3", "epoch = 3", "attack has no 'epoch': it has epochs"),
        ("[attack]\nepochs = 3", "attack = 3", "attack is no table"),
        ("[attack]", "[attacks]", "'attacks' is no part of a plan"),
        ('file = "mine.npz"', "foe = 0.4", "data.mine is incomplete: give file"),
        ('"mine.npz"', "3", "data.mine.file is 3: it must be Path"),
        ('"mine.npz"', '"mine.npz"\nfoe = 1', "data.mine: foe is 1: choose a share above 0 and below 1"),
        ('"mine.npz"', '"mine.npz"\nfoe = nan', "foe is nan"),
        ('"mine.npz"', '"mine.npz"\nguide = 0.0', "guide is 0"),
        ('"mine.npz"', '"mine.npz"\nrounds = 0', "rounds is 0"),
        ('"mine.npz"', '"mine.npz"\nrounds = 1.5', "rounds is 1.5: it must be int"),
        ('"mine.npz"', '"mine.npz"\nbatch = 0', "batch is 0"),
        ('"mine.npz"', '"mine.npz"\nshift = -1', "shift is -1"),
        ('"mine.npz"', '"mine.npz"\nrest = -1', "rest is -1"),
        ("[[stage]]", "[[stage]]\nseeds = -3", "stage 1: seeds is -3"),
        ('"mine.npz"', '"mine.npz"\nsignal = 1', "signal is 1: it must be bool"),
        ('"mine.npz"', '"mine.npz"\nmerge = ["x_val"]', "merge names pairs of arrays"),
        ('"mine.npz"', '"mine.npz"\nmerge = ["x_val", 3]', "it must be tuple"),
        ("[data.mine]", '[data."../mine"]', "'../mine' cannot be named so"),
        ("[data.mine]", "[[data.mine]]", "data holds no tables"),
        ('profile = "hardened"', 'profile = "hard"', "there is no profile 'hard': use one of vanilla"),
        ('profile = "hardened"', 'profile = "vanilla"', "devices train the front of 'vanilla'"),
        ('profile = "hardened"', 'profile = "hardened"\nnoise = -1', "noise is -1"),
        (
            'profile = "hardened"',
            'profile = "hardened"\nperturb = "much"',
            "perturb is 'much': it is none, sign or max",
        ),
        ('profile = "hardened"', 'profile = "hardened"\nepsilon = 2', "epsilon is 2: it is 0 to 1"),
        ("{strength = 1, steps = 20}", "3", "profile.strong.recipe is 3"),
        ("{strength = 1, steps = 20}", "{strenth = 1}", "recipe has no 'strenth': it has defence, steps"),
        ("{strength = 1, steps = 20}", "{steps = 0}", "profile.strong: recipe: steps"),
        ("{strength = 1, steps = 20}", '{steps = "many"}', "recipe.steps is 'many': it must be int"),
        ("{strength = 1, steps = 20}", '{compute = "cuda"}', "use --compute"),
        ("[profile.strong]", "[[profile]]", "profile holds no tables"),
        ("[[stage]]", "[stage]", r"there is no \[\[stage\]\]"),
        ("[[stage]]", "[[stage]]\nseeds = 0", "stage 1: seeds is 0"),
        ('["vanilla", "strong"]', "[]", "stage 1: nothing to do"),
        ('["vanilla", "strong"]', '"vanilla"', "it must be tuple"),
        ('["vanilla", "strong"]', '["weak"]', "stage 1 names profile 'weak': there are vanilla"),
        ('data = ["mine"]', 'data = ["yours"]', "stage 1 names data 'yours': there are mine"),
        ('["decoder_mlp"]', '["guess"]', "stage 1 names attack 'guess': there are decoder_mlp"),
        ('attacks = ["decoder_mlp"]', "", "stage 1 is incomplete: give attacks"),
        ("[attack]", "[attack", "is not TOML"),
    ],
)
def test_a_wrong_plan_is_refused_with_its_place(tmp_path: Path, was: str, becomes: str, words: str) -> None:
    assert GOOD.count(was) == 1
    with pytest.raises(ConfigError, match=words) as caught:
        read(tmp_path, GOOD.replace(was, becomes))
    assert str(tmp_path / "plan.toml") in str(caught.value) and "\n" not in str(caught.value).replace("TOML", "")


def test_a_plan_that_is_not_there_or_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_plan(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_plan(tmp_path)
    with pytest.raises(ConfigError, match=r"no \[\[stage\]\]"):
        read(tmp_path, "")
    (tmp_path / "plan.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_plan(tmp_path / "plan.toml")


def test_attacks_are_what_they_are_called() -> None:
    options = AttackOptions(epochs=3, width=5, steps=7, sends=4)
    made = {name: options.make(name, "cpu") for name in ATTACKS}
    assert {name: attack.name for name, attack in made.items()} == {name: name for name in ATTACKS}
    decoder, search = made["decoder_convolution"], made["white_box"]
    assert isinstance(decoder, LearnedDecoder) and (decoder.epochs, decoder.width) == (3, 5)
    assert isinstance(search, WhiteBox) and search.steps == 7
    often = made["averaging_decoder_mlp"]
    assert isinstance(often, Averaging) and often.sends == 4
