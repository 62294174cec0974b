"""ettin_foundry: paired encoders and decoders as a plugin of LLM-Foundry.

`REGISTRY` is the one table of names given to LLM-Foundry; the entry points in setup.cfg mirror it (a test holds them
equal), so that stock `llmfoundry train` finds the same names once the package is installed. `register()` puts them into
the registries of the running process, which is what `train.py` does in a bare clone. Importing this package imports
neither torch nor LLM-Foundry.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from pathlib import Path

from ettin_foundry.version import __version__

__all__ = ["REGISTRY", "__version__", "program_folder", "register"]

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # of 300,000: threads that spin hold up others, and wait for them

# registry of LLM-Foundry -> name in YAML -> module:attribute
REGISTRY: dict[str, dict[str, str]] = {
    "models": {"ettin": "ettin_foundry.model.composer:EttinModel"},
    "dataloaders": {"ettin_text": "ettin_foundry.data.loader:build_ettin_loader"},
    "collators": {
        "ettin_mlm": "ettin_foundry.data.loader:mlm_collator",
        "ettin_clm": "ettin_foundry.data.loader:clm_collator",
        "ettin_mntp": "ettin_foundry.data.loader:mntp_collator",
        "ettin_scheduled": "ettin_foundry.data.loader:scheduled_collator",
    },
    "optimizers": {"ettin_stable_adamw": "ettin_foundry.training.optimizer:StableAdamW"},
    "schedulers": {
        "warmup_stable_decay": "ettin_foundry.training.optimizer:WarmupStableDecay",
        "one_minus_sqrt": "ettin_foundry.training.optimizer:OneMinusSqrt",
    },
    "loggers": {"ettin_console": "ettin_foundry.training.console:RunConsole"},
    "callbacks": {
        "ettin_phase": "ettin_foundry.training.callbacks:EnterPhase",
        "ettin_cross": "ettin_foundry.training.callbacks:CrossObjective",
        "ettin_export": "ettin_foundry.hub.export:ExportHF",
        "ettin_samples": "ettin_foundry.training.callbacks:LogSamples",
        "ettin_monitor": "ettin_foundry.training.callbacks:DataMonitor",
        "ettin_watch": "ettin_foundry.training.watch:Watch",
    },
    "callbacks_with_config": {
        "ettin_clock": "ettin_foundry.training.clock:Clock",
        "ettin_steps": "ettin_foundry.training.callbacks:StepLog",
    },
    "config_transforms": {"ettin_checks": "ettin_foundry.training.checks:check_config"},
}


def register() -> None:
    """Puts every name of `REGISTRY` into LLM-Foundry's registries of this process; calling it again is harmless."""
    from llmfoundry import registry

    for registry_name, names in REGISTRY.items():
        for name, target in names.items():
            module, attribute = target.split(":")
            getattr(registry, registry_name).register(name, func=getattr(importlib.import_module(module), attribute))


def program_folder() -> Path:
    """The folder that holds train.py, yamls/ and data_prep/: the clone, or where a wheel put its copy of them.

    Raises:
        FileNotFoundError: the package was copied by hand, without them.
    """
    clone = Path(__file__).resolve().parents[1]
    if (clone / "yamls").is_dir():
        return clone
    distribution = importlib.metadata.distribution("ettin-foundry")
    for file in distribution.files or ():
        if file.parts[-2:] == ("ettin_foundry", "train.py"):
            return Path(str(distribution.locate_file(file))).resolve().parent
    raise FileNotFoundError("yamls/ is neither beside the package nor in its installation; install it with pip")
