"""Small converted sets, and mixtures built from them, for the tests of mixtures."""

import numpy as np
import yaml
from memory_set import write_set

from ettin_foundry.corpus.mix import build_mix


def shards(number, *, seed, chunks=60, longest=62):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, longest + 1, int(rng.integers(chunks // 2, chunks))) for _ in range(number)]


def make_sets(folder):
    """Three datasets: web (with validation), code, and one of books and notes (with validation)."""
    write_set(folder / "web", {"web": shards(9, seed=1)}, seed=1)
    write_set(folder / "web", {"web": shards(2, seed=2, chunks=10)}, split="validation", seed=2)
    write_set(folder / "code", {"github": shards(5, seed=3)}, seed=3)
    write_set(folder / "both", {"books": shards(3, seed=4), "notes": shards(2, seed=5)}, seed=4)
    write_set(folder / "both", {"books": shards(1, seed=6), "notes": shards(1, seed=7)}, split="validation", seed=5)
    return folder


BUDGETS = {"web": 7000, "code": 5000, "books": 2000, "notes": 10_500}  # notes has about 3,200
ENTRIES = {"web": {"set": "sets/web"}, "code": {"set": "sets/code", "source": "github"},
           "books": {"set": "sets/both", "source": "books"}, "notes": {"set": "sets/both", "source": "notes"}}


def write_spec(folder, **changes):
    spec = {"sets": {name: {**ENTRIES[name], "tokens": tokens} for name, tokens in BUDGETS.items()}, **changes}
    path = folder / "mix.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in spec.items() if value is not None}, sort_keys=False))
    return path


def build(root, name="mix", seed=21, **changes):
    return build_mix(write_spec(root.parent, **changes), root.parent / name, seed=seed)


def chunks_of(data):
    """(source, document) of every chunk of every shard; `doc` names set, split, shard and chunk in these sets."""
    return [(source, data.sample(shard, index)["doc"]) for shard, source in enumerate(data.sources)
            if data.chunk(shard, 0).size for index in range(data.samples[shard])]
