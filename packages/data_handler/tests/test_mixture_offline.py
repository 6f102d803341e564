"""Methods that train proxies, on a learner whose losses are known functions of what it has read."""

import json

import numpy as np
import pytest
from data_handler import DataConfig, SourceConfig, UserError, load_config
from data_handler.mixture import (
    Aioli,
    DoReMi,
    InfluenceWeighted,
    OnlineDataMixing,
    Static,
    StepResult,
    Stratified,
    drive,
    offline,
    with_weights,
    write_config,
)
from data_handler.mixture.driver import Apportioner
from data_handler.mixture.journal import Journal
from data_handler.mixture.offline import Budget, doremi, proxy_run, regmix
from data_handler.mixture.regmix import KINDS, best_mixture, fit, random_mixtures, spearman

NAMES = ("quick", "slow", "noise")
FLOOR = np.array([0.5, 1.0, 3.0])
GAIN = np.array([1.0, 2.0, 0.0])
PACE = np.array([40.0, 400.0, 1.0])
"""Loss of a domain after n rows of it: FLOOR + GAIN * PACE / (PACE + n). Noise has nothing to learn."""


class Toy:
    domains = NAMES

    def __init__(self, seed=0, *, reference=None):
        self.read = np.zeros(3)
        self.trained_tokens = self.measured_tokens = 0
        self.reference = reference
        self.calls = []

    def losses(self):
        return FLOOR + GAIN * PACE / (PACE + self.read)

    def step(self, rows, token_weights, *, excess):
        weights = np.ones(3) if token_weights is None else np.array(token_weights)
        self.calls.append((list(rows), token_weights))
        losses = self.losses()
        self.read += np.array(rows) * weights * sum(rows) / max(1e-9, (np.array(rows) * weights).sum())
        self.trained_tokens += sum(rows)
        over = np.maximum(losses - self.reference.losses(), 0.0).tolist() if excess else None
        return StepResult(losses=losses.tolist(), tokens=list(rows), excess=over)

    def validate(self):
        self.measured_tokens += 3
        return self.losses().tolist()

    def influence(self):
        return np.diag(GAIN * PACE / (PACE + self.read) ** 2).tolist()


def nothing(step):
    pass


def optimum(rows, target):
    grid = random_mixtures(20_000, [1, 1, 1], 9)
    losses = FLOOR + GAIN * PACE / (PACE + grid * rows)
    return grid[np.argmin(losses @ np.array(target))]


def test_rows_follow_the_shares_and_a_change_makes_up_for_nothing():
    apportioner = Apportioner(3)
    counts = np.array([apportioner.rows([0.7, 0.2, 0.1], 8) for _ in range(100)])
    assert (counts.sum(axis=1) == 8).all()
    assert abs(np.cumsum(counts, axis=0) - np.outer(np.arange(1, 101), [5.6, 1.6, 0.8])).max() <= 1.0
    after = np.array([apportioner.rows([0.0, 0.0, 1.0], 8) for _ in range(10)]).sum(axis=0)
    assert after.tolist()[:2] == [0, 0] or after[:2].sum() <= 2


def test_drive_applies_weights_from_the_next_step_and_counts():
    learner, controller = Toy(), OnlineDataMixing(NAMES)
    run = drive(learner, controller, 50, 10)
    assert run.rows == np.sum([rows for rows, _ in learner.calls], axis=0).tolist()
    assert learner.trained_tokens == 500
    changes = dict(run.history)
    weights, realised, wanted = None, np.zeros(3), np.zeros(3)
    for step, (rows, _) in enumerate(learner.calls):
        weights = changes.get(step, weights)
        realised, wanted = realised + rows, wanted + np.array(weights) * 10
        assert abs(realised - wanted).max() <= 2.0
    assert run.average == pytest.approx(wanted / 500)
    assert run.average[2] > 0.4  # it chases the noise


