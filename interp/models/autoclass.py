"""Choose the transformers class for a model: the one its configuration names, else the fitting Auto class."""

from typing import Any

from interp.errors import UnsupportedError


def model_class(config: Any, *, trust_remote_code: bool) -> Any:
    """The class whose `from_pretrained` loads a model with this configuration.

    In order: a class of transformers named in `config.architectures`; with `trust_remote_code`, the Auto class that the
    model's own code is registered for; then by the configuration's type: image-text-to-text, speech to text,
    sequence to sequence, causal language model (for types that are not masked ones too), and last the bare model.

    Raises:
        UnsupportedError: nothing in transformers loads this configuration.
    """
    import transformers

    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    if trust_remote_code:
        remote = getattr(config, "auto_map", None) or {}
        for name in remote:
            if name.startswith("AutoModel") and hasattr(transformers, name):
                return getattr(transformers, name)
    return _by_type(config)


def _by_type(config: Any) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    kind = type(config)
    if kind in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    if kind in auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING:
        return transformers.AutoModelForSpeechSeq2Seq
    if kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForSeq2SeqLM
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if kind in auto.MODEL_MAPPING:
        return transformers.AutoModel
    raise UnsupportedError(
        f"transformers {transformers.__version__} has no model for the configuration {kind.__name__} "
        f"(model_type {config.model_type!r}, architectures {getattr(config, 'architectures', None)})."
    )
