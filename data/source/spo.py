"""生成三元组抽取任务的样例：汽车维修文本 → 头_关系_尾，每行一个；由 make_sample_data.py 调用。

四种关系的方向：性能_性能故障_状态、部件_部件故障_状态、零件_组成_总成、工具_检测工具_被测对象。
三元组按在文本中出现的先后排列，只收录文本断言为真的关系：被排除的故障与合格的部件都不收录。
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from data.source.chooser import Chooser, read_word_lines

INSTRUCTION = (
    "请从汽车维修文本中找出“性能故障”“部件故障”“组成”“检测工具”四种关系，"
    "每行写一个三元组，格式为“头_关系_尾”；没有可抽取的内容时不输出。文本："
)
PERFORMANCE, PART, COMPOSITION, TOOL = "性能故障", "部件故障", "组成", "检测工具"
POSITIONS = {
    "(轮)": ["左前", "右前", "左后", "右后"],
    "(侧)": ["左侧", "右侧"],
    "(缸)": ["一缸", "二缸", "三缸", "四缸"],
}
BODIES = ["三厢轿车", "两厢轿车", "紧凑型SUV", "七座商务车", "轻型货车", "皮卡", "微型面包车", "旅行车", "城市SUV"]
ELECTRIC_BODIES = ["纯电动轿车", "纯电动SUV", "插电式混合动力轿车", "增程式SUV", "纯电动网约车", "纯电动物流车"]
SYMPTOM_OPENERS = ["故障现象：", "车主反映", "客户报修：", "据驾驶员讲，", "到店描述：", "用户来电说", "报修内容：", ""]
SECOND_OPENERS = ["检修中又发现另一处故障：", "半年后车辆再次进厂，车主反映", "同一车辆还有一处故障："]
CAUSE_OPENERS = [
    "拆检发现",
    "进一步检查发现",
    "经过排查，最终确认",
    "故障原因：",
    "分解后看到",
    "结果发现",
    "仔细查看，",
]
FIRST_STEPS = ["首先", "先", "连接设备后，", "按手册要求", "技师"]
NEXT_STEPS = ["接着", "再", "随后", "为了缩小范围，又"]
ENDINGS = [
    "试车五公里，症状消失。",
    "故障排除。",
    "交车一周后回访，客户表示满意。",
    "再次试车，一切正常。",
    "清除故障码后交车。",
]
REPAIR_VERBS = [
    ("清洗", ("积碳", "堵", "脏", "水垢", "沾满", "粘有", "发霉", "冰堵")),
    ("重新紧固", ("松动", "松脱", "虚接", "紧固力矩", "脱落", "脱开", "接触不良", "松旷")),
    ("重新调整", ("调整", "过松", "漂移", "未标定", "偏移", "偏差")),
    ("重新充气并检查", ("气压不足",)),
    ("重新标定", ("误报",)),
]
CHECKED = ["目测{}，外观良好。", "检查{}，没有发现问题。", "单独检查{}，结果正常。", "查看{}的情况，符合要求。"]
EXCLUDED = ["由此排除了{}{}的可能。", "没有发现{}{}的情况。", "起初怀疑{}{}，实车检查后予以否定。"]
COMPOSITION_FORMS = [
    "{}由{}组成。",
    "{}的主要零件有{}。",
    "{}包括{}。",
    "从结构上看，{}由{}构成。",
    "维修前应了解，{}含有{}。",
]
COMPOSITION_TAILS = [
    "装配时各零件要保持清洁，并按规定力矩拧紧。",
    "拆解前应做好标记，避免装错方向。",
    "日常保养时按里程检查即可，不要随意拆卸。",
    "更换时应选用原厂件，装好后做一次基本设定。",
    "检修时先看外观，再按电路图逐段测量。",
]
ROUTINES = [
    "车辆行驶到{km}公里，按保养手册更换机油和机油滤清器",
    "客户预约做{km}公里保养，更换空气滤清器并清洁空调滤芯",
    "年检前来店做全车检查，里程表显示{km}公里",
    "长途出行前检查车况，当前里程{km}公里",
    "二手车交易前做检测，表显里程{km}公里",
    "车辆行驶{km}公里，来店做轮胎换位",
]
ROUTINE_NEXT = [
    "检查灯光、雨刮和轮胎气压，各项均正常",
    "读取各控制单元，没有故障码",
    "举升车辆查看底盘，未见渗漏和磕碰",
    "补加玻璃水，清理发动机舱的落叶",
    "试车三公里，加速、转向和制动都符合要求",
    "制动片还有足够余量，暂不更换",
    "蓄电池电量充足，桩头清洁",
    "冷却液、制动液的液面都在上下限之间",
]
ROUTINE_ENDS = ["洗车后交车。", "提醒客户半年后再来检查。", "填写保养记录后放行。", "客户确认签字，当场交车。"]


@dataclass
class Symptom:
    template: str
    group: str


@dataclass
class Cause:
    part: str
    states: list[str]
    whole: str
    place: str
    group: str


@dataclass
class Assembly:
    whole: str
    parts: list[str]
    group: str


@dataclass
class Check:
    tool: str
    action: str
    target: str
    passed: str
    failed: str
    state: str
    relation: str
    group: str


@dataclass
class System:
    name: str
    symptoms: list[Symptom] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    assemblies: list[Assembly] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def matching(self, group: str) -> System:
        """只留下能与 group 搭配的原因与检测，免得车窗的现象配上喇叭的原因。"""
        causes = [cause for cause in self.causes if not group or cause.group in ("", group)]
        checks = [check for check in self.checks if not group or check.group in ("", group)]
        return replace(self, causes=causes, checks=checks)


class Report:
    """边写文本边记三元组，保证二者一致。"""

    def __init__(self, chooser: Chooser):
        self.chooser = chooser
        self.text = ""
        self.triples: list[tuple[str, str, str]] = []

    def write(self, text: str) -> None:
        self.text += text

    def add(self, head: str, relation: str, tail: str) -> None:
        if (head, relation, tail) not in self.triples:
            self.triples.append((head, relation, tail))

    def heads(self) -> set[str]:
        return {head for head, _, _ in self.triples}

    def fill(self, text: str) -> str:
        """替换方位与数值范围；同一段里的方位取同一个。"""
        for mark, names in POSITIONS.items():
            if mark in text:
                text = text.replace(mark, self.chooser.pick(names))
        return re.sub(r"\{([\d.]+)-([\d.]+)(:1)?\}", self._number, text)

    def _number(self, match: re.Match) -> str:
        low, high, decimal = match.groups()
        if not decimal:
            return str(self.chooser.between(int(low), int(high)))
        return f"{self.chooser.between(round(float(low) * 10), round(float(high) * 10)) / 10:.1f}"

    def symptom(self, symptom: Symptom) -> None:
        """写一条现象，[主体|状态] 与 {部件|状态} 各记一个三元组。"""
        for piece in re.split(r"(\[[^\]]+\]|\{[^}]+\})", self.fill(symptom.template)):
            if not piece.startswith(("[", "{")):
                self.write(piece)
                continue
            head, states = piece[1:-1].split("|")
            state = self.chooser.pick(states.split("/"))
            self.write(head + state)
            self.add(head, PERFORMANCE if piece[0] == "[" else PART, state)

    def cause(self, cause: Cause) -> tuple[str, str]:
        """写一个故障原因，返回 (部件, 状态)。"""
        part, state = self.fill(cause.part), self.chooser.pick(cause.states)
        adverb = self.chooser.pick(["", "", "已经", "已"]) if state.endswith("*") else ""
        state = state.rstrip("*")
        if cause.whole and self.chooser.chance(0.7):
            self.write(f"{cause.whole}{cause.place}的")
            self.add(part, COMPOSITION, cause.whole)
        self.write(part + adverb + state)
        self.add(part, PART, state)
        return part, state

    def check(self, check: Check, failed: bool) -> None:
        """写一次检测；不合格时另记一个故障。"""
        verb = self.chooser.pick(["用", "使用", "利用"])
        self.write(f"{verb}{check.tool}{check.action}{check.target}，")
        self.add(check.tool, TOOL, check.target)
        if failed:
            self.write(f"{self.fill(check.failed)}，{check.target}{check.state}。")
            self.add(check.target, check.relation, check.state)
        else:
            self.write(f"{self.fill(check.passed)}。")


def read_systems(path: Path) -> list[System]:
    """读 spo.txt；行的写法见该文件开头。"""
    systems: list[System] = []
    for line in read_word_lines(path):
        line, _, group = line.partition(" ^")
        kind, text = line.split(" ", 1)
        if kind == "系统":
            systems.append(System(text))
        elif kind == "现象":
            systems[-1].symptoms.append(Symptom(text, group))
        elif kind == "原因":
            part, states = text.split(":")
            part, _, whole = part.partition("@")
            systems[-1].causes.append(Cause(part, states.split("/"), whole[:-1], whole[-1:], group))
        elif kind == "总成":
            whole, parts = text.split(":")
            systems[-1].assemblies.append(Assembly(whole, parts.split(","), group))
        elif kind == "检测":
            tool, action, target, passed, failed, state = text.split("|")
            relation = PART if target.startswith("#") else PERFORMANCE
            systems[-1].checks.append(Check(tool, action, target.lstrip("#"), passed, failed, state, relation, group))
        else:
            raise ValueError(f"{path.name}: 不认识的行首词 {kind!r}，请参看文件开头的说明")
    return systems


def _header(report: Report, system: System) -> None:
    chooser = report.chooser
    body = chooser.pick(ELECTRIC_BODIES if system.name.startswith("新能源") else BODIES)
    year, mileage = chooser.between(2012, 2023), f"{chooser.between(8, 230) / 10:.1f}"
    forms = [
        f"一辆{year}年生产的{body}，行驶里程{mileage}万公里。",
        f"车型：{body}；里程：{mileage}万公里。",
        f"维修工单{chooser.between(101, 989)}号：{year}款{body}，已行驶{mileage}万公里。",
        f"{year}款{body}，跑了{mileage}万公里。",
        "",
        "",
    ]
    report.write(chooser.pick(forms))


def _repair(part: str, state: str) -> str:
    if part.endswith(("油", "液", "制冷剂")):
        return f"按标准量加注{part}"
    for verb, marks in REPAIR_VERBS:
        if any(mark in state for mark in marks):
            return f"{verb}{part}"
    return f"更换{part}"


def _write_report(report: Report, system: System) -> None:
    """完整的维修记录；少数记两处故障，成为较长的文本。"""
    _header(report, system)
    report.write(report.chooser.pick(SYMPTOM_OPENERS))
    rest = _write_repair(report, system)
    if report.chooser.chance(0.15) and rest.symptoms:
        report.write(report.chooser.pick(SECOND_OPENERS))
        _write_repair(report, rest)


def _write_repair(report: Report, system: System) -> System:
    """写一处故障的现象、检测、原因、处理；返回去掉所用现象与原因的系统，免得下一处与这一处矛盾。"""
    chooser = report.chooser
    symptom = chooser.pick(system.symptoms)
    report.symptom(symptom)
    report.write("。")
    rest = system
    system = system.matching(symptom.group)
    causes = chooser.some(system.causes, 3)
    for step, check in enumerate(chooser.some(system.checks, chooser.weighted([(0, 3), (1, 5), (2, 2)]))):
        report.write(chooser.pick(NEXT_STEPS if step else FIRST_STEPS))
        # 现象已说明异常的量，不能再测得合格
        report.check(check, failed=chooser.chance(0.4) or check.target in report.heads())
    # 第三个原因只作干扰：查过合格，或被排除
    if len(causes) > 2 and causes[2].part not in report.heads() and chooser.chance(0.35):
        part = report.fill(causes[2].part)
        if chooser.chance(0.5):
            report.write(chooser.pick(CHECKED).format(part))
        else:
            report.write(chooser.pick(EXCLUDED).format(part, chooser.pick(causes[2].states).rstrip("*")))
    report.write(chooser.pick(CAUSE_OPENERS))
    repairs = [_repair(*report.cause(causes[0]))]
    if len(causes) > 1 and chooser.chance(0.4):
        report.write(chooser.pick(["，同时", "，另外", "，而且"]))
        repairs.append(_repair(*report.cause(causes[1])))
    report.write("。")
    if chooser.chance(0.75):
        opener = chooser.pick(["处理方法：", "维修措施：", "于是", ""])
        report.write(f"{opener}{'，'.join(dict.fromkeys(repairs))}，{chooser.pick(ENDINGS)}")
    rest = replace(rest, causes=[cause for cause in rest.causes if cause not in causes], checks=[])
    symptoms = [other for other in rest.symptoms if other != symptom and rest.matching(other.group).causes]
    return replace(rest, symptoms=symptoms)


def _write_complaint(report: Report, system: System) -> None:
    """只有现象的短文本。"""
    chooser = report.chooser
    if chooser.chance(0.5):
        _header(report, system)
    report.write(chooser.pick(SYMPTOM_OPENERS))
    first, *rest = chooser.some(system.symptoms, chooser.weighted([(1, 3), (2, 2)]))
    report.symptom(first)
    for symptom in rest:
        report.write(chooser.pick(["；此外，", "。另外，", "。还发现"]))
        report.symptom(symptom)
    report.write(chooser.pick(["。", "。", "，要求检查。", "，请求检修。"]))


def _write_causes(report: Report, system: System) -> None:
    """现象加编号的原因清单。"""
    chooser = report.chooser
    report.write(chooser.pick(["故障现象：", "现象：", "常见故障："]))
    symptom = chooser.pick(system.symptoms)
    report.symptom(symptom)
    report.write(chooser.pick(["。故障原因：", "。原因分析：", "。引起该故障的原因有："]))
    causes = chooser.some(system.matching(symptom.group).causes, chooser.between(2, 4))
    found = []
    style = chooser.pick(["{}.", "（{}）", "{}）"])
    for number, cause in enumerate(causes, start=1):
        report.write(style.format(number))
        found.append(report.cause(cause))
        report.write("；" if number < len(causes) else "。")
    if chooser.chance(0.5):
        report.write("排除方法：" + "；".join(dict.fromkeys(_repair(*item) for item in found)) + "。")


def _write_structure(report: Report, system: System) -> None:
    """结构介绍，有些附一个该总成的故障。"""
    chooser = report.chooser
    assembly = chooser.pick(system.assemblies)
    whole, parts = assembly.whole, chooser.some(assembly.parts, chooser.between(2, len(assembly.parts)))
    causes = [cause for cause in system.causes if cause.whole == whole or cause.part in assembly.parts]
    report.write(chooser.pick(COMPOSITION_FORMS).format(whole, "、".join(parts[:-1]) + "和" + parts[-1]))
    for part in parts:
        report.add(part, COMPOSITION, whole)
    if causes and chooser.chance(0.7):
        report.write(chooser.pick(["本例中", "实际维修中发现", "检查时发现", "该车拆开后看到"]))
        report.cause(chooser.pick(causes))
        report.write("。")
    if chooser.chance(0.6):
        report.write(chooser.pick(COMPOSITION_TAILS))


def _write_check(report: Report, system: System) -> None:
    """以检测为主的文本。"""
    chooser = report.chooser
    report.write(chooser.pick(["检测过程：", "诊断步骤：", "到店后", "检查记录：", f"对{system.name}做检查，"]))
    system = system.matching(chooser.pick(system.checks).group)
    for step, check in enumerate(chooser.some(system.checks, chooser.between(1, 3))):
        if step:
            report.write(chooser.pick(NEXT_STEPS))
        report.check(check, failed=chooser.chance(0.5))
    if chooser.chance(0.5):
        report.write(chooser.pick(CAUSE_OPENERS))
        report.cause(chooser.pick(system.causes))
        report.write("。")


def _write_routine(report: Report, system: System) -> None:
    """没有可抽取内容的保养记录。"""
    chooser = report.chooser
    opening = chooser.pick(ROUTINES).format(km=chooser.between(5, 120) * 1000)
    steps = chooser.some(ROUTINE_NEXT, chooser.between(1, 3))
    report.write("。".join([opening, *steps]) + "。" + chooser.pick(ROUTINE_ENDS))


WRITERS = [
    (_write_report, 42),
    (_write_complaint, 15),
    (_write_causes, 14),
    (_write_structure, 12),
    (_write_check, 12),
    (_write_routine, 5),
]


def make_rows(seed: int, num_train: int, num_test: int) -> tuple[list[dict], list[dict]]:
    """返回 (训练行, 测试行)，全部输入互不相同。"""
    systems = read_systems(Path(__file__).parent / "words" / "spo.txt")
    chooser = Chooser(seed)
    rows: dict[str, dict] = {}
    while len(rows) < num_train + num_test:
        report = Report(chooser)
        # 先轮流取系统，使各系统的行数相近
        chooser.weighted(WRITERS)(report, systems[len(rows) % len(systems)])
        output = "\n".join("_".join(triple) for triple in report.triples)
        rows.setdefault(report.text, {"instruction": INSTRUCTION, "input": report.text, "output": output})
    mixed = chooser.some(list(rows.values()), len(rows))
    return mixed[:num_train], mixed[num_train:]
