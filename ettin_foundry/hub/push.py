"""Exported folders to the Hugging Face Hub: one, or every revision of a run, each a commit under a tag of its name."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from ettin_foundry.hub.folder import export_checkpoint, revisions
from ettin_foundry.model.weights import WEIGHTS


def push(sources: Sequence[Path], repo: str, *, every: bool = False, private: bool = False,
         dry_run: bool = False) -> str:
    """Uploads an exported folder, or every revision, oldest first, so that main is the newest; returns what went where.

    Revisions whose tag is there are skipped, so an interrupted upload goes on. A repository is made if needed.

    sources: an exported folder; with `every`, save folders, or folders that `export_every` wrote. repo: OWNER/NAME, or
    NAME alone for one of the token's user. dry_run: says what would go where, without the network.
    """
    validate_repo_id(repo)
    if not every and not _is_export(sources[0]):
        raise ValueError(f"FOLDER must be an exported model, with config.json and {WEIGHTS}, got {sources[0]}; "
                         "`ettin export` writes one, --every takes a run")
    found = _revisions(sources) if every else {"main": sources[0]}
    newest = list(found)[-1]
    if dry_run:
        return "\n".join([f"{path} -> {repo}@{name}" for name, path in found.items()] + [f"main is {newest}"] * every)
    if get_token() is None:
        raise ValueError("a token of the Hub is needed; run `huggingface-cli login`, or set HF_TOKEN")
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        repo = url.repo_id
        tags = {tag.name for tag in api.list_repo_refs(repo).tags}
        wanted = [name for name in found if name not in tags]
        for name in [*wanted, *([newest] if wanted and newest in tags else [])]:  # main must not stay at an older one
            with tempfile.TemporaryDirectory() as scratch:
                if not _is_export(folder := found[name]):
                    folder = Path(scratch, repo.split("/")[1])  # which becomes the card's title
                    export_checkpoint(found[name], folder)
                message = name if every else folder.name
                commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
            if every and name not in tags:
                api.create_tag(repo, tag=name, revision=commit.oid)
    except HfHubHTTPError as error:
        raise ValueError(f"{repo}: {' '.join(str(error).split())}; the same command goes on") from error
    what = f"{len(wanted)} of {len(found)} revisions, the others were there; main is {newest}" if every else sources[0]
    return f"pushed to {url}: {what}"


def _is_export(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / WEIGHTS).is_file()


def _revisions(sources: Sequence[Path]) -> dict[str, Path]:
    exported = [path for source in sources for path in source.glob("[!.]*/") if _is_export(path)]
    if not exported:
        return {name: head.path for name, head in revisions(sources).items()}
    said = {path: json.loads((path / "config.json").read_text())["ettin_foundry"] for path in exported}
    return {path.name: path for path in sorted(exported, key=lambda path: said[path].get("tokens") or 0)}
