"""ettin_foundry: paired encoders and decoders as a plugin of LLM-Foundry.

`REGISTRY` is the one table of names given to LLM-Foundry; the entry points in setup.cfg mirror it (a test holds them
equal), so that stock `llmfoundry train` finds the same names once the package is installed. `register()` puts them into
the registries of the running process, which is what `train.py` does in a bare clone. Importing this package imports
neither torch nor LLM-Foundry.
"""

from __future__ import annotations

import importlib

from ettin_foundry.version import __version__

__all__ = ["REGISTRY", "__version__", "register"]

# registry of LLM-Foundry -> name in YAML -> module:attribute
REGISTRY: dict[str, dict[str, str]] = {
    "models": {
        "ettin": "ettin_foundry.composer_model:EttinModel",
        "ettin_contrastive": "ettin_foundry.contrastive:EttinContrastive",
    },
    "dataloaders": {"ettin_text": "ettin_foundry.data:build_ettin_loader"},
    "collators": {
        "ettin_mlm": "ettin_foundry.data:mlm_collator",
        "ettin_clm": "ettin_foundry.data:clm_collator",
        "ettin_mntp": "ettin_foundry.data:mntp_collator",
        "ettin_mdlm": "ettin_foundry.data:mdlm_collator",
        "ettin_scheduled": "ettin_foundry.data:scheduled_collator",
    },
    "optimizers": {"ettin_stable_adamw": "ettin_foundry.optim:StableAdamW"},
    "schedulers": {
        "warmup_stable_decay": "ettin_foundry.optim:WarmupStableDecay",
        "one_minus_sqrt": "ettin_foundry.optim:OneMinusSqrt",
    },
    "callbacks": {
        "ettin_phase": "ettin_foundry.phases:EnterPhase",
        "ettin_cross": "ettin_foundry.phases:CrossObjective",
        "ettin_export": "ettin_foundry.callbacks:ExportHF",
        "ettin_samples": "ettin_foundry.callbacks:LogSamples",
        "ettin_monitor": "ettin_foundry.callbacks:DataMonitor",
    },
    "algorithms": {"ema": "ettin_foundry.ema:EMA"},
    "callbacks_with_config": {
        "ettin_clock": "ettin_foundry.clock:Clock",
        "ettin_steps": "ettin_foundry.step_log:StepLog",
    },
    "config_transforms": {"ettin_checks": "ettin_foundry.checks:check_config"},
}


def register() -> None:
    """Puts every name of `REGISTRY` into LLM-Foundry's registries of this process; calling it again is harmless."""
    from llmfoundry import registry

    for registry_name, names in REGISTRY.items():
        for name, target in names.items():
            module, attribute = target.split(":")
            getattr(registry, registry_name).register(name, func=getattr(importlib.import_module(module), attribute))
