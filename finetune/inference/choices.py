"""选择题（C-Eval、CMMLU 与同样写法的文件）：读题，拼成几个例子加一题的提示，取 A–D 里对数概率最高的；几个检查点并排。

写法与官方的相同：「答案：」之后直接是字母，不套提示格式，不加 bos；上下文放不下时少用几个例子。
"""

import csv
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from finetune.checkpoint.inspection import Checkpoint, load_checkpoint_model, load_checkpoint_tokenizer
from finetune.inference.generation import label_log_probs, plan_batches
from finetune.inference.predictor import prediction_dtype, short_names
from finetune.metrics.choices import ALL, MEAN, accuracy, accuracy_change
from finetune.process.accelerator import empty_cache, is_card
from finetune.terminal import format_table, long_job, note
from utils import read_json

LABELS = ("A", "B", "C", "D")
ANSWER = "答案："
DESCRIPTION = "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n"
MAPPING = "subject_mapping.json"  # C-Eval 自带：文件名 → [英文名, 中文名, 类别]
PARTS = ("_dev", "_val", "_test")
Subjects = dict[str, list["Question"]]


class Question(NamedTuple):
    """一题。"""

    place: str  # 文件:行号
    text: str
    options: tuple[str, ...]
    answer: str  # A–D

    @property
    def prompt(self) -> str:
        """题、四个选项与「答案：」。"""
        lines = [f"{label}. {option}" for label, option in zip(LABELS, self.options, strict=True)]
        return "\n".join([self.text, *lines, ANSWER])


class Prompts(NamedTuple):
    """各题的提示词 id，依次属于哪一科、第几题，与少用了例子的题数。"""

    ids: list[list[int]]
    labels: list[list[int]]
    num_shortened: int


# ---- 读题 ----


def read_questions(path: Path) -> Subjects:
    """一个 CSV 文件或一个目录里的全部 CSV → {科目: 各题}。

    科目是 subject 一列，没有时是文件名（去掉 _dev、_val、_test）。列名不分大小写：question、A、B、C、D、answer，
    其余（id、explanation、没有名字的序号）不用。

    Raises:
        ValueError: 没有 CSV，缺列，或一题的答案不是 A–D，指出文件与行号。
    """
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"{path} 不是 CSV 文件，也不是有 CSV 的目录；写法见 docs/evaluation.md")
    subjects: Subjects = {}
    for file in files:
        for subject, question in read_file(file):
            subjects.setdefault(subject, []).append(question)
    if not subjects:
        raise ValueError(f"{path} 里一题也没有")
    return subjects


def read_file(path: Path) -> list[tuple[str, Question]]:
    """一个 CSV → (科目, 题)；见 read_questions。"""
    own = next((path.stem.removesuffix(part) for part in PARTS if path.stem.endswith(part)), path.stem)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            names = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
            missing = [name for name in ("question", "a", "b", "c", "d", "answer") if name not in names]
            if missing:
                hint = "（C-Eval 的 test 没有公布答案，请用 val）" if missing == ["answer"] else ""
                raise ValueError(f"{path} 缺少 {'、'.join(missing)} 列{hint}，现在的列是 {reader.fieldnames}")
            found = []
            for row in reader:
                cells = {name: row[column] or "" for name, column in names.items()}
                place, answer = f"{path}:{reader.line_num}", cells["answer"].strip().upper()
                if answer not in LABELS:
                    raise ValueError(f"{place}: 答案 {cells['answer']!r} 不是 A、B、C、D 之一")
                options = tuple(cells[label.lower()] for label in LABELS)  # 选项原样：官方与 lm-eval 都不去空白
                question = Question(place, cells["question"].strip(), options, answer)
                found.append((cells.get("subject", "").strip() or own, question))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} 不是 UTF-8 编码（{error}），请另存为 UTF-8") from error
    return found


def examples_beside(path: Path) -> Path | None:
    """没有写 --dev 时的例子：题目的目录（或文件所在的目录）旁边的 dev/，没有时为 None。"""
    beside = (path if path.is_dir() else path.parent).resolve().parent / "dev"
    return beside if beside.is_dir() else None


def subject_names(path: Path) -> dict[str, str]:
    """科目 → 提示里写的中文名；C-Eval 的 subject_mapping.json 在题目的目录或它上一级时由它得到。"""
    directory = path if path.is_dir() else path.parent
    for folder in (directory, directory.resolve().parent):
        if (folder / MAPPING).is_file():
            return {name: entry[1] for name, entry in read_json(folder / MAPPING).items()}
    return {}


# ---- 提示与评分 ----


def question_texts(questions: Sequence[Question], shots: Sequence[Question], description: str) -> list[list[str]]:
    """一科各题的提示：从用全部例子的到一个也不用的，依次少一个。"""
    solved = [f"{shot.prompt}{shot.answer}\n\n" for shot in shots]
    return [
        [description + "".join(solved[:count]) + question.prompt for count in range(len(solved), -1, -1)]
        for question in questions
    ]


