"""两次运行从哪里开始不同：逐步记下每个张量的校验和，再找出第一处不同的算子。

    python benchmarks/reliability/first_difference.py record --level op a.txt scripts/build_tiny_model.py …
    python benchmarks/reliability/first_difference.py record --level op b.txt scripts/build_tiny_model.py …
    python benchmarks/reliability/first_difference.py compare a.txt b.txt

record 在记录之下运行一个 Python 脚本；也可以由启动器拉起：deepspeed first_difference.py record a.txt train.py …
（每个进程一个文件，名字后面加 rank）。--level step 记每个模块的输入与输出、每一步的梯度、权重与优化器状态；
op 另记主线程里每个算子的输入与输出（反向也在主线程里），慢几倍。compare 的退出码：0 没有不同，1 有，2 用法错误。
"""

import argparse
import hashlib
import os
import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

# 输出是没有写过的内存
UNWRITTEN = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted", "resize_")
# 就地改写，不看原来的值
OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_")
CONTEXT_LINES = 3


class Entry(NamedTuple):
    """记录里的一行：在哪一步、哪个模块，哪个算子，输入与输出的校验和（inputs 里 @n 是地址除以 64 的余数）。"""

    step: str
    where: str
    name: str
    inputs: str
    outputs: str


# ---------------------------------------------------------------------------------------------------------------------
# 记录


def checksum(tensor: torch.Tensor) -> str:
    """形状、类型与每一位都相同才相同。"""
    if tensor.device.type == "meta":
        return f"meta{list(tensor.shape)}"
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().data, digest_size=6, person=str(tensor.dtype)[-16:].encode()).hexdigest()


