"""Small models with random weights, made on the spot: `python -m tests.engines.models DIRECTORY`.

Run in the engines' environment (torch, transformers). Weights are drawn from fixed seeds, so a model made twice is the
same. Greedy tokens of such a model depend on every token before them, which is what tests of a cache need.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

NAMES = ("llama", "qwen3", "step3", "mla", "gemma3")
VOCABULARY = 512
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}


def tokenizer() -> object:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    one = Tokenizer(models.BPE(unk_token=None))
    one.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    one.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=letters, show_progress=False
    )
    one.train_from_iterator(["a cache keeps what was computed so that it need not be computed again"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=one, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def plain(name: str, directory: Path) -> None:
    """Llama, Qwen3 and Gemma3, as transformers makes them."""
    import torch
    import transformers as t

    more = {"num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.2}
    if name == "gemma3":
        window = {"sliding_window": 64, "num_hidden_layers": 6, "num_key_value_heads": 1, "initializer_range": 0.1}
        config = t.Gemma3TextConfig(**{**COMMON, **more, **window, "query_pre_attn_scalar": 64})
        kind = t.Gemma3ForCausalLM
    else:
        config_kind, kind = {
            "llama": (t.LlamaConfig, t.LlamaForCausalLM),
            "qwen3": (t.Qwen3Config, t.Qwen3ForCausalLM),
        }[name]
        config = config_kind(**COMMON, **more)
    torch.manual_seed(0)
    kind(config).to(torch.bfloat16).eval().save_pretrained(directory)


def latent(directory: Path) -> None:
    """DeepSeek-V3's attention (MLA, 512 + 64) without experts: the CPU kernel knows these dims only."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **COMMON,
        num_key_value_heads=4,
        initializer_range=0.2,
        kv_lora_rank=512,
        q_lora_rank=64,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=3,
        moe_intermediate_size=64,
        n_group=1,
        topk_group=1,
    )
    torch.manual_seed(1)
    DeepseekV3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    path = directory / "config.json"  # transformers 5 leaves out what vLLM asks for
    path.write_text(json.dumps({**json.loads(path.read_text()), "topk_method": "noaux_tc", "scoring_func": "sigmoid"}))


def multi_matrix(directory: Path) -> None:
    """Step-3's attention (MFA): one KV head of 256 for all query heads, in the names of the released weights."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, heads, dim, low, layers, experts, expert = 128, 256, 4, 256, 64, 3, 4, 64
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.1).to(torch.bfloat16)

    def ones(n: int) -> torch.Tensor:
        return torch.ones(n, dtype=torch.bfloat16)

    weights = {"model.embed_tokens.weight": drawn(VOCABULARY, hidden), "model.norm.weight": ones(hidden)}
    weights["lm_head.weight"] = drawn(VOCABULARY, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes = {
            "self_attn.q_proj": (low, hidden),
            "self_attn.k_proj": (dim, hidden),
            "self_attn.v_proj": (dim, hidden),
            "self_attn.o_proj": (hidden, heads * dim),
            "self_attn.wq": (heads * dim, low),
        }
        if layer == 0:
            shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
            shapes["mlp.down_proj"] = (hidden, inner)
        else:
            shapes |= {"moe.gate": (experts, hidden), "moe.gate_proj": (experts, expert, hidden)}
            shapes |= {"moe.up_proj": (experts, expert, hidden), "moe.down_proj": (experts, hidden, expert)}
            shapes |= {"share_expert.gate_proj": (expert, hidden), "share_expert.up_proj": (expert, hidden)}
            shapes["share_expert.down_proj"] = (hidden, expert)
        weights |= {f"{at}{part}.weight": drawn(*shape) for part, shape in shapes.items()}
        weights[f"{at}self_attn.inter_norm.weight"] = ones(low)
        weights[f"{at}input_layernorm.weight"] = ones(hidden)
        weights[f"{at}post_attention_layernorm.weight"] = ones(hidden)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Step3TextForCausalLM"],
        "model_type": "step3_text",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_attention_groups": 1,
        "num_hidden_layers": layers,
        "max_seq_len": 2048,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "moe_intermediate_size": expert,
        "moe_num_experts": experts,
        "moe_top_k": 2,
        "rope_theta": 500000.0,
        "max_position_embedding": 2048,
        "max_position_embeddings": 2048,
        "share_expert_dim": expert,
        "share_q_dim": low,
        "head_dim": dim,
        "norm_expert_weight": True,
        "moe_layers_enum": "1,2",
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))


def make(root: Path, names: tuple[str, ...] = NAMES) -> None:
    """Makes the models that are not there yet, each whole or not at all."""
    for name in names:
        if (root / name / "config.json").exists():
            continue
        part = root / f"{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        {"mla": latent, "step3": multi_matrix}.get(name, lambda at, name=name: plain(name, at))(part)
        tokenizer().save_pretrained(part)
        part.rename(root / name)


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    make(Path(sys.argv[1]))
