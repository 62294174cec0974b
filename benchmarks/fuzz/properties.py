"""Properties of order, packing, chunking, objectives, schedules, warm-up, configs and resumes, by hypothesis.

Each is a function of `draw` (hypothesis's `data.draw`), which draws a case and asserts; what it compares with is
written here, one thing after the other, in plain Python or exact fractions.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import yaml
from hypothesis import strategies as st
from memory_set import SPECIALS, VOCAB_SIZE, MemorySet

import train
from ettin_foundry.corpus.chunking import Chunker
from ettin_foundry.data.order import Order
from ettin_foundry.data.packing import pack_lengths, piece_counts
from ettin_foundry.data.stream import BatchRamp, RowStream
from ettin_foundry.objectives.schedule import MaskRate, ObjectiveSchedule
from ettin_foundry.objectives.targets import TextVocab, draw_objective, make_inputs, row_generator
from ettin_foundry.training import run_config, sources

Draw = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]


def run_property(name: str, *, seed: int, examples: int | None, end: float) -> tuple[Counter[str], set[str]]:
    """Rounds of examples, each round from another seed, until the time has come or the number is reached."""
    tally, number = Counter[str](), min(examples or 50, 50)

    @hypothesis.settings(max_examples=number, deadline=None, database=None, print_blob=True,
                         suppress_health_check=list(hypothesis.HealthCheck))  # type: ignore[arg-type]
    @hypothesis.given(data=st.data())
    def test(data: Any) -> None:
        tally["drawn"] += 1
        PROPERTIES[name](data.draw)

    while time.monotonic() < end and (examples is None or tally["drawn"] < examples):
        try:
            hypothesis.seed(seed)(test)()
        except Exception as error:
            print(f"--- {name}, seed {seed}: {type(error).__name__}: {error!s:.2000}")
            for line in getattr(error, "__notes__", []):
                print(line)
            return tally, {type(error).__name__}
        seed += 1
    return tally, set()


def refuses(work: Callable[[], object]) -> str:
    """The message of a ValueError, or ""."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------ rows


class TextSet(MemorySet):
    """With chunks that say what they are: a chunk's tokens are its number in the dataset."""

    fingerprint = "in memory"

    def chunk(self, shard: int, sample: int) -> np.ndarray:
        return np.full(self.stored[shard][sample], int(self.samples[:shard].sum()) + sample, np.uint16)

    def last(self, shard: int) -> np.ndarray:
        return np.ones(len(self.stored[shard]), bool)

    def prefetch(self, shards: Any) -> None:
        pass


def draw_set(draw: Draw) -> TextSet:
    number, longest = draw(st.integers(1, 6)), draw(st.sampled_from((1, 4, 62)))
    shards = [draw(st.lists(st.integers(1, longest), min_size=1, max_size=30)) for _ in range(number)]
    names = draw(st.lists(st.sampled_from("abc"), min_size=number, max_size=number))
    passes = draw(st.none() | st.lists(st.integers(0, 2), min_size=number, max_size=number))
    return TextSet([np.array(shard) for shard in shards], sources=names, passes=passes,
                   rows_at=draw(st.sampled_from(((), (64,)))))


def order(draw: Draw) -> None:
    (_order_of_rows if draw(st.booleans()) else _ranks)(draw)


def _order_of_rows(draw: Draw) -> None:
    """Each chunk once an epoch; tokens before a row as a walk counts them; seeds and epochs change it."""
    data, shuffle, packing = draw_set(draw), draw(st.booleans()), draw(st.booleans())
    options: dict[str, Any] = dict(packing=packing, shuffle=shuffle, window=draw(st.integers(1, 8)))
    seed, length = draw(st.integers(0, 2**40)), draw(st.sampled_from((64, 100)))
    walked, tokens = Order(data, length, seed=seed, **options), 0
    rows = []
    for number in range(2 * walked.rows_per_epoch):
        assert walked.tokens_before(number) == tokens
        epoch, shard, samples = walked.row(number)
        assert epoch == number // walked.rows_per_epoch and len(samples) >= 1 and (packing or len(samples) == 1)
        pieces = [int(data.stored[shard][sample]) + 2 for sample in samples]
        assert sum(pieces) <= length
        tokens += sum(pieces)
        rows.append((shard, samples))
    every = Counter((shard, sample) for shard, of in enumerate(data.stored) for sample in range(len(of)))
    epochs = rows[:len(rows) // 2], rows[len(rows) // 2:]
    for epoch in epochs:
        assert Counter((shard, sample) for shard, samples in epoch for sample in samples) == every
    assert shuffle or epochs[0] == epochs[1]
    jumper = Order(data, length, seed=seed, **options)  # a resume: any row first
    for number in draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8)):
        assert jumper.row(number)[1:] == rows[number]
        assert set(jumper.shards_ahead(number)) >= {rows[number][0]}
    if shuffle and len(epochs[0]) >= 6:  # eight seeds that all give one order: less than 1e-13
        orders = [Order(data, length, seed=seed + more, **options) for more in range(8)]
        assert len({tuple(other.row(at)[1:] for at in range(len(epochs[0]))) for other in orders}) > 1
        assert len({tuple(walked.row(len(epochs[0]) * epoch + at)[1:] for at in range(len(epochs[0])))
                    for epoch in range(8)}) > 1


