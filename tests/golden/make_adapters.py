"""Makes golden/adapters/*: LoRA adapters of models in golden/models, with what PEFT + PyTorch compute and train.

Needs torch, transformers, peft, safetensors (from PyPI) and golden/models. Writes for each adapter
  NAME/adapter_config.json, NAME/adapter_model.safetensors   as PEFT saves it; no matrix is zero
  NAME/golden.safetensors
      tokens        i32 [B, T+1]   inputs are [:, :-1], targets [:, 1:]
      losses        f32 [B, T]     cross-entropy of each token
      grad.<name>   f32            gradient of the mean loss, PEFT's names without base_model.model.
      steps         f32 [6]        mean loss before each of six AdamW steps on the same tokens
The f32 weights are computed with in float64, except where transformers itself goes through f32 (norms, softmax, angles).
"""
import os, torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
ADAPTERS = {  # name: (settings, sequences, tokens)
    # Tied; most layers of every block.
    "llama": (dict(r=3, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]), 2, 13),
    # Nothing is trained in the first block; the head is.
    "llama_untied": (dict(r=2, lora_alpha=5, use_rslora=True,
                          target_modules=r".*layers\.1\.(self_attn\.k_proj|mlp\.up_proj)|lm_head"), 2, 11),
    "gpt2": (dict(r=4, lora_alpha=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True), 2, 17),
}
PREFIX = "base_model.model."

for number, (name, (settings, batch, length)) in enumerate(ADAPTERS.items()):
    folder = os.path.join(HERE, "adapters", name)
    torch.manual_seed(200 + number)
    base = os.path.join(HERE, "models", name)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for n, p in model.named_parameters():
        if "lora_B" in n: p.data.normal_(0, 0.2)
    model.peft_config["default"].base_model_name_or_path = f"../../models/{name}"
    model.save_pretrained(folder, save_embedding_layers=False)
    if os.path.exists(os.path.join(folder, "README.md")): os.remove(os.path.join(folder, "README.md"))
    model = model.double().eval()
    trained = {n.removeprefix(PREFIX).replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    tokens = torch.randint(0, model.config.vocab_size, (batch, length + 1))
    x, y = tokens[:, :-1], tokens[:, 1:]
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    out, steps = {"tokens": tokens.to(torch.int32)}, []
    for step in range(6):
        optimizer.zero_grad()
        logits = model(input_ids=x).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        losses.mean().backward()
        if step == 0:
            out["losses"] = losses.detach().float().view(batch, length)
            for n, p in trained.items(): out["grad." + n] = p.grad.float().clone()
        steps.append(losses.mean().item())
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
    out["steps"] = torch.tensor(steps, dtype=torch.float32)
    save_file({k: v.contiguous() for k, v in out.items()}, os.path.join(folder, "golden.safetensors"))
    size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))
    print(f"{name}: {size // 1024} KiB, {len(trained)} matrices, losses {steps}")