def test_drive_weighs_the_loss_where_the_method_acts_there():
    reference = Toy()
    drive(reference, Stratified(NAMES), 20, 9)
    learner, controller = Toy(reference=reference), DoReMi(NAMES)
    drive(learner, controller, 3, 9)
    assert [rows for rows, _ in learner.calls] == [[3, 3, 3]] * 3
    assert learner.calls[0][1] == pytest.approx([1, 1, 1])
    assert learner.calls[2][1][0] > 1 > learner.calls[2][1][2]  # the reference has learned most of the quick one


def test_nothing_is_measured_after_the_last_step():
    learner = Toy()
    drive(learner, Aioli(NAMES, every=20, probe_steps=2), 20, 6)
    assert learner.measured_tokens == 3 * 4  # the start and three probes, not the start of a second round
    influenced = InfluenceWeighted(NAMES, every=10)
    drive(Toy(), influenced, 20, 6)
    assert influenced.step == 19


def test_doremi_weighs_what_the_reference_learned_and_the_proxy_has_not():
    found = doremi(Toy, NAMES, Budget(steps=100, rows_per_step=9), 0, nothing)
    assert found.trained_tokens == 2 * 900
    assert found.weights[2] < 0.05 < 0.3 < min(found.weights[:2])
    assert sum(found.weights) == pytest.approx(1)


def test_a_proxy_run_gives_the_mean_of_an_online_method():
    found = proxy_run(Toy, InfluenceWeighted(NAMES, every=5, floor=0.02), Budget(steps=100, rows_per_step=9), 0, nothing)
    assert found.weights[2] < 0.1 < found.weights[1]
    assert found.trained_tokens == 900
    stratified = proxy_run(Toy, Stratified(NAMES), Budget(steps=10, rows_per_step=9), 0, nothing)
    assert stratified.weights == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(("kind", "slack"), [("quadratic", 0.04), ("trees", 0.1)])
def test_regmix_finds_the_optimum_of_a_known_function(kind, slack, monkeypatch):
    monkeypatch.setattr(offline, "CANDIDATES", 20_000)  # trees are slow to ask
    target, budget = [0.5, 0.5, 0.0], Budget(steps=50, rows_per_step=20)
    found = regmix(Toy, NAMES, budget, 0, nothing, proxies=48, target=target, kind=kind)
    losses = [float((FLOOR + GAIN * PACE / (PACE + 1000 * np.array(w))) @ target) for w in (found.weights, optimum(1000, target))]
    stratified = float((FLOOR + GAIN * PACE / (PACE + 1000 / 3)) @ target)
    assert losses[0] <= losses[1] + slack
    assert losses[0] < stratified
    assert found.detail["rank_correlation"] > 0.8
    assert found.trained_tokens == 48 * 1000


def test_the_quadratic_regression_finds_the_inner_optimum_of_a_convex_function():
    best = np.array([0.5, 0.3, 0.2])
    mixtures = random_mixtures(64, [1, 1, 1], 3)
    losses = ((mixtures - best) ** 2).sum(axis=1)
    candidates = random_mixtures(100_000, [1, 1, 1], 4)
    found = best_mixture(fit(mixtures, losses, "quadratic").predict, candidates)
    assert found == pytest.approx(best, abs=0.02)
    linear = best_mixture(fit(mixtures, losses, "linear").predict, candidates)
    assert linear.max() > 0.9  # a linear function has its least at a corner


def test_a_linear_law_is_recovered_exactly_and_noise_is_admitted():
    mixtures = random_mixtures(40, [1, 1, 1, 1], 0)
    slope = np.array([1.0, 2.0, 0.5, 3.0])
    exact = fit(mixtures, mixtures @ slope, "linear")
    assert exact.predict(np.eye(4)) == pytest.approx(slope, abs=1e-3)
    assert exact.rank_correlation > 0.99
    noise = fit(mixtures, np.random.default_rng(0).normal(size=40), "linear")
    assert abs(noise.rank_correlation) < 0.5
    assert noise.error > 0.5


