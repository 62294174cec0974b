"""The command `ettin`: every command on a real file, and one clear line for bad input."""

import inspect
import subprocess
import sys

import nano_run
import parity
import pytest
import torch
from test_revisions import equal_states

from ettin_foundry import __version__
from ettin_foundry.cli import data
from ettin_foundry.corpus.convert import ConvertOptions
from ettin_foundry.hub.folder import export_model
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.weights import import_folder, weights_checkpoint


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """(tokenizer, its folder)"""
    tokenizer, folder = parity.tiny_tokenizer(), tmp_path_factory.mktemp("tokens")
    tokenizer.save_pretrained(str(folder))
    return tokenizer, folder


@pytest.fixture(scope="module")
def encoder():
    return parity.random_model(EttinConfig.for_size("nano", causal=False, vocab_size=320))


@pytest.fixture(scope="module")
def decoder():
    return parity.random_model(EttinConfig.for_size("nano", causal=True, vocab_size=320, window_left=64))


def save(model, path, objective, tokenizer=None, **clock):
    """A checkpoint in Composer's layout, with what the run's clock records about itself."""
    content = weights_checkpoint(model.state_dict(), model.config, objective=objective, tokenizer=tokenizer)
    content["state"]["callbacks"]["Clock"].update(clock)
    torch.save(content, path)
    return path


HEAVY = """
import sys
from ettin_foundry.cli.main import main
for line in sys.argv[1].splitlines():
    try:
        main(line.split())
    except SystemExit as end:
        found = {"torch", "torch._dynamo", "transformers", "composer", "llmfoundry"} & set(sys.modules)
        print("HEAVY", end.code or 0, *sorted(found))
"""


def test_no_command_on_models_imports_the_host_and_others_not_even_torch(encoder, tokenizer, data_set, tmp_path):
    folder = export_model(encoder, encoder.config, tokenizer[0], tmp_path / "hf", objective="mlm")
    source = save(encoder, tmp_path / "ba1.pt", "mlm", str(tokenizer[1]))
    lines = ["--help", "plan yamls/ettin-enc-150m.yaml", "suite yamls/suite/demo.yaml --stage nope --list",
             f"order --yaml yamls/nano.yaml --step 123456 --rows 1 variables.global_batch=8 variables.data={data_set}",
             f"evaluate {folder} --data {tmp_path}", f"fill-mask {folder} [MASK]", f"export {source} {tmp_path}/o"]
    done = subprocess.run([sys.executable, "-c", HEAVY, "\n".join(lines)], capture_output=True, text=True, check=True)
    told = [line for line in done.stdout.splitlines() if line.startswith("HEAVY")]
    light = [f"HEAVY {code}" for code in (0, 0, 1, 0, 1)]
    assert told == [*light, *["HEAVY 0 torch transformers"] * 2], done
    assert "step 123,456 of nano-mlm-pretrain: 8 rows" in done.stdout


def test_version_and_defaults_are_those_of_the_package(ettin):
    assert ettin("--version") == (0, f"{__version__}\n", "")
    given = {name: option.default for name, option in inspect.signature(data.convert).parameters.items()
             if name in ConvertOptions.__dataclass_fields__}
    needed = {"sources": ["x"], "out": "y", "tokenizer": "z"}
    ours, theirs = ConvertOptions(**{**given, **needed}), ConvertOptions(**needed)
    assert ours.record() == theirs.record() and ours.engine == theirs.engine


def test_checkpoint_to_folder_to_a_run_s_first_weights_is_bit_equal(decoder, tokenizer, tmp_path, ettin):
    """The last step is Composer's Trainer with load_path and load_weights_only, strict."""
    from composer import Trainer

    from ettin_foundry.model.composer import EttinModel

    source = save(decoder, tmp_path / "ba7.pt", "clm", str(tokenizer[1]), tokens=1000,
                  lineage=({"objective": "mlm", "tokens": 234},))
    assert ettin("export", source, tmp_path / "hf", "--license", "mit")[0] == 0
    state, config, objective = import_folder(tmp_path / "hf")
    assert equal_states(state, decoder.state_dict()) and (config, objective) == (decoder.config, "clm")
    text = (tmp_path / "hf" / "README.md").read_text()
    assert "1,234" in text and "objective mlm, tokens 234" in text and 'license: mit' in text

    assert ettin("import", tmp_path / "hf", tmp_path / "back" / "weights.pt")[0] == 0
    assert [p.name for p in (tmp_path / "back").iterdir()] == ["weights.pt"]
    model = EttinModel(tokenizer[0], size="nano", objective="clm", max_seq_len=1024, vocab_size=320, window_left=64)
    Trainer(model=model, load_path=str(tmp_path / "back" / "weights.pt"), load_weights_only=True, device="cpu",
            load_strict_model_weights=True, auto_log_hparams=False, progress_bar=False).close()
    assert equal_states(model.model.state_dict(), decoder.state_dict()) and model.config == decoder.config


