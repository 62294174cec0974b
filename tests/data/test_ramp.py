"""Batch-size warm-ups that are refused. Sizes, steps and tokens against a walk: benchmarks/fuzz, `warmup`."""

import pytest

from ettin_foundry.data.stream import check_warmup

RECIPE = {"min_size": 352, "tokens": "50_000_000_000tok"}


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
