"""Schedules of objectives against formulas written out here; what is refused. Rates: benchmarks/fuzz, `schedules`."""

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