class Recorder(TorchDispatchMode):
    """把看到的一切逐行写进 path；with 之内的一切都在记录之下。

    Args:
        path: 记录的文件。
        records_ops: 每个算子也记；否则只记模块与优化器的每一步。
        steps: 只记 [起, 止) 之内的步（0 是第一次更新之前）。
    """

    def __init__(self, path: Path, records_ops: bool, steps: tuple[int, int]):
        super().__init__()
        self.stream = path.open("w", encoding="utf-8")
        self.records_ops, self.steps, self.step = records_ops, steps, 0
        self.names: dict[int, str] = {}
        self.stack: list[str] = []
        self.hooks = ExitStack()
        self.line("machine", "", machine())

    def line(self, where: str, name: str, inputs: Any = "", outputs: Any = ""):
        self.stream.write("\t".join(map(str, (self.step, where, name, inputs, outputs))) + "\n")

    def sums(self, values: Any, places: bool = False) -> str:
        found = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
        return " ".join(
            checksum(tensor) + (f"@{tensor.data_ptr() % 64}" if places and tensor.device.type == "cpu" else "")
            for tensor in found
        )

    @property
    def is_recording(self) -> bool:
        return self.steps[0] <= self.step < self.steps[1]

    def __enter__(self):
        for hook in (
            register_module_forward_pre_hook(self.before_module),
            register_module_forward_hook(self.after_module),
            register_optimizer_step_pre_hook(self.before_update),
            register_optimizer_step_post_hook(self.after_update),
        ):
            self.hooks.callback(hook.remove)
        if self.records_ops:
            super().__enter__()
        return self

    def __exit__(self, *error):
        if self.records_ops:
            super().__exit__(*error)
        self.hooks.close()
        self.stream.close()

    # ------------------------------------------------------------------------------------------------- 模块与优化器

    def before_module(self, module, inputs):
        if id(module) not in self.names:  # 最外面的模块先到：由它给各层起名
            for name, child in module.named_modules():
                self.names[id(child)] = name or type(module).__name__
        self.stack.append(self.names[id(module)])
        if self.is_recording:
            with _disable_current_modes():
                self.line(self.stack[-1], "module 输入", self.sums(inputs, places=True))

    def after_module(self, module, inputs, output):
        if self.is_recording:
            with _disable_current_modes():
                self.line(self.stack[-1], "module 输出", "", self.sums(output))
        self.stack.pop()

    def optimizer_lines(self, optimizer, kinds: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
        for group_index, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                state = {"grad": parameter.grad, "weight": parameter.data, **optimizer.state.get(parameter, {})}
                for kind, value in state.items():
                    if isinstance(value, torch.Tensor) and (kind in kinds or not kinds):
                        yield f"group{group_index}.{index} {kind}", value

    def write_optimizer(self, optimizer, what: str, kinds: tuple[str, ...]):
        if self.is_recording:
            with _disable_current_modes():
                for name, value in self.optimizer_lines(optimizer, kinds):
                    self.line(what, name, "", self.sums(value))

    def before_update(self, optimizer, args, kwargs):
        self.write_optimizer(optimizer, "更新之前", ("grad",))

    def after_update(self, optimizer, args, kwargs):
        self.write_optimizer(optimizer, "更新之后", ())
        self.step += 1
        self.stream.flush()

    # ---------------------------------------------------------------------------------------------------------- 算子

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.is_recording:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        returns = func._schema.returns
        is_view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        if is_view or name in UNWRITTEN:
            return func(*args, **kwargs)
        read = args[1:] if name in OVERWRITES else args
        inputs = self.sums((read, {key: value for key, value in kwargs.items() if key != "out"}), places=True)
        result = func(*args, **kwargs)
        where = self.stack[-1] if self.stack else "（模块之外）"
        self.line(where, name, inputs, self.sums(args[0] if not returns and args else result))
        return result


def machine() -> str:
    """决定位数的东西，一行。"""
    return (
        f"torch {torch.__version__}，{torch.get_num_threads()} 个线程，{torch.backends.cpu.get_cpu_capability()}，"
        + "，".join(f"{name}={os.environ[name]}" for name in sorted(os.environ) if re.match("OMP_|MKL_|GOMP_", name))
    )


def record(path: Path, level: str, steps: tuple[int, int], command: list[str]):
    """在记录之下运行 command（脚本与它的参数），就像直接运行它；没有人定种子的随机数从 0 起，初值才可比。"""
    torch.manual_seed(0)
    script = Path(command[0]).resolve()
    sys.argv = [str(script), *command[1:]]
    rank = os.environ.get("RANK")
    recorder = Recorder(path if rank is None else path.with_name(f"{path.name}.{rank}"), level == "op", steps)
    with recorder:
        runpy.run_path(str(script), run_name="__main__")


# ---------------------------------------------------------------------------------------------------------------------
# 比较


def read_entries(path: Path) -> Iterator[Entry]:
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n"):  # 被打断的末行不算
                yield Entry(*line.rstrip("\n").split("\t"))


def without_places(sums: str) -> str:
    return re.sub(r"@\d+", "", sums)


def first_difference(left: Path, right: Path) -> tuple[int, list[tuple[Entry | None, Entry | None]]]:
    """(相同的行数, 最后几对与第一对不同的)；没有不同时第二项是空的。地址不同不算不同。"""
    recent: list[tuple[Entry | None, Entry | None]] = []
    count = 0
    for pair in zip_longest(read_entries(left), read_entries(right)):
        ours, theirs = pair
        recent = [*recent[-CONTEXT_LINES:], pair]
        if ours is None or theirs is None or not same(ours, theirs):
            return count, recent
        count += 1
    return count, []


def same(ours: Entry, theirs: Entry) -> bool:
    return ours.where == "machine" or [without_places(field) for field in ours] == [
        without_places(field) for field in theirs
    ]


def verdict(ours: Entry | None, theirs: Entry | None) -> str:
    """第一处不同说明了什么。"""
    if ours is None or theirs is None:
        return "一次的记录先结束了，此前没有不同"
    if ours[:3] != theirs[:3]:
        return "做的事不同：算子的次序或控制流变了"
    what = f"第 {ours.step} 步，{ours.where}，{ours.name}"
    if without_places(ours.inputs) != without_places(theirs.inputs):
        return f"{what}：输入已经不同，而此前的记录都相同，改写它的不在记录里（别的线程、没有记录的 C++，或未初始化）"
    places = "，输入的地址对齐也不同" if ours.inputs != theirs.inputs else ""
    return f"{what}：输入逐位相同，输出不同：{ours.outputs} 与 {theirs.outputs}{places}"


def compare(left: Path, right: Path) -> int:
    count, pairs = first_difference(left, right)
    if not pairs:
        print(f"{count} 行全部相同")
        return 0
    print(f"前 {count} 行相同；{verdict(*pairs[-1])}\n")
    for ours, theirs in pairs:
        is_same = ours is not None and theirs is not None and same(ours, theirs)
        for mark, entry in (("=", ours),) if is_same else (("<", ours), (">", theirs)):
            print(mark, "（没有了）" if entry is None else "  ".join(entry))
    return 1


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    recording = verbs.add_parser("record", help="在记录之下运行一个脚本")
    recording.add_argument("output", type=Path, help="记录的文件")
    recording.add_argument("--level", choices=("step", "op"), default="step", help="记到模块与步，还是每个算子")
    recording.add_argument("--steps", default="0:1000000000", help="只记 起:止 之内的步（缺省全部）")
    recording.add_argument("command", nargs=argparse.REMAINDER, help="脚本与它的参数")
    comparing = verbs.add_parser("compare", help="两份记录的第一处不同")
    comparing.add_argument("left", type=Path)
    comparing.add_argument("right", type=Path)
    return parser.parse_args(argv)


def main() -> int:
    ranks = [word for word in sys.argv[1:] if word.startswith("--local_rank")]  # 启动器加在最前面的，交给脚本
    args = parse_args([word for word in sys.argv[1:] if word not in ranks])
    if args.verb == "compare":
        return compare(args.left, args.right)
    begin, end = (int(number) for number in args.steps.split(":"))
    record(args.output, args.level, (begin, end), [*args.command, *ranks])
    return 0


if __name__ == "__main__":
    sys.exit(main())
