"""Makes golden/models/*: small random-weight models of every architecture, with what transformers + PyTorch compute.

Needs torch, transformers, safetensors (from PyPI). Writes for each model
  NAME/config.json, NAME/model.safetensors   a Hugging Face folder: odd sizes, f32 weights
  NAME/golden.safetensors
      tokens        i32 [B, T+1]   inputs are [:, :-1], targets [:, 1:]
      logits        f32 [B, T, V]
      losses        f32 [B, T]     cross-entropy of each token
      grad.<name>   f32            gradient of the mean loss, Hugging Face's names
The f32 weights are computed with in float64, except where transformers itself goes through f32 (norms, softmax, angles).
"""
import os, torch
from safetensors.torch import save_file
from transformers import (GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
                          Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "models")
ids = dict(bos_token_id=0, eos_token_id=0)
MODELS = {  # name: (model class, config, sequences, tokens)
    # Three query heads share a key-value head; the original context is short, so that all three kinds of frequency occur.
    "llama": (LlamaForCausalLM, LlamaConfig(
        vocab_size=1003, hidden_size=18, intermediate_size=29, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=10, max_position_embeddings=160, initializer_range=0.2, rms_norm_eps=1e-5,
        tie_word_embeddings=True, rope_parameters=dict(
            rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=40), **ids), 1, 13),
    "llama_untied": (LlamaForCausalLM, LlamaConfig(
        vocab_size=67, hidden_size=21, intermediate_size=35, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=80, max_position_embeddings=64, initializer_range=0.2,
        rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.5), **ids), 2, 19),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(
        vocab_size=131, hidden_size=24, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0), **ids), 3, 17),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(
        vocab_size=131, hidden_size=20, intermediate_size=33, num_hidden_layers=2, num_attention_heads=5,
        num_key_value_heads=1, head_dim=14, max_position_embeddings=64, initializer_range=0.2,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0), **ids), 2, 23),
    "mistral": (MistralForCausalLM, MistralConfig(
        vocab_size=131, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=8, max_position_embeddings=64, sliding_window=21, initializer_range=0.2,
        **ids), 2, 21),
    "gpt2": (GPT2LMHeadModel, GPT2Config(
        vocab_size=131, n_positions=40, n_embd=21, n_layer=2, n_head=3, n_inner=50, initializer_range=0.2,
        layer_norm_epsilon=1e-6, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ids), 2, 21),
}

for number, (name, (cls, config, batch, length)) in enumerate(MODELS.items()):
    folder = os.path.join(HERE, name)
    torch.manual_seed(100 + number)
    config._attn_implementation = "eager"
    model = cls(config).float()
    for p in model.parameters():                # biases and norms away from 0 and 1, so that every gradient path is seen
        if p.dim() == 1: p.data.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    os.remove(os.path.join(folder, "generation_config.json"))
    model = model.double().eval()
    tokens = torch.randint(0, config.vocab_size, (batch, length + 1))
    tokens[:, 5] = tokens[:, 2]                 # a repeated token, so that rows of the table's gradient are summed
    x, y = tokens[:, :-1], tokens[:, 1:]
    logits = model(input_ids=x).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(batch, length)
    losses.mean().backward()
    out = {"tokens": tokens.to(torch.int32), "logits": logits.detach().float(), "losses": losses.detach().float()}
    for n, p in model.named_parameters(): out["grad." + n] = p.grad.float().clone()
    save_file({k: v.contiguous() for k, v in out.items()}, os.path.join(folder, "golden.safetensors"))
    size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))
    print(f"{name}: {size // 1024} KiB, loss {losses.mean().item():.6f}")