def test_encoder_that_does_not_say_how_it_predicts_must_be_told(encoder, tokenizer, tmp_path, ettin):
    folder = export_model(encoder, encoder.config, tokenizer[0], tmp_path / "hf", objective="mlm")
    code, _, err = ettin("import", folder, tmp_path / "w.pt", "--objective", "mntp")
    assert code == 1 and "must be mlm" in err
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"ettin_foundry"', '"other"'))
    code, _, err = ettin("import", folder, tmp_path / "w.pt")
    assert code == 1 and "must be mlm" in err and not (tmp_path / "w.pt").exists()
    assert ettin("import", folder, tmp_path / "w.pt", "--objective", "mntp")[0] == 0
    assert torch.load(tmp_path / "w.pt", weights_only=True)["state"]["callbacks"]["Clock"]["objective"] == "mntp"


def test_samples_are_the_models_own(encoder, decoder, tokenizer, tmp_path, ettin):
    source = export_model(encoder, encoder.config, tokenizer[0], tmp_path / "enc", objective="mntp")
    ids = tokenizer[0]("def [MASK](a):")["input_ids"]
    best = parity.our_logits(encoder, torch.tensor(ids))[ids.index(tokenizer[0].mask_token_id) - 1].argmax()  # mntp
    out = ettin("fill-mask", source, "def [MASK](a):", "--top-k", "1")[1]
    assert out.splitlines()[0] == "def [MASK](a):" and repr(tokenizer[0].decode([int(best)])) in out

    source = save(decoder, tmp_path / "dec.pt", "clm", str(tokenizer[1]))
    start = ids = [tokenizer[0].cls_token_id, *tokenizer[0].encode("def add", add_special_tokens=False)]
    for _ in range(3):
        ids = [*ids, int(parity.our_logits(decoder, torch.tensor(ids))[-1].argmax())]
    code, out, err = ettin("generate", source, "def add", "--max-new-tokens", "3")
    assert out == f"def add{tokenizer[0].decode(ids[len(start):])}\n", err


def test_bad_input_is_one_line_and_exit_code_1(encoder, tokenizer, tmp_path, ettin, monkeypatch):
    good = save(encoder, tmp_path / "good.pt", "mlm", str(tokenizer[1]))
    folder = export_model(encoder, encoder.config, tokenizer[0], tmp_path / "hf", objective="mlm")
    (tmp_path / "there.pt").write_bytes(b"x")
    assert ettin("recipes", "--copy", tmp_path / "copy")[0] == 0
    assert (tmp_path / "copy/yamls/phases/cross.yaml").is_file()
    monkeypatch.chdir(nano_run.ROOT)
    plan, order, of = ("plan", "yamls/ettin-enc-150m.yaml"), ("order", "--yaml", "yamls/nano.yaml"), "--checkpoint"
    for arguments, words in (
        (("export", tmp_path / "there.pt", tmp_path / "o"), "there.pt"),
        (("export", good, folder), "exists and is not empty"),
        (("import", folder, tmp_path / "there.pt"), "--overwrite"),
        (("generate", folder, "x"), "use fill-mask"), (("fill-mask", tmp_path / "no.pt", "x"), "no.pt: no such path"),
        (("export", tmp_path / "no.pt", tmp_path / "o"), "no.pt: no such path"),
        (("recipes", "--copy", tmp_path / "copy"), "--copy must be a folder without train.py"),
        (("convert", "missing.jsonl", "--out", tmp_path / "o", "--tokenizer", tokenizer[1]), "missing.jsonl"),
        *((words, "either --checkpoint must be given alone, or --yaml and --step") for words in (
            ("order", "--step", "3"), order, (*order, "--step", "3", of, "x.pt"), ("order", of, "x.pt", "seed=3"))),
        (("order", of, "x.pt"), "x.pt"), ((*order, "--step", "3", "variables.data=nowhere"), "'nowhere'"),
        ((*order, "--step", "3", "train_loader.name=text"), "got 'text'"),
        ((*plan, "--gpus", "4xH800"), "--gpus must be"), ((*plan, "--mfu", "1.5"), "--mfu must be"),
        ((*plan, "model.name=mpt_causal_lm"), "model.name must be ettin"),
        (("plan", "yamls/suite/ettin-150m.yaml", "--gpus", "3xH100"), "encoder-pretrain: --gpus must divide global"),
    ):
        code, _, err = ettin(*arguments)
        line = err.strip().splitlines()[-1]
        assert code == 1 and line.startswith("error: ") and words in line, (arguments, err)
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.pt").exists()
    assert (tmp_path / "there.pt").read_bytes() == b"x"
