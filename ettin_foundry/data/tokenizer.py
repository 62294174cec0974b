"""The tokenizer: load, train, fingerprint, check, and the two templates (encoder, decoder) of one vocabulary.

Ettin uses OLMo's byte-level BPE with [UNK] [CLS] [SEP] [PAD] [MASK] behind the other entries; BOS is [CLS], EOS [SEP].
Both members of a pair share the vocabulary and differ only in the template put around a text. Datasets carry a
fingerprint of the tokenizer, so that training with another one is an error and not a bad model.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ettin_foundry.model.hf_config import check_folder

if TYPE_CHECKING:  # importing transformers takes seconds, which readers of a manifest need not wait for
    from transformers import PreTrainedTokenizerFast

MAX_VOCAB_SIZE = 65_535  # tokens are stored as uint16
COMPARED = ("vocab_size", "special_ids", "vocab_sha256", "probe_sha256")  # of two fingerprints; names may differ
_PLAIN = {"PreTrainedTokenizerFast", "TokenizersBackend", "tokenizers"}
_SPECIALS = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}

# What a fingerprint tokenizes. Never change it: every manifest on disk holds its hash.
_PROBE = "".join(json.loads(Path(__file__).with_name("fingerprint_probe.json").read_text(encoding="utf-8")))


def load(name_or_folder: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Loads a fast tokenizer from a folder or by its Hugging Face id, without remote code.

    Where it names no special tokens, [UNK] [CLS] [SEP] [PAD] [MASK] of its vocabulary are taken; BOS is then the cls
    token and EOS the sep token, as for ModernBERT's.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import cached_file

    name, make = os.fspath(name_or_folder), PreTrainedTokenizerFast
    options: dict[str, Any] = {"local_files_only": Path(name).is_dir()}
    try:
        path = cached_file(name, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False, **options)
        check_folder(Path(path).parent if path else Path(name))
        config = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        if config.get("tokenizer_file"):  # which would be read instead
            raise ValueError("tokenizer_config.json names another tokenizer_file")
        if isinstance(further := config.get("extra_special_tokens"), list):  # transformers 4 reads a dictionary
            options |= {"extra_special_tokens": {}, "additional_special_tokens": further}
        # what transformers 5 saved, or names neither a class nor a model, is all in tokenizer.json
        kinds = {config.get("tokenizer_class"), config.get("backend")}
        is_alone = Path(name, "tokenizer.json").is_file() and not Path(name, "config.json").is_file()
        if not kinds & _PLAIN and (kinds != {None} or not is_alone):
            from transformers import AutoTokenizer as make  # here: it imports a good part of transformers

        tok = make.from_pretrained(name, trust_remote_code=False, **options)
        tok("a")  # settings of other types than transformers writes are met here
    except BaseException as error:  # the hub client raises many kinds; the tokenizers library panics, which is none
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise (ValueError if options["local_files_only"] else FileNotFoundError)(
            f"tokenizer {name} must be a folder of a fast tokenizer, or a Hugging Face id that can be loaded here, got "
            f"one that cannot be read ({' '.join(str(error).split()) or type(error).__name__:.200})") from error
    if not isinstance(tok, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer {name} must be a fast one (tokenizer.json), got {type(tok).__name__}; convert it")
    for key, token in _SPECIALS.items():
        if tok.special_tokens_map.get(f"{key}_token") is None and tok.backend_tokenizer.token_to_id(token) is not None:
            setattr(tok, f"{key}_token", token)
    tok.bos_token, tok.eos_token = tok.bos_token or tok.cls_token, tok.eos_token or tok.sep_token
    special_ids(tok)
    return tok


def special_ids(tok: PreTrainedTokenizerFast) -> dict[str, int | None]:
    """Ids of unk, cls (also BOS), sep (also EOS), pad and mask; only unk may be None."""
    if vocab_size(tok) > MAX_VOCAB_SIZE:
        raise ValueError(f"tokenizer {_name(tok)} must have at most {MAX_VOCAB_SIZE} entries, got {vocab_size(tok)}")
    found: dict[str, Any] = {key: getattr(tok, f"{key}_token_id") for key in _SPECIALS}
    needed = {value for key, value in found.items() if key != "unk"}
    if None in needed or len(needed) < 4:
        raise ValueError(f"tokenizer {_name(tok)} must have different cls, sep, pad and mask tokens, got {found}; add "
                         "them and save it again, or train one with --train-tokenizer")
    return found


def forbidden_ids(tok: PreTrainedTokenizerFast) -> set[int]:
    """Ids that ordinary text must never give: the special tokens, and every added token marked special."""
    added = tok.backend_tokenizer.get_added_tokens_decoder()
    return {*special_ids(tok).values(), *(number for number, token in added.items() if token.special)} - {None}


def vocab_size(tok: PreTrainedTokenizerFast) -> int:
    """Highest id plus one: the rows that an embedding needs."""
    return max(tok.get_vocab().values()) + 1


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE of Ettin's kind: NFC, no prefix space, the special tokens as the last five ids.

    `texts` are read once. `vocab_size` counts the special tokens too; ValueError where the text gives fewer entries.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if not 256 + 5 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"--train-tokenizer must be 261 to {MAX_VOCAB_SIZE} entries, got {vocab_size}; try 8192")
    backend: Any = Tokenizer(models.BPE())  # Any: the stubs of tokenizers 0.21 lack setters and keywords
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    make_trainer: Any = trainers.BpeTrainer
    backend.train_from_iterator(texts, trainer=make_trainer(
        vocab_size=vocab_size - 5, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if (found := backend.get_vocab_size() + 5) != vocab_size:
        raise ValueError(f"--train-tokenizer must be at most the {found} entries of the corpus, got {vocab_size}; give "
                         "more text, or its --text-field")
    # added after training: the trainer would put them first, Ettin has them last
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False, lstrip=key == "mask")
                                for key, token in _SPECIALS.items()])
    names: dict[str, Any] = {f"{key}_token": token for key, token in _SPECIALS.items()}
    names["mask_token"] = AddedToken("[MASK]", special=True, normalized=False, lstrip=True)
    tok = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="[CLS]", eos_token="[SEP]", **names, clean_up_tokenization_spaces=False,
        name_or_path="trained", model_input_names=["input_ids", "attention_mask"])
    return with_template(tok, "encoder")


def with_template(tok: PreTrainedTokenizerFast, kind: str) -> PreTrainedTokenizerFast:
    """A copy that puts the template of an "encoder" or of a "decoder" around a text.

    encoder: [CLS] A [SEP], pairs [CLS] A [SEP] B [SEP], padding on the right.
    decoder: [CLS] A: BOS, never EOS, since a prompt must not say that it is over; padding on the left, to generate.
    """
    from tokenizers.processors import TemplateProcessing

    result = copy.deepcopy(tok)
    cls, sep, ids = str(tok.cls_token), str(tok.sep_token), special_ids(tok)
    single, pair, side = (f"{cls} $A {sep}", f"{cls} $A {sep} $B:1 {sep}:1", "right") if kind == "encoder" else \
        (f"{cls} $A", f"{cls} $A $B:1", "left")
    backend: Any = result.backend_tokenizer
    tokens = [(cls, ids["cls"]), (sep, ids["sep"])]
    backend.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=tokens)
    result.padding_side = side
    # save_pretrained writes only what the constructor was given, so what was changed is put there too
    result.init_kwargs.update(padding_side=side, bos_token=tok.bos_token or cls, eos_token=tok.eos_token or sep)
    return result


def save(tok: PreTrainedTokenizerFast, folder: str | os.PathLike[str]) -> None:
    """`save_pretrained`, naming the fast class: transformers 4.51 names the slow one, which holds no vocabulary."""
    tok.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def fingerprint(tok: PreTrainedTokenizerFast) -> dict[str, Any]:
    """A manifest's tokenizer block: name, vocab_size, special_ids and two sha256.

    vocab_sha256 covers every (token, id); probe_sha256 the ids of a fixed text, hence merges, normalizer and
    pre-tokenizer. Neither depends on template, truncation or padding: an encoder's and a decoder's are equal.
    """
    backend: Any = type(tok.backend_tokenizer).from_str(tok.backend_tokenizer.to_str())
    backend.encode_special_tokens = True  # a literal "[MASK]" in a text is ordinary text
    backend.no_truncation()
    backend.no_padding()
    probe = np.array(backend.encode(_PROBE, add_special_tokens=False).ids, "<u2")
    vocab = sorted(tok.get_vocab().items())
    return {"name": _name(tok), "vocab_size": vocab_size(tok), "special_ids": special_ids(tok),
            "vocab_sha256": hashlib.sha256(json.dumps(vocab).encode()).hexdigest(),
            "probe_sha256": hashlib.sha256(probe.tobytes()).hexdigest()}


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first part in which two fingerprints differ, with both values, or ""."""
    differing = (key for key in COMPARED if found.get(key) != wanted.get(key))
    return next((f"{key} is {found.get(key)}, not {wanted.get(key)}" for key in differing), "")


def check(tok: PreTrainedTokenizerFast, manifest_block: Mapping[str, Any]) -> None:
    """Raises ValueError where a tokenizer is not the one that a dataset was made with."""
    mine = fingerprint(tok)
    if differing := difference(mine, manifest_block):
        raise ValueError(f"tokenizer must be the dataset's, {manifest_block.get('name')!r}, got {mine['name']!r}, "
                         f"whose {differing}; use the dataset's folder")


def _name(tok: PreTrainedTokenizerFast) -> str:
    """A hub id as it is; of a folder only its last part, so that manifests hold no paths of a machine."""
    name = str(tok.name_or_path or "unnamed")
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name
