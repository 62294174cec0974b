"""Schedules: in plain data, and what is refused. What holds at each token: benchmarks/fuzz, `schedules`."""

import pytest

from ettin_foundry.objectives.schedule import MaskRate, ObjectiveSchedule, check_together, parse_tokens

TOTAL = 1_000_003  # no round number, so that shares of it round
BIPHASIC = [{"until": "0.25dur", "objective": "clm"}, {"until": "1dur", "objective": "mlm"}]
# the last turn is cut short
ALTERNATING = [{"until": "390_000tok", "cycle": [{"tokens": "4_000tok", "objective": "clm"},
                                                 {"tokens": "16_000tok", "objective": "mlm"}]}, {"objective": "clm"}]


@pytest.mark.parametrize("value", [
    "mlm", BIPHASIC, ALTERNATING, {"clm": 0.25, "mntp": 0.75},
    [{"until": 10, "objective": {"clm": 0.5, "mlm": 0.5}}, {"objective": "mntp"}]], ids=str)
def test_plain_data_reads_back_as_the_same_schedule(value):
    schedule = ObjectiveSchedule.parse(value, total=TOTAL)
    again = ObjectiveSchedule.parse(schedule.plain())
    assert again.plain() == schedule.plain()
    assert [again.at(t) for t in range(0, TOTAL, 9973)] == [schedule.at(t) for t in range(0, TOTAL, 9973)]
    assert (again.objectives, again.final) == (schedule.objectives, schedule.final)
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
