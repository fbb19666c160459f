"""抽取的参照：不用模型，只用训练的回答造一本词典，在测试部分是几分；表里的 F1 要同它比着看。

    python benchmarks/comparison/dictionary.py output-comparison      # 比较的目录，用它的 data/extraction

结果另写成这个目录里的 dictionary.json，报告的表里就有它的一行。

输入里出现的、训练的回答里见过的头与尾（长的盖过短的），每个尾配上它前面 MOST_GAP 个字以内最近的头，
关系取这个尾最常有的。
"""

import argparse
from collections import Counter, defaultdict
from pathlib import Path

from finetune.comparison.cells import read_rows_any
from finetune.metrics.triples import parse_triples, triple_f1
from finetune.options import ScriptParser
from utils import write_json

MOST_GAP = 6


def places_of(words: set[str], text: str) -> list[tuple[int, int]]:
    """text 里各词的起止，去掉包在更长的词里的。"""
    found = [
        (begin, begin + len(word))
        for word in words
        for begin in range(len(text) - len(word) + 1)
        if text.startswith(word, begin)
    ]
    return [
        (begin, end)
        for begin, end in sorted(found)
        if not any(a <= begin and end <= b and (a, b) != (begin, end) for a, b in found)
    ]


def extract(text: str, heads: set[str], relations: dict[str, str]) -> str:
    """按词典抽出的三元组，一行一个；relations：尾 → 关系。"""
    lines = {}
    before = places_of(heads, text)
    for begin, end in places_of(set(relations), text):
        near = [(b, a) for a, b in before if b <= begin <= b + MOST_GAP]
        if near:
            b, a = max(near)
            lines[f"{text[a:b]}_{relations[text[begin:end]]}_{text[begin:end]}"] = None
    return "\n".join(lines)


def read_dictionary(outputs: list[str]) -> tuple[set[str], dict[str, str]]:
    """训练的回答 → (全部的头, 尾 → 它最常有的关系)。"""
    heads, relations = set(), defaultdict(Counter)
    for output in outputs:
        for head, relation, tail in sorted(parse_triples(output)[0]):
            heads.add(head)
            relations[tail][relation] += 1
    return heads, {tail: counts.most_common(1)[0][0] for tail, counts in relations.items()}


def main():
    parser = ScriptParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="比较的输出目录")
    directory = parser.parse_args().directory
    data = directory / "data" / "extraction"
    if not (data / "final.json").is_file():
        how = "要的是做过的比较的输出目录；提交的 results/ 里没有数据，复制成输出目录再运行一次比较就有"
        parser.error(f"没有 {data / 'final.json'}：{how}")
    heads, relations = read_dictionary([row["output"] for row in read_rows_any(data / "final.json")])
    test = read_rows_any(data / "test.json")
    scored = triple_f1([extract(row["input"], heads, relations) for row in test], [row["output"] for row in test])
    precision, recall = (scored["details"][name]["score"] for name in ("precision", "recall"))
    found = {"task": "extraction", **{name: scored[name] for name in ("score", "ci_low", "ci_high")}}
    write_json(directory / "dictionary.json", found | {"precision": precision, "recall": recall})
    print(
        f"词典：头 {len(heads)} 个、尾 {len(relations)} 个；F1 {scored['score']:.3f}"
        f"［{scored['ci_low']:.3f}，{scored['ci_high']:.3f}］，精确率 {precision:.3f}，召回率 {recall:.3f}"
    )


if __name__ == "__main__":
    main()
