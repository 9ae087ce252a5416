"""Which classes of the tested families are tested to split exactly.

What a family's table says was tried with its causal LM. A model of another class has other code
around the same blocks: `HEADS` are those that `tests/models/test_every_head.py` found equal to the
unsplit model, padded on both sides and not.
"""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

HEADS = (
    "AXK1ForSequenceClassification",
    "AXK1ForTokenClassification",
    "AXK2ForSequenceClassification",
    "AXK2ForTokenClassification",
    "ApertusForTokenClassification",
    "ArceeForSequenceClassification",
    "ArceeForTokenClassification",
    "BeamForTokenClassification",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BioGptForSequenceClassification",
    "BioGptForTokenClassification",
    "BloomForSequenceClassification",
    "BloomForTokenClassification",
    "CTRLForSequenceClassification",
    "CamembertForMaskedLM",
    "CamembertForSequenceClassification",
    "CamembertForTokenClassification",
    "Data2VecTextForMaskedLM",
    "Data2VecTextForSequenceClassification",
    "Data2VecTextForTokenClassification",
    "DeepseekV2ForSequenceClassification",
    "DeepseekV3ForSequenceClassification",
    "DeepseekV3ForTokenClassification",
    "DiffLlamaForSequenceClassification",
    "DiffLlamaForTokenClassification",
    "DogeForSequenceClassification",
    "ElectraForMaskedLM",
    "ElectraForSequenceClassification",
    "ElectraForTokenClassification",
    "ErnieForMaskedLM",
    "ErnieForSequenceClassification",
    "ErnieForTokenClassification",
    "Exaone4ForSequenceClassification",
    "Exaone4ForTokenClassification",
    "FalconForSequenceClassification",
    "FalconForTokenClassification",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPTBigCodeForSequenceClassification",
    "GPTBigCodeForTokenClassification",
    "GPTJForSequenceClassification",
    "GPTNeoForSequenceClassification",
    "GPTNeoForTokenClassification",
    "GPTNeoXForSequenceClassification",
    "GPTNeoXForTokenClassification",
    "Gemma2ForSequenceClassification",
    "Gemma2ForTokenClassification",
    "Gemma3TextForSequenceClassification",
    "GemmaForSequenceClassification",
    "GemmaForTokenClassification",
    "Glm4ForSequenceClassification",
    "Glm4ForTokenClassification",
    "GlmForSequenceClassification",
    "GlmForTokenClassification",
    "GptOssForSequenceClassification",
    "GptOssForTokenClassification",
    "HeliumForSequenceClassification",
    "HeliumForTokenClassification",
    "HunYuanDenseV1ForSequenceClassification",
    "HunYuanMoEV1ForSequenceClassification",
    "JambaForSequenceClassification",
    "JetMoeForSequenceClassification",
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "MegatronBertForMaskedLM",
    "MegatronBertForSequenceClassification",
    "MegatronBertForTokenClassification",
    "MiniCPM3ForSequenceClassification",
    "MiniMaxForSequenceClassification",
    "MiniMaxForTokenClassification",
    "Ministral3ForSequenceClassification",
    "Ministral3ForTokenClassification",
    "MinistralForSequenceClassification",
    "MinistralForTokenClassification",
    "MistralForSequenceClassification",
    "MistralForTokenClassification",
    "MixtralForSequenceClassification",
    "MixtralForTokenClassification",
    "ModernBertDecoderForSequenceClassification",
    "MptForSequenceClassification",
    "MptForTokenClassification",
    "NemotronForSequenceClassification",
    "NemotronForTokenClassification",
    "OPTForSequenceClassification",
    "Olmo2ForSequenceClassification",
    "Olmo3ForSequenceClassification",
    "OlmoForSequenceClassification",
    "PersimmonForSequenceClassification",
    "PersimmonForTokenClassification",
    "Phi3ForSequenceClassification",
    "Phi3ForTokenClassification",
    "PhiForSequenceClassification",
    "PhiForTokenClassification",
    "PhimoeForSequenceClassification",
    "Qwen2ForSequenceClassification",
    "Qwen2ForTokenClassification",
    "Qwen2MoeForSequenceClassification",
    "Qwen2MoeForTokenClassification",
    "Qwen3ForSequenceClassification",
    "Qwen3ForTokenClassification",
    "Qwen3MoeForSequenceClassification",
    "Qwen3MoeForTokenClassification",
    "Qwen3NextForSequenceClassification",
    "Qwen3NextForTokenClassification",
    "Qwen3_5TextForSequenceClassification",
    "RemBertForMaskedLM",
    "RemBertForSequenceClassification",
    "RemBertForTokenClassification",
    "RoCBertForMaskedLM",
    "RoCBertForSequenceClassification",
    "RoCBertForTokenClassification",
    "RobertaForMaskedLM",
    "RobertaForSequenceClassification",
    "RobertaForTokenClassification",
    "RobertaPreLayerNormForMaskedLM",
    "RobertaPreLayerNormForSequenceClassification",
    "RobertaPreLayerNormForTokenClassification",
    "SeedOssForSequenceClassification",
    "SeedOssForTokenClassification",
    "SmolLM3ForSequenceClassification",
    "SmolLM3ForTokenClassification",
    "StableLmForSequenceClassification",
    "StableLmForTokenClassification",
    "Starcoder2ForSequenceClassification",
    "Starcoder2ForTokenClassification",
    "XLMRobertaForMaskedLM",
    "XLMRobertaForSequenceClassification",
    "XLMRobertaForTokenClassification",
    "XLMRobertaXLForMaskedLM",
    "XLMRobertaXLForSequenceClassification",
    "XLMRobertaXLForTokenClassification",
)
"""Names of classes in `transformers`."""


def causal_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class that transformers' AutoModelForCausalLM makes of a config."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return kind[0] if isinstance(kind, tuple) else kind


def require_tested_class(model: PreTrainedModel, allow_untested: bool) -> bool:
    """Return whether the class of `model` is tested; refuse one that is not, unless it is allowed.

    A subclass is another class, and so is a model whose `forward` was replaced.

    Raises
    ------
    ValueError
        If the class is untested and `allow_untested` is false.
    """
    kind, causal = type(model), causal_class(model.config)
    own = kind.__module__.startswith("transformers.models.") and kind.__name__ in HEADS
    if (kind is causal or own) and "forward" not in vars(model):
        return True
    if allow_untested:
        return False
    what = (
        f"{kind.__name__} with a forward of its own" if "forward" in vars(model) else kind.__name__
    )
    known = f"; of {model.config.model_type}, {causal.__name__} is" if causal else ""
    raise ValueError(
        f"the class {what} is not tested to split exactly{known}. To try it all the same, with a "
        "check against the unsplit model, set allow-untested (allow_untested=True)"
    )
