"""The kinds of model that tests/zoo.py bakes; zoo_models.py has their architectures."""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np
import test_bake_kinds as refused
import test_bake_kinds_served as served
import test_bake_pictures as pictures
import test_bake_source as sources
import tiny_clip
import tiny_code
import tiny_models as tiny
import transformers
import zoo_models as models
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm
from test_bake_served import truncated
from zoo_models import Kind, causal, of, pooled, saved, sized, t5_encoder, transformer

TRUST = ("--trust-remote-code",)

KINDS: dict[str, Kind] = {
    "all-MiniLM-L6-v2 (the real one)": Kind(models.real),
    # BERT, its poolings and heads
    "BERT, WordPiece, mean": pooled("mean"),
    "BERT, cls": pooled("cls"),
    "BERT, max": pooled("max"),
    "BERT, mean_sqrt_len_tokens": pooled("mean_sqrt_len_tokens", normalize=False),
    "BERT, weightedmean": pooled("weightedmean"),
    "BERT, lasttoken": pooled("lasttoken"),
    "BERT, cls and max side by side": pooled(("cls", "max")),
    "BERT, not normalised": pooled("mean", normalize=False),
    "BERT, Dense with tanh (LaBSE)": pooled("cls", heads=models.head),
    "BERT, two Dense, the second without bias": pooled(
        "mean", heads=lambda: [Dense(models.WIDTH, 96), Dense(96, 24, bias=False)]
    ),
    "BERT, Normalize before a Dense": pooled(
        "mean", heads=lambda: [Normalize(), *models.head()], normalize=False
    ),
    "BERT, LayerNorm module": pooled("mean", heads=lambda: [LayerNorm(models.WIDTH)]),
    "BERT, Dropout module": pooled("mean", heads=lambda: [Dropout(0.5)]),
    "BERT, WeightedLayerPooling": Kind(models.layered),
    "BERT, LSTM over its tokens": Kind(models.recurrent),
    "BERT, CNN over its tokens": Kind(models.convolving),
    "BERT, truncate_dim": Kind(
        lambda folder: truncated(tiny.save(folder, models.BERT, width=models.WIDTH), 24)
    ),
    "BERT, a default prompt": pooled("mean", prompts=models.QUERY, default_prompt="query"),
    "BERT, prompts, include_prompt false": Kind(
        models.instructed, models.PROMPT, models.with_prompt
    ),
    "BERT, LoRA adapter (PEFT)": Kind(served.adapted),
    "BERT, tokenizer of bytes (ByT5's)": of("Bert", models.bytes_t5, *models.UNSTATED),
    "BERT, tokenizer of bytes (Perceiver's)": of(
        "Bert", lambda: transformers.PerceiverTokenizer(), *models.UNSTATED
    ),
    "BERT, no padding token": Kind(
        saved(served.unpadded_bert, width=tiny.WIDTH, pooling="cls"), models.UNSTATED, None
    ),
    "BERT, no modules (plain transformers)": Kind(refused.plain, models.UNSTATED),
    "BERT, masked language model, no modules": Kind(
        lambda folder: refused.plain(folder, "BertForMaskedLM"), models.UNSTATED
    ),
    # encoders
    "RoBERTa, byte-level BPE": Kind(saved(models.ROBERTA)),
    "RoBERTa, padded on the left": Kind(saved(tiny.roberta_left, width=tiny.WIDTH)),
    "XLM-RoBERTa, Unigram": of(
        "XLMRoberta", models.unigram, max_position_embeddings=models.ROBERTA_POSITIONS
    ),
    "XLM-RoBERTa, window of 8192": of("XLMRoberta", models.unigram, max_position_embeddings=8194),
    "XLM-RoBERTa-XL": of(
        "XLMRobertaXL", models.unigram, max_position_embeddings=models.ROBERTA_POSITIONS
    ),
    "CamemBERT": of(
        "Camembert", models.camembert, max_position_embeddings=models.ROBERTA_POSITIONS
    ),
    "DistilBERT": of("DistilBert", models.wordpiece, hidden_dim=128),
    "MPNet": of("MPNet", lambda: tiny.mpnet()[0], max_position_embeddings=models.ROBERTA_POSITIONS),
    "ALBERT": of("Albert", models.albert, embedding_size=32),
    "ELECTRA": of("Electra", models.wordpiece, embedding_size=32),
    "DeBERTa": of(
        "Deberta",
        models.deberta,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["c2p", "p2c"],
    ),
    "DeBERTa-v2, v3": Kind(saved(tiny.deberta, width=tiny.WIDTH)),
    "NomicBERT": of("NomicBert", models.wordpiece),
    "GTE": of("Gte", models.wordpiece),
    "Jina embeddings v3": of("JinaEmbeddingsV3", models.unigram),
    "ModernBERT": of(
        "ModernBert",
        models.modernbert,
        save={"pooling": "cls"},
        local_attention=16,
        global_attn_every_n_layers=2,
    ),
    "ModernBERT, window of 8192": of(
        "ModernBert", models.modernbert, max_position_embeddings=8192, local_attention=128
    ),
    "ModernBERT decoder": of(
        "ModernBertDecoder", models.modernbert, save=models.POOL_LAST, local_attention=16
    ),
    "EuroBERT": of("EuroBert", models.modernbert, num_key_value_heads=1),
    "UltraBERT": of("Ultrabert", models.modernbert, sliding_window=16),
    "Megatron-BERT": of("MegatronBert", models.wordpiece),
    "ERNIE": of("Ernie", models.wordpiece),
    "RoFormer": of("RoFormer", models.wordpiece, embedding_size=models.WIDTH),
    "RemBERT": of("RemBert", models.rembert, input_embedding_size=32),
    "data2vec text": of(
        "Data2VecText", models.byte_pairs, max_position_embeddings=models.ROBERTA_POSITIONS
    ),
    "RoBERTa-PreLayerNorm": of(
        "RobertaPreLayerNorm", models.byte_pairs, max_position_embeddings=models.ROBERTA_POSITIONS
    ),
    "I-BERT": of("IBert", models.byte_pairs, max_position_embeddings=models.ROBERTA_POSITIONS),
    "X-MOD": of(
        "Xmod",
        models.unigram,
        default_language="en_XX",
        max_position_embeddings=models.ROBERTA_POSITIONS,
    ),
    "LUKE": of(
        "Luke",
        models.byte_pairs,
        entity_vocab_size=10,
        entity_emb_size=16,
        max_position_embeddings=models.ROBERTA_POSITIONS,
    ),
    "LiLT": of(
        "Lilt",
        models.byte_pairs,
        save={"width": 96},
        hidden_size=96,
        max_position_embeddings=models.ROBERTA_POSITIONS,
    ),
    "LayoutLM": of("LayoutLM", models.wordpiece),
    "Splinter": of("Splinter", models.wordpiece),
    "BERT generation": Kind(saved(models.bert_generation)),
    "SqueezeBERT": of("SqueezeBert", models.wordpiece, embedding_size=models.WIDTH),
    "MobileBERT": of(
        "MobileBert",
        models.wordpiece,
        embedding_size=32,
        intra_bottleneck_size=32,
        true_hidden_size=32,
    ),
    "ConvBERT": of("ConvBert", models.wordpiece, embedding_size=models.WIDTH, head_ratio=2),
    "FNet": of("FNet", models.wordpiece),
    "Funnel": sized("Funnel", models.funnel, block_sizes=[1, 1], num_decoder_layers=1, d_head=32),
    "Longformer": of(
        "Longformer",
        models.byte_pairs,
        attention_window=16,
        max_position_embeddings=models.ROBERTA_POSITIONS,
    ),
    "BigBird, block-sparse": of(
        "BigBird", models.big_bird, max_position_embeddings=512, block_size=8, num_random_blocks=2
    ),
    "BigBird, full attention": of("BigBird", models.big_bird, attention_type="original_full"),
    "Nyströmformer": of(
        "Nystromformer",
        models.unigram,
        num_landmarks=8,
        segment_means_seq_len=8,
        conv_kernel_size=9,
    ),
    "YOSO": of("Yoso", models.unigram, max_position_embeddings=models.ROBERTA_POSITIONS),
    "MRA": of("Mra", models.unigram, max_position_embeddings=models.ROBERTA_POSITIONS),
    "XLNet": sized("XLNet", models.xlnet, n_layer=2),
    "Reformer": of(
        "Reformer",
        models.unigram,
        attention_head_size=32,
        axial_pos_embds=False,
        feed_forward_size=128,
        attn_layers=["local", "local"],
        local_attn_chunk_length=16,
    ),
    "CANINE (characters)": Kind(saved(models.canine), models.UNSTATED),
    # encoders of encoder-decoders
    "T5 encoder": t5_encoder("T5"),
    "T5 encoder, gated, ByT5's bytes": t5_encoder(
        "T5", models.bytes_t5, feed_forward_proj="gated-gelu"
    ),
    "mT5 encoder": t5_encoder("MT5"),
    "UMT5 encoder": t5_encoder("UMT5"),
    "LongT5 encoder": t5_encoder("LongT5", local_radius=15),
    "Switch transformers encoder": t5_encoder("SwitchTransformers", num_experts=2),
    "BART, its decoder's states": of("Bart", models.byte_pairs, **models.BART),
    "mBART, its decoder's states": of("MBart", models.unigram, **models.BART),
    "Pegasus, its decoder's states": of("Pegasus", models.t5, **models.BART),
    # decoders
    "GPT-2, no padding token, lasttoken": causal("GPT2", models.gpt2, **models.GPT),
    "GPT-2, weightedmean (SGPT)": Kind(
        saved(transformer("GPT2", models.gpt2, **models.GPT), pooling="weightedmean"), (), None
    ),
    "GPT-Neo": causal(
        "GPTNeo", models.gpt2, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    ),
    "GPT-J": causal("GPTJ", models.gpt2, **models.GPT, rotary_dim=16),
    "CodeGen": causal(
        "CodeGen", models.gpt2, **{**models.GPT, "n_head": 4}, num_attention_heads=4, rotary_dim=8
    ),
    "GPT-BigCode": causal("GPTBigCode", models.gpt2, **models.GPT),
    "GPT-NeoX, Pythia": causal("GPTNeoX", models.neox),
    "OPT": causal("OPT", models.opt, ffn_dim=128, word_embed_proj_dim=models.WIDTH, init_std=0.2),
    "BLOOM": causal("Bloom", models.neox, *models.UNSTATED, n_layer=2, n_head=2),
    "Falcon": causal("Falcon", models.neox),
    "MPT": causal(
        "Mpt", models.neox, *models.UNSTATED, d_model=models.WIDTH, n_heads=2, n_layers=2
    ),
    "Llama": causal("Llama", models.llama),
    "Llama, mean": Kind(saved(transformer("Llama", models.llama)), (), None),
    "Mistral, sliding window": causal("Mistral", models.llama, sliding_window=16, **models.GROUPED),
    "Mixtral (experts)": causal("Mixtral", models.llama, **models.GROUPED, **models.EXPERTS),
    "Qwen2": causal("Qwen2", models.qwen, **models.GROUPED),
    "Qwen3": causal("Qwen3", models.qwen, head_dim=32, **models.GROUPED),
    "Qwen3-MoE (experts)": causal(
        "Qwen3Moe",
        models.qwen,
        head_dim=32,
        moe_intermediate_size=32,
        **models.GROUPED,
        **models.EXPERTS,
    ),
    "Gemma": causal("Gemma", models.gemma, head_dim=32, **models.GROUPED),
    "Gemma 2": causal(
        "Gemma2",
        models.gemma,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        **models.GROUPED,
    ),
    "Gemma 3": Kind(saved(tiny.gemma3, width=tiny.WIDTH, **models.POOL_LAST)),
    "EmbeddingGemma (Gemma 3 both ways, two Dense)": Kind(
        saved(
            tiny.embedding_gemma,
            width=tiny.WIDTH,
            heads=lambda: [Dense(tiny.WIDTH, 64), Dense(64, 24, bias=False)],
        )
    ),
    "Phi": causal("Phi", models.gpt2),
    "Phi-3": causal(
        "Phi3", models.llama, original_max_position_embeddings=models.WINDOW, pad_token_id=0
    ),
    "OLMo 2": causal("Olmo2", models.neox),
    "StarCoder2": causal("Starcoder2", models.gpt2, **models.GROUPED),
    "Granite": causal("Granite", models.gpt2),
    "SmolLM3": causal("SmolLM3", models.gpt2, **models.GROUPED, no_rope_layer_interval=2),
    "Cohere": causal("Cohere", models.neox),
    "Mamba (no attention)": causal("Mamba", models.neox, *models.UNSTATED, state_size=8),
    "a generating model (Qwen3ForCausalLM), --pooling": Kind(
        refused.generative, ("--pooling", "lasttoken"), None
    ),
    # code of the model's own
    "own code in the folder (NomicBERT, GTE of old)": Kind(
        lambda folder: tiny_code.own_model(folder), TRUST
    ),
    "own code in another repository": Kind(
        lambda folder: tiny_code.own_model(folder, code=folder.with_name("code")), TRUST
    ),
    "a module of own code": Kind(tiny_code.own_module, TRUST),
    "a first module of own code (older jina-embeddings)": Kind(
        tiny_code.old_module, ("--trust-remote-code",)
    ),
    "own code without --trust-remote-code": Kind(lambda folder: tiny_code.own_model(folder)),
    # tables and words
    "StaticEmbedding": Kind(served.static),
    "StaticEmbedding, normalised": Kind(lambda folder: served.static(folder, normalize=True)),
    "model2vec": Kind(served.model2vec),
    "StaticEmbedding with a Dense": Kind(served.headed_static),
    "WordEmbeddings": Kind(refused.words),
    "BoW": Kind(refused.bag),
    # routes
    "Router behind the transformer, --route query": Kind(
        refused.routed, models.ROUTE, models.as_query
    ),
    "Router of two transformers, --route query": Kind(
        lambda folder: refused.routed(folder, after=False), models.ROUTE, models.as_query
    ),
    "Router without --route": Kind(refused.routed),
    # pictures
    "CLIP (the hub's clip-ViT-*)": Kind(lambda folder: tiny_clip.save(folder, trained=False)),
    "CLIP in the Transformer module": Kind(
        lambda folder: tiny_clip.save(folder, trained=False, legacy=False)
    ),
    "SigLIP": Kind(pictures.siglip, (), None),
    "SigLIP 2, pictures keep their shape (NaFlex)": Kind(refused.naflex),
    "ViT alone": Kind(refused.vit),
    "DINOv2 alone": Kind(refused.dino),
    # no embedding models
    "CrossEncoder that generates text": Kind(refused.causal),
    "SparseEncoder (SPLADE)": Kind(refused.sparse),
    "MultiVectorEncoder": Kind(refused.multi_vector),
    "ColBERT of PyLate": Kind(refused.pylate),
    "BertForTokenClassification": Kind(refused.named("BertForTokenClassification")),
    "BertForQuestionAnswering": Kind(refused.named("BertForQuestionAnswering")),
    "a generating model (Qwen3ForCausalLM)": Kind(refused.generative),
    "ESM (tokenizer in Python only)": Kind(saved(sources.slow_tokenizer, width=tiny.WIDTH)),
    "chat template": Kind(saved(sources.chatting, width=tiny.WIDTH)),
}
LARGE = {"BGE-M3's shape (XLM-RoBERTa large, window of 8192)": Kind(models.large)}


def own_vectors(kind: Kind, folder: pathlib.Path) -> Sequence[Sequence[float]] | None:
    """sentence-transformers' own vectors of tiny.TEXTS; None where it cannot embed."""
    if kind.encode is None:
        return None
    try:
        model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=bool(kind.options))
        if "--max-tokens" in kind.options:
            model.max_seq_length = models.WINDOW
        found = [kind.encode(model, text) for text in tiny.TEXTS]
    except Exception as error:
        print(f"sentence-transformers: {error}", file=sys.stderr)
        return None
    return [np.asarray(vector).tolist() for vector in found]
