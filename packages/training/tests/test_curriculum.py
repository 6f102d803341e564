"""Phases as pure functions, and what they refuse."""

import pytest
from bitnet_arch import UserError
from wrinklefree.cli import load_run_config
from wrinklefree.curriculum import CurriculumConfig, ever_above_zero, point_at, shares_at
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
        (
            "[{until: 0.501, learning_rate: 0.5}, {until: 0.503, learning_rate: 1.0}]",
            "phases.1 is too short: none of the run's 250",
        ),
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
