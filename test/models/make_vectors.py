# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""Makes test/models/vectors: MoE blocks of published models with small random weights, and what the transformers
package computes for them.

    python3 -m venv v && v/bin/pip install torch transformers safetensors numpy
    v/bin/python test/models/make_vectors.py [case...]

Each case is a folder with config.json (as the configuration class writes it), block.safetensors (names and layout of
the published checkpoints), in.safetensors (x) and expected.safetensors (y, experts, weights: float32, on the CPU). The
tests need the folders alone. Rerun it with the versions that vectors/README.md names and the bytes are the same.

The weights are far larger than those of a trained model, so that clamps clamp, biases decide and groups exclude.
Tokens whose choice changes when x and the router are rounded to bfloat16 are left out: one set of experts is then right
in both types. So are those of Phi whose masks change, on which its weights hang with a jump.
"""
import copy
import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers.models.dbrx import modeling_dbrx as dbrx
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe as ernie4_5_moe
from transformers.models.glm4_moe import modeling_glm4_moe as glm4_moe
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.granitemoe import modeling_granitemoe as granitemoe
from transformers.models.jamba import modeling_jamba as jamba
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.minimax import modeling_minimax as minimax
from transformers.models.minimax_m2 import modeling_minimax_m2 as minimax_m2
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.phimoe import modeling_phimoe as phimoe
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_moe
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

HERE = pathlib.Path(__file__).resolve().parent / "vectors"
TOKENS = 24

# How the published checkpoints name the matrices of one expert: gate, up, down.
MIXTRAL_NAMES = ("w1", "w3", "w2")
PROJ_NAMES = ("gate_proj", "up_proj", "down_proj")


def sizes(width, hidden, **rest):
    """What every configuration class takes; attention is of no account here."""
    return dict(hidden_size=width, moe_intermediate_size=hidden, num_attention_heads=4, num_key_value_heads=2,
                num_hidden_layers=1, **rest)


def dense(width, hidden, **rest):
    """The same for classes that call an expert's hidden width intermediate_size."""
    return dict(hidden_size=width, intermediate_size=hidden, num_attention_heads=4, num_key_value_heads=2,
                num_hidden_layers=1, **rest)