def _ranks(draw: Draw) -> None:
    """Ranks and workers share a step's rows; batches of a warm-up tile the stream."""
    data, base = draw_set(draw), draw(st.sampled_from((1, 2, 3)))
    per_rank, sizes = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    worlds = [world for world in range(1, 7) if (base * per_rank) % world == 0]
    ramp = BatchRamp(base * per_rank, base * per_rank * sizes, draw(st.integers(1, 3)))
    rows = Order(data, 64, packing=draw(st.booleans()), shuffle=True, seed=draw(st.integers(0, 9)), window=3)
    stream = RowStream(data, rows, ramp)  # type: ignore[arg-type]
    expected = 0
    for step in range(draw(st.integers(1, 12))):
        whole = stream.rows_of(step)
        assert [row.place for row in whole] == list(range(len(whole)))
        for at, row in enumerate(whole):
            _, shard, samples = rows.row(expected + at)
            assert [int(chunk[0]) for chunk in row.chunks] == [int(data.chunk(shard, sample)[0]) for sample in samples]
            assert (row.epoch, row.number) == divmod(expected + at, rows.rows_per_epoch)
        for world in worlds:
            shares = [stream.rows_of(step, rank=rank, world_size=world) for rank in range(world)]
            assert len({len(share) for share in shares}) == 1
            joined = [row for share in shares for row in share]
            assert [(row.epoch, row.number, row.place, row.step, row.tokens_before) for row in joined] == [
                (row.epoch, row.number, row.place, step, whole[0].tokens_before) for row in whole]
        assert whole[0].tokens_before == rows.tokens_before(expected)
        expected += len(whole)