def test_random_mixtures_are_mixtures_around_the_prior():
    mixtures = random_mixtures(4000, [8, 1, 1], 0, temperature=1.0)
    assert mixtures.sum(axis=1) == pytest.approx(1)
    assert mixtures.mean(axis=0) == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    flat = random_mixtures(4000, [8, 1, 1], 0)
    assert flat.mean(axis=0)[0] == pytest.approx(8**0.5 / (8**0.5 + 2), abs=0.02)
    assert ((mixtures == 0) | (mixtures > 2e-4)).all()
    assert (random_mixtures(5, [1, 1], 1) == random_mixtures(5, [1, 1], 1)).all()
    assert (random_mixtures(5, [1, 1], 1) != random_mixtures(5, [1, 1], 2)).any()


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 2], [3, 3, 4]) == pytest.approx(1)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0


@pytest.mark.parametrize(
    ("mixtures", "losses", "kind", "message"),
    [
        (np.eye(3), [1, 2, 3], "linear", "3 proxy runs are too few"),
        (random_mixtures(8, [1, 1], 0), [1, 2, 3, 4, 5, 6, 7, np.nan], "linear", "1 of the proxy runs have no finite loss"),
        (random_mixtures(8, [1, 1], 0), np.ones(8), "magic", f"one of {', '.join(KINDS)}"),
    ],
)
def test_a_regression_that_cannot_be_is_refused(mixtures, losses, kind, message):
    with pytest.raises(UserError, match=message):
        fit(mixtures, losses, kind)


def test_a_stopped_sweep_goes_on(tmp_path):
    path, budget, target = tmp_path / "proxies.jsonl", Budget(steps=5, rows_per_step=6), [1, 1, 0]
    made = []

    def make(seed, *, reference=None):
        if len(made) == 7 and not path.with_suffix(".on").exists():
            raise KeyboardInterrupt
        made.append(Toy())
        return made[-1]

    with pytest.raises(KeyboardInterrupt):
        regmix(make, NAMES, budget, 0, nothing, proxies=12, target=target, journal=Journal(path, {"a": 1}))
    with path.open("a") as file:
        file.write('["proxy 7", {"losses": [1')  # what a crash leaves
    path.with_suffix(".on").touch()
    again = regmix(make, NAMES, budget, 0, nothing, proxies=12, target=target, journal=Journal(path, {"a": 1}))
    assert len(made) == 12
    assert again == regmix(Toy, NAMES, budget, 0, nothing, proxies=12, target=target)
    with pytest.raises(UserError, match="keeps the results of other settings"):
        Journal(path, {"a": 2})


def test_found_weights_become_a_configuration_that_loads(tmp_path):
    sources = (
        SourceConfig(name="x", kind="text", path="x"),
        SourceConfig(name="y", kind="jsonl", path="y", text_column="body", weight=7.0),
        SourceConfig(name="z", kind="stdlib_code"),
    )
    config = DataConfig(sources=sources, sequence_length=64, packing=False)
    mixed = with_weights(config, [3.0, 1.0, 1e-9])
    assert [(s.name, s.weight) for s in mixed.sources] == [("x", 0.75), ("y", 0.25)]
    path = tmp_path / "configs" / "mixed.yaml"
    write_config(path, mixed, ["found by hand", "at no cost"])
    assert load_config(str(path)) == mixed
    assert path.read_text().startswith("# found by hand\n# at no cost\nsources:\n")
    assert [p.name for p in path.parent.iterdir()] == ["mixed.yaml"]
    with pytest.raises(UserError, match=r"must end in \.yaml"):
        write_config(tmp_path / "mixed.json", mixed)
    with pytest.raises(UserError, match="2 weights do not fit the 3 sources"):
        with_weights(config, [1, 1])


def test_a_run_is_plain_data():
    run = drive(Toy(), Static(NAMES, weights=[1, 2, 3]), 4, 6)
    assert json.loads(json.dumps(run.history)) == [[0, [pytest.approx(1 / 6), pytest.approx(1 / 3), 0.5]]]
    assert run.rows == [4, 8, 12]
