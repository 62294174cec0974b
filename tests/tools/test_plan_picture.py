"""What a plan's picture shows: its curves against formulas, and that no two labels lie on each other."""

import copy
import itertools
import math
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from plan_suites import planned_150m

from ettin_foundry.tools import plan_picture
from ettin_foundry.tools.plan_report import plan_chain
from ettin_foundry.training import recipes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """draw(runs, sources) -> the panels of the figure; written, which takes a second, only if asked for."""

    def draw(runs, sources=None, write=False):
        figures = []
        save = matplotlib.figure.Figure.savefig

        def keep(figure, path, **options):
            figures.append(figure)
            if write:
                save(figure, path, **options)

        monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
        path = tmp_path / "plans" / "plan.png"
        plan_picture.draw(runs, path, sources)
        assert not write or path.read_bytes().startswith(b"\x89PNG")
        return figures[0].axes

    return draw


def recipe(*args, **changes):
    cfg = copy.deepcopy(recipes.resolved([str(ROOT / "yamls/ettin-enc-150m.yaml"), *args]))
    for key, value in changes.items():
        cfg[key] = {**cfg[key], **value}
    return cfg


def line(axes, number=0):
    return axes.lines[number].get_xdata(), axes.lines[number].get_ydata()


def assert_apart(texts):
    """No two texts overlap on the canvas."""
    texts = [text for text in texts if text.get_text() and text.get_visible()]
    renderer = FigureCanvasAgg(texts[0].figure).get_renderer()
    for a, b in itertools.combinations(texts, 2):
        assert not a.get_window_extent(renderer).overlaps(b.get_window_extent(renderer)), (a.get_text(), b.get_text())


def test_the_curves_of_a_run_are_those_of_its_recipe(drawn):
    objective = [{"until": "0.25dur", "objective": "clm"}, {"objective": {"mntp": 0.75, "clm": 0.25}}]
    rates = [{"until": "0.5dur", "rate": 0.4}, {"from": 0.4, "to": 0.1}]
    cfg = recipe(model={"objective": objective},
                 train_loader={"objective": objective, "mask_rate": rates,
                               "batch_size_warmup": {"min_size": 704, "tokens": 100_000_000_000}},
                 scheduler={"t_warmup": "0.1dur"})
    [run] = plan_chain([("run", cfg)])
    rate, batch, mask, kinds, length = drawn([run])
    total, share = run.plan.num_tokens, lambda x: np.asarray(x) / rate.get_xlim()[1]  # noqa: E731
    x, y = line(rate)
    assert y == pytest.approx([8e-4 * min(1.0, 1e-10 + (1 - 1e-10) * t / 0.1) for t in share(x)], rel=1e-9)
    assert share(x)[[0, -1]] == pytest.approx([0, 1])
    # 704, 1,408 and 2,112 rows of 1,024 tokens for equally many steps, about 100B tokens in all
    steps = round(100e9 / (1024 * 704 * 6))
    [stairs] = batch.patches
    values, edges, _ = stairs.get_data()
    assert values.tolist() == [704, 1408, 2112, 2816]
    borders = [steps * 1024 * 704 * n for n in (0, 1, 3, 6)]
    assert share(edges) == pytest.approx([*(b / total for b in borders), 1], rel=1e-9)
    x, y = line(mask)
    at = share(x)
    assert all(math.isnan(v) == (t < 0.25 - 1e-6) for t, v in zip(at[1:-1], y[1:-1]) if abs(t - 0.25) > 1e-3)
    assert np.interp([0.3, 0.5, 0.75, 1], at, y) == pytest.approx([0.4, 0.4, 0.25, 0.1], abs=1e-5)
    bands = {tuple(p.get_facecolor()): p.get_data() for p in kinds.patches}
    assert len(bands) == 2
    clm = next(data for data in bands.values() if not np.any(data.baseline))
    place = share((clm.edges[1:] + clm.edges[:-1]) / 2)
    assert clm.values == pytest.approx(np.where(place < 425e9 / total, 1.0, 0.25), abs=1e-6)
    mntp = next(data for data in bands.values() if np.any(data.baseline))
    assert mntp.baseline == pytest.approx(clm.values) and mntp.values == pytest.approx(np.ones(len(clm.values)))
    assert list(line(length)[1]) == [1024, 1024]
    assert [axes.get_ylabel() for axes in (rate, batch, mask)] == ["learning rate", "rows a step", "mask rate"]


def test_a_suite_is_drawn_chain_by_chain(drawn):
    panels = drawn(*planned_150m(), write=True)
    names = [text.get_text() for text in panels[0].texts]
    assert names == ["encoder-pretrain", "encoder-extend", "encoder-decay", "decoder-from-encoder",
                     "decoder-pretrain", "decoder-extend", "decoder-decay", "encoder-from-decoder"]
    ticks = [text.get_text() for text in panels[-1].get_xticklabels()]
    assert ticks == ["0", "1.7T", "1.95T", "2T", "2.05T"] * 2
    places = panels[-1].get_xticks()
    widths = np.diff(places[:5])
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(1700 / 250), rel=1e-3)
    assert places[5] - places[4] > 0 and np.diff(places[5:]) == pytest.approx(widths)
    assert [a.get_text() for a in panels[3].texts] == ["mlm", "mlm", "mlm", "clm", "clm", "clm", "clm", "mntp"]
    for axes in panels:
        assert_apart([*axes.get_yticklabels(), *axes.get_xticklabels()])
    # slanted names are parallel: their baselines are further apart than letters are high
    names = panels[0].texts
    starts = panels[0].transData.transform([(text.get_position()[0], 0) for text in names])[:, 0]
    height = names[0].get_fontsize() * panels[0].figure.dpi / 72
    assert min(np.diff(starts)) * math.sin(math.radians(names[0].get_rotation())) > height


def test_two_runs_from_one_source_are_two_chains(drawn):
    cfg = recipe()
    runs = plan_chain([(name, cfg) for name in ("a", "b", "c")])
    panels = drawn(runs, {"a": None, "b": "a", "c": "a"})
    assert [text.get_text() for text in panels[-1].get_xticklabels()] == ["0", "1.7T", "3.4T", "1.7T", "3.4T"]


def test_the_shortest_run_of_a_chain_can_be_seen(drawn):
    """A millionth of the tokens before it would be a thousandth of the width."""
    runs = plan_chain([("long", recipe()), ("short", recipe("max_duration=1700000tok", "variables.warmup=0tok"))])
    places = drawn(runs)[-1].get_xticks()
    assert (places[2] - places[1]) / places[2] == pytest.approx(0.07 / 1.07, rel=0.01)


def test_a_foreign_scheduler_is_shown_as_what_is_known(drawn):
    cfg = recipe()
    cfg["scheduler"] = {"name": "cosine_with_warmup", "t_warmup": "1000tok"}
    rate, *_ = drawn(plan_chain([("run", cfg)]))
    assert [text.get_text() for text in rate.texts] == ["cosine_with_warmup"]
