"""What servers of others load by their entry points, so that they know an export's classes. Imports none of them."""

ARCHITECTURE = "AlignVLMForConditionalGeneration"
"""What `architectures` in config.json of an export says."""


def register_in_vllm() -> None:
    """vLLM calls this in each of its processes (entry point `vllm.general_plugins`)."""
    from vllm import ModelRegistry

    import alignvlm.model  # noqa: F401  (registers the classes with transformers)

    # By name: vLLM looks at the class in a process of its own before it starts CUDA.
    ModelRegistry.register_model(ARCHITECTURE, "alignvlm.serving.plugins.vllm_model:ServedByVLLM")


def register_in_sglang() -> None:
    """SGLang calls this in each of its processes (entry point `sglang.srt.plugins`). Read in its source, not run."""
    import transformers
    from sglang.srt.configs.model_config import multimodal_model_archs

    from alignvlm.model import AlignVLMForConditionalGeneration

    setattr(transformers, ARCHITECTURE, AlignVLMForConditionalGeneration)  # where SGLang looks for a class it may use
    if ARCHITECTURE not in multimodal_model_archs:
        multimodal_model_archs.append(ARCHITECTURE)
