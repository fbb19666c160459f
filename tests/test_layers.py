"""房子的楼层：谁都只往下看；见 docs/design.md。"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# 从上到下；同一层的几间之间可以互相用
FLOORS = [
    {"train", "predict"},
    {"model_factory", "data_set"},
    {"cli", "planning"},
    {"training", "tasks"},
    {"export", "inference", "data_doctor", "comparison"},
    {"checkpoint", "methods", "metrics"},
    {"data", "process", "terminal", "options"},
    {"baichuan"},
    {"utils"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TOOLS = {"benchmarks", "scripts", "tests"}
PRODUCT = [*ROOT.glob("*.py"), *(ROOT / "finetune").rglob("*.py"), *(ROOT / "baichuan").rglob("*.py")]


def room_of(module: str) -> str:
    first, *rest = module.split(".")
    return rest[0] if first == "finetune" and rest else first


def imports_of(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            # from finetune import terminal：房间在后面
            names = [f"finetune.{alias.name}" for alias in node.names] if node.module == "finetune" else [node.module]
            found += [(node.lineno, name) for name in names]
    return found


def test_every_import_looks_down():
    wrong = []
    for path in PRODUCT:
        relative = path.relative_to(ROOT)
        here = room_of(".".join(relative.with_suffix("").parts))
        in_root = len(relative.parts) == 1
        for line, module in imports_of(path):
            there = room_of(module)
            if there in TOOLS:
                wrong.append(f"{relative}:{line} 用了 {module}：产品不看工具")
            elif there in FLOOR_OF and here in FLOOR_OF and FLOOR_OF[there] < FLOOR_OF[here]:
                wrong.append(f"{relative}:{line} 用了上面的 {module}")
            elif not in_root and module in {path.stem for path in ROOT.glob("*.py")} - {"utils"}:
                wrong.append(f"{relative}:{line} 用了根目录的 {module}：finetune 与 baichuan 只用 utils")
    assert wrong == [], "\n".join(wrong)


def test_every_room_has_a_floor():
    rooms = {path.stem if path.is_file() else path.name for path in (ROOT / "finetune").iterdir()}
    assert rooms - {"__init__", "__pycache__"} <= FLOOR_OF.keys()


def test_no_module_of_a_floor_is_imported_in_a_circle():
    graph = {}
    for path in PRODUCT:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]):
        assert name not in above, f"循环导入：{' → '.join([*above, name])}"
        if name in graph and name not in done:
            for module in graph[name]:
                visit(module, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())
