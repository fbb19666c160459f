"""指标的表：名字 → 计算它的函数。"""

from collections.abc import Callable
from typing import Any

from finetune.metrics.bootstrap import Scorer
from finetune.metrics.labels import label_f1, score_labels
from finetune.metrics.nll import nll, score_nll
from finetune.metrics.text import rouge, score_rouge_l
from finetune.metrics.triples import score_triples, triple_f1

LOWER_IS_BETTER = frozenset({"nll"})
SCORERS: dict[str, Scorer] = {
    "triple_f1": score_triples,
    "label_f1": score_labels,
    "rouge": score_rouge_l,
    "nll": score_nll,
}
# 名字 → 指标函数；前三个的参数是 (predictions, references)，nll 的是 (loss_sums, token_counts)
METRICS: dict[str, Callable[..., dict[str, Any]]] = {
    "triple_f1": triple_f1,
    "label_f1": label_f1,
    "rouge": rouge,
    "nll": nll,
}