def encode_questions(tokenizer, subjects: Subjects, shots: Subjects, description: str, names, limit: int) -> Prompts:
    """各题的提示词 id（至多 limit 个 token，含字母）与四个字母各自的 id。一题不用例子也放不下时抛 ValueError。"""
    begin = len(tokenizer.encode_plain(ANSWER))
    labels = [tokenizer.encode_plain(ANSWER + label)[begin:] for label in LABELS]
    longest, ids, num_shortened = limit - max(map(len, labels)), [], 0
    for subject, questions in subjects.items():
        opening = description.replace("{subject}", names.get(subject, subject))
        tried = question_texts(questions, shots.get(subject, ()), opening)
        for question, texts in zip(questions, tried, strict=True):
            tries = map(tokenizer.encode_plain, texts)
            index, encoded = next(((i, found) for i, found in enumerate(tries) if len(found) <= longest), (0, None))
            if encoded is None:
                size = len(tokenizer.encode_plain(texts[-1]))
                raise ValueError(f"{question.place}: 不用例子也有 {size} 个 token，超过上下文的 {limit} 个")
            ids.append(encoded)
            num_shortened += index > 0
    return Prompts(ids, labels, num_shortened)


def score_prompts(model, prompts: Prompts, batch_size: int, pad_token_id: int, title: str) -> list[list[float]]:
    """各题四个字母的对数概率（nat），次序同 prompts.ids；长的先算。"""
    scores: list[list[float]] = [[] for _ in prompts.ids]
    with long_job(title, len(scores), "题") as job:
        for batch in plan_batches(prompts.ids, batch_size):
            found = label_log_probs(
                model, [prompts.ids[index] for index in batch], prompts.labels, batch_size, pad_token_id
            )
            for index, values in zip(batch, found, strict=True):
                scores[index] = values
            job.update(len(batch))
    return scores


def score_checkpoint(checkpoint: Checkpoint, prompts: Prompts, precision: str, device, batch_size: int, title: str):
    """载入一个检查点（适配器连同基座），评完放下 → 各题四个字母的对数概率。"""
    model = load_checkpoint_model(checkpoint, prediction_dtype(precision, device), device)
    scores = score_prompts(model, prompts, batch_size, checkpoint.config.pad_token_id, title)
    del model
    gc.collect()
    if is_card(device):
        empty_cache()
    return scores


def evaluate_choices(
    subjects: Subjects,
    shots: Subjects,
    checkpoints: Sequence[Checkpoint],
    device: torch.device,
    *,
    precision: str = "auto",
    batch_size: int = 8,
    description: str = DESCRIPTION,
    names: dict[str, str] | None = None,
) -> dict[str, Any]:
    """各检查点依次评 → 结果：每个检查点各科、mean、all 的准确率与区间，逐题的选择与对数概率，与第一个检查点之差。"""
    titles = short_names([checkpoint.path for checkpoint in checkpoints])
    answers = {subject: [question.answer for question in questions] for subject, questions in subjects.items()}
    results, first = [], None
    for checkpoint, title in zip(checkpoints, titles, strict=True):
        tokenizer = load_checkpoint_tokenizer(checkpoint)
        limit = checkpoint.context_length
        prompts = encode_questions(tokenizer, subjects, shots, description, names or {}, limit)
        if prompts.num_shortened:
            note(f"{title}：{prompts.num_shortened} 题放不下全部例子（上下文 {limit} 个 token），少用了几个")
        scores = score_checkpoint(checkpoint, prompts, precision, device, batch_size, title)
        rows, chosen, correct = iter(scores), {}, {}
        for subject, expected in answers.items():
            own = [next(rows) for _ in expected]
            picked = [LABELS[max(range(len(LABELS)), key=values.__getitem__)] for values in own]
            chosen[subject] = [
                {"answer": answer, "chosen": pick, "log_probs": [round(value, 6) for value in values]}
                for answer, pick, values in zip(expected, picked, own, strict=True)
            ]
            correct[subject] = [answer == pick for answer, pick in zip(expected, picked, strict=True)]
        first = first or correct
        results.append(
            {
                **{"name": title, "path": str(checkpoint.path), "accuracy": accuracy(correct)},
                **{"num_shortened": prompts.num_shortened, "questions": chosen},
                "change": accuracy_change(first, correct),
            }
        )
    return {"num_questions": {subject: len(part) for subject, part in answers.items()}, "checkpoints": results}


def result_tables(result: dict[str, Any], names: dict[str, str] | None = None) -> str:
    """evaluate_choices 的结果 → 终端的表：各科（names 里有的写中文名）的准确率；两个以上检查点时，另有与第一个之差。"""
    numbers, found = result["num_questions"], result["checkpoints"]
    titles = {**{subject: (names or {}).get(subject, subject) for subject in numbers}, MEAN: "各科平均", ALL: "全部题"}
    counts = {**numbers, MEAN: len(numbers), ALL: sum(numbers.values())}

    def table(key: str, entries: list[dict], sign: str) -> str:
        rows = [[title, str(counts[name]), *(shown(entry[key][name], sign) for entry in entries)]
                for name, title in titles.items()]  # fmt: skip
        return format_table(["科目", "题数", *(entry["name"] for entry in entries)], rows)

    def shown(entry: dict[str, float], sign: str) -> str:
        return "{} [{}, {}]".format(*(format(100 * entry[key], sign + ".1f") for key in ("score", "ci_low", "ci_high")))

    parts = ["准确率（%，95% 区间；四个选项里乱猜是 25）\n" + table("accuracy", found, "")]
    if len(found) > 1:
        parts.append(f"与 {found[0]['name']} 之差（百分点）\n" + table("change", found[1:], "+"))
    return "\n\n".join(parts)