# name: (configuration, block, form, dtype of the file)
#   form: names of one expert's matrices, or None: stacked, as the module has them
CASES = {
    "mixtral": lambda: (
        transformers.MixtralConfig(**dense(32, 40, num_local_experts=8, num_experts_per_tok=2)),
        mixtral.MixtralSparseMoeBlock, MIXTRAL_NAMES, torch.bfloat16),
    "qwen2_moe": lambda: (
        transformers.Qwen2MoeConfig(**sizes(40, 24, num_experts=12, num_experts_per_tok=4, norm_topk_prob=False,
                                            shared_expert_intermediate_size=72)),
        qwen2_moe.Qwen2MoeSparseMoeBlock, PROJ_NAMES, torch.bfloat16),
    "qwen2_moe_normalized": lambda: (
        transformers.Qwen2MoeConfig(**sizes(24, 16, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True,
                                            shared_expert_intermediate_size=40)),
        qwen2_moe.Qwen2MoeSparseMoeBlock, PROJ_NAMES, torch.float32),
    "qwen3_moe": lambda: (
        transformers.Qwen3MoeConfig(**sizes(40, 24, num_experts=24, num_experts_per_tok=8, norm_topk_prob=True)),
        qwen3_moe.Qwen3MoeSparseMoeBlock, PROJ_NAMES, torch.bfloat16),
    "olmoe": lambda: (
        transformers.OlmoeConfig(**dense(32, 24, num_experts=16, num_experts_per_tok=8, norm_topk_prob=False)),
        olmoe.OlmoeSparseMoeBlock, PROJ_NAMES, torch.float32),
    "deepseek_v2": lambda: (
        transformers.DeepseekV2Config(**sizes(40, 24, n_routed_experts=20, num_experts_per_tok=6, n_shared_experts=2,
                                              topk_method="group_limited_greedy", n_group=5, topk_group=3,
                                              routed_scaling_factor=16.0, norm_topk_prob=False)),
        deepseek_v2.DeepseekV2Moe, PROJ_NAMES, torch.bfloat16),
    "deepseek_v2_greedy": lambda: (
        transformers.DeepseekV2Config(**sizes(24, 20, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=1,
                                              topk_method="greedy", norm_topk_prob=False, mlp_bias=True)),
        deepseek_v2.DeepseekV2Moe, PROJ_NAMES, torch.float32),
    "deepseek_v3": lambda: (
        transformers.DeepseekV3Config(**sizes(40, 24, n_routed_experts=32, num_experts_per_tok=8, n_shared_experts=1,
                                              n_group=8, topk_group=4, routed_scaling_factor=2.5,
                                              norm_topk_prob=True)),
        deepseek_v3.DeepseekV3MoE, PROJ_NAMES, torch.bfloat16),
    "deepseek_v3_raw": lambda: (
        transformers.DeepseekV3Config(**sizes(24, 16, n_routed_experts=12, num_experts_per_tok=3, n_shared_experts=2,
                                              n_group=3, topk_group=1, routed_scaling_factor=1.5,
                                              norm_topk_prob=False)),
        deepseek_v3.DeepseekV3MoE, PROJ_NAMES, torch.float32),
    "llama4": lambda: (
        transformers.Llama4TextConfig(**dense(32, 40, num_local_experts=8, num_experts_per_tok=1)),
        llama4.Llama4TextMoe, None, torch.bfloat16),
    "llama4_top2": lambda: (
        transformers.Llama4TextConfig(**dense(24, 16, num_local_experts=6, num_experts_per_tok=2)),
        llama4.Llama4TextMoe, None, torch.float32),
    "gpt_oss": lambda: (
        transformers.GptOssConfig(**dense(32, 24, num_local_experts=16, num_experts_per_tok=4)),
        gpt_oss.GptOssMLP, None, torch.bfloat16),
    "glm4_moe": lambda: (
        transformers.Glm4MoeConfig(**sizes(32, 24, n_routed_experts=16, num_experts_per_tok=8, n_shared_experts=1,
                                           n_group=1, topk_group=1, routed_scaling_factor=2.5, norm_topk_prob=True)),
        glm4_moe.Glm4MoeMoE, PROJ_NAMES, torch.float32),
    "granitemoe": lambda: (
        transformers.GraniteMoeConfig(**dense(40, 24, num_local_experts=20, num_experts_per_tok=8)),
        granitemoe.GraniteMoeMoE, None, torch.bfloat16),
    "ernie4_5_moe": lambda: (
        transformers.Ernie4_5_MoeConfig(**sizes(40, 24, moe_num_experts=16, moe_k=6, moe_num_shared_experts=2)),
        ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock, PROJ_NAMES, torch.bfloat16),
    "ernie4_5_moe_clamped": lambda: (  # half of the tokens' sums lie below the least divisor
        transformers.Ernie4_5_MoeConfig(**sizes(24, 16, moe_num_experts=8, moe_k=2, moe_num_shared_experts=0,
                                                moe_norm_min=0.25)),
        ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock, PROJ_NAMES, torch.float32),
    "phimoe": lambda: (
        transformers.PhimoeConfig(**dense(32, 24, num_local_experts=16, num_experts_per_tok=2,
                                          router_jitter_noise=0.25)),
        phimoe.PhimoeSparseMoeBlock, MIXTRAL_NAMES, torch.bfloat16),
    "dbrx": lambda: (
        transformers.DbrxConfig(d_model=40, n_heads=4, n_layers=1,
                                ffn_config=dict(ffn_hidden_size=24, moe_num_experts=16, moe_top_k=4)),
        dbrx.DbrxFFN, None, torch.bfloat16),
    "dbrx_norm2": lambda: (
        transformers.DbrxConfig(d_model=24, n_heads=4, n_layers=1,
                                ffn_config=dict(ffn_hidden_size=16, moe_num_experts=6, moe_top_k=3,
                                                moe_normalize_expert_weights=2.0)),
        dbrx.DbrxFFN, None, torch.float32),
    "dbrx_raw": lambda: (
        transformers.DbrxConfig(d_model=24, n_heads=4, n_layers=1,
                                ffn_config=dict(ffn_hidden_size=16, moe_num_experts=6, moe_top_k=3,
                                                moe_normalize_expert_weights=None)),
        dbrx.DbrxFFN, None, torch.float32),
    "jamba": lambda: (
        transformers.JambaConfig(**dense(24, 32, num_experts=8, num_experts_per_tok=2)),
        jamba.JambaSparseMoeBlock, PROJ_NAMES, torch.float32),
    "minimax": lambda: (
        transformers.MiniMaxConfig(**dense(24, 32, num_local_experts=8, num_experts_per_tok=2)),
        minimax.MiniMaxSparseMoeBlock, MIXTRAL_NAMES, torch.float32),
    "minimax_m2": lambda: (
        transformers.MiniMaxM2Config(**dense(24, 16, num_local_experts=16, num_experts_per_tok=4)),
        minimax_m2.MiniMaxM2SparseMoeBlock, MIXTRAL_NAMES, torch.float32),
    "deepseek_v3_top1": lambda: (
        transformers.DeepseekV3Config(**sizes(24, 16, n_routed_experts=8, num_experts_per_tok=1, n_shared_experts=1,
                                              n_group=2, topk_group=1, routed_scaling_factor=1.5,
                                              norm_topk_prob=True)),
        deepseek_v3.DeepseekV3MoE, PROJ_NAMES, torch.float32),
    "ernie4_5_moe_biases": lambda: (
        transformers.Ernie4_5_MoeConfig(**sizes(24, 16, moe_num_experts=8, moe_k=3, moe_num_shared_experts=1,
                                                use_bias=True)),
        ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock, PROJ_NAMES, torch.float32),
}


