"""The command `ettin`: every command on a real file, and one clear line for bad input."""

import inspect
import subprocess
import sys
from pathlib import Path

import torch
from parity import equal_states, nano, our_logits, save, tiny_tokenizer

from ettin_foundry import __version__
from ettin_foundry.cli import data
from ettin_foundry.corpus.convert import ConvertOptions
from ettin_foundry.hub.folder import export_model
from ettin_foundry.model.weights import import_folder

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


def test_no_command_on_models_imports_the_host_and_others_not_even_torch(tiny_dir, data_set, tmp_path):
    encoder = nano("mlm")
    folder = export_model(encoder, encoder.config, tiny_tokenizer(), tmp_path / "hf", objective="mlm")
    source = save(tmp_path / "ba1.pt", encoder, "mlm", place=tiny_dir)
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


def test_checkpoint_to_folder_to_a_run_s_first_weights_is_bit_equal(tiny_dir, tmp_path, ettin):
    """The last step is Composer's Trainer with load_path and load_weights_only, strict."""
    from composer import Trainer

    from ettin_foundry.model.composer import EttinModel

    decoder = nano("clm", window_left=64)
    source = save(tmp_path / "ba7.pt", decoder, "clm", place=tiny_dir, tokens=1000,
                  lineage=({"objective": "mlm", "tokens": 234},))
    assert ettin("export", source, tmp_path / "hf", "--license", "mit")[0] == 0
    state, config, objective = import_folder(tmp_path / "hf")
    assert equal_states(state, decoder.state_dict()) and (config, objective) == (decoder.config, "clm")
    text = (tmp_path / "hf" / "README.md").read_text()
    assert "1,234" in text and "objective mlm, tokens 234" in text and 'license: mit' in text

    assert ettin("import", tmp_path / "hf", tmp_path / "back" / "weights.pt")[0] == 0
    assert [p.name for p in (tmp_path / "back").iterdir()] == ["weights.pt"]
    model = EttinModel(tiny_tokenizer(), size="nano", objective="clm", max_seq_len=1024, vocab_size=320,
                       num_hidden_layers=2, window_left=64)
    Trainer(model=model, load_path=str(tmp_path / "back" / "weights.pt"), load_weights_only=True, device="cpu",
            load_strict_model_weights=True, auto_log_hparams=False, progress_bar=False).close()
    assert equal_states(model.model.state_dict(), decoder.state_dict()) and model.config == decoder.config


def test_encoder_that_does_not_say_how_it_predicts_must_be_told(tmp_path, ettin):
    encoder = nano("mlm")
    folder = export_model(encoder, encoder.config, tiny_tokenizer(), tmp_path / "hf", objective="mlm")
    code, _, err = ettin("import", folder, tmp_path / "w.pt", "--objective", "mntp")
    assert code == 1 and "must be mlm" in err
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"ettin_foundry"', '"other"'))
    code, _, err = ettin("import", folder, tmp_path / "w.pt")
    assert code == 1 and "must be mlm" in err and not (tmp_path / "w.pt").exists()
    assert ettin("import", folder, tmp_path / "w.pt", "--objective", "mntp")[0] == 0
    assert torch.load(tmp_path / "w.pt", weights_only=True)["state"]["callbacks"]["Clock"]["objective"] == "mntp"


def test_samples_are_the_models_own(tiny_dir, tmp_path, ettin):
    encoder, decoder, tokenizer = nano("mntp"), nano("clm"), tiny_tokenizer()
    source = export_model(encoder, encoder.config, tokenizer, tmp_path / "enc", objective="mntp")
    ids = tokenizer("def [MASK](a):")["input_ids"]
    best = our_logits(encoder, torch.tensor(ids))[ids.index(tokenizer.mask_token_id) - 1].argmax()
    out = ettin("fill-mask", source, "def [MASK](a):", "--top-k", "1")[1]
    assert out.splitlines()[0] == "def [MASK](a):" and repr(tokenizer.decode([int(best)])) in out

    source = save(tmp_path / "dec.pt", decoder, "clm", place=tiny_dir)
    start = ids = [tokenizer.cls_token_id, *tokenizer.encode("def add", add_special_tokens=False)]
    for _ in range(3):
        ids = [*ids, int(our_logits(decoder, torch.tensor(ids))[-1].argmax())]
    code, out, err = ettin("generate", source, "def add", "--max-new-tokens", "3")
    assert out == f"def add{tokenizer.decode(ids[len(start):])}\n", err


ORDER, PLAN = "order --yaml yamls/nano.yaml", "plan yamls/ettin-enc-150m.yaml"
EITHER = "either --checkpoint must be given alone, or --yaml and --step"
WRONG = {
    "order --step 3": EITHER, f"{ORDER} --checkpoint x.pt": EITHER, ORDER: EITHER,
    "order --checkpoint x.pt seed=3": EITHER, "order --checkpoint x.pt": "x.pt",
    f"{ORDER} --step 3 variables.data=nowhere": "'nowhere'", f"{ORDER} --step 3 train_loader.name=text": "got 'text'",
    f"{PLAN} --gpus 4xH800": "--gpus must be", f"{PLAN} --mfu 1.5": "--mfu must be",
    f"{PLAN} model.name=mpt_causal_lm": "model.name must be ettin",
    "plan yamls/suite/ettin-150m.yaml --gpus 3xH100": "encoder-pretrain: --gpus must divide global_train",
    "generate no.pt x": "no.pt: no such path", "export no.pt o": "no.pt: no such path",
    "convert missing.jsonl --out o --tokenizer t": "missing.jsonl"}


def test_bad_input_is_one_line_and_exit_code_1(tiny_dir, tmp_path, ettin):
    good = save(tmp_path / "good.pt", encoder := nano("mlm"), "mlm", place=tiny_dir)
    folder = export_model(encoder, encoder.config, tiny_tokenizer(), tmp_path / "hf", objective="mlm")
    (tmp_path / "there.pt").write_bytes(b"x")
    assert ettin("recipes", "--copy", tmp_path / "copy")[0] == 0
    assert (tmp_path / "copy/yamls/phases/cross.yaml").is_file()
    for arguments, words in (
        (("export", tmp_path / "there.pt", tmp_path / "o"), "there.pt"),
        (("export", good, folder), "exists and is not empty"),
        (("import", folder, tmp_path / "there.pt"), "--overwrite"),
        (("generate", folder, "x"), "use fill-mask"),
        (("recipes", "--copy", tmp_path / "copy"), "--copy must be a folder without train.py"),
        *((line.split(), words) for line, words in WRONG.items()),
    ):
        code, out, err = ettin(*arguments)
        assert code == 1 and not out and err.startswith("error: ") and words in err, (arguments, err)
        assert err.count("\n") == 1, err
    assert not Path("o").exists() and not (tmp_path / "o").exists() and (tmp_path / "there.pt").read_bytes() == b"x"
