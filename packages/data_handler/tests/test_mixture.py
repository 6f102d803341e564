"""Mixture methods against their formulas by hand, the directions their papers promise, and exact resuming."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from data_handler import UserError
from data_handler.mixture import (
    CONTROLLERS,
    Aioli,
    DoReMi,
    InfluenceWeighted,
    Observation,
    OnlineDataMixing,
    Static,
    Stratified,
    bounded,
    influence_weights,
    mean_influence,
    parse_mixture,
    simplex_grid,
)
from data_handler.mixture.aioli import aioli_step, normalised_law, recover_law
from data_handler.mixture.doremi import doremi_step
from data_handler.mixture.influence import influence_mixture, size_caps
from data_handler.mixture.odm import exploration, policy
from data_handler.mixture.simplex import smoothed_one_hot
from hypothesis import given, settings
from hypothesis import strategies as st

NAMES = ("a", "b", "c", "d")
NAN = float("nan")


def seen(step, losses, tokens=(64, 64, 64, 64), **more):
    return Observation(step=step, losses=losses, tokens=tokens, **more)


# --- the simplex


@pytest.mark.parametrize(
    ("weights", "floor", "cap", "expected"),
    [
        pytest.param([2, 1, 1], 0.0, 1.0, [0.5, 0.25, 0.25], id="unbounded"),
        pytest.param([8, 1, 1], 0.0, 0.5, [0.5, 0.25, 0.25], id="cap"),
        pytest.param([8, 1, 1], 0.2, 1.0, [0.6, 0.2, 0.2], id="floor"),
        pytest.param([1, 0, 0], 0.0, 0.5, [0.5, 0.25, 0.25], id="a cap pours onto zeros"),
        pytest.param([6, 3, 1], [0, 0, 0.3], [0.4, 1, 1], [0.4, 0.3, 0.3], id="one bound a domain"),
        pytest.param([1, 0, 0], 0.0, 1.0, [1, 0, 0], id="zeros stay"),
    ],
)
def test_bounds_by_hand(weights, floor, cap, expected):
    assert bounded(weights, floor, cap) == pytest.approx(expected)


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1e6), min_size=2, max_size=8).filter(lambda w: sum(w) > 0),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_a_bounded_mixture_is_on_the_simplex_within_its_bounds_and_keeps_order(weights, low, high):
    floor, cap = low / len(weights), 1 / len(weights) + high * (1 - 1 / len(weights))
    mixture = bounded(weights, floor, cap)
    assert mixture.sum() == pytest.approx(1)
    assert (mixture >= floor - 1e-9).all()
    assert (mixture <= cap + 1e-9).all()
    assert (np.diff(mixture[np.argsort(weights, kind="stable")]) >= -1e-9).all()


def test_the_grid_has_the_points_it_should():
    assert len(simplex_grid(4, 10)) == 286
    assert len(simplex_grid(4, 4)) == 35
    grid = simplex_grid(3, 5)
    assert grid.sum(axis=1) == pytest.approx(1)
    assert len({tuple(point) for point in grid.round(6)}) == len(grid) == 21
    assert grid.min() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: Static(NAMES, weights=[1, 2, 3]), "3 values for 4 domains", id="too few"),
        pytest.param(lambda: Static(NAMES, weights=[1, -1, 1, 1]), "at least 0", id="negative"),
        pytest.param(lambda: Static(NAMES, weights=[0, 0, 0, 0]), "not all 0", id="zeros"),
        pytest.param(lambda: Static(NAMES, weights={"a": 1, "x": 1}), "'x', which is no domain", id="unknown name"),
        pytest.param(lambda: OnlineDataMixing(NAMES, floor=0.3), "floors must sum to at most 1", id="floors"),
        pytest.param(lambda: OnlineDataMixing(NAMES, cap=0.2), "caps to at least 1", id="caps"),
        pytest.param(lambda: OnlineDataMixing(NAMES, variant="best"), "variant must be one of", id="variant"),
        pytest.param(lambda: Aioli(NAMES, every=16), "more than the 16 steps of probing", id="no room to train"),
        pytest.param(lambda: Aioli(NAMES, every=99, one_hot=0.25), "one_hot must be above", id="a flat probe"),
        pytest.param(lambda: Aioli(NAMES, every=99, cap=0.5), "probes outside", id="a probe beyond the cap"),
        pytest.param(lambda: DoReMi(NAMES, weights=[1, 1, 1, 0]), "weights above 0", id="doremi from 0"),
        pytest.param(lambda: InfluenceWeighted(NAMES, sizes=100), "give both or neither", id="sizes alone"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


# --- ODM


def test_exploration_by_hand():
    assert exploration(4, 0) == 0.25
    assert exploration(4, 1) == 0.25  # sqrt(ln 4 / 4) = 0.59 is above 1/K
    assert exploration(4, 100) == pytest.approx(math.sqrt(math.log(4) / 400))


def test_the_smoothed_policy_by_hand():
    rewards, t = np.array([1.0, 2.0, 0.5, 0.0]), 50
    now, before = exploration(4, 50), exploration(4, 49)
    scores = [math.exp(before * r) for r in rewards]
    expected = [(1 - 4 * now) * s / sum(scores) + now for s in scores]
    assert policy(rewards, t, linear=False) == pytest.approx(expected)
    expected = [(1 - 4 * now) * r / 3.5 + now for r in rewards]
    assert policy(rewards, t, linear=True) == pytest.approx(expected)


def test_odm_averages_exponentiated_losses():
    odm = OnlineDataMixing(NAMES, smoothing=0.9)
    odm.observe(seen(1, [1.0, 2.0, NAN, 0.5], (10, 10, 0, 10)))
    odm.observe(seen(2, [2.0, NAN, NAN, 0.5], (10, 0, 0, 10)))
    rewards = odm.state_dict()["rewards"]
    assert rewards == pytest.approx([0.9 * 0.1 * math.e + 0.1 * math.e**2, 0.1 * math.e**2, 0.0, (0.9 * 0.1 + 0.1) * math.exp(0.5)])
    assert odm.weights == pytest.approx(policy(np.array(rewards), 2, linear=True))


def test_exp3_weighs_by_importance():
    odm = OnlineDataMixing(NAMES, variant="exp3", weights=[4, 3, 2, 1])
    odm.observe(seen(1, [NAN, 5.0, NAN, NAN], (0, 32, 0, 0)))
    assert odm.state_dict()["rewards"] == pytest.approx([0, 0.5 / 0.3, 0, 0])
    odm = OnlineDataMixing(NAMES, variant="exp3", weights=[4, 3, 2, 1])
    odm.observe(seen(1, [5.0] * 4, (40, 30, 20, 10)))  # shares as the weights: the importance weights cancel
    assert odm.state_dict()["rewards"] == pytest.approx([0.5] * 4)


@pytest.mark.parametrize("variant", ["group", "smoothed", "exp3"])
def test_odm_chases_loss_keeps_exploring_and_a_reference_or_a_cap_stops_it(variant):
    losses = [1.0, 1.5, 2.0, 4.0]  # d is noise: it stays at 4 whatever is done

    def run(**options):
        odm = OnlineDataMixing(NAMES, variant=variant, **options)
        for step in range(1, 401):
            odm.observe(seen(step, losses))
            assert min(odm.weights) >= exploration(4, step) - 1e-9 or options
        return odm.weights

    free = run()
    assert free[3] == max(free)
    assert free[3] > 0.3
    assert run(reference=losses) == pytest.approx([0.25] * 4)
    assert run(cap={"d": 0.1})[3] == pytest.approx(0.1)


def test_odm_waits_for_its_warm_up_and_acts_every_so_often():
    odm = OnlineDataMixing(NAMES, warmup=2, every=3)
    moved = [step for step in range(1, 25) if odm.observe(seen(step, [1, 2, 3, 4])) is not None]
    assert odm.state_dict()["updates"] == 8
    assert moved == [18, 21, 24]  # until the sixth update eps is 1/K, which leaves no choice


# --- DoReMi


def test_a_doremi_step_by_hand():
    w, e = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 2.0])
    raw = [0.5, 0.3 * math.e, 0.2 * math.e**2]
    expected = [0.999 * r / sum(raw) + 0.001 / 3 for r in raw]
    assert doremi_step(w, e, step_size=1.0, smoothing=1e-3) == pytest.approx(expected)


def test_doremi_raises_the_domain_of_higher_excess_and_averages():
    doremi = DoReMi(NAMES, step_size=0.5)
    history = []
    for step in range(1, 6):
        assert doremi.observe(seen(step, [9, 9, 9, 9], excess=[0.1, 0.5, 0.1, 0.1])) is None  # it acts on the loss
        history.append(doremi.loss_weights)
    assert doremi.weights == (0.25,) * 4
    assert doremi.recommended == pytest.approx(np.mean(history, axis=0))
    assert history[0][1] > 0.25 > history[0][0]
    assert [w[1] for w in history] == sorted(w[1] for w in history)


def test_doremi_keeps_the_last_excess_of_an_absent_domain():
    first, second = DoReMi(NAMES), DoReMi(NAMES)
    for doremi, late in ((first, (0.4, NAN, 0.1, 0.1)), (second, (0.4, 0.7, 0.1, 0.1))):
        doremi.observe(seen(1, [1] * 4, excess=[0.4, 0.7, 0.1, 0.1]))
        doremi.observe(seen(2, [1] * 4, (8, 0 if math.isnan(late[1]) else 8, 8, 8), excess=late))
    assert first.loss_weights == second.loss_weights


def test_doremi_can_act_on_sampling():
    doremi = DoReMi(NAMES, apply="sampling")
    assert doremi.loss_weights is None
    assert doremi.observe(seen(1, [1] * 4, excess=[0, 0, 0, 1])) == doremi.weights
    assert doremi.weights[3] > 0.25


# --- Aioli


def test_aioli_recovers_a_planted_law():
    law = np.random.default_rng(0).normal(size=(3, 4))
    mixtures = np.stack([smoothed_one_hot(4, j, 0.7) for j in range(4)])
    assert recover_law(law @ mixtures.T, 0.7) == pytest.approx(law)


def test_an_aioli_step_by_hand():
    law = normalised_law(np.array([[3.0, -1.0], [1.0, 1.0]]))
    assert law == pytest.approx(np.array([[4, 0], [2, 2]]) / 8)
    raw = [0.4 * math.exp(0.5 * 6 / 8), 0.6 * math.exp(0.5 * 2 / 8)]
    assert aioli_step(np.array([0.4, 0.6]), law, 0.5) == pytest.approx([r / sum(raw) for r in raw])


def linear_run(controller, law, steps, start=10.0):
    """Drive a controller in a world that obeys a linear law exactly; return the weights it ever gave."""
    losses, given = np.full(len(law), start), []
    for step in range(steps):
        if step:
            losses = losses - law @ np.array(controller.weights)
        validation = losses.tolist() if "validation" in controller.needs(step) else None
        given.append(controller.observe(seen(step, [1.0] * 4, validation=validation)))
    return given


@pytest.mark.parametrize("average", [None, 0.3])
def test_aioli_moves_towards_what_lowers_the_losses(average):
    law = np.diag([0.01, 0.01, 0.01, 0.0])
    law[:, 1] += 0.02  # b helps every domain, d helps none
    aioli = Aioli(NAMES, every=30, probe_steps=2, step_size=1.0, average=average)
    given = linear_run(aioli, law, 9)
    expected = aioli_step(np.full(4, 0.25), normalised_law(2 * law), 1.0)
    assert given[8] == pytest.approx(expected)  # exact: after 4 probes of 2 steps
    assert np.argsort(aioli.recommended).tolist()[::3] == [3, 1]
    probed = [g for g in given if g is not None and max(g) == pytest.approx(0.75)]
    assert sorted(int(np.argmax(g)) for g in probed) == [0, 1, 2, 3]


def test_aioli_serves_its_target_alone():
    law = np.zeros((4, 4))
    law[3, 3], law[0, 0] = 0.5, 0.01  # d falls fast by itself, and nobody wants it
    everyone, target = (Aioli(NAMES, every=30, probe_steps=2, target=t) for t in (None, {"a": 1}))
    for aioli in (everyone, target):
        linear_run(aioli, law, 9)
    assert np.argmax(everyone.recommended) == 3
    assert np.argmax(target.recommended) == 0


# --- influence


def test_influence_weights_by_hand():
    influence = [[1.0, -5.0], [2.0, 1.0], [-1.0, -1.0], [0.0, 0.0]]
    assert influence_mixture(influence) == pytest.approx([0.25, 0.75, 0, 0])
    assert influence_mixture([-1, -2, -3]) == pytest.approx([1 / 3] * 3)
    assert influence_weights(influence, NAMES, floor=0.1, cap=0.5) == pytest.approx([0.3, 0.5, 0.1, 0.1])
    means = mean_influence([[1, 0], [3, 2], [5, 5]], [0, 0, 2], 4)
    assert means == pytest.approx(np.array([[2, 1], [0, 0], [5, 5], [0, 0]]))
    assert size_caps([100, 1000], budget=1000, epochs=4) == pytest.approx([0.4, 1.0])


def test_influence_moves_by_a_moving_average_and_respects_sizes():
    controller = InfluenceWeighted(
        NAMES, every=10, average=0.5, sizes={"a": 1e9, "b": 75, "c": 1e9, "d": 1e9}, budget=1000, epochs=4
    )
    influence = [[0.0], [1.0], [0.0], [0.0]]
    assert controller.needs(10) == {"influence"}
    assert not controller.needs(11)
    first = controller.observe(seen(0, [NAN] * 4, (0,) * 4, influence=influence))
    assert first[1] == pytest.approx(0.3)  # 0.5 * 0.25 + 0.5 * 1, capped at 4 repetitions of 75 tokens
    free = InfluenceWeighted(NAMES, every=10, average=0.5)
    assert free.observe(seen(0, [NAN] * 4, (0,) * 4, influence=influence)) == pytest.approx([0.125, 0.625, 0.125, 0.125])


# --- all of them

MAKERS = {
    "stratified": lambda: Stratified(NAMES),
    "static": lambda: Static(NAMES, weights={"a": 3, "b": 1, "c": 1, "d": 1}),
    "influence": lambda: InfluenceWeighted(NAMES, every=7, floor=0.03),
    "odm": lambda: OnlineDataMixing(NAMES, every=3, warmup=2, cap=0.6),
    "odm-exp3": lambda: OnlineDataMixing(NAMES, variant="exp3", floor={"a": 0.1}),
    "doremi": lambda: DoReMi(NAMES),
    "doremi-sampling": lambda: DoReMi(NAMES, apply="sampling", floor=0.05),
    "aioli": lambda: Aioli(NAMES, every=20, probe_steps=2, sweeps=2, step_size=2.0),
    "aioli-ema": lambda: Aioli(NAMES, every=12, probe_steps=2, average=0.4, floor=0.05, target={"a": 1, "b": 2}),
}


def observations(steps, equal=False):
    """Make up a run; some domains are absent in some steps."""
    generator = np.random.default_rng(5)
    for step in range(steps):
        tokens = np.ones(4, int) if equal else generator.integers(0, 3, 4)
        draw = np.ones(4) if equal else generator.gamma(2.0, 1.0, 4)
        losses = np.where(tokens > 0, draw, NAN).tolist()
        yield seen(step, losses, (32 * tokens).tolist(), validation=draw.tolist(), excess=losses, influence=draw[:, None].tolist())


@pytest.mark.parametrize("name", MAKERS)
def test_weights_are_mixtures_within_bounds(name):
    controller = MAKERS[name]()
    moves = [controller.observe(observation) for observation in observations(80)]
    assert any(m is not None for m in moves) == (name not in ("stratified", "static", "doremi"))
    for weights in [m for m in moves if m is not None] + [controller.weights, controller.recommended]:
        assert sum(weights) == pytest.approx(1)
        assert (np.array(weights) >= controller.floor - 1e-9).all()
        assert (np.array(weights) <= controller.cap + 1e-9).all()


@pytest.mark.parametrize("name", [n for n in MAKERS if n != "static"])
def test_equal_losses_leave_the_stratified_mixture(name):
    controller = MAKERS[name]()
    if name == "aioli-ema":
        controller = Aioli(NAMES, every=12, probe_steps=2, average=0.4)
    if name == "odm-exp3":
        controller = OnlineDataMixing(NAMES, variant="exp3")
    for observation in observations(80, equal=True):
        controller.observe(observation)
    assert controller.recommended == pytest.approx([0.25] * 4)
    assert controller.loss_weights is None or controller.loss_weights == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("stop", [0, 1, 9, 33])
@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_controller_goes_on_bit_for_bit(name, stop):
    whole, before, after = MAKERS[name](), MAKERS[name](), MAKERS[name]()
    told = list(observations(60))
    expected = [(whole.observe(o), whole.loss_weights, whole.recommended) for o in told]
    for observation in told[:stop]:
        before.observe(observation)
    after.load_state_dict(json.loads(json.dumps(before.state_dict(), allow_nan=False)))
    assert [(after.observe(o), after.loss_weights, after.recommended) for o in told[stop:]] == expected[stop:]
    assert after.state_dict() == whole.state_dict()


def test_a_state_of_something_else_is_refused():
    with pytest.raises(UserError, match="resume with the mixture that the run was started with"):
        OnlineDataMixing(NAMES).load_state_dict(Stratified(NAMES).state_dict())
    with pytest.raises(UserError, match="resume with the mixture"):
        Stratified(NAMES).load_state_dict(Stratified(("a", "b")).state_dict())


def test_an_observation_must_hold_what_was_asked_for_and_come_in_order():
    with pytest.raises(ValueError, match="needs excess of 4 domains"):
        DoReMi(NAMES).observe(seen(1, [1] * 4))
    with pytest.raises(ValueError, match="needs losses of 4 domains"):
        Stratified(NAMES).observe(seen(1, [1, 2]))
    controller = Stratified(NAMES)
    controller.observe(seen(3, [1] * 4))
    with pytest.raises(ValueError, match="step 3 was observed after step 3"):
        controller.observe(seen(3, [1] * 4))


def test_a_configuration_makes_a_controller():
    config = parse_mixture({"method": "odm", "options": {"variant": "exp3", "reference": {"a": 1.0, "b": 2.0}}})
    controller = config.controller(("a", "b"))
    assert isinstance(controller, OnlineDataMixing)
    assert controller.reference.tolist() == [1.0, 2.0]
    assert parse_mixture({}).controller(("a",)).weights == (1.0,)
    assert set(CONTROLLERS) == {"stratified", "static", "influence", "odm", "doremi", "aioli"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"method": "magic"}, "must be one of stratified, static"),
        ({"method": "odm", "options": {"lr": 1}}, "no option 'lr': its options are variant, smoothing"),
        ({"method": "stratified", "options": {"weights": [1]}}, "it has no options"),
        ({"method": "aioli"}, "needs the option every"),
        ({"metod": "odm"}, "unknown key 'metod'"),
        ({"method": "odm", "options": {"every": "often"}}, "wrong type"),
    ],
)
def test_a_wrong_configuration_names_what_is_wrong(raw, message):
    with pytest.raises(UserError, match=message):
        parse_mixture(raw).controller(NAMES)


def test_the_subpackage_needs_no_trainer_and_no_torch_model():
    code = (
        "import sys, data_handler.mixture\n"
        "print([n for n in ('pytorch_lightning', 'hydra', 'wandb', 'bitnet_arch', 'wrinklefree', 'sklearn') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