def fill(block, dtype, generator):
    """Normal weights: routers spread their logits by 1.5, experts keep the size of what passes. All but the correction
    biases are numbers of the file's dtype, so that nothing is lost on the way."""
    for name, p in list(block.named_parameters()) + list(block.named_buffers()):
        value = torch.randn(p.shape, generator=generator)
        fan_in = p.shape[-1]
        if "e_score_correction_bias" in name:
            p.data.copy_(0.3 * value)
            continue
        if name in ("gate.weight", "router.weight", "router.layer.weight"):
            value *= 1.5 / fan_in**0.5
        elif isinstance(block, gpt_oss.GptOssMLP) and name.endswith("gate_up_proj"):
            value *= 3.5 / p.shape[1]**0.5  # beyond the limit of 7 now and then
        elif name.endswith("bias"):
            value *= 0.7
        elif isinstance(block, (gpt_oss.GptOssMLP, llama4.Llama4TextMoe)) and name.startswith("experts."):
            value *= 1.4 / p.shape[1]**0.5  # (E,in,out)
        elif name.endswith("mlp.w2"):
            value *= 1.4 / block.experts.ffn_hidden_size**0.5  # (E*H,D), of which H are added up
        else:
            value *= 1.4 / fan_in**0.5
        p.data.copy_(value.to(dtype).float())


def run(block, x):
    """y, and the experts and weights of every token as the block's own router gives them, best first."""
    router = block.router if hasattr(block, "router") else block.gate
    seen = []
    hook = router.register_forward_hook(lambda module, given, result: seen.append(result))
    with torch.no_grad():
        y = block(x[None])
    hook.remove()
    y = (y[0] if isinstance(y, tuple) else y).reshape(x.shape)
    out = seen[0]
    if isinstance(block, dbrx.DbrxFFN):
        weights, experts = block.route_tokens_to_experts(out)
    elif isinstance(block, llama4.Llama4TextMoe):
        scores, logits = out
        experts = torch.topk(logits, block.top_k, dim=-1).indices
        weights = scores.gather(1, experts)
    else:
        logits, weights, experts = out
    bias = {k: v for k, v in block.state_dict().items() if k.endswith("e_score_correction_bias")}
    if isinstance(block, ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock):
        key = logits.softmax(-1)
    elif bias:
        key = logits.sigmoid()
    elif isinstance(block, phimoe.PhimoeSparseMoeBlock):
        return y, experts, weights  # in the order of its two rounds
    else:
        key = router.layer(x).detach() if isinstance(block, dbrx.DbrxFFN) else logits
    for b in bias.values():
        key = key + b.reshape(-1)
    # Some routers ask topk for no order.
    order = key.gather(1, experts).argsort(dim=-1, descending=True, stable=True)
    return y, experts.gather(1, order), weights.gather(1, order)


