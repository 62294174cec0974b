"""What the Trainer needs on a GPU machine that has torch 2.11 and Python 3.12, but neither network nor LLM-Foundry.

    python3 benchmarks/wheels_gpu.py                    collects the wheels below into .wheels/ (make wheels-gpu)
    python3 benchmarks/wheels_gpu.py --unpack FOLDER    there: unpacks them; put FOLDER first on PYTHONPATH

The list is what `import llmfoundry, composer, streaming, optimi` and llmfoundry.command_utils.train load beyond a usual
machine-learning image (torch, torchvision, torchmetrics, accelerate, einops, numpy, pandas, pyarrow, scikit-learn,
matplotlib, sentencepiece, safetensors, requests, aiohttp, rich, PyYAML, xxhash, protobuf, ...), found by importing with
everything else out of sight. Cloud SDKs and trackers that are only tried are left out. torch is never fetched.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

FOLDER = Path(__file__).resolve().parents[1] / ".wheels"
LIMIT_MB = 60
PYTHON = "3.12"
# pip matches each tag literally, so all that a wheel may carry are named
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17, 12, 5)] + ["manylinux2014_x86_64"]
PINS = """
llm-foundry==0.22.0 mosaicml==0.32.1 mosaicml-cli==0.7.5 mosaicml-streaming==0.12.0 torch-optimi==0.3.3
transformers==4.51.3 tokenizers==0.21.4 huggingface-hub==0.33.5 datasets==3.6.0 dill==0.3.8 multiprocess==0.70.16
omegaconf==2.4.0 catalogue==2.0.10 coolname==2.2.0 importlib-metadata==8.9.0 backoff==2.2.1 tenacity==9.2.1
beautifulsoup4==4.15.0 soupsieve==4.1.2
gql==3.5.3 graphql-core==3.2.6 websockets==11.0.3 questionary==2.0.1 prompt-toolkit==3.0.36 wcwidth==0.9.4
ruamel.yaml==0.19.1 validators==0.36.0 GitPython==3.1.44 gitdb==4.0.12 smmap==5.0.3
mlflow-skinny==2.22.5 databricks-sdk==0.156.0 google-auth==2.62.2 cachetools==5.5.2 cryptography==50.0.2 cffi==2.1.1
sqlparse==0.6.1 pytz==2026.6 opentelemetry-api==1.45.2 opentelemetry-sdk==1.45.2
opentelemetry-semantic-conventions==0.66b2
pydantic==2.14.3 pydantic-core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5
zstandard==0.25.0 zstd==1.5.6.1 brotli==1.2.1 python-snappy==0.7.3 cramjam==2.14.0
""".split()


def collect(folder: Path) -> None:
    """Downloads `PINS` for the machine's Python; a second call fetches what is missing."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
               "--implementation", "cp", "--python-version", PYTHON, "--dest", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *PINS], check=True)
    wheels = sorted(folder.glob("*.whl"))
    megabytes = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{len(wheels)} wheels, {megabytes:.1f} MB in {folder}")
    if megabytes > LIMIT_MB or len(wheels) != len(PINS):
        raise SystemExit(f"{folder} holds {len(wheels)} wheels of {megabytes:.1f} MB together; {len(PINS)} wheels under "
                         f"{LIMIT_MB} MB are allowed. Remove the folder and run this again")


def unpack(folder: Path, target: Path) -> None:
    """Lays the wheels out as one site folder, as pip would without scripts.

    Raises:
        ValueError: a wheel names a file outside the folder.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"{folder} holds no wheels; run `make wheels-gpu` on a machine with network and bring the folder")
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
                    raise ValueError(f"{wheel.name}: {member.filename!r} lies outside the folder; fetch the wheel again")
                path = target.joinpath(*parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(member))
    print(f"{len(wheels)} wheels unpacked into {target}")


def main() -> None:
    parser = argparse.ArgumentParser(description="wheels of the Trainer for a GPU machine without network")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--unpack", type=Path, metavar="FOLDER", help="unpack into this folder instead of downloading")
    args = parser.parse_args()
    if args.unpack:
        unpack(args.folder, args.unpack)
    else:
        collect(args.folder)


if __name__ == "__main__":
    main()
