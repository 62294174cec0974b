"""What the Trainer needs on a GPU machine that has torch 2.11 and Python 3.12, but neither network nor LLM-Foundry.

    python3 benchmarks/wheels_gpu.py                    collects the wheels below into .wheels/ (make wheels-gpu)
    python3 benchmarks/wheels_gpu.py --unpack FOLDER    there: unpacks them; put FOLDER first on PYTHONPATH
    python3 benchmarks/wheels_gpu.py --check            holds the package's imports against the two lists (make lint)

`NAMES` is what training and conversion load beyond `IMAGE`, found by running both with everything else out of sight.
Cloud SDKs and trackers that are only tried are left out. torch is never fetched. Versions are those of constraints.txt.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

FOLDER = Path(__file__).resolve().parents[1] / ".wheels"
LIMIT_MB = 60
PYTHON = "3.12"
# pip matches each tag literally, so all that a wheel may carry are named
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(35, 4, -1)] + ["manylinux2014_x86_64"]
# of a usual machine-learning image, whatever the version
IMAGE = """
torch torchvision torchmetrics triton accelerate einops numpy pandas scikit-learn pyarrow matplotlib sentencepiece
safetensors requests aiohttp fsspec rich typer click PyYAML jinja2 markupsafe protobuf psutil tabulate tqdm packaging
""".split()
NAMES = """
llm-foundry mosaicml mosaicml-cli mosaicml-streaming torch-optimi
transformers tokenizers huggingface-hub datasets dill multiprocess
omegaconf catalogue coolname importlib-metadata backoff tenacity beautifulsoup4 soupsieve
gql graphql-core websockets questionary prompt-toolkit wcwidth
ruamel.yaml validators GitPython gitdb smmap
mlflow-skinny databricks-sdk google-auth cachetools cryptography cffi
sqlparse pytz opentelemetry-api opentelemetry-sdk opentelemetry-semantic-conventions
pydantic pydantic-core annotated-types typing-inspection
zstandard zstd brotli python-snappy cramjam
orjson fastokens setuptools xxhash liger-kernel==0.8.5
""".split()


def check() -> None:
    """Refuses lists that lack what the package or a program of `make gpu` imports, or what setup.cfg bounds."""
    root, setup = FOLDER.parent, configparser.ConfigParser(inline_comment_prefixes="#")
    setup.read(root / "setup.cfg")
    bounded = {line for line in setup["options"]["install_requires"].split() if "<" in line or "==" in line}
    names = {name.lower() for name in NAMES}
    assert {re.split("[<>=]", line)[0] for line in bounded} <= names  # the image may have another version
    of, there = importlib.metadata.packages_distributions(), names | {name.lower() for name in IMAGE}
    own = {"ettin_foundry", "train", "real_job", "train_step", "step_worker", "streams", "cpu_vs_transformers",
           "attention", "kernels", "loss"}
    of_make_gpu = (path for path in (root / "benchmarks").glob("*.py") if path.stem in own)
    for path in (*(root / "ettin_foundry").rglob("*.py"), root / "train.py", *of_make_gpu):
        for node in ast.parse(path.read_text()).body:
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [
                alias.name for alias in getattr(node, "names", ())]
            for module in {name.split(".")[0] for name in modules} - sys.stdlib_module_names - own:
                assert {name.lower() for name in of[module]} & there, (path, module)


def collect(folder: Path) -> None:
    """Downloads `NAMES` for the machine's Python; a second call fetches what is missing."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
               "--implementation", "cp", "--python-version", PYTHON, "--dest", str(folder),
               "--constraint", str(FOLDER.with_name("constraints.txt"))]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *NAMES], check=True)
    wheels = sorted(folder.glob("*.whl"))
    megabytes = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{len(wheels)} wheels, {megabytes:.1f} MB in {folder}")
    if megabytes > LIMIT_MB or len(wheels) != len(NAMES):
        raise SystemExit(f"{folder} must hold {len(NAMES)} wheels under {LIMIT_MB} MB together, got {len(wheels)} of "
                         f"{megabytes:.1f} MB; remove it and run this again")


def unpack(folder: Path, target: Path) -> None:
    """Lays the wheels out as one site folder, as pip would without scripts.

    Raises:
        ValueError: a wheel names a file outside the folder.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"{folder} holds no wheels; run `make wheels-gpu` where there is network, and bring it here")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                parts = PurePosixPath(member.filename).parts
                if parts and parts[0].endswith(".data"):
                    if len(parts) < 3 or parts[1] not in ("purelib", "platlib"):
                        continue  # scripts, headers
                    parts = parts[2:]
                if not parts or member.is_dir():
                    continue
                if ".." in parts or parts[0].startswith("/"):
                    raise ValueError(f"{wheel.name}: {member.filename!r} is outside the folder; fetch it again")
                path = target.joinpath(*parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(member))
    print(f"{len(wheels)} wheels unpacked into {target}")


def main() -> None:
    parser = argparse.ArgumentParser(description="wheels of the Trainer for a GPU machine without network")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--unpack", type=Path, metavar="FOLDER", help="unpack into this folder instead of downloading")
    parser.add_argument("--check", action="store_true", help="only say whether the lists are whole")
    args = parser.parse_args()
    if args.check:
        check()
    elif args.unpack:
        unpack(args.folder, args.unpack)
    else:
        collect(args.folder)


if __name__ == "__main__":
    main()