def packing(draw: Draw) -> None:
    """Against best-fit decreasing on single pieces; what is packed depends on the histogram alone."""
    capacity = draw(st.integers(3, 80))
    lengths = draw(st.lists(st.integers(1, capacity - 2), max_size=60))
    counts = piece_counts(np.bincount(lengths, minlength=1))
    packed = pack_lengths(counts, capacity)
    pieces, offsets = packed.expand()
    found = [tuple(pieces[a:b].tolist()) for a, b in zip(offsets, offsets[1:])]
    bins: list[list[int]] = []
    for length in sorted((length + 2 for length in lengths), reverse=True):
        fitting = [row for row in bins if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            bins.append([length])
    assert all(0 < sum(row) <= capacity for row in found) and len(found) == packed.num_rows
    assert sorted(pieces.tolist()) == sorted(length + 2 for length in lengths)
    # of rows with as little space either may take the next piece, so sums are compared
    assert Counter(sum(row) for row in found) == Counter(sum(row) for row in bins)
    assert not lengths or refuses(lambda: pack_lengths(counts, max(lengths) + 1))  # a piece that fits nowhere


def warmup(draw: Draw) -> None:
    """A batch-size warm-up, against a walk from step to step."""
    smallest, sizes, steps_each = draw(st.integers(1, 50)), draw(st.integers(1, 9)), draw(st.integers(1, 40))
    ramp, row, size, held = BatchRamp(smallest, smallest * sizes, steps_each), 0, smallest, 0
    for step in range(draw(st.integers(1, 200))):
        assert (ramp.first_row(step), ramp.rows(step), ramp.step_of(row)) == (row, size, step)
        inside = row + draw(st.integers(0, size - 1)) if step % 20 == 0 else row + size - 1
        assert inside == row or refuses(lambda: ramp.step_of(inside))  # noqa: B023
        assert (step >= ramp.num_steps) == (size == smallest * sizes)
        row, held = row + size, held + 1
        if held == steps_each and size < smallest * sizes:
            size, held = size + smallest, 0
    tokens, per_row = draw(st.integers(1, 10**12)), draw(st.floats(3.0, 9000.0))
    if sizes > 1:
        built = BatchRamp.build({"min_size": smallest, "tokens": tokens}, max_size=smallest * sizes,
                                tokens_per_row=per_row)
        once = sum(smallest * size for size in range(1, sizes)) * per_row
        spent = once * built.steps_per_size
        assert abs(spent - tokens) <= once * (0.5 + 1e-9) or built.steps_per_size == 1 and tokens < once


# ------------------------------------------------------------------ text


def chunking(draw: Draw) -> None:
    """Tokens of a byte-level vocabulary whose pieces may begin or end inside of a character."""
    pieces = draw(st.lists(st.sampled_from((b"a", b"A", b" b", b".", b"!", b"\n", b"\n\n", b" ", b"\xe4\xbd", b"\xa0",
                                            b"\xa0x", b"\xc3", b"\xa9", b"1", b".\"", b"\xe3\x80\x82", b"\x80")),
                           min_size=1, max_size=17, unique=True))
    alphabet = _byte_alphabet()
    vocab = {"".join(alphabet[byte] for byte in piece): number for number, piece in enumerate(pieces)}
    content = {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": [],
               "pre_tokenizer": {"type": "ByteLevel"}}
    limit, window = draw(st.integers(1, 60)), draw(st.sampled_from((0.0, 0.01, 0.1, 0.25, 0.5)))
    chunker = Chunker(json.dumps(content), limit, window)
    tokens = np.array(draw(st.lists(st.integers(0, len(pieces) - 1), min_size=1, max_size=300)), np.uint16)
    cuts, places = chunker.cuts(tokens), int(Fraction(limit) * Fraction(str(window)))
    parts = [tokens[a:b] for a, b in zip([0, *cuts], cuts)]
    assert np.array_equal(np.concatenate(parts), tokens)
    assert all(1 <= len(part) <= limit for part in parts)
    assert len(tokens) > limit or len(parts) == 1
    inside = [0x80 <= pieces[token][0] < 0xC0 for token in tokens]
    for begin, cut in zip([0, *cuts], cuts[:-1]):
        left = len(tokens) - begin
        high = begin + (limit if left >= Fraction(limit) * (1 + Fraction(str(window))) else left // 2 + places // 2)
        allowed = [at for at in range(high - places, high + 1) if not inside[at]]
        if allowed:  # some place of the window is between characters: the cut is one of them
            assert cut in allowed
        else:
            assert cut <= high and (not inside[cut] or all(inside[begin + 1:high]))
    if not any(inside):
        assert all(len(part) >= max(1, places) for part in parts[:-1])
        assert len(parts) == 1 or len(parts[-1]) >= places


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's characters for bytes, as published (`bytes_to_unicode`)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return {**{byte: chr(byte) for byte in kept}, **{byte: chr(256 + at) for at, byte in enumerate(others)}}


def objectives(draw: Draw) -> None:
    text = [number for number in range(110) if number % 7]
    special = np.zeros(VOCAB_SIZE, bool)
    special[list(SPECIALS.values())] = True
    vocab = TextVocab(**SPECIALS, text=np.array(text), is_special=special)
    ids, piece_of, ends = list[int](), list[int](), list[bool]()
    for piece in range(draw(st.integers(1, 5))):
        chunk = draw(st.lists(st.sampled_from((*text[:20], *SPECIALS.values())), min_size=1, max_size=12))
        ids += [vocab.cls, *chunk, vocab.sep]
        piece_of += [piece] * (len(chunk) + 2)
        ends.append(draw(st.booleans()))
    padding = draw(st.integers(0, 5))
    ids, piece_of = ids + [vocab.pad] * padding, piece_of + [-1] * padding
    name, rate, mixed = draw(st.sampled_from(("mlm", "clm", "mntp"))), draw(st.floats(0.01, 1.0)), draw(st.booleans())
    words = [draw(st.integers(0, 2**40)) for _ in range(3)]
    given = np.array(ids), np.array(piece_of), np.array(ends)
    found = make_inputs(name, *given, mask_rate=rate, vocab=vocab, mixed=mixed,
                        rng=None if name == "clm" else row_generator(*words))
    assert given[0].tolist() == ids and len(found.labels) == len(ids)
    labels = [-100] * len(ids)
    if name == "clm":
        for at in range(len(ids) - 1):
            closes = at + 2 == len(ids) or piece_of[at + 2] != piece_of[at]
            if piece_of[at] == piece_of[at + 1] >= 0 and (not closes or ends[piece_of[at]]):
                labels[at] = ids[at + 1]
        assert found.labels.tolist() == labels and found.input_ids.tolist() == ids
        assert (found.weight, found.loss_tokens) == (1.0, sum(label != -100 for label in labels))
        return
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((4, *words))))  # as documented
    uniform = rng.random(len(ids)).tolist()
    maskable = [at for at in range(len(ids)) if piece_of[at] >= 0 and ids[at] not in SPECIALS.values()]
    chosen = [at for at in maskable if uniform[at] < rate] or maskable and [maskable[int(rng.random() * len(maskable))]]
    for at in chosen:
        labels[at - (name == "mntp")] = ids[at]
    assert found.labels.tolist() == labels and (not maskable or chosen)
    kinds, picks = rng.random((2, len(chosen))).tolist()
    expected = list(ids)
    for at, kind, pick in zip(chosen, kinds, picks):
        expected[at] = vocab.mask if kind < 0.8 else text[int(pick * len(text))] if kind < 0.8 + 0.1 else ids[at]
    assert found.input_ids.tolist() == expected
    assert (found.weight, found.loss_tokens) == ((1 / rate, len(maskable)) if mixed else (1.0, len(chosen)))


