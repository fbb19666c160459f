"""导出目录里的说明：从哪来、怎样训练、分词器有什么要留意。"""

import json
from pathlib import Path

from finetune.checkpoint.inspection import Checkpoint
from finetune.export.check import Comparison
from utils import read_json


def model_card(checkpoint: Checkpoint, to: str, kind: str, comparison: Comparison) -> str:
    """导出目录的 README.md：基座、方法、数据的哈希、参数、核对与成绩。"""
    run = checkpoint.run_config
    base = run.get("base_model") or {}
    prompting = checkpoint.prompting
    is_chat = prompting.prompt_format == "chat"
    role_ids = f"，角色 id {prompting.user_token_id}/{prompting.assistant_token_id}" if is_chat else ""
    merging = ""
    if checkpoint.is_adapter:
        merging = f"，只有适配器，基座用 {to.removesuffix('_lora')}" if to.endswith("_lora") else "，适配器已合并"
    lines = [
        f"# {checkpoint.path.resolve().name}（{to}，{kind}）",
        "",
        f"- 来源：`{checkpoint.path}`" + (f"，第 {run['global_step']} 步" if run.get("global_step") else ""),
        f"- 基座：`{base.get('path', checkpoint.base_path)}`",
        f"- 方法：{run.get('train_type', '没有训练记录')}" + merging,
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
    if to == "gguf":
        notes.append("llama.cpp 的对话接口把文本里的保留片段（如角色片段）认作角色，请先从不可信的文本里去掉")
    if to in ("gguf", "gguf_lora") and checkpoint.prompting.family == "baichuan":
        notes.append(
            "llama.cpp 不做 NFKC 规范化，不合并空格，不认多个字符的自定义片段（如 <h2>），遇到它们时编号与来源不同"
        )
    return notes
