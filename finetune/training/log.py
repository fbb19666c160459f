"""训练过程的记录：控制台、train_log.jsonl、TensorBoard、SwanLab 与 loss.png；只在 0 号进程写。"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from tqdm import tqdm

from finetune.process.accelerator import peak_memory_mb
from utils import global_rank, log_rank_0, raise_together, replacing, write_failed, write_json


class SwanLabWriter:
    """SwanLab 的离线记录：不联网，写在 directory 里，以后可用 swanlab sync 上传；接口同 SummaryWriter。

    续训是另一条记录，从续上的那一步起。不接管终端，不收集机器、代码库与环境的信息：run_config.json 里已有。
    """

    def __init__(self, directory: Path, name: str) -> None:
        import swanlab

        off = ("hardware", "runtime", "requirements", "git", "swanlab", "monitor")
        settings = swanlab.Settings(
            interactive=False,
            terminal=swanlab.Settings.Terminal(proxy_type="none"),
            probe=swanlab.Settings.Probe(**dict.fromkeys(off, False)),
        )
        directory.mkdir(parents=True, exist_ok=True)
        self._run = swanlab.init(
            project="baichuan-finetuning", name=name, mode="offline", log_dir=str(directory), settings=settings
        )

    def add_scalar(self, key: str, value: float, step: int) -> None:
        """记一个数。"""
        self._run.log({key: value}, step=step)

    def flush(self) -> None:
        """SwanLab 自己按批写盘。"""

    def close(self) -> None:
        """写完全部的数。"""
        self._run.finish()


def open_writer(report: str, logging_dir: Path, name: str, purge_step: int | None):
    """--report_to 的一项：TensorBoard 写在 logging_dir，SwanLab 写在它下面的 swanlab/。"""
    if report == "swanlab":
        return SwanLabWriter(logging_dir / "swanlab", name)
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(logging_dir), purge_step=purge_step)


class TrainLog:
    """累计每一步的数，到该显示的步写出一条：loss 是上一条以来各项（目标 token，或偏好的行）的平均。

    Args:
        output_dir: train_log.jsonl 与 loss.png 写在这里。
        logging_dir: TensorBoard 与 SwanLab 的目录。
        num_steps: 优化器步的总数。
        show_loss_step: 每隔多少步写一条；第一步与最后一步总写。
        state: 续训时 state() 存下的累计；从头开始为 None。
        report_to: --report_to 的几项。

    写不下（磁盘满、只读）时不抛出，记在 error 里：别的进程还在等下一次通信，由 Interruption.agreed 告诉它们。
    """

    def __init__(
        self,
        output_dir: Path,
        logging_dir: Path,
        num_steps: int,
        show_loss_step: int,
        state: dict | None = None,
        report_to: Sequence[str] = ("tensorboard",),
    ):
        self.path = output_dir / "train_log.jsonl"
        self.num_steps, self.show_loss_step = num_steps, show_loss_step
        state = state or {"step": 0, "loss_sum": 0.0, "targets": 0, "tokens": 0, "seconds": 0.0, "elapsed": 0.0}
        self._step, self._loss_sum = state["step"], state["loss_sum"]
        self._num_items, self._num_tokens = state["targets"], state["tokens"]
        self._figures: dict[str, tuple[float, int]] = dict(state.get("figures", {}))
        self._seconds, self._elapsed_before = state["seconds"], state["elapsed"]
        self._started = self._window_started = time.perf_counter()
        self._paused = self._started
        self._progress = self._writers = None
        self.error: OSError | None = None
        if global_rank() == 0:
            cut_log(self.path, self._step, drops_evaluation=state.get("owes_evaluation", False))
            self._file = self.path.open("a", encoding="utf-8")
            purge_step = self._step + 1 if self._step else None
            name = output_dir.resolve().name
            self._writers = [open_writer(report, logging_dir, name, purge_step) for report in report_to]
            self._progress = tqdm(  # 重定向到文件时只有一行行的记录，没有进度条
                total=num_steps, initial=self._step, desc="训练", unit="步", dynamic_ncols=True, disable=None
            )

    def step(
        self,
        step: int,
        epoch: float,
        loss: float,
        num_targets: int,
        num_tokens: int,
        lr: float,
        grad_norm: float,
        num_overflows: int = 0,
        figures: Mapping[str, tuple[float, int]] = MappingProxyType({}),
    ):
        """记一步。loss 是这一步各项（目标 token，或偏好的行）的平均，num_targets 是有几项；figures 是别的 (和, 个数)。

        num_tokens 是所有进程的非填充 token 数。
        num_overflows 是至今 fp16 溢出的次数，不是 0 才写；溢出的一步梯度范数不是有限数，写成 null。
        """
        self._step = step
        self._loss_sum += loss * num_targets
        self._num_items += num_targets
        for name, (total, count) in figures.items():
            before = self._figures.get(name, (0.0, 0))
            self._figures[name] = before[0] + total, before[1] + count
        self._num_tokens += num_tokens
        if self._progress is not None:
            self._progress.update(1)
        if step != 1 and step != self.num_steps and step % self.show_loss_step:
            return
        now = time.perf_counter()
        self._seconds += now - self._window_started
        record = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": self._loss_sum / max(1, self._num_items),
            **{name: total / count for name, (total, count) in self._figures.items() if count},
            "lr": lr,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "tokens": self._num_tokens,
            "tokens_per_second": self._num_tokens / max(self._seconds, 1e-9),
            "elapsed_seconds": self._elapsed_before + now - self._started,
            "memory_mb": peak_memory_mb(),
        }
        if num_overflows:
            record["overflows"] = num_overflows
        self.write(record, step)
        self._loss_sum, self._num_items, self._num_tokens, self._seconds, self._figures = 0.0, 0, 0, 0.0, {}
        self._window_started = time.perf_counter()
        if self._progress is not None:
            norm = f"{grad_norm:.4g}" if grad_norm > 1e6 else f"{grad_norm:.3f}"
            told = "".join(f"{name} {record[name]:.4f}  " for name in figures if name in record)
            self._progress.set_postfix_str(f"loss {record['loss']:.4f}")
            log_rank_0(
                f"步 {step}/{self.num_steps}  轮 {epoch:.2f}  loss {record['loss']:.4f}  {told}lr {lr:.3g}  "
                f"梯度范数 {norm}  {record['tokens_per_second']:.0f} token/s  "
                f"内存 {record['memory_mb']:.0f} MB" + (f"  溢出 {num_overflows} 次" if num_overflows else "")
            )

    def write(self, record: dict, step: int):
        """写一条到 train_log.jsonl、TensorBoard 与 SwanLab（键前加 train/；已带 / 的原样）。"""
        if self._writers is None or self.error is not None:
            return
        try:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._file.flush()
            for writer in self._writers:
                for key, value in record.items():
                    if key not in ("step", "epoch") and isinstance(value, (int, float)):
                        writer.add_scalar(key if "/" in key else f"train/{key}", value, step)
                writer.flush()
        except OSError as error:
            self.error = write_failed(error)

    def state(self) -> dict:
        """续训所需的累计：上一条以来的损失、token 与时间；只在 pause() 之后取。"""
        return {
            "step": self._step,
            "loss_sum": self._loss_sum,
            "targets": self._num_items,
            **({"figures": self._figures} if self._figures else {}),
            "tokens": self._num_tokens,
            "seconds": self._seconds,
            "elapsed": self._elapsed_before + time.perf_counter() - self._started,
        }

    def pause(self):
        """评估与保存之前调用：此后的时间不计入 tokens_per_second。"""
        self._paused = time.perf_counter()
        self._seconds += self._paused - self._window_started

    def resume(self):
        """评估与保存之后调用。"""
        self._window_started = time.perf_counter()
        if self._progress is not None and not self._progress.disable:  # 剩余时间只按训练的步推算
            self._progress.start_t += self._window_started - self._paused
            self._progress.last_print_t += self._window_started - self._paused

    def close(self) -> OSError | None:
        """画 loss.png，关闭文件；返回写不下的错误。"""
        if self._writers is None:
            return None
        self._progress.close()
        try:
            for writer in self._writers:
                writer.close()
            self._file.close()
            draw_loss(self.path)
        except OSError as error:
            self.error = self.error or write_failed(error)
        return self.error


def open_log(
    output_dir: Path,
    logging_dir: str | None,
    num_steps: int,
    show_loss_step: int,
    state: dict | None,
    configs: dict[str, dict],
    report_to: Sequence[str] = ("tensorboard",),
) -> TrainLog:
    """0 号进程写下 configs（文件名 → 内容），各进程打开记录；集合操作。参数其余同 TrainLog。

    Raises:
        AgreedError: 0 号进程写不下；所有进程一起停下。
    """
    log = error = None
    try:
        for name, content in configs.items() if global_rank() == 0 else ():
            write_json(output_dir / name, content)
        directory = Path(logging_dir or output_dir / "runs")
        log = TrainLog(output_dir, directory, num_steps, show_loss_step, state, report_to)
    except OSError as os_error:
        error = write_failed(os_error)
    raise_together(error)
    return log


def cut_log(path: Path, last_step: int, drops_evaluation: bool = False):
    """把 train_log.jsonl 截到 last_step 为止（续训用）；写了一半的行去掉，要补做的最后一步的评估也去掉。"""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        is_redone = drops_evaluation and record["step"] == last_step and "eval/nll" in record
        if record["step"] <= last_step and not is_redone:
            kept.append(line)
    with replacing(path) as stream:
        stream.writelines(line + "\n" for line in kept)


def draw_loss(log_path: Path):
    """把 train_log.jsonl 画成同目录下的 loss.png：上面是训练与评估的损失，有别的指标时下面再画它。

    这台机器没有中文字体时，图里的字用英文。
    """
    from finetune.comparison.fonts import find_font
    from finetune.comparison.plots import set_up

    font = find_font()

    def word(chinese: str, english: str) -> str:
        return english if font is None else chinese

    records = [json.loads(line) for line in log_path.read_text(encoding="utf-8").splitlines()]

    def curve(key: str) -> tuple[list, list]:
        found = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        return [step for step, _ in found], [value for _, value in found]

    names = {key.removeprefix("eval/") for record in records for key in record if key.startswith("eval/")}
    metrics = sorted(name for name in names if f"{name}_ci_low" in names or name == "accuracy")
    held_out = "loss" if "loss" in names else "nll"  # 偏好的各阶段看它们自己的损失
    pyplot = set_up(font)
    figure, panels = pyplot.subplots(
        1 + len(metrics), figsize=(7, 4.2 + 2.6 * len(metrics)), layout="constrained", sharex=True, squeeze=False
    )
    figure.suptitle(f"{word('训练过程：', '')}{log_path.resolve().parent.name}")
    top, *others = panels[:, 0]
    top.plot(*curve("loss"), label=word("训练", "train"), color="#0072b2", linewidth=1.6, marker=".", markersize=5)
    if held_out in names:
        top.plot(
            *curve(f"eval/{held_out}"),
            label=word("评估", "eval"),
            color="#d55e00",
            linewidth=1.6,
            marker="o",
            markersize=5,
        )
    per_token, per_pair = word("每个目标 token 的损失", "loss per target token"), word("每对的损失", "loss per pair")
    top.set_ylabel(per_token if held_out == "nll" else per_pair)
    top.legend(frameon=False)
    for axes, metric in zip(others, metrics, strict=True):
        steps, scores = curve(f"eval/{metric}")
        axes.plot(steps, scores, color="#d55e00", linewidth=1.6, marker="o", markersize=5)
        if f"{metric}_ci_low" in names:
            low, high = (curve(f"eval/{metric}_ci_{side}")[1] for side in ("low", "high"))
            axes.fill_between(steps, low, high, color="#d55e00", alpha=0.15)
        axes.set_ylabel(f"{word('评估：', 'eval ')}{metric}")
    panels[-1, 0].set_xlabel(word("步", "step"))
    figure.savefig(log_path.with_name("loss.png"), dpi=150)
    pyplot.close(figure)
