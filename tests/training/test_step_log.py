"""steps.jsonl and the batch-size warm-up in whole runs, through yamls/nano.yaml and LLM-Foundry's `train`."""

import shutil

import nano_run
import pytest

from ettin_foundry.training.step_log import StepLog
from ettin_foundry.training.steps import STEPS, compare_steps, read_steps


def test_each_line_says_what_its_step_read_and_gave(rising_run):
    folder, seen = rising_run
    steps = read_steps(folder)
    rows = [2, 2, 4, 4, 6, 6, *[8] * (len(steps) - 6)]
    assert [entry["rows"] for entry in steps] == [len(batch["input_ids"]) for batch in seen["batches"]] == rows
    assert [entry["step"] for entry in steps] == [batch["step"] for batch in seen["batches"]] == list(range(len(steps)))
    assert [entry["tokens"] for entry in steps] == seen["tokens"]
    for key, values in (("lr", seen["lrs"]), ("loss", seen["losses"])):
        assert [entry[key] for entry in steps] == values
    assert [entry["ids_hash"] for entry in steps] == [f"{batch['ids_hash']:012x}" for batch in seen["batches"]]
    assert len({entry["ids_hash"] for entry in steps}) == len(steps) > 8 and all(entry["seconds"] > 0 for entry in steps)
    assert {(entry["objective"], entry["mask_rate"]) for entry in steps} == {("mlm", 0.3)}
    for before, lr in zip(seen["tokens"], seen["lrs"]):  # the clock counts tokens, whatever the batch sizes
        assert lr == pytest.approx(3e-3 * min(1.0, 1e-10 + (1 - 1e-10) * before / 2000), rel=1e-9)


def test_warm_up_killed_twice_equals_never_killed_also_with_workers(rising_run, data_set, tmp_path):
    from composer import Callback
    from llmfoundry import registry

    class Kill(Callback):
        at = -1

        def before_train_batch(self, state, logger):
            if state.timestamp.batch == Kill.at:
                raise KeyboardInterrupt

    registry.callbacks.register("kill", func=Kill)
    capture = nano_run.register_capture()
    seen = {key: [] for key in ("losses", "lrs", "tokens")}
    for workers, Kill.at in ((0, 5), (2, 8), (0, -1)):  # resumed from the checkpoints of batch 3 and batch 6
        arguments = [data_set, tmp_path, *nano_run.RISING, "callbacks.capture={}", "callbacks.kill={}",
                     f"train_loader.num_workers={workers}"]
        if Kill.at >= 0:
            with pytest.raises(KeyboardInterrupt):
                nano_run.run(*arguments)
            with (next(tmp_path.iterdir()) / STEPS).open("a") as file:
                file.write('{"step": 5, "tokens": 12')  # killed while it wrote
        else:
            nano_run.run(*arguments).close()
        again = capture.batches[0]["step"]
        for key, values in seen.items():
            values[again:] = getattr(capture, key)[:len(capture.losses)]
    folder, expected = rising_run
    assert seen == {key: expected[key] for key in seen}
    alike = [[{**entry, "seconds": 0} for entry in read_steps(place)] for place in (folder, next(tmp_path.iterdir()))]
    assert alike[0] == alike[1]


def test_the_pair_read_identical_documents_at_every_step_and_the_log_tells_the_objectives(rising_run, data_set, tmp_path):
    overrides = [*nano_run.RISING, "max_duration=2000tok", "loggers.inmemory={}", "variables.label=biphasic",
                 "variables.objective=[{until: 1000tok, objective: clm}, {objective: mlm}]"]
    trainer = nano_run.run(data_set, tmp_path, *overrides)
    trainer.close()
    steps = read_steps(next(tmp_path.iterdir()))
    logged = trainer.logger.destinations[-1].data
    first = shutil.copytree(rising_run[0], tmp_path / "first", ignore=lambda _, names: set(names) - {STEPS})
    (first / STEPS).write_text("".join(f"{line}\n" for line in (first / STEPS).read_text().splitlines()[:len(steps)]))
    assert len(steps) > 5 and compare_steps(first, next(p for p in tmp_path.iterdir() if p != first)) is None
    turn = [entry["objective"] for entry in steps].index("mlm")
    assert 0 < turn < len(steps) and steps[turn - 1]["tokens"] < 1000 <= steps[turn]["tokens"]
    for name in ("clm", "mlm"):
        shares = [float(entry["objective"] == name) for entry in steps]
        assert [value for _, value in logged[f"data/objective_{name}"]] == shares


@pytest.mark.parametrize(("config", "folder", "words"), [
    ({}, None, "save_folder is None.*Set callbacks.ettin_steps.folder"),
    ({"save_folder": "s3://bucket/run"}, None, "save_folder is 's3://bucket/run', and steps.jsonl is written to a local"),
    ({"save_folder": "x"}, "gs://b/c", "callbacks.ettin_steps.folder is 'gs://b/c'")])
def test_a_run_without_a_local_folder_is_told_what_to_do(config, folder, words):
    with pytest.raises(ValueError, match=words):
        StepLog(config, folder)
