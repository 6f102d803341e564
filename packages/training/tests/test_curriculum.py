"""Phases as pure functions, and what they refuse."""

from itertools import pairwise

import pytest
from bitnet_arch import UserError
from hypothesis import given
from hypothesis import strategies as st
from wrinklefree.cli import load_run_config
from wrinklefree.curriculum import CurriculumConfig, ever_above_zero, fitted, phase_steps, point_at, shares_at
from wrinklefree.mapping import from_mapping


def curriculum(*phases, by="ratio"):
    return from_mapping(CurriculumConfig, {"by": by, "phases": list(phases)})


def test_steps_hold_lines_and_cosines_move_and_what_is_not_named_stays():
    config = curriculum(
        {"until": 0.2, "objectives": {"a": 0.0}, "learning_rate": 0.5},
        {"until": 0.6, "interpolation": "linear", "objectives": {"a": 1.0, "b": 3.0}},
        {"until": 1.0, "interpolation": "cosine", "objectives": {"a": 0.0}, "learning_rate": 0.1},
    )
    found = [point_at(config, progress) for progress in (0.0, 0.19, 0.2, 0.4, 0.6, 0.7, 0.8)]
    assert [p.objectives["a"] for p in found] == pytest.approx([0, 0, 0, 0.5, 1, 0.853553, 0.5])
    assert [p.objectives["b"] for p in found] == pytest.approx([1, 1, 1, 2, 3, 3, 3])
    assert [p.learning_rate for p in found] == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.5, 0.441421, 0.3])
    assert all(p.lambda_value is None for p in found)
    assert found[0].objectives["a"] == found[2].objectives["a"] == 0.0  # exactly: it then costs nothing


def test_values_hold_behind_the_last_phase_and_none_change_nothing():
    config = curriculum({"until": 0.5, "interpolation": "linear", "lambda_value": 0.0})
    assert [point_at(config, p).lambda_value for p in (0.0, 0.25, 0.5, 0.9)] == [1.0, 0.5, 0.0, 0.0]
    nothing = point_at(curriculum(), 0.5)
    assert (dict(nothing.objectives), nothing.learning_rate, nothing.lambda_value) == ({}, 1.0, None)


def test_tokens_are_shares_of_the_runs_tokens():
    ratio = curriculum(
        {"until": 0.25, "objectives": {"a": 0.0}}, {"until": 1.0, "interpolation": "linear", "objectives": {"a": 1.0}}
    )
    tokens = curriculum(
        {"until": 1000, "objectives": {"a": 0.0}}, {"until": 4000, "interpolation": "linear", "objectives": {"a": 1.0}}, by="tokens"
    )
    for progress in (0.0, 0.2, 0.25, 0.5, 0.99):
        assert point_at(ratio, progress) == point_at(tokens, progress, 4000)


def test_shares_of_sources_begin_with_their_phase():
    config = curriculum(
        {"until": 0.5, "objectives": {"a": 0.0}}, {"until": 0.7, "data": {"x": 0.9, "y": 0.1}}, {"until": 1.0, "learning_rate": 0.1}
    )
    assert shares_at(config, 0.4) is None
    assert shares_at(config, 0.5) == (1, {"x": 0.9, "y": 0.1}) == shares_at(config, 0.99)


def test_a_phase_may_be_a_single_step_and_factors_of_one_may_stand_beside_others():
    phases = "[{until: 0.5, learning_rate: 1.0}, {until: 0.504, learning_rate: 0.5}, {until: 1.0, learning_rate: 1.0}]"
    config = load_run_config([f"curriculum.phases={phases}"])
    rates = [point_at(config.curriculum, step / 250).learning_rate for step in range(250)]
    assert [step for step, rate in enumerate(rates) if rate == 0.5] == [125]
    assert load_run_config(["curriculum.phases=[{until: 0.5, lambda_value: 0.0}]"]) is not None
    rising = ["training.lambda_schedule=linear", "training.lambda_warmup_share=0.5"]
    assert load_run_config([*rising, "curriculum.phases=[{until: 0.5, lambda_value: 1.0}]"]).own_lambda


