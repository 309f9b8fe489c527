"""What the graphs lack for models that shortstack cannot export, by ``model_type``: for refusals that say why.

The names are those of transformers and of the hub. A name that is in no list is refused with the nearest supported one.
"""

from __future__ import annotations

from collections.abc import Mapping

EXPERTS, RECURRENT, LATENT = "a mixture of experts", "recurrent layers", "latent attention"
ENCODER, BOTH_WAYS, MEDIA = "an encoder", "attention to later positions", "images or sound"

_NAMES: Mapping[str, str] = {
    EXPERTS: """
        afmoe aria_text axk1 axk2 bailing_moe cohere2_moe dbrx deepseek deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4
        dots1 ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite glm4v_moe glm_moe_dsa gpt_oss
        granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 jamba jetmoe kimi_k2
        kimi_linear lfm2_moe llama4 llama4_text longcat_flash mimo_v2_flash minimax minimax_m2 mixtral nllb-moe
        nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen3_omni_moe_thinker
        qwen3_vl_moe sarvam_mla sarvam_moe solar_open switch_transformers zaya
    """,
    RECURRENT: """
        bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe lfm2_vl lfm3 mamba mamba2 minimax
        nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next recurrent_gemma rwkv xlstm
        zamba zamba2
    """,
    LATENT: """
        axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_k2 kimi_linear longcat_flash
        minicpm3 sarvam_mla youtu
    """,
    ENCODER: """
        bart bigbird_pegasus blenderbot blenderbot-small cohere_asr dia encoder-decoder florence2 fsmt
        kyutai_speech_to_text led longt5 m2m_100 marian mbart moonshine moonshine_streaming mt5 mvp nllb-moe pegasus
        pegasus_x pix2struct plbart pop2piano prophetnet seamless_m4t seamless_m4t_v2 speech-encoder-decoder
        speech_to_text speecht5 switch_transformers t5 t5gemma t5gemma2 trocr udop umt5 vision-encoder-decoder whisper
    """,
    BOTH_WAYS: """
        albert bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra ernie esm eurobert
        flaubert funnel gte layoutlm longformer luke megatron-bert mobilebert modernbert mpnet nomic_bert rembert
        roberta roberta-prelayernorm roformer squeezebert xlm xlm-roberta xlm-roberta-xl xlnet xmod
    """,
    MEDIA: """
        aria audioflamingo3 aya_vision blip blip-2 chameleon cohere2_vision cohere_asr deepseek_ocr2 deepseek_vl
        deepseek_vl_hybrid emu3 ernie4_5_vl_moe fast_vlm florence2 fuyu gemma3n gemma4_unified git glm4v
        glm4v_moe glm_ocr got_ocr2 granite4_vision granite_speech hunyuan_vl idefics idefics2 idefics3 instructblip
        internvl janus kimi_k25 kosmos-2 kosmos-2.5 lfm2_vl llama4 llava llava_next llava_next_video llava_onevision
        mllama molmo2 moshi musicgen ovis2 paddleocr_vl paligemma perception_lm phi4_multimodal
        pix2struct qwen2_5_omni qwen2_5_omni_thinker qwen2_5_vl qwen2_audio qwen2_vl qwen3_5 qwen3_5_moe qwen3_asr
        qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe seamless_m4t seamless_m4t_v2 smolvlm speech_to_text speecht5
        t5gemma2 trocr video_llava vipllava vision-encoder-decoder voxtral whisper
    """,
}
MISSING: Mapping[str, tuple[str, ...]] = {
    name: tuple(what for what, names in _NAMES.items() if name in names.split())
    for name in sorted({name for names in _NAMES.values() for name in names.split()})
}
"""What is missing for each name."""
REMEDIES: Mapping[str, str] = {
    MEDIA: "if its language model alone is of a supported family, save that as a checkpoint of its own and export it",
}
