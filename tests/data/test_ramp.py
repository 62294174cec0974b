"""Batch-size warm-up: its tokens, and what is refused. Steps and rows against a walk: benchmarks/fuzz, `warmup`."""

import pytest

from ettin_foundry.data.stream import BatchRamp, check_warmup

RECIPE = {"min_size": 352, "tokens": "50_000_000_000tok"}


def simulate(smallest, largest, steps_each, number):
    found, size, held, before = [], smallest, 0, 0
    for _ in range(number):
        found.append((size, before))
        before += size
        held += 1
        if held == steps_each and size < largest:
            size, held = size + smallest, 0
    return found


@pytest.mark.parametrize(("warmup", "largest", "tokens_per_row"), [
    (RECIPE, 2816, 1007.3), ({"min_size": 4, "tokens": 3000}, 32, 51.0)], ids=["recipe", "nano"])
def test_sizes_share_the_tokens_asked_for_in_proportion_to_themselves(warmup, largest, tokens_per_row):
    ramp = BatchRamp.build(warmup, max_size=largest, tokens_per_row=tokens_per_row)
    sizes = [rows for rows, _ in simulate(warmup["min_size"], largest, 1, largest // warmup["min_size"])][:-1]
    spent = [sum(ramp.rows(step) for step in range(ramp.num_steps) if ramp.rows(step) == size) for size in sizes]
    assert [rows / size for rows, size in zip(spent, sizes)] == [ramp.steps_per_size] * len(sizes)
    asked, one_of_each = int(str(warmup["tokens"]).removesuffix("tok")), sum(sizes) * tokens_per_row
    assert abs(sum(spent) * tokens_per_row - asked) <= one_of_each / 2  # whole steps: half a step of each size at most
    assert BatchRamp.build(None, max_size=largest, tokens_per_row=tokens_per_row) == BatchRamp(largest, largest)
    few = BatchRamp.build({**warmup, "tokens": 1}, max_size=largest, tokens_per_row=tokens_per_row)
    assert few.steps_per_size == 1


@pytest.mark.parametrize(("change", "machine", "message"), [
    ({"step": 3}, {}, "batch_size_warmup must have the keys min_size"),
    ({"min_size": 2.0}, {}, "min_size must be .*2816, .*got 2.0"), ({"min_size": 300}, {}, "min_size must .*got 300"),
    ({"min_size": 2816}, {}, "min_size must be .*got 2816"), ({"tokens": "0tok"}, {}, "tokens must be above 0"),
    ({"tokens": "0.1dur"}, {}, "batch_size_warmup.tokens"), ({}, {"total": 10**9}, "within max_duration"),
    ({}, {"world_size": 3}, "min_size must be a multiple of the 3 processes, got 352"),
    ({}, {"world_size": 8, "microbatch": 88}, "device_train_microbatch_size must divide the 44 rows .*got 88"),
    ({}, {"microbatch": "auto"}, "device_train_microbatch_size must be a number")], ids=str)
def test_a_warm_up_that_cannot_be_carried_out_is_refused_naming_the_key(change, machine, message):
    with pytest.raises(ValueError, match=message):
        check_warmup({**RECIPE, **change}, 2816, **machine)
    found = check_warmup(RECIPE, 2816, world_size=8, microbatch=44, total=10**11)
    assert found == {**RECIPE, "tokens": 50_000_000_000}
