"""The contrastive stage: its loss, views, pooling and metrics against naive float64, and a short run through the trainer.

References are written here, text by text and pair by pair, and the loss is also held to sentence-transformers' own.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import nano_run
import numpy as np
import parity
import pytest
import torch
from composer.loggers import InMemoryLogger
from omegaconf import OmegaConf as om

import ettin_foundry
from ettin_foundry.data.batch import flatten
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.transformer import Ettin
from ettin_foundry.model.weights import weights_checkpoint
from ettin_foundry.training import check_objectives, checks, recipes
from ettin_foundry.training.checkpoints import load_model_state
from ettin_foundry.training.contrastive import Alignment, ContrastiveLoss, EttinContrastive, Uniformity, contrastive_loss
from ettin_foundry.training.entry import Source, Target, compare

VOCAB = 512
LENGTHS = (9, 40, 3, 21, 40)


def texts_of(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=generator) for n in lengths]


def batch_of(texts, step=0, width=64):
    """The flat microbatch of these texts, one a row, as the loader makes it."""
    ids, sequence_id = torch.zeros(len(texts), width, dtype=torch.int64), torch.full((len(texts), width), -1)
    for row, text in enumerate(texts):
        ids[row, :len(text)], sequence_id[row, :len(text)] = text, 0
    return flatten({"input_ids": ids, "labels": torch.full_like(ids, -100), "sequence_id": sequence_id,
                    "row_weight": torch.ones(len(texts)), "loss_tokens": torch.ones(len(texts), dtype=torch.int64),
                    "objective": "simcse", "step": step, "tokens_before": 0})


def model_of(**changes):
    """A float64 nano whose matrices are drawn wide, so that texts differ."""
    model = EttinContrastive(**{"size": "nano", "objective": "simcse", "max_seq_len": 64, "vocab_size": VOCAB, **changes})
    model.model.load_state_dict(parity.random_model(model.config).state_dict())
    return model.double()


def one_by_one(model, texts):
    """Mean (or last) hidden state of each text run alone."""
    vectors = []
    for text in texts:
        n = len(text)
        hidden = model.model(text, torch.arange(n), torch.tensor([0, n], dtype=torch.int32), n)
        vectors.append(sum(hidden[i] for i in range(n)) / n if model.pooling == "mean" else hidden[-1])
    return vectors


def naive_loss(first, second, scale):
    """-log of the softmax of the own text among all, averaged; sums, products and roots only."""
    total = first[0].new_zeros(())
    for i, a in enumerate(first):
        scores = [scale * (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt()) for b in second]
        total = total - (scores[i] - torch.stack(scores).exp().sum().log())
    return total / len(first)


# ------------------------------------------------------------------ loss, views, pooling


def test_loss_and_gradients_are_those_of_the_formula_and_of_sentence_transformers():
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    first, second = (torch.randn(6, 10, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = naive_loss(first, second, 20.0)
    gradients = torch.autograd.grad(expected, (first, second))
    ours = contrastive_loss(first, second, 20.0)
    library: Any = MultipleNegativesRankingLoss
    theirs = library(torch.nn.Identity(), scale=20.0).compute_loss_from_embeddings([first, second], None)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-12) == pytest.approx(theirs.item(), rel=1e-12)  # float64
    for mine, other in zip(torch.autograd.grad(ours, (first, second)), gradients):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_the_loss_is_in_fp32_under_autocast():
    first, second = torch.randn(4, 32), torch.randn(4, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert contrastive_loss(first, second, 20.0) == contrastive_loss(first, second, 20.0).float()
        found = contrastive_loss(first, second, 20.0)
    assert found.item() == pytest.approx(naive_loss(first.double(), second.double(), 20.0).item(), rel=1e-5)  # fp32


@pytest.mark.parametrize("changes", [{}, {"pooling": "last"}, {"causal": True}, {"causal": True, "pooling": "last"}],
                         ids=["mean", "last", "causal", "causal-last"])
def test_without_dropout_loss_and_parameter_gradients_are_the_formulas_with_equal_views(changes):
    """Flat stream, doubled, pooled at once: the same as each text alone, pooled by hand."""
    model, texts = model_of(attn_out_dropout=0.0, **changes), texts_of()
    out = model.train()(batch_of(texts))
    out["loss"].backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    vectors = one_by_one(model, texts)
    expected = naive_loss(vectors, vectors, 20.0)
    gradients = torch.autograd.grad(expected, list(trained.values()))
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-10)  # float64, sums in another order
    for view in out["views"]:
        torch.testing.assert_close(view, torch.stack(vectors), rtol=1e-10, atol=1e-12)
    for name, gradient in zip(trained, gradients):
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12)
    assert {name for name, gradient in found.items() if gradient is None} == {
        "model.head.dense.weight", "model.head.norm.weight", "model.output_bias"}


def test_a_causal_trunk_is_not_a_bidirectional_one():
    texts = texts_of()
    changed = [torch.cat([text[:-1], (text[-1:] + 1) % VOCAB]) for text in texts]
    for causal in (True, False):
        model = model_of(causal=causal).eval()
        before, after = (model.model(flat["input_ids"], flat["position_ids"], flat["cu_seqlens"], flat["max_seqlen"],
                                     causal=(len(texts), flat["num_tokens"]) if causal else (0, 0))
                         for flat in (batch_of(texts), batch_of(changed)))
        assert torch.equal(before[0], after[0]) is causal  # does the first token see the last?
        pooled = model.embed(batch_of(texts))[0]
        assert torch.allclose(pooled[0], before[:len(texts[0])].mean(0), rtol=1e-10)


def test_dropout_makes_the_two_views_of_each_text_differ_and_evaluation_has_none():
    model, batch = model_of(), batch_of(texts_of())
    views = model.train()(batch)["views"]
    distance = (views[0] - views[1]).norm(dim=-1) / views[0].norm(dim=-1)
    assert (distance > 0.01).all()
    alike = batch_of([texts_of()[0]] * 3)  # one text three times: no two share a mask
    first, second = model.train()(alike)["views"]
    every = torch.cat([first, second])
    assert torch.pdist(every).min() > 0.01 * every.norm(dim=-1).mean()
    one, two = model.eval().embed(batch, views=2)
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------ metrics


def test_metrics_are_the_papers_formulas_over_batches_and_leave_everything_as_it_was():
    model = model_of().eval()
    batches = [batch_of(texts_of(seed=1), step=0), batch_of(texts_of((30, 8, 17), seed=2), step=1),
               batch_of(texts_of((5,)), step=2), batch_of([])]  # what the last rows of an evaluation may leave
    kinds = {kind.__name__: kind() for kind in (ContrastiveLoss, Alignment, Uniformity)}
    assert model.get_metrics(is_train=False).keys() == kinds.keys()
    state = torch.random.get_rng_state()
    for batch in batches:
        with torch.no_grad():
            out = model.eval_forward(batch)
            again = model.eval_forward(batch)
        assert all(torch.equal(out[name][0], again[name][0]) for name in kinds)
        for metric in kinds.values():
            model.update_metric(batch, out, metric)
    assert torch.equal(torch.random.get_rng_state(), state) and not model.training

    losses, distances, potentials = [], [], []
    for batch, texts in zip(batches[:2], (texts_of(seed=1), texts_of((30, 8, 17), seed=2))):
        torch.manual_seed(batch["step"])
        with torch.no_grad():
            first, second = model.train().embed(batch, views=2)
            plain = one_by_one(model.eval(), texts)
        losses += [naive_loss(first, second, 20.0).item()] * len(texts)
        sphere = [[v / v.norm() for v in view] for view in (first, second, plain)]
        distances += [((a - b) ** 2).sum().item() for a, b in zip(*sphere[:2])]
        potentials += [math.exp(-2 * ((sphere[2][i] - sphere[2][j]) ** 2).sum().item())
                       for i in range(len(texts)) for j in range(i)]
    expected = {"ContrastiveLoss": np.mean(losses), "Alignment": np.mean(distances),
                "Uniformity": math.log(np.mean(potentials))}
    for name, metric in kinds.items():
        assert metric.compute().item() == pytest.approx(expected[name], rel=1e-9), name  # float64
    assert len(potentials) == 10 + 3 and kinds["Uniformity"].num_targets == 13


def test_flops_are_two_passes_without_targets():
    model = model_of()
    sequence_id = torch.tensor([[0] * 40 + [-1] * 24, [0] * 10 + [-1] * 54])
    batch = {"input_ids": sequence_id, "labels": torch.full_like(sequence_id, -100), "sequence_id": sequence_id,
             "objective": "simcse"}
    config = EttinConfig.for_size("nano", causal=False, vocab_size=VOCAB, max_position_embeddings=64)
    pairs = config.attended_pairs(40) + config.attended_pairs(10)
    assert model.flops_per_batch(batch) == 2 * config.flops(50, 0, pairs)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("changes, words", [
    ({"objective": "mlm"}, "model.objective: 'mlm' given; model.name: ettin_contrastive trains simcse only"),
    ({"scale": 0}, "model.scale: 0 given; a number above 0"),
    ({"scale": True}, "model.scale: True given"),
    ({"pooling": "cls"}, "model.pooling: 'cls' is unknown; choose one of mean, last"),
    ({"causal": "yes"}, "model.causal: 'yes' given; true .* or false"),
])
def test_settings_that_are_none_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        model_of(**changes)


def test_batches_that_have_no_negatives_or_are_of_another_kind_are_refused():
    model = model_of()
    with pytest.raises(ValueError, match=r"a microbatch of 1 text\(s\) given; at least 2"):
        model(batch_of(texts_of((8,))))
    with pytest.raises(ValueError, match=r"a microbatch of 0 text\(s\)"):
        model(batch_of([]))
    with pytest.raises(ValueError, match="train_loader.objective: 'mlm' given; .* needs simcse"):
        model({**batch_of(texts_of()), "objective": "mlm"})
    with pytest.raises(ValueError, match="train_loader.packing: 5 texts in 3 rows"):
        model({**batch_of(texts_of()), "num_rows": 3})
    with pytest.raises(ValueError, match="cu_seqlens"):
        model({"objective": "simcse"})
    with pytest.raises(ValueError, match="predicts no tokens"):
        model.fill_mask(["a [MASK]"])


def recipe(name="nano", *args):
    return recipes.resolved([str(nano_run.ROOT / f"yamls/{name}.yaml"), str(nano_run.ROOT / "yamls/phases/contrastive.yaml"),
                             "variables.contrastive_data=sentences", "variables.source=x.pt", *args])


@pytest.mark.parametrize("args, words", [
    (["variables.packing=true"], "train_loader.packing: True given; simcse compares texts"),
    (["model.objective=mlm"], "model.objective: 'mlm' given; model.name is 'ettin_contrastive'"),
    (["train_loader.objective=mlm", "train_loader.mask_rate=0.3"], "train_loader.objective: 'mlm' given"),
    (["variables.mask_rate=0.3"], "mask_rate: 0.3 given with objective: simcse"),
    (["model.temperature=0.05"], "model.temperature: unknown key; the keys are .*scale, pooling, causal"),
    (["callbacks.ettin_samples={interval: 5ba, prompts: [a]}"], "callbacks.ettin_samples: given .* predicts no tokens"),
    (["device_eval_batch_size=1"], "device_eval_batch_size: 1 given; at least 2"),
])
def test_recipes_that_would_train_something_else_are_refused(args, words):
    with pytest.raises(ValueError, match=words):
        checks.check_settings(recipe("nano", *args))


def test_language_models_have_no_simcse():
    with pytest.raises(ValueError, match="model.objective: 'simcse' given; model.name is 'ettin', and simcse goes with"):
        checks.check_settings(recipes.resolved([str(nano_run.ROOT / "yamls/nano.yaml"), "variables.objective=simcse",
                                                "variables.mask_rate=0.0"]))


@pytest.mark.parametrize("rows, micro, processes, words", [
    (128, 64, 1, "device_train_microbatch_size: 64 given; it must be the 128 rows .*global_train_batch_size is 128 on 1"),
    (128, 128, 2, "device_train_microbatch_size: 128 given; .*64"),
    (128, "auto", 1, "device_train_microbatch_size: 'auto' given"),
    (2, 1, 2, r"device_train_microbatch_size: 1 given; .*at least 2"),
])
def test_a_microbatch_that_is_not_the_device_batch_is_refused(rows, micro, processes, words):
    cfg = {"model": {"name": "ettin_contrastive"}, "train_loader": {}, "global_train_batch_size": rows,
           "device_train_microbatch_size": micro}
    with pytest.raises(ValueError, match=words):
        checks._check_batch(cfg, processes, cuda=True)
        check_objectives.check_negatives(cfg, processes)
    if isinstance(micro, int):
        check_objectives.check_negatives({**cfg, "model": {"name": "ettin"}}, processes)  # a language model accumulates
        whole = {**cfg, "global_train_batch_size": 64 * processes, "device_train_microbatch_size": 64}
        check_objectives.check_negatives(whole, processes)


def test_the_machine_check_asks_for_it(data_set, source, tmp_path):
    config = configure(data_set, tmp_path, source, "variables.packed.microbatch.contrastive=4")
    cfg: Any = om.to_container(config, resolve=True)
    with pytest.raises(ValueError, match="device_train_microbatch_size: 4 given; it must be the 8 rows"):
        checks.check_machine(cfg)
    cfg["device_train_microbatch_size"] = 8
    checks.check_machine(cfg)


def test_the_overlay_fits_every_kind_of_recipe():
    for name, vocabulary, causal in (("nano", 8192, False), ("ettin-enc-150m", 50368, False), ("ettin-dec-1b", 50368, True)):
        cfg = recipe(name, f"model.causal={str(causal).lower()}")
        checks.check_settings(cfg)
        config = checks.model_config(cfg)
        assert (config.vocab_size, config.causal, config.attn_out_dropout) == (vocabulary, causal, 0.3)
        assert (cfg["model"]["scale"], cfg["model"]["pooling"], cfg["optimizer"]["weight_decay"]) == (20, "mean", 0)
        assert (cfg["global_train_batch_size"], cfg["device_train_microbatch_size"], cfg["max_seq_len"]) == (128, 128, 128)
        assert (cfg["max_duration"], cfg["optimizer"]["lr"], cfg["train_loader"]["packing"]) == ("1000ba", 3e-5, False)


def test_the_source_may_have_any_objective_also_one_that_it_does_not_say():
    def compared(causal, objective, starts_with):
        was, now = (dataclasses.asdict(EttinConfig.for_size("nano", causal=kind)) for kind in (causal, False))
        source = Source(Path("official"), {"config": was, "objective": objective}, has_moments=False, is_folder=True)
        return compare("callbacks.ettin_cross", source, Target(now, (starts_with,), None), [], crossing=True)

    for causal, objective in ((False, None), (False, "mlm"), (False, "mntp"), (True, "clm")):
        assert compared(causal, objective, "simcse") == {}
    with pytest.raises(ValueError, match="does not say whether this encoder predicts masks as mlm or mntp"):
        compared(False, None, "mlm")  # there it matters


# ------------------------------------------------------------------ through the trainer


@pytest.fixture(scope="module")
def source(tmp_path_factory, data_set):
    """A trunk to which all texts look alike: a fresh one whose token embeddings were given a common direction."""
    config = EttinConfig.for_size("nano", causal=False, vocab_size=VOCAB, max_position_embeddings=64)
    model = Ettin(config)
    with torch.no_grad():
        model.trunk.embeddings.tok_embeddings.weight += 0.05 * torch.randn(config.hidden_size)  # tokens are drawn with 0.02
    path = tmp_path_factory.mktemp("source") / "trunk.pt"
    torch.save(weights_checkpoint(model.state_dict(), config, objective="mlm", tokenizer=str(data_set / "tokenizer")), path)
    return path


def configure(data, out, source, *overrides):
    small = [arg for arg in nano_run.SMALL if "=" in arg and "variables." not in arg]
    config = nano_run.program().configure([
        str(nano_run.ROOT / "yamls/nano.yaml"), str(nano_run.ROOT / "yamls/phases/contrastive.yaml"), *small,
        f"variables.contrastive_data={data}", f"variables.save_root={out}", f"variables.source={source}",
        f"variables.vocab_size={VOCAB}", "variables.rope_theta=10000.0", "variables.packed.max_seq_len.contrastive=64",
        "variables.packed.global_batch.contrastive=8", "variables.packed.microbatch.contrastive=8",
        "variables.eval_batch.contrastive=16", "optimizer.lr=3.0e-3", "eval_interval=8ba", "eval_subset_num_batches=2",
        f"callbacks.ettin_export={{interval: 100ba, folder: {out}/exports}}", *overrides])
    for name in ("speed_monitor", "runtime_estimator", "scheduled_gc"):
        config.callbacks.pop(name)
    config.callbacks.capture = {}
    config.loggers = {"in_memory_logger": {}}
    return config


def train(config):
    from llmfoundry.command_utils import train as host

    torch.set_num_threads(1)
    return host(config)


@pytest.mark.filterwarnings("ignore")
def test_a_short_run_spreads_texts_resumes_bit_for_bit_and_can_be_exported(data_set, source, tmp_path):
    ettin_foundry.register()
    capture = nano_run.register_capture()
    trainer = train(configure(data_set, tmp_path, source, "eval_first=true"))
    memory = next(d for d in trainer.logger.destinations if isinstance(d, InMemoryLogger))
    logged = {name.rsplit("/", 1)[1]: [float(value) for _, value in values]
              for name, values in memory.data.items() if name.startswith("metrics/eval/")}
    trainer.close()
    losses, batches = list(capture.losses), capture.batches
    assert len(losses) == 8 and {b["objective"] for b in batches} == {"simcse"} and (batches[0]["labels"] == -100).all()
    assert capture.gradients and not any("head" in name or "output_bias" in name for name in capture.gradients)
    for name in ("ContrastiveLoss", "Uniformity"):
        assert logged[name][-1] < logged[name][0] - 0.1, (name, logged)
    folder = tmp_path / "nano-simcse-contrastive"
    state, record = load_model_state(folder / "latest-rank0.pt")
    before, _ = load_model_state(source)
    assert (record["objective"], record["config"]["causal"]) == ("simcse", False)
    assert json.loads(record["run_config"])["model"]["pooling"] == "mean"  # what `ettin export` reads
    assert record["lineage"][0]["objective"] == "mlm"
    for name, tensor in state.items():
        untouched = name.startswith("head.") or name == "output_bias"
        assert torch.equal(tensor, before[name]) is untouched, name
    written = json.loads((tmp_path / "exports/contrastive8/config.json").read_text())["ettin_foundry"]
    assert (written["objective"], written["pooling"], written["lineage"][0]["objective"]) == ("simcse", "mean", "mlm")
    assert (tmp_path / "exports/contrastive8/modules.json").is_file()

    (folder / "latest-rank0.pt").unlink()
    (folder / "ep0-ba8-rank0.pt").unlink()  # killed after batch 4
    train(configure(data_set, tmp_path, source)).close()
    assert capture.losses == losses[4:]
    resumed, _ = load_model_state(folder / "latest-rank0.pt")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in state.items())
