"""把训练器的任何检查点（full、freeze、lora 或基座）导出成别的工具能直接加载的格式；LoRA 当场合并。

python scripts/export.py --model_path output-lora/epoch-3-step-240 --to llama --output_dir baichuan2-7B-llama

llama：LlamaForCausalLM 目录（7B），transformers、vLLM 等直接加载；baichuan：官方布局，词表投影已归一化；
gguf：llama.cpp 的文件（7B、13B）。
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from export_check import Comparison, check_export, encode_check_prompts
from export_gguf import GGUF_TYPES, GgufFile, check_gguf, write_gguf
from export_source import (
    DTYPES,
    TensorSource,
    WeightDirectory,
    dtype_name,
    normalized_head,
    open_checkpoint,
    resolve_dtype,
    run_command,
    staged_directory,
    write_baichuan,
    write_tensors,
)
from export_tokenizer import write_fast_tokenizer

from baichuan import BaichuanConfig, BaichuanTokenizer
from checkpoint import write_manifest
from loading import Checkpoint, load_checkpoint_tokenizer
from utils import read_json, write_json

TARGETS = ("llama", "baichuan", "gguf")
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def export(
    model_path: str | Path,
    to: str,
    output_dir: str | Path,
    dtype: str = "auto",
    gguf_type: str | None = None,
    base_model_path: str | Path | None = None,
    check_prompt: list[str] | None = None,
) -> Comparison:
    """导出并核对，返回来源与写出的权重的 logits 之差；各参数与同名命令行选项相同。

    Raises:
        ValueError: 检查点不能这样导出（说明改用什么），或 output_dir 已有内容。
        CheckFailed: 核对不过；OSError: 写盘失败。两种情况都不留下 output_dir。
    """
    if to not in TARGETS:
        raise ValueError(f"--to({to}) 不认识，可选：{'、'.join(TARGETS)}")
    gguf_type = resolve_gguf_type(to, dtype, gguf_type)
    checkpoint = open_checkpoint(model_path, base_model_path)
    config = checkpoint.config
    if to == "llama" and config.position_embedding == "alibi":
        raise ValueError(
            f"{model_path} 用 ALiBi 位置编码（13B），Llama 没有这种结构，不能导出成 llama；"
            "请改用 --to gguf（llama.cpp 支持 13B），或 --to baichuan（官方布局，供认识 Baichuan 的引擎用）"
        )
    if to == "gguf":
        check_gguf(config, gguf_type)
    tokenizer = load_checkpoint_tokenizer(checkpoint)
    prompts = encode_check_prompts(checkpoint, tokenizer, check_prompt)
    source = TensorSource(checkpoint)
    target_dtype = resolve_dtype(dtype, source)
    kind = GGUF_TYPES[gguf_type] if to == "gguf" else dtype_name(target_dtype)
    exported_config = BaichuanConfig.from_dict({**config.to_dict(), "norm_head": False})
    with staged_directory(output_dir) as directory:
        if to == "llama":
            write_llama(checkpoint, source, tokenizer, directory, target_dtype)
            reader = LlamaDirectory(directory)
        elif to == "baichuan":
            write_baichuan(checkpoint, source, directory, target_dtype, normalize=True)
            reader = WeightDirectory(directory)
        else:
            name = Path(output_dir).resolve().name
            path = directory / f"{name}-{gguf_type}.gguf"
            write_gguf(source, tokenizer, checkpoint.prompting, path, gguf_type, name)
            reader = GgufFile(path, config.num_attention_heads)
        vector_kind = "float32" if to == "gguf" else kind
        comparison = check_export(source, exported_config, reader.read, prompts, kind, vector_kind)
        (directory / "README.md").write_text(model_card(checkpoint, to, kind, comparison), encoding="utf-8")
        write_manifest(directory, checkpoint.run_config.get("global_step", 0))
    return comparison


def resolve_gguf_type(to: str, dtype: str, gguf_type: str | None) -> str | None:
    """GGUF 的类型：--gguf_type；没有给时随 --dtype，auto 为 f16。

    Raises:
        ValueError: 给了不起作用或互相矛盾的选项。
    """
    if to != "gguf":
        if gguf_type is not None:
            raise ValueError(f"--gguf_type 只对 --to gguf 起作用，对 {to} 请用 --dtype")
        return None
    of_dtype = {"auto": "f16", **{name: kind for kind, name in GGUF_TYPES.items() if name in DTYPES}}
    if gguf_type is not None and dtype != "auto" and gguf_type != of_dtype[dtype]:
        raise ValueError(f"--dtype {dtype} 与 --gguf_type {gguf_type} 矛盾，请只写 --gguf_type")
    return gguf_type or of_dtype[dtype]


# ---------------------------------------------------------------------------------------------------------------------
# llama


def write_llama(
    checkpoint: Checkpoint, source: TensorSource, tokenizer: BaichuanTokenizer, directory: Path, dtype: torch.dtype
):
    """LlamaForCausalLM 的目录：W_pack 拆成 q、k、v，词表投影已归一化，快速分词器带对话模板。"""
    config = source.config

    def convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name.endswith("W_pack.weight"):
            names = [name.replace("W_pack", projection) for projection in PROJECTIONS]
            return dict(zip(names, tensor.chunk(3), strict=True))
        return {name: normalized_head(config, name, tensor)}

    write_json(
        directory / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "head_dim": config.head_dim,
            "hidden_act": config.hidden_act,
            "hidden_size": config.hidden_size,
            "initializer_range": config.initializer_range,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.trained_length,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": config.num_attention_heads,
            "num_hidden_layers": config.num_hidden_layers,
            "num_key_value_heads": config.num_attention_heads,
            "pad_token_id": config.pad_token_id,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": dtype_name(dtype),
            "use_cache": True,
            "vocab_size": config.vocab_size,
        },
    )
    generation_path = checkpoint.base_path / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    special = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    special["pad_token_id"] = config.pad_token_id
    generation = {key: value for key, value in generation.items() if key != "_from_model_config"}
    write_json(directory / "generation_config.json", {**special, **generation})
    write_fast_tokenizer(tokenizer, checkpoint.prompting, directory, config.trained_length)
    write_tensors(source, directory, dtype, convert)


class LlamaDirectory(WeightDirectory):
    """读回 LlamaForCausalLM 目录的张量，名字还原成官方的。"""

    def read(self, name: str) -> Tensor:
        """官方名字 → 张量；W_pack 由 q、k、v 拼回。"""
        if name.endswith("W_pack.weight"):
            return torch.cat([super(LlamaDirectory, self).read(name.replace("W_pack", p)) for p in PROJECTIONS])
        return super().read(name)


# ---------------------------------------------------------------------------------------------------------------------
# 模型卡片


def model_card(checkpoint: Checkpoint, to: str, kind: str, comparison: Comparison) -> str:
    """导出目录的 README.md：基座、方法、数据的哈希、参数、核对与成绩。"""
    run = checkpoint.run_config
    base = run.get("base_model") or {}
    prompting = checkpoint.prompting
    is_chat = prompting.prompt_format == "chat"
    role_ids = f"，角色 id {prompting.user_token_id}/{prompting.assistant_token_id}" if is_chat else ""
    lines = [
        f"# {checkpoint.path.resolve().name}（{to}，{kind}）",
        "",
        f"- 来源：`{checkpoint.path}`" + (f"，第 {run['global_step']} 步" if run.get("global_step") else ""),
        f"- 基座：`{base.get('path', checkpoint.base_path)}`",
        f"- 方法：{run.get('train_type', '没有训练记录')}" + ("，适配器已合并" if checkpoint.is_adapter else ""),
        f"- 提示词格式：{prompting.prompt_format}（{prompting.family}）{role_ids}",
        f"- 核对：与来源相比，{comparison}",
    ]
    lines += [f"- 数据：`{path}`，SHA-256 {digest}" for path, digest in (run.get("data") or {}).items()]
    lines += [f"- 成绩：{score}" for score in find_scores(checkpoint)]
    lines += [f"- 注意：{note}" for note in tokenizer_notes(checkpoint, to)]
    if run.get("args"):
        lines += ["", "## 训练参数", "", "```json", json.dumps(run["args"], ensure_ascii=False, indent=2), "```"]
    return "\n".join(lines) + "\n"


def find_scores(checkpoint: Checkpoint) -> list[str]:
    """这个检查点的成绩：训练日志里这一步的评估损失，predict.py --metric 存在检查点或其上级目录的结果。"""
    scores = []
    step = checkpoint.run_config.get("global_step")
    log_path = checkpoint.path.resolve().parent / "train_log.jsonl"
    for line in log_path.read_text(encoding="utf-8").splitlines() if step and log_path.is_file() else []:
        row = json.loads(line)
        if row.get("step") == step and "eval/nll" in row:
            scores.append(f"eval/nll {row['eval/nll']:.4f}")
    for directory in (checkpoint.path.resolve(), checkpoint.path.resolve().parent):
        for path in sorted(directory.glob("*.metrics.json")):
            metrics = read_json(path)
            if Path(metrics.get("model_path", "")).resolve() == checkpoint.path.resolve():
                numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
                scores.append(f"{metrics.get('test_path')}：" + "，".join(f"{k} {v:.6g}" for k, v in numbers.items()))
    return scores


def tokenizer_notes(checkpoint: Checkpoint, to: str) -> list[str]:
    """导出的分词器与来源的已知不同之处。"""
    notes = []
    if to == "llama":
        notes.append("文本里的保留片段（如角色片段）按其编号编码，请先从不可信的文本里去掉；`</s>` 等按普通文字编码")
    if to == "gguf" and checkpoint.prompting.family == "baichuan":
        notes.append(
            "llama.cpp 不做 NFKC 规范化，不合并空格，不认多个字符的自定义片段（如 <h2>），遇到它们时编号与来源不同"
        )
    return notes


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model_path", required=True, help="检查点目录：full、freeze、lora 训练的，或没有训练过的基座")
    add("--to", required=True, choices=TARGETS, help="导出的格式")
    add("--output_dir", required=True, help="写在哪里；不能已有内容")
    add("--dtype", choices=["auto", *DTYPES], default="auto",
        help="写出的精度；auto 是基座自己的，对 gguf 是 f16（缺省 %(default)s）")  # fmt: skip
    add("--gguf_type", choices=list(GGUF_TYPES), help="gguf 的类型（缺省随 --dtype）；q8_0 约为 f16 的一半大")
    add("--base_model_path", help="适配器的基座移动过时的新位置（缺省用训练时记下的）")
    add("--check_prompt", nargs="+", metavar="文本", help="核对 logits 用的提示词（缺省用自带的几句）")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """命令行入口；返回退出码。"""
    args = parse_args(argv)

    def run():
        comparison = export(**vars(args))
        print(f"核对（来源对写出的权重）：{comparison}")
        print(f"已写到 {args.output_dir}")

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
