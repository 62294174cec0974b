"""Exported decoders in vLLM, which has no ModernBertDecoder: `pip install ./serving` beside it, `vllm serve FOLDER`."""


def register() -> None:
    """vLLM calls this in each of its processes (entry point `vllm.general_plugins`)."""
    from vllm import ModelRegistry

    ModelRegistry.register_model("ModernBertDecoderForCausalLM", "ettin_vllm.decoder:ModernBertDecoderForCausalLM")