# ------------------------------------------------------------------ schedules


def schedules(draw: Draw) -> None:
    (_objective_and_rate if draw(st.booleans()) else _learning_rate)(draw)


def _objective_and_rate(draw: Draw) -> None:
    """Against exact fractions, at borders and between them."""
    total = draw(st.integers(10, 10**13))
    borders = sorted(draw(st.sets(st.integers(1, total - 1), max_size=4)))
    borders = [0, *borders, total]
    segments, shares = list[dict[str, Any]](), st.sampled_from(("mlm", "clm", "mntp"))
    rates = st.floats(0.01, 1.0)
    slopes = [(draw(rates), draw(rates)) if draw(st.booleans()) else (draw(rates),) * 2 for _ in borders[1:]]
    segments = [{"until": f"{end}tok", **({"rate": a} if a == b else {"from": a, "to": b})}
                for end, (a, b) in zip(borders[1:], slopes)]
    rate = MaskRate.parse(segments, total=total)
    blocks = [draw(st.lists(st.tuples(st.integers(1, total), shares), min_size=1, max_size=3)) for _ in borders[1:]]
    objective = ObjectiveSchedule.parse(
        [{"until": end, **({"objective": block[0][1]} if len(block) == 1 else
                           {"cycle": [{"tokens": f"{length}tok", "objective": name} for length, name in block]})}
         for end, block in zip(borders[1:], blocks)], total=total)
    again = MaskRate.parse(rate.plain(), total=total), ObjectiveSchedule.parse(objective.plain(), total=total)
    for tokens in sorted({*borders[:-1], *draw(st.lists(st.integers(0, total - 1), max_size=20)),
                          *(border - 1 for border in borders[1:])}):
        at = max(n for n, border in enumerate(borders[:-1]) if border <= tokens)
        (first, last), begin, end = slopes[at], borders[at], borders[at + 1]
        exact = Fraction(first) + (Fraction(last) - Fraction(first)) * Fraction(tokens - begin, end - begin)
        assert abs(Fraction(rate.at(tokens)) - exact) <= Fraction(1, 10**12)  # a few roundings of float64
        assert again[0].at(tokens) == rate.at(tokens)
        place = (tokens - begin) % sum(length for length, _ in blocks[at])
        ends = np.cumsum([length for length, _ in blocks[at]], dtype=object)
        expected = next(name for (_, name), end_of_block in zip(blocks[at], ends) if place < end_of_block)
        assert objective.at(tokens) == again[1].at(tokens) == {expected: 1.0}
        assert min(first, last) - 1e-12 <= rate.at(tokens) <= max(first, last) + 1e-12
        if tokens + 1 < end:  # continuous and monotone inside of a segment
            step = rate.at(tokens + 1) - rate.at(tokens)
            assert abs(step) <= abs(last - first) / (end - begin) + 1e-12 and step * (last - first) >= -1e-24
    mixture = draw(st.dictionaries(shares, st.integers(1, 9), min_size=1))
    mixture = {name: weight / sum(mixture.values()) for name, weight in mixture.items()}
    seeds = [draw(st.integers(0, 2**32)) for _ in range(3)]
    uniform = np.random.Generator(np.random.Philox(np.random.SeedSequence((5, *seeds)))).random()
    ends = np.cumsum(list(mixture.values())).tolist()
    expected = next((name for name, end in zip(mixture, ends) if uniform < end), [*mixture][-1])
    assert draw_objective(mixture, *seeds) == (expected if len(mixture) > 1 else [*mixture][0])