def masks_of(block, x):
    """Which experts compete in the two rounds of Phi's router."""
    scores = block.router.weight.data.matmul(x.T).T
    out = []
    for _ in range(2):
        top, best = scores.max(dim=-1, keepdim=True)
        out.append((top - scores) / scores.abs().clamp(min=top) > 2 * block.router.router_jitter_noise)
        scores = scores.scatter(-1, best, float("-inf"))
    return torch.cat(out, dim=-1)


def tensors_of(block, form, dtype):
    """The block's tensors as a checkpoint holds them."""
    out = {}
    for name, value in block.state_dict().items():
        kind = torch.float32 if "e_score_correction_bias" in name else dtype
        value = value.to(kind)
        if form and name == "experts.gate_up_proj":
            for e, matrix in enumerate(value):
                for part, half in zip(form, matrix.chunk(2)):
                    out[f"experts.{e}.{part}.weight"] = half.contiguous()
        elif form and name == "experts.down_proj":
            for e, matrix in enumerate(value):
                out[f"experts.{e}.{form[2]}.weight"] = matrix.contiguous()
        else:
            out[name] = value.contiguous()
    rename = {}
    if isinstance(block, granitemoe.GraniteMoeMoE):
        rename = {"experts.gate_up_proj": "input_linear.weight", "experts.down_proj": "output_linear.weight",
                  "router.weight": "router.layer.weight"}
    elif isinstance(block, phimoe.PhimoeSparseMoeBlock):
        rename = {"router.weight": "gate.weight"}
    elif isinstance(block, ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock):
        rename = {"gate.moe_statics.e_score_correction_bias": "moe_statics.e_score_correction_bias"}
    return {rename.get(name, name): value for name, value in out.items()}


def make(case, number):
    config, kind, form, dtype = CASES[case]()
    config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(1000 + number)
    block = kind(config).eval().float()
    fill(block, dtype, generator)
    width = block.state_dict()["router.layer.weight" if case.startswith("dbrx") else
                               "router.weight" if hasattr(block, "router") else "gate.weight"].shape[1]
    x = torch.randn((8 * TOKENS, width), generator=generator)
    rounded = copy.deepcopy(block)
    for name, p in rounded.named_parameters():
        if "e_score_correction_bias" not in name:
            p.data.copy_(p.data.bfloat16().float())
    _, experts, _ = run(block, x)
    _, again, _ = run(rounded, x.bfloat16().float())
    same = (experts == again).all(dim=1)
    if isinstance(block, phimoe.PhimoeSparseMoeBlock):
        same &= (masks_of(block, x) == masks_of(rounded, x.bfloat16().float())).all(dim=1)
    x = x[same][:TOKENS].contiguous()
    assert len(x) == TOKENS, f"{case}: only {len(x)} tokens are clear of ties"
    y, experts, weights = run(block, x)

    folder = HERE / case
    folder.mkdir(parents=True, exist_ok=True)
    text = json.loads(config.to_json_string(use_diff=True))
    (folder / "config.json").write_text(json.dumps(text, indent=1, sort_keys=True) + "\n")
    save_file(tensors_of(block, form, dtype), folder / "block.safetensors")
    save_file({"x": x}, folder / "in.safetensors")
    save_file({"y": y.contiguous(), "experts": experts.to(torch.int32).contiguous(),
               "weights": weights.float().contiguous()}, folder / "expected.safetensors")
    shapes = {name: tuple(value.shape) for name, value in block.state_dict().items()}
    print(f"{case}: {kind.__name__}, |y| {y.norm() / y.numel()**0.5:.3f}, weights {weights.min():.4f} to "
          f"{weights.max():.4f}, {len(set(experts.flatten().tolist()))} experts in use\n    {shapes}")


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for number, case in enumerate(CASES):
        if len(sys.argv) == 1 or case in sys.argv[1:]:
            make(case, number)
    (HERE / "README.md").write_text(
        "<!-- SPDX-FileCopyrightText: The FastMoE authors -->\n"
        "<!-- SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception -->\n"
        "# Vectors\n\nMade by `test/models/make_vectors.py`, with\n\n"
        f"    transformers {transformers.__version__}\n    torch {torch.__version__.split('+')[0]}\n")


main()