PARTS = ({"until": 0.3, "learning_rate": 0.5}, {"until": 0.4, "learning_rate": 0.25}, {"until": 1.0, "learning_rate": 1.0})


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(3, [1, 1, 1]), (4, [1, 1, 2]), (5, [1, 1, 3]), (6, [2, 1, 3]), (7, [2, 1, 4]), (10, [3, 1, 6]), (250, [75, 25, 150])],
    ids=str,
)
def test_every_phase_has_a_step_and_the_others_go_by_share(steps, expected):
    config = curriculum(*PARTS)
    moved = fitted(config, 1.0, steps)
    assert phase_steps(config, 1.0, steps) == [*expected, 0]
    rates = [point_at(moved, step / steps).learning_rate for step in range(steps)]
    assert rates == [0.5] * expected[0] + [0.25] * expected[1] + [1.0] * expected[2]
    untouched = [point_at(config, step / steps).learning_rate for step in range(steps)]
    assert (moved == config) == (rates == untouched) == (steps not in (4, 5, 7))  # the control: a phase was empty there


def test_a_phase_of_one_step_is_on_its_way_and_steps_behind_the_last_phase_are_given_first():
    moved = fitted(
        curriculum({"until": 0.3, "lambda_value": 0.0}, {"until": 0.4, "interpolation": "linear", "lambda_value": 1.0}), 1, 4
    )
    assert [phase.until for phase in moved.phases] == [0.125, 0.4]
    assert 0 < point_at(moved, 0.25).lambda_value < 1 == point_at(moved, 0.5).lambda_value
    early = curriculum(*({"until": until, "learning_rate": until} for until in (10, 20, 30)), by="tokens")
    assert phase_steps(early, 4000, 8) == [1, 1, 1, 5]
    assert [point_at(fitted(early, 4000, 8), step / 8, 4000).learning_rate for step in range(4)] == [10, 20, 30, 30]


@given(
    ends=st.lists(st.integers(1, 1000), min_size=1, max_size=6, unique=True).map(sorted),
    steps=st.integers(1, 60),
    total=st.just(1000),
)
def test_phases_stay_in_order_and_have_their_steps(ends, steps, total):
    if len(ends) > steps:
        return
    config = curriculum(*({"until": end, "learning_rate": 1 + i} for i, end in enumerate(ends)), by="tokens")
    moved, expected = fitted(config, total, steps), phase_steps(config, total, steps)
    assert sum(expected) == steps
    assert min(expected[:-1]) >= 1
    assert all(a.until < b.until for a, b in pairwise(moved.phases))
    rates = [point_at(moved, step / steps, total).learning_rate for step in range(steps)]
    assert [rates.count(1 + i) for i in range(len(ends))] == [*expected[:-2], expected[-2] + expected[-1]]
    assert phase_steps(moved, total, steps) == expected


@pytest.mark.parametrize("steps", [1, 2])
def test_fewer_steps_than_phases_are_refused(steps):
    with pytest.raises(UserError, match=f"curriculum.phases has 3 phases, and the run {steps} step"):
        load_run_config(["training=stage1_9_layerwise", f"training.max_steps={steps}"])


