"""任务指标：三元组 F1、标签 F1、ROUGE/BLEU、NLL，每个分数附按行自助法的 95% 区间；只看预测与参考，不认识模型。

每个指标都写成「各行计数之和的函数」：一行数据贡献一行计数，总分由列和算出。自助法因此只需重新加权求列和，
两个结果之间的配对自助法也可以直接用保存下来的 per_row 计数。所有分数在 0 到 1 之间（nll 除外，单位 nat）。
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# 参考答案：一条字符串，或多条等价答案的列表（取最好的一条）
Reference = str | Sequence[str]
Scorer = Callable[[np.ndarray], np.ndarray]

LOWER_IS_BETTER = frozenset({"nll"})
BLEU_COLUMNS = [f"correct{n}" for n in range(1, 5)] + [f"total{n}" for n in range(1, 5)] + ["hyp_len", "ref_len"]


def normalize(text: str) -> str:
    """三元组与标签比较前的规范化：NFKC（全角转半角、兼容字形合一），首尾去空白，内部连续空白并成一个空格。"""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def safe_divide(numerator: np.ndarray, denominator: np.ndarray, empty: float | np.ndarray = 0.0) -> np.ndarray:
    """逐元素相除，分母为零处取 empty（一个数，或逐元素）。"""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    return np.divide(numerator, denominator, out=np.full(numerator.shape, empty, float), where=denominator != 0)


def resample_sums(counts: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """有放回地重抽行，返回每次重抽的列和；counts [行, 列] → [num_resamples, 列]。同一种子、同样的行数抽到同样的行。"""
    rng = np.random.default_rng(seed)
    num_rows = len(counts)
    blocks = []
    for start in range(0, num_resamples, 100):
        block = min(100, num_resamples - start)
        # 重抽 n 行等价于给每行一个多项分布的权重，于是整块是一次矩阵乘
        weights = rng.multinomial(num_rows, np.full(num_rows, 1.0 / num_rows), size=block)
        blocks.append(weights @ counts)
    return np.concatenate(blocks)


def score_with_interval(scorer: Scorer, counts: np.ndarray, sums: np.ndarray) -> dict[str, float]:
    """一个分数及其 95% 百分位自助区间；sums 是 resample_sums 的结果，scorer 把 [m, 列] 的列和变成 [m] 个分数。"""
    score = float(scorer(counts.sum(axis=0, keepdims=True))[0])
    low, high = np.percentile(scorer(sums), [2.5, 97.5])
    return {"score": score, "ci_low": float(low), "ci_high": float(high)}


def paired_bootstrap(first: dict, second: dict, num_resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """同一测试集上两个结果之差（first - second）的配对自助法（Koehn 2004）：差、95% 区间与双侧 p 值。

    first、second 是同一指标函数的返回值，行必须一一对应；行数或列不同时抛 ValueError。
    """
    for key in ("metric", "num_rows"):
        if first[key] != second[key]:
            raise ValueError(
                f"配对比较要求两个结果的 {key} 相同，现在是 {first[key]} 与 {second[key]}；请用同一测试文件重新评测"
            )
    if first["per_row"]["columns"] != second["per_row"]["columns"]:
        raise ValueError("配对比较要求两个结果的标签集合相同；请用同一测试文件重新评测")
    scorer = SCORERS[first["metric"]]
    counts = [np.asarray(result["per_row"]["counts"], float) for result in (first, second)]
    # 同一种子抽到同样的行，差值因此是配对的
    drawn = [scorer(resample_sums(part, num_resamples, seed)) for part in counts]
    difference = drawn[0] - drawn[1]
    low, high = np.percentile(difference, [2.5, 97.5])
    tail = min((difference <= 0).sum(), (difference >= 0).sum())
    return {
        "difference": first["score"] - second["score"],
        "ci_low": float(low),
        "ci_high": float(high),
        "p_value": min(1.0, 2.0 * (float(tail) + 1.0) / (num_resamples + 1.0)),
    }


def as_references(predictions: Sequence[Any], references: Sequence[Reference]) -> list[list[str]]:
    """检查两列等长且非空，并把每行参考统一成非空列表；不合要求时抛 ValueError。"""
    if len(predictions) != len(references):
        raise ValueError(f"预测有 {len(predictions)} 行，参考有 {len(references)} 行，两者必须一一对应")
    if not predictions:
        raise ValueError("没有可评测的行：预测与参考都是空的，请检查测试文件")
    listed = [[item] if isinstance(item, str) else list(item) for item in references]
    for row, item in enumerate(listed):
        if not item or not all(isinstance(text, str) for text in item):
            raise ValueError(f"第 {row + 1} 行的参考应是字符串或非空的字符串列表，现在是 {references[row]!r}")
    return listed


def build_result(
    metric: str, columns: list[str], counts: np.ndarray, sums: np.ndarray, details: dict
) -> dict[str, Any]:
    """各指标共同的返回格式；主分数由 SCORERS[metric] 给出，per_row 留作配对自助法。"""
    return {
        "metric": metric,
        **score_with_interval(SCORERS[metric], counts, sums),
        "num_rows": len(counts),
        "details": details,
        "per_row": {"columns": columns, "counts": np.round(counts, 8).tolist()},
    }


def _class_scores(correct: float, predicted: float, expected: float) -> dict[str, float]:
    """一个关系或标签的精确率、召回率、F1 与三个计数。"""
    return {
        "precision": float(safe_divide(correct, predicted)),
        "recall": float(safe_divide(correct, expected)),
        "f1": float(safe_divide(2 * correct, predicted + expected)),
        "correct": int(correct),
        "predicted": int(predicted),
        "expected": int(expected),
    }


# ---- 抽取：三元组 ----


def parse_triples(text: str, separator: str = "_") -> tuple[set[tuple[str, str, str]], int]:
    """把一行一个「头_关系_尾」的文本解析为三元组集合（重复只留一个），并返回格式不对的行数。

    先规范化（normalize），再按分隔符切；不是恰好三段或有空段的非空行算格式不对。空文本是空集合。
    """
    triples, malformed = set(), 0
    for line in text.splitlines():
        parts = tuple(normalize(part) for part in unicodedata.normalize("NFKC", line).split(separator))
        if len(parts) == 3 and all(parts):
            triples.add(parts)
        elif line.strip():
            malformed += 1
    return triples, malformed


def _score_triples(sums: np.ndarray) -> np.ndarray:
    """列 tp、predicted、expected、malformed → 微平均 F1；两边都没有三元组时，没有格式不对的行为 1，有则为 0。"""
    return safe_divide(2 * sums[:, 0], sums[:, 1] + sums[:, 2], empty=_is_clean(sums))


def _is_clean(sums: np.ndarray) -> np.ndarray:
    return ~sums[:, 3:].any(axis=1)


def triple_f1(
    predictions: Sequence[str],
    references: Sequence[Reference],
    *,
    separator: str = "_",
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """三元组抽取的微平均精确率、召回率与 F1（信息抽取的通行定义：头、关系、尾全等才算对），另按关系分列。

    规范化见 normalize；同一行里重复的三元组只算一次；格式不对的行不成其为三元组，不进精确率，单独计数。
    参考与预测都为空的行不增减计数，算整行全对；有格式不对的行就不算。有多条参考时取该行 F1 最高的一条（相同取前者）。
    返回 score（F1）、ci_low、ci_high、num_rows、details（precision、recall、per_relation、各种计数）、per_row。
    """
    listed = as_references(predictions, references)
    rows, relations = [], {}
    malformed_references, empty_rows, empty_correct, exact = 0, 0, 0, 0
    for prediction, options in zip(predictions, listed, strict=True):
        found, bad = parse_triples(prediction, separator)
        parsed = [parse_triples(option, separator) for option in options]
        malformed_references += sum(bad for _, bad in parsed)
        # max 取第一个最大值
        expected = max((triples for triples, _ in parsed), key=lambda triples: _row_f1(found, triples, bad))
        rows.append((len(found & expected), len(found), len(expected), bad))
        exact += found == expected and not bad
        empty_rows += not expected
        empty_correct += not expected and not found and not bad
        for column, triples in enumerate((found & expected, found, expected)):
            for _, relation, _ in triples:
                relations.setdefault(relation, [0, 0, 0])[column] += 1
    counts = np.asarray(rows, float)
    sums = resample_sums(counts, num_resamples, seed)
    by_support = sorted(relations.items(), key=lambda item: (-item[1][2], item[0]))
    per_relation = {relation: _class_scores(*numbers) for relation, numbers in by_support}
    tp, predicted, expected, malformed = (int(value) for value in counts.sum(axis=0))
    details = {
        "precision": score_with_interval(
            lambda s: safe_divide(s[:, 0], s[:, 1], empty=0.0 if expected else _is_clean(s)), counts, sums
        ),
        "recall": score_with_interval(lambda s: safe_divide(s[:, 0], s[:, 2], empty=1.0), counts, sums),
        "exact_match": exact / len(rows),
        "correct": tp,
        "predicted": predicted,
        "expected": expected,
        "malformed_lines": malformed,
        "malformed_reference_lines": malformed_references,
        "empty_reference_rows": empty_rows,
        "empty_reference_rows_correct": empty_correct,
        "per_relation": per_relation,
    }
    return build_result("triple_f1", ["correct", "predicted", "expected", "malformed"], counts, sums, details)


def _row_f1(found: set, expected: set, bad: int) -> float:
    return 2 * len(found & expected) / (len(found) + len(expected)) if found or expected else float(not bad)


# ---- 分类：标签 ----


def _score_labels(sums: np.ndarray) -> np.ndarray:
    """列 correct、各标签的 (tp, predicted, expected) → 宏平均 F1；一次都没出现的标签不进平均。"""
    per_label = sums[:, 1:].reshape(len(sums), -1, 3)
    total = per_label[:, :, 1] + per_label[:, :, 2]
    f1 = safe_divide(2 * per_label[:, :, 0], total)
    return safe_divide(f1.sum(axis=1), (total > 0).sum(axis=1))


def label_f1(
    predictions: Sequence[str],
    references: Sequence[Reference],
    *,
    labels: Sequence[str] | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """分类的宏平均 F1（各标签 F1 的算术平均，同 scikit-learn 的 macro）与准确率。

    规范化见 normalize。labels 缺省为参考中出现过的全部标签；标签以外的回答算错并单独计数，它不成为新的一类。
    一行有多条参考时命中任意一条算对，未命中按第一条计。
    返回 score（宏 F1）、ci_low、ci_high、num_rows、details（accuracy、out_of_label、per_label 等）、per_row。
    """
    listed = [[normalize(text) for text in options] for options in as_references(predictions, references)]
    given = sorted({text for options in listed for text in options}) if labels is None else labels
    names = [normalize(label) for label in given]
    unknown = sorted({text for options in listed for text in options} - set(names))
    if unknown:
        raise ValueError(f"参考里有不在标签集合 {names} 中的标签 {unknown[:5]}；请补全 labels 或修正测试文件")
    index = {label: position for position, label in enumerate(names)}
    counts = np.zeros((len(listed), 1 + 3 * len(names)))
    outside = Counter()
    for row, (prediction, options) in enumerate(zip(predictions, listed, strict=True)):
        answer = normalize(prediction)
        expected = answer if answer in options else options[0]
        counts[row, 1 + 3 * index[expected] + 2] = 1
        if answer not in index:
            outside[answer] += 1
            continue
        counts[row, 1 + 3 * index[answer] + 1] = 1
        if answer == expected:
            counts[row, [0, 1 + 3 * index[answer]]] = 1
    sums = resample_sums(counts, num_resamples, seed)
    totals = counts.sum(axis=0)
    per_label = {label: _class_scores(*totals[1 + 3 * k : 4 + 3 * k]) for label, k in index.items()}
    details = {
        "accuracy": score_with_interval(lambda s: s[:, 0] / len(listed), counts, sums),
        "out_of_label": sum(outside.values()),
        "out_of_label_kinds": len(outside),
        "out_of_label_examples": [answer for answer, _ in outside.most_common(5)],
        "per_label": per_label,
    }
    columns = ["correct", *(f"{label}.{part}" for label in names for part in ("correct", "predicted", "expected"))]
    return build_result("label_f1", columns, counts, sums, details)


# ---- 生成：ROUGE、BLEU、distinct ----


def segment(text: str) -> list[str]:
    """中文切分：sacreBLEU 的 zh 切分器，汉字与标点一字一个，连续的西文与数字算一个词。ROUGE、BLEU、distinct 都用它。"""
    from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

    return TokenizerZh()(text).split()


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """最长公共子序列的长度（Hyyrö 2004 的位并行算法：整数的第 i 位对应 first 的第 i 个词）。"""
    positions: dict[str, int] = {}
    for place, token in enumerate(first):
        positions[token] = positions.get(token, 0) | 1 << place
    mask = (1 << len(first)) - 1
    state = mask
    for token in second:
        matched = state & positions.get(token, 0)
        state = ((state + matched) | (state - matched)) & mask
    return len(first) - state.bit_count()


def ngrams(tokens: Sequence[str], size: int) -> Counter:
    """n 元组的计数。"""
    return Counter(zip(*(tokens[shift:] for shift in range(size)), strict=False))


def rouge_f1(prediction: Sequence[str], reference: Sequence[str]) -> tuple[float, float, float]:
    """一对词序列的 ROUGE-1、ROUGE-2、ROUGE-L 的 F1（Lin 2004，beta = 1）；两者都空时为 1。"""
    if not prediction and not reference:
        return 1.0, 1.0, 1.0
    scores = []
    for size in (1, 2):
        found, expected = ngrams(prediction, size), ngrams(reference, size)
        total = found.total() + expected.total()
        scores.append(2 * (found & expected).total() / total if total else 0.0)
    scores.append(2 * lcs_length(prediction, reference) / (len(prediction) + len(reference)))
    return scores[0], scores[1], scores[2]


def _score_bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU 的十列充分统计量 → 语料级 BLEU-4，公式与平滑（exp）都由 sacreBLEU 计算，除以 100。"""
    from sacrebleu.metrics import BLEU

    def one(row: list[int]) -> float:
        return BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score / 100.0

    return np.asarray([one(row) for row in sums.round().astype(int).tolist()])


