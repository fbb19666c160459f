"""指标的结果排成终端里的表。"""

from typing import Any

from finetune.terminal import format_table, shorten

# 指标结果里的键 → 终端里的名字
NAMES = {
    "triple_f1": "三元组 F1",
    "label_f1": "标签宏平均 F1",
    "rouge": "ROUGE-L",
    "nll": "NLL（nat/token）",
    "precision": "精确率",
    "recall": "召回率",
    "accuracy": "准确率",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "bleu4": "BLEU-4",
    "distinct2": "distinct-2",
    "exact_match": "整行全对的比例",
    "correct": "对的三元组",
    "predicted": "预测的三元组",
    "expected": "参考的三元组",
    "malformed_lines": "预测里不成三段的行",
    "malformed_reference_lines": "参考里不成三段的行",
    "empty_reference_rows": "参考为空的行",
    "empty_reference_rows_correct": "其中也答了空的",
    "out_of_label": "标签以外的回答",
    "out_of_label_kinds": "标签以外的种数",
    "empty_predictions": "空的回答",
    "perplexity": "困惑度",
    "num_target_tokens": "目标 token 数",
}


def format_result(result: dict[str, Any]) -> str:
    """把指标函数的返回值排成表：各分数与 95% 区间，计数，以及按关系或标签的分列；名字用中文，结果文件里的键不变。"""
    details = result["details"]
    scored = {result["metric"]: result, **{k: v for k, v in details.items() if isinstance(v, dict) and "ci_low" in v}}
    if result["metric"] == "rouge":
        scored.pop("rougeL", None)  # 就是主分数
    rows = [[NAMES[k], f"{v['score']:.4f}", f"[{v['ci_low']:.4f}, {v['ci_high']:.4f}]"] for k, v in scored.items()]
    parts = [format_table([f"{result['metric']}（{result['num_rows']} 行）", "分数", "95% 区间"], rows)]
    numbers = [
        f"{NAMES[k]} {v:.4f}" if isinstance(v, float) else f"{NAMES[k]} {v}"
        for k, v in details.items()
        if _is_number(v)
    ]
    if numbers:
        parts.append("，".join(numbers))
    for key, title in (("per_relation", "关系"), ("per_label", "标签")):
        if key in details:
            rows = class_rows(details, key)
            parts += [format_table([title, "精确率", "召回率", "F1", "预测数", "参考数"], rows)] if rows else []
    return "\n\n".join(parts)


def class_rows(details: dict[str, Any], key: str) -> list[list[str]]:
    """分列的表：参考里的各关系（或任务的各标签）一行，预测里此外的合成一行「其他（N 种）」。"""
    classes = details[key]
    if key == "per_relation":
        others = [scores for scores in classes.values() if not scores["expected"]]
        classes = {name: scores for name, scores in classes.items() if scores["expected"]}
        kinds, predicted = len(others), sum(scores["predicted"] for scores in others)
    else:
        kinds, predicted = details["out_of_label_kinds"], details["out_of_label"]
    counts = ("predicted", "expected")
    rows = [
        [shorten(name), *(f"{v[k]:.4f}" for k in ("precision", "recall", "f1")), *(f"{v[k]}" for k in counts)]
        for name, v in classes.items()
    ]
    if kinds:
        rows.append([f"其他（{kinds} 种）", f"{0:.4f}", "-", f"{0:.4f}", str(predicted), "0"])
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