def test_an_objective_that_never_counts_is_known():
    assert ever_above_zero(curriculum(), "a")
    assert not ever_above_zero(curriculum({"until": 1.0, "objectives": {"a": 0.0}}), "a")
    assert ever_above_zero(curriculum({"until": 1.0, "interpolation": "linear", "objectives": {"a": 0.0}}), "a")
    assert ever_above_zero(curriculum({"until": 0.5, "objectives": {"b": 0.0}}, {"until": 1.0, "objectives": {"a": 0.0}}), "a")
    assert ever_above_zero(curriculum({"until": 0.5, "objectives": {"a": 0.0}}, {"until": 1.0, "objectives": {"a": 0.1}}), "a")


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ("[{until: 0.5, objectives: {ce: 1}}, {until: 0.4, objectives: {ce: 1}}]", "phases.1.until must lie after 0.5"),
        ("[{until: 1.5, objectives: {ce: 1}}]", "at most 1, not 1.5"),
        ("[{until: 0.5}]", "phases.0 changes nothing"),
        ("[{until: 0.5, objectives: {ce: -1}}]", "at least 0, not -1"),
        ("[{until: 0.5, lambda_value: 2}]", "must lie in"),
        ("[{until: 0.5, objectives: {logits: 1}}]", "names 'logits', and the objectives are ce"),
        ("[{until: 1.0, objectives: {ce: 0}}]", "no objective ever has a weight above 0"),
        ("[{until: 0.5, data: {code: 1.0}}]", "must give every source a share"),
        ("[{until: 0.5, learning_rate: 1.0}]", "curriculum.phases has no effect, since all of its factors are 1"),
        ("[{until: 0.5, objectives: {ce: 1}, lambda_value: 1}]", "curriculum.phases has no effect"),
        ("[{until: 0.5, interpolation: zigzag, learning_rate: 0.5}]", "interpolation"),
    ],
    ids=str,
)
def test_phases_that_cannot_be_meant_are_refused(phases, message):
    with pytest.raises(UserError, match=message):
        load_run_config([f"curriculum.phases={phases}"])
    if "data" in phases:
        with pytest.raises(UserError, match="both set the sources' shares"):
            load_run_config(["mixture=odm", "curriculum.phases=[{until: 0.5, data: {code: 0.5, prose: 0.5}}]"])


PAIR = ["objectives={ce: {}, layerwise: {}}", "mixture=odm", "training.max_steps=20"]
SILENT = "curriculum.phases=[{until: 0.5, objectives: {ce: 0}}, {until: 1.0, objectives: {ce: 1}}]"
QUIET = SILENT.replace("ce: 0", "ce: 0.1")
FADING = "curriculum.phases=[{until: 0.5, interpolation: linear, objectives: {ce: 0}}]"
AND_BACK = FADING.replace("}]", "}, {until: 1.0, interpolation: cosine, objectives: {ce: 1}}]")
TO_THE_END = "curriculum.phases=[{until: 0.5, learning_rate: 0.5}, {until: 1.0, interpolation: linear, objectives: {ce: 0}}]"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([SILENT, "training.max_steps=6"], "^at step 1, the first of curriculum.phases.0, every objective has weight 0"),
        ([FADING, "training.max_steps=6"], "^at step 4, the first behind curriculum.phases, every objective has weight 0"),
        ([AND_BACK], "the first of curriculum.phases.1, every objective has weight 0"),
        ([*PAIR, SILENT], "^at step 1, the first of curriculum.phases.0, the cross-entropy has weight 0, and mixture.method=odm"),
        ([*PAIR, FADING], "^at step 11, the first behind curriculum.phases, the cross-entropy has weight 0"),
    ],
    ids=str,
)
def test_a_step_at_which_nothing_is_learnt_is_refused(more, message):
    with pytest.raises(UserError, match=message):
        load_run_config(more)


@pytest.mark.parametrize("more", [[TO_THE_END], [*PAIR, TO_THE_END], [PAIR[0], SILENT], [PAIR[0], FADING], [*PAIR, QUIET]], ids=str)
def test_a_weight_that_fades_to_the_end_or_leaves_others_is_none(more):
    """The control: what reaches 0 with the last step was above it in every one."""
    config = load_run_config(more)
    points = [point_at(config.fitted_curriculum, step / config.training.max_steps) for step in range(config.training.max_steps)]
    assert all(point.objectives.get("ce", 1.0) > 0 for point in points) or "layerwise" in config.objective_settings()