def _learning_rate(draw: Draw) -> None:
    """Against the formulas, written for tokens alone."""
    total = draw(st.integers(100, 10**13))
    warm = draw(st.integers(0, total // 2))
    decay, alpha = draw(st.integers(0, total - warm)), draw(st.floats(0, 1))
    kind = draw(st.sampled_from(("warmup_stable_decay", "one_minus_sqrt")))
    decay = max(1, decay) if kind == "one_minus_sqrt" else decay
    as_share = draw(st.booleans())
    block = {"name": kind, "t_decay": f"{decay}tok", "t_max": "1dur" if as_share else f"{total}tok", "alpha_f": alpha}
    if kind == "warmup_stable_decay":
        block["t_warmup"] = f"{warm}tok"

    def factor(tokens: int) -> float:
        return run_config.lr_factor(block, (total, "tok"), lambda unit: float({"tok": tokens}[unit]))

    def formula(tokens: int) -> float:
        left = min(1.0, max(0.0, float(Fraction(tokens - (total - decay), decay)))) if decay else 0.0
        if kind == "one_minus_sqrt":
            return alpha + (1 - alpha) * (1 - math.sqrt(left))
        return tokens / warm if tokens < warm else 1 - left * (1 - alpha)

    for tokens in {0, warm, max(0, warm - 1), total - decay, total - 1, total, total + 5,
                   *draw(st.lists(st.integers(0, total), max_size=20))}:
        found = factor(tokens)
        # 1e-10 is where a warm-up begins; a float64 of 1e13 tokens is exact, sqrt loses half of the digits near 0
        assert abs(found - formula(tokens)) <= 1.1e-10 + (1e-7 if kind == "one_minus_sqrt" else 0)
        assert min(alpha, 0 if warm else alpha) - 1e-12 <= found <= 1 + 1e-12
        following = factor(tokens + 1)
        if kind == "warmup_stable_decay" and tokens + 1 < warm:
            assert 0 <= following - found <= 1.01 / warm + 1e-12
        if tokens >= warm or kind == "one_minus_sqrt":
            assert following <= found + 1e-12
            if kind == "warmup_stable_decay" and decay:
                assert found - following <= 1.01 / decay + 1e-12


# ------------------------------------------------------------------ configs


_KEYS = st.sampled_from(("name", "a", "b", "c", "d", "size"))
_LEAVES = st.sampled_from((1, 2.5, True, None, "x", "y z", "???", "1e3", [1, 2], [], {}))
_TREES = st.recursive(_LEAVES, lambda inner: st.dictionaries(_KEYS, inner, max_size=4), max_leaves=12)
_CONFIGS = st.dictionaries(_KEYS.filter(lambda key: key != "name"), _TREES, max_size=4)


def naive_merge(base: Any, over: Any) -> Any:
    """The stated rule, key by key."""
    if over == "???":
        return base
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "name" in base and "name" in over and base["name"] != over["name"]:
        return over
    result = dict(base)
    for key in over:
        result[key] = naive_merge(base[key], over[key]) if key in base else over[key]
    return result


def merge(draw: Draw) -> None:
    files = draw(st.lists(_CONFIGS, min_size=1, max_size=3))
    before, expected, merged = copy.deepcopy(files), {}, {}
    for each in files:
        expected, merged = naive_merge(expected, each), run_config.merge(merged, each)
    assert merged == expected and files == before
    plain = [_without_missing(each) for each in files]
    expected = {}
    for each in plain:
        expected = naive_merge(expected, each)
    key = ".".join(draw(st.lists(_KEYS, min_size=1, max_size=3)))
    value = draw(st.sampled_from(("7", "2.5", "word", "1e3")))
    if key == "name":
        return
    *path, last = key.split(".")
    override: Any = {last: yaml.safe_load(value.replace("1e3", "1.0e+3"))}
    for part in reversed(path):
        override = {part: override}
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for number, each in enumerate(plain):
            names.append(f"{folder}/{number}.yaml")
            Path(names[-1]).write_text(json.dumps(each))  # texts in quotes
        found: Any = run_config.om.to_container(train.configure([*names, f"{key}={value}"]))
    assert found == naive_merge(expected, override), f"{key}={value}"


def _without_missing(tree: Any) -> Any:
    """No value is missing."""
    if isinstance(tree, dict):
        return {key: _without_missing(value) for key, value in tree.items()}
    return "here" if tree == "???" else tree


_LEARNING = {
    "optimizer.lr": 1e-4, "optimizer.weight_decay": 0.1, "optimizer.eps": 1e-5, "optimizer.betas": [0.9, 0.95],
    "scheduler.t_warmup": "300_000tok", "scheduler.t_decay": "0.1dur", "scheduler.alpha_f": 0.5, "seed": 22,
    "train_loader.shuffle_seed": 22, "train_loader.packing": False, "train_loader.mask_rate": 0.15,
    "train_loader.shuffle_window": 4, "train_loader.dataset.split": "validation", "global_train_batch_size": 64,
    "precision": "amp_bf16", "accumulate_train_batch_on_tokens": False, "algorithms": {"gradient_clipping": {}}}
_FREE = {
    "save_interval": "7ba", "save_folder": "elsewhere", "save_num_checkpoints_to_keep": 2, "eval_interval": "9ba",
    "device_train_microbatch_size": 2, "device_eval_batch_size": 2, "train_loader.num_workers": 3, "autoresume": False,
    "train_loader.prefetch_factor": 4, "train_loader.dataset.local": "copy", "progress_bar": False, "dist_timeout": 99,
    "log_to_console": False, "callbacks.speed_monitor.window_size": 3, "callbacks.lr_monitor": None,
    "load_path": "x.pt", "python_log_level": "debug", "loggers": {"wandb": {}}, "variables.label": "other",
    "model.compile": "none", "train_loader.pin_memory": False, "train_loader.timeout": 5, "metadata": {"a": 1}}
_DEFAULTS = {  # spelled out, each is what the recipe has anyway
    "optimizer.disable_grad": None, "scheduler.t_max": "1dur", "scheduler.alpha_f": 0.0,
    "train_loader.shuffle_window": 16, "max_duration": "4000000tok", "scheduler.t_warmup": "0.025dur",
    "model.local_attention": 128, "eval_first": False, "train_loader.persistent_workers": False, "optimizer.lr": 0.002,
    "model.num_hidden_layers": 4, "load_path": None}


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        config = config.setdefault(part, {})
    config[last] = copy.deepcopy(value)


def resume(draw: Draw) -> None:
    then = _recipe()
    now = copy.deepcopy(then)
    for key in draw(st.lists(st.sampled_from(sorted(_DEFAULTS)), max_size=4)):
        _put(draw(st.sampled_from((then, now))), key, _DEFAULTS[key])
    free = draw(st.lists(st.sampled_from(sorted(_FREE)), max_size=4))
    changed = draw(st.lists(st.sampled_from(sorted(_LEARNING)), max_size=3, unique=True))
    for key in free:
        _put(now, key, _FREE[key])
    for key in changed:
        _put(now, key, _LEARNING[key])
    old, new = sources.record_of(then, read_tokenizer=False), sources.record_of(now, read_tokenizer=False)
    message = refuses(lambda: sources.check_resume(old, new, place="run", own=True))
    assert bool(message) == bool(changed), (changed, free, message)
    named = {part.split(" must be ")[0] for part in message.split(": so it was")[0].split("; ")} - {""}
    assert {key for key in changed if not any(name.startswith(key) for name in named)} == set(), (changed, message)
    assert all(name.startswith(tuple(changed)) for name in named), (changed, message)
    if changed:  # what is accepted goes on, and is told
        found = sources.check_resume(old, new, place="run", own=True, accept=sorted(named))
        assert set(found) == named
    branch = refuses(lambda: sources.check_resume(old, new, place="run", own=False))
    assert bool(branch) == any(not key.startswith(("optimizer", "scheduler")) for key in changed), (changed, branch)


_READ: dict[str, Any] = {}


def _recipe() -> dict[str, Any]:
    if not _READ:
        with contextlib.chdir(ROOT):
            _READ.update(run_config.resolved(["yamls/nano.yaml"]))
    return copy.deepcopy(_READ)


PROPERTIES: dict[str, Callable[[Draw], None]] = {
    "order": order, "packing": packing, "warmup": warmup, "chunking": chunking, "objectives": objectives,
    "schedules": schedules, "merge": merge, "resume": resume}
