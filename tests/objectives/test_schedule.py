"""Schedules of objective and mask rate against formulas written out here, and what is refused."""

import bisect
import random
from fractions import Fraction

import pytest

from ettin_foundry.model.config import objective_names
from ettin_foundry.objectives.schedule import MaskRate, ObjectiveSchedule, check_together, parse_tokens

TOTAL = 1_000_003  # no round number, so that shares of it round
BIPHASIC = [{"until": "0.25dur", "objective": "clm"}, {"until": "1dur", "objective": "mlm"}]
# the last turn is cut short
ALTERNATING = [{"until": "390_000tok", "cycle": [{"tokens": "4_000tok", "objective": "clm"},
                                                 {"tokens": "16_000tok", "objective": "mlm"}]}, {"objective": "clm"}]


def tokens_to_try(*breakpoints):
    """Every breakpoint, its neighbours, both ends, and 1,000 random tokens."""
    rng = random.Random(5)
    near = {max(0, b + d) for b in breakpoints for d in (-1, 0, 1)}
    return sorted({t for t in near if t < TOTAL} | {0, TOTAL - 1} | {rng.randrange(TOTAL) for _ in range(1000)})


def test_segments_and_cycles_hold_where_their_formula_says():
    switch, turns = round(Fraction(TOTAL, 4)), [20_000 * turn + part for turn in range(20) for part in (0, 4_000)]
    biphasic, alternating = (ObjectiveSchedule.parse(value, total=TOTAL) for value in (BIPHASIC, ALTERNATING))
    for t in tokens_to_try(switch, *turns, 390_000):
        assert biphasic.at(t) == {"clm" if t < switch else "mlm": 1.0}
        assert alternating.at(t) == {"clm" if t >= 390_000 or t % 20_000 < 4_000 else "mlm": 1.0}, t
    assert (biphasic.objectives, biphasic.final, alternating.final) == (("clm", "mlm"), "mlm", "clm")
    mixture = ObjectiveSchedule.parse({"mntp": 0.9375, "clm": 0.0625})
    assert mixture.at(0) == mixture.at(10**13) == {"mntp": 0.9375, "clm": 0.0625}


def test_rates_are_their_formula_at_every_breakpoint_and_at_random_tokens():
    segments = [{"until": "0.5dur", "rate": 0.3}, {"until": 800_000, "rate": 0.15}, {"rate": 0.05}]
    steps = MaskRate.parse(segments, total=TOTAL)
    ends = [round(Fraction(TOTAL, 2)), 800_000, TOTAL]
    linear = MaskRate.parse([{"until": 300_000, "from": 0.3, "to": 0.15}, {"from": 0.15, "to": 0.05}], total=TOTAL)
    for t in tokens_to_try(*ends, 300_000):
        assert steps.at(t) == (0.3, 0.15, 0.05)[bisect.bisect_right(ends, t)]
        x = Fraction(t, 300_000) if t < 300_000 else Fraction(t - 300_000, TOTAL - 300_000)
        first, last = (Fraction("0.3"), Fraction("0.15")) if t < 300_000 else (Fraction("0.15"), Fraction("0.05"))
        assert linear.at(t) == pytest.approx(float(first + (last - first) * x), rel=1e-14)  # a few roundings of float64
    assert MaskRate.parse(0.3).at(7) == 0.3


@pytest.mark.parametrize("value", [
    "mlm", BIPHASIC, ALTERNATING, {"clm": 0.25, "mntp": 0.75},
    [{"until": 10, "objective": {"clm": 0.5, "mlm": 0.5}}, {"objective": "mntp"}]], ids=str)
def test_plain_data_reads_back_as_the_same_schedule(value):
    schedule = ObjectiveSchedule.parse(value, total=TOTAL)
    again = ObjectiveSchedule.parse(schedule.plain())
    assert again.plain() == schedule.plain()
    assert [again.at(t) for t in range(0, TOTAL, 9973)] == [schedule.at(t) for t in range(0, TOTAL, 9973)]
    assert objective_names(value) == objective_names(schedule.plain()) == (schedule.objectives, schedule.final)
    for rate in (0.3, 0, [{"until": "0.5dur", "rate": 0.3}, {"from": 0.3, "to": 0.1}]):
        plain = MaskRate.parse(rate, total=TOTAL).plain()
        assert MaskRate.parse(plain).plain() == plain


def test_what_does_not_fill_the_run_or_is_out_of_range_is_refused_by_key():
    until = [{"until": 500, "objective": "clm"}]
    for schedule, value, words in (
            (ObjectiveSchedule, [*until, {"until": 500, "objective": "mlm"}, {"objective": "clm"}], r"\[1\].until"),
            (ObjectiveSchedule, [*until, {"until": "0.9dur", "objective": "mlm"}], "end of the run"),
            (ObjectiveSchedule, [{"objective": "clm"}, {"objective": "mlm"}], r"\[0\].until"),
            (ObjectiveSchedule, [{"until": "3ba", "objective": "clm"}, {"objective": "mlm"}], "'3ba'"),
            (ObjectiveSchedule, [{"until": 10, "objektive": "clm"}, {"objective": "mlm"}], "or cycle.*objektive"),
            (ObjectiveSchedule, [], "empty list"), (ObjectiveSchedule, "mdlm", "'mdlm'"),
            (ObjectiveSchedule, {"clm": 0.5, "mlm": 0.6}, "sum to 1"), (ObjectiveSchedule, {"clm": -1, "mlm": 2}, "-1"),
            (ObjectiveSchedule, [{"cycle": [{"tokens": 5, "objective": "clm"}]}], "at least two blocks"),
            (ObjectiveSchedule, [{"cycle": [{"tokens": 0, "objective": "clm"}] * 2}], r"\[0\].tokens"),
            (MaskRate, 1.01, "1.01"), (MaskRate, True, "True"), (MaskRate, [{"from": 0.3, "to": 1.5}], r"\[0\].to"),
            (MaskRate, [{"rate": 0.3, "to": 0.1}], "rate or from")):
        with pytest.raises(ValueError, match=f"key.*{words}"):
            schedule.parse(value, total=1000, key="key")
    with pytest.raises(ValueError, match="objective.0..until.*not in tokens.*'0.25dur'"):
        ObjectiveSchedule.parse(BIPHASIC)
    with pytest.raises(ValueError, match="until must be given"):
        MaskRate.parse([{"from": 0.3, "to": 0.1}])


def test_times_are_read_in_every_form():
    assert (parse_tokens("x", "1_000tok", None), parse_tokens("x", "1e3tok", None), parse_tokens("x", "0.5dur", 9)) == (
        1000, 1000, 4)  # half of 9 rounds to the even neighbour


def test_a_rate_is_given_exactly_where_something_is_masked_at_it():
    for objective, fits, other in (("mlm", 0.3, 0), ("clm", 0, 0.3), ({"mntp": 0.5, "clm": 0.5}, 0.15, 0)):
        check_together(ObjectiveSchedule.parse(objective), MaskRate.parse(fits), "train_loader.")
        with pytest.raises(ValueError, match=r"train_loader\.mask_rate must be"):
            check_together(ObjectiveSchedule.parse(objective), MaskRate.parse(other), "train_loader.")