def rouge(
    predictions: Sequence[str],
    references: Sequence[Reference],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """生成任务的 ROUGE-1/2/L（各行 F1 的平均，Lin 2004）、BLEU-4（语料级，Papineni 2002，sacreBLEU）与 distinct-2。

    切分见 segment，不做其他规范化。一行有多条参考时 ROUGE 取各指标最高者，BLEU 按多参考的定义计算。
    distinct-2（Li 2016）是全部预测里不同二元组数与二元组总数之比；重抽行会凭空造出重复，所以区间按行分摊计算：
    一个二元组的 1 分由出现它的各行均分，点估计不变。
    返回 score（ROUGE-L）、ci_low、ci_high、num_rows、details（五个分数各带区间、空回答数）、per_row。
    """
    from sacrebleu.metrics import BLEU

    listed = as_references(predictions, references)
    bleu = BLEU(tokenize="zh", effective_order=True)
    tokens = [segment(prediction) for prediction in predictions]
    bigrams = [ngrams(row, 2) for row in tokens]
    num_rows_with = Counter(bigram for row in bigrams for bigram in row)
    rows = []
    for prediction, words, pairs, options in zip(predictions, tokens, bigrams, listed, strict=True):
        best = np.max([rouge_f1(words, segment(option)) for option in options], axis=0)
        stats = bleu.sentence_score(prediction, options)
        distinct = sum(1.0 / num_rows_with[pair] for pair in pairs)
        rows.append([*best, *stats.counts, *stats.totals, stats.sys_len, stats.ref_len, distinct, pairs.total()])
    # 第一列恒为 1，列和就是行数，均值因此也是列和的函数
    counts = np.column_stack([np.ones(len(rows)), np.asarray(rows, float)])
    sums = resample_sums(counts, num_resamples, seed)
    scorers: dict[str, Scorer] = {
        "rouge1": lambda s: s[:, 1] / s[:, 0],
        "rouge2": lambda s: s[:, 2] / s[:, 0],
        "rougeL": _score_rouge_l,
        "bleu4": lambda s: _score_bleu(s[:, 4:14]),
        "distinct2": lambda s: safe_divide(s[:, 14], s[:, 15]),
    }
    details: dict[str, Any] = {name: score_with_interval(scorer, counts, sums) for name, scorer in scorers.items()}
    details["empty_predictions"] = sum(not row for row in tokens)
    columns = ["rows", "rouge1", "rouge2", "rougeL", *BLEU_COLUMNS, "distinct_bigrams", "bigrams"]
    return build_result("rouge", columns, counts, sums, details)


def _score_rouge_l(sums: np.ndarray) -> np.ndarray:
    return sums[:, 3] / sums[:, 0]


# ---- 任何任务：目标 token 的 NLL ----


def _score_nll(sums: np.ndarray) -> np.ndarray:
    return safe_divide(sums[:, 0], sums[:, 1], empty=float("nan"))


def nll(
    loss_sums: Sequence[float],
    token_counts: Sequence[int],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """目标 token 的平均负对数似然（nat/token）：全部行的损失之和除以目标 token 总数，每个 token 等权。

    loss_sums：各行目标 token 的负对数似然之和；token_counts：各行的目标 token 数。困惑度在 details.perplexity。
    """
    if len(loss_sums) != len(token_counts) or not len(loss_sums):
        raise ValueError(f"损失有 {len(loss_sums)} 行，token 数有 {len(token_counts)} 行，两者必须等长且非空")
    if not sum(token_counts):
        raise ValueError("没有目标 token，算不出 NLL；请检查测试文件的 output")
    counts = np.column_stack([np.asarray(loss_sums, float), np.asarray(token_counts, float)])
    sums = resample_sums(counts, num_resamples, seed)
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(_score_nll(counts.sum(axis=0, keepdims=True))[0]))
    details = {"perplexity": perplexity, "num_target_tokens": int(counts[:, 1].sum())}
    return build_result("nll", ["loss_sum", "target_tokens"], counts, sums, details)


SCORERS: dict[str, Scorer] = {
    "triple_f1": _score_triples,
    "label_f1": _score_labels,
    "rouge": _score_rouge_l,
    "nll": _score_nll,
}
# 名字 → 指标函数；前三个的参数是 (predictions, references)，nll 的是 (loss_sums, token_counts)
METRICS: dict[str, Callable[..., dict[str, Any]]] = {
    "triple_f1": triple_f1,
    "label_f1": label_f1,
    "rouge": rouge,
    "nll": nll,
}
