"""interruption.py：真实的 deepspeed 训练与真实的信号；存好再停，续训与没有打断过的一次逐位相同。"""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from paths import ROOT
from resume_runs import assert_same_bits
from train_runs import SIZES, records_of, write_rows

from finetune.checkpoint.manifest import verify_checkpoint
from finetune.process.interruption import EXIT_INTERRUPTED, Interruption
from finetune.process.training_process import Ended, TrainingProcess, free_port

# 48 行、全局 batch 2：每轮 24 步，共 10 轮；每轮末评估并保存。被打断的总是其中很早的一步
STEPS_PER_EPOCH, STEPS = 24, 240
DEVICE = torch.device("cpu")


def flags_of(base: Path, directory: Path, num_ranks: int, *more, zero: str = "zero2_no", method: str = "lora") -> list:
    return [
        *("--train_path", directory / "rows.json", "--model_name_or_path", base, "--output_dir", directory / "output"),
        *("--ds_file", ROOT / f"ds_{zero}_offload.json", "--train_type", method, "--precision", "fp32"),
        *("--max_len", 96, "--max_src_len", 64, "--show_loss_step", 1, "--num_train_epochs", 10),
        *("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2 // num_ranks, *more),
    ]


@contextmanager
def training(base: Path, directory: Path, num_ranks: int, *more, **options):
    """一次训练，已经走了几步。"""
    if not (directory / "rows.json").exists():
        write_rows(directory / "rows.json", 48)
    with TrainingProcess(
        flags_of(base, directory, num_ranks, *more, **options), num_ranks, directory / "log.txt"
    ) as run:
        yield run


@pytest.fixture(scope="module")
def base(tiny_checkpoint) -> Path:
    return tiny_checkpoint("baichuan2-7b", **SIZES)


def check_saved(ended: Ended, directory: Path, reason: str) -> Path:
    """停下的样子：所有进程都结束，说了原因，最后一步的检查点完整，没有写了一半的东西；返回那个检查点。"""
    assert ended.returncode is not None, f"没有结束\n{ended.output[-3000:]}"
    assert f"收到 {reason}，已保存；用 --resume auto 接着训练" in ended.output, ended.output[-3000:]
    # deepspeed 自己收到 Ctrl-C 时打印它的 KeyboardInterrupt
    assert "Traceback" not in ended.output or "KeyboardInterrupt" in ended.output, ended.output[-3000:]
    last = records_of(directory / "output")[-1]["step"]
    assert last < STEPS
    saved = directory / "output" / f"epoch-{(last - 1) // STEPS_PER_EPOCH + 1}-step-{last}"
    assert verify_checkpoint(saved) == []
    assert not list((directory / "output").glob(".tmp-*"))
    return saved


@pytest.mark.slow
@pytest.mark.deepspeed
def test_sigterm_to_one_rank_stops_both(base, tmp_path):
    with training(base, tmp_path, 2) as run:
        assert run.wait_for(r"步 3/"), run.text()[-3000:]
        run.send("rank", signal.SIGTERM, rank=1)
        ended = run.wait(60)
    check_saved(ended, tmp_path, "SIGTERM")
    assert ended.returncode == EXIT_INTERRUPTED  # launch.py 与 deepspeed 原样传回
    assert ended.seconds < 30


@pytest.mark.slow
@pytest.mark.deepspeed
def test_orphaned_ranks_save_and_stop(base, tmp_path):
    """deepspeed 与 launch.py 都被 SIGKILL：没有人转告，rank 自己发现。"""
    with training(base, tmp_path, 1) as run:
        assert run.wait_for(r"步 3/"), run.text()[-3000:]
        os.kill(run.process.pid, signal.SIGKILL)
        os.kill(run.launcher(), signal.SIGKILL)
        ended = run.wait(60)
    check_saved(ended, tmp_path, "启动器已消失")


@pytest.mark.slow
@pytest.mark.deepspeed
def test_a_killed_rank_ends_the_run(base, tmp_path):
    with training(base, tmp_path, 2) as run:
        assert run.wait_for(r"步 3/"), run.text()[-3000:]
        # DeepSpeed 的通信缓冲还映射着，名字已经删去：被杀也不留下 69 MB
        for pid in run.ranks():
            assert re.search(
                rf"deepspeed_allreduce_buffer_.*_{run.port}_. \(deleted\)", Path(f"/proc/{pid}/maps").read_text()
            )
        assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{run.port}_*"))
        run.send("rank", signal.SIGKILL, rank=1)
        ended = run.wait(60)
    assert ended.returncode not in (None, 0, EXIT_INTERRUPTED)
    assert ended.seconds < 45
    assert "通信断了" in ended.output, ended.output[-3000:]


# ---------------------------------------------------------------------------------------------------------------------
# 较慢的

# (发给谁, 信号, deepspeed 的退出码)；负数是 deepspeed 自己死于信号
SENT = [
    ("rank", signal.SIGINT, 75),
    ("rank", signal.SIGUSR1, 75),
    ("group", signal.SIGTERM, -15),
    ("group", signal.SIGINT, -2),
    ("group", signal.SIGUSR1, -10),
    ("launcher", signal.SIGTERM, 1),
    ("launcher", signal.SIGINT, 1),
    ("launcher", signal.SIGKILL, 0),
    ("runner", signal.SIGTERM, -15),
    ("runner", signal.SIGINT, -2),
    ("runner", signal.SIGUSR1, -10),
]


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize(("target", "number", "code"), SENT, ids=[f"{t}-{n.name}" for t, n, _ in SENT])
def test_any_signal_to_anyone_saves(base, tmp_path, target, number, code):
    with training(base, tmp_path, 2) as run:
        assert run.wait_for(r"步 3/"), run.text()[-3000:]
        run.send(target, number, rank=1)
        ended = run.wait(90)
    # launch.py 收到什么都给各 rank 补发 SIGTERM；deepspeed 什么也不转告，rank 自己发现它没了
    is_told = target == "launcher" and number != signal.SIGKILL
    reason = "SIGTERM" if is_told else "启动器已消失" if target in ("runner", "launcher") else number.name
    saved = check_saved(ended, tmp_path, reason)
    assert ended.returncode == code
    assert not (tmp_path / "output" / "summary.json").exists()  # 只有走完的才有
    print(f"{target} {number.name}：退出码 {ended.returncode}，{ended.seconds:.1f} 秒，存在 {saved.name}")


@pytest.mark.slow
@pytest.mark.deepspeed
def test_a_second_sigint_leaves_at_once(base, tmp_path):
    """第一次 Ctrl-C 之后正在保存；第二次不等它。"""
    with training(base, tmp_path, 1) as run:
        assert run.wait_for(r"步 3/"), run.text()[-3000:]
        [pid] = run.ranks()
        os.kill(pid, signal.SIGINT)
        assert run.wait_until(lambda: any((tmp_path / "output").glob(".tmp-epoch-*")), 30, 0.0005)
        os.kill(pid, signal.SIGINT)
        ended = run.wait(60)
    assert ended.returncode == 128 + signal.SIGINT
    assert "已保存" not in ended.output
    assert not list((tmp_path / "output").glob("epoch-*"))


@pytest.mark.slow
@pytest.mark.deepspeed
def test_a_signal_during_a_save_finishes_it(base, tmp_path):
    with training(base, tmp_path, 2, "--save_model_step", 2, method="full", zero="zero3") as run:
        output = tmp_path / "output"
        assert run.wait_until(lambda: any(output.glob(".tmp-epoch-*")), 180, 0.001), run.text()[-3000:]
        [partial] = output.glob(".tmp-epoch-*")
        run.send("group", signal.SIGTERM)
        ended = run.wait(90)
    check_saved(ended, tmp_path, "SIGTERM")
    assert verify_checkpoint(output / partial.name.removeprefix(".tmp-")) == []


@pytest.mark.slow
@pytest.mark.deepspeed
def test_a_signal_during_an_evaluation(base, tmp_path):
    """评估 240 行要几秒；信号之后很快停下，续训时补上这次评估，与没有打断过的一次逐位相同。"""
    write_rows(tmp_path / "eval.json", 240)
    more = ("--eval_path", tmp_path / "eval.json", "--max_steps", 30)
    with training(base, tmp_path, 2, *more) as run:
        assert run.wait_for(r"步 24/"), run.text()[-3000:]
        time.sleep(0.3)
        run.send("rank", signal.SIGTERM, rank=1)
        ended = run.wait(90)
    saved = check_saved(ended, tmp_path, "SIGTERM")
    assert saved.name in ("epoch-1-step-24", "epoch-2-step-25")
    with training(base, tmp_path, 2, *more, "--resume", "auto") as run:
        ended = run.wait(180)
    assert ended.returncode == 0, ended.output[-3000:]
    (tmp_path / "output").rename(tmp_path / "resumed")
    with training(base, tmp_path, 2, *more) as run:
        ended = run.wait(180)
    assert ended.returncode == 0, ended.output[-3000:]
    assert_same_bits(tmp_path / "resumed" / "epoch-2-step-30", tmp_path / "output" / "epoch-2-step-30")
    assert records_of(tmp_path / "resumed") == records_of(tmp_path / "output")


# ---------------------------------------------------------------------------------------------------------------------
# 不起训练的


@pytest.fixture
def handlers():
    """测试之后放回 pytest 自己的信号处理函数。"""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_remembered(handlers, number):
    interruption = Interruption()
    assert interruption.agreed(DEVICE) is False
    os.kill(os.getpid(), number)
    assert interruption.agreed(DEVICE) is True
    assert interruption.reason == number.name


def test_sigterm_after_sigint_is_not_a_second_one(handlers):
    """launch.py 在收到 Ctrl-C 之后给各 rank 补发 SIGTERM。"""
    interruption = Interruption()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.agreed(DEVICE)
    assert interruption.reason == "SIGINT"


def test_a_second_sigint_exits_with_130(handlers):
    pid = os.fork()
    if pid == 0:
        Interruption()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGINT


def test_a_vanished_parent_is_noticed(handlers, tmp_path):
    """孙进程在父进程死后发现；父进程还在时没有。"""
    result = tmp_path / "result"
    middle = os.fork()
    if middle == 0:
        child = os.fork()
        if child:
            time.sleep(0.5)
            os._exit(0)
        interruption = Interruption()
        interruption.watch(os.getppid())
        first = interruption.agreed(DEVICE)
        deadline = time.monotonic() + 10
        while not interruption.agreed(DEVICE) and time.monotonic() < deadline:
            time.sleep(0.02)
        result.write_text(f"{first} {interruption.reason}", encoding="utf-8")
        os._exit(0)
    os.waitpid(middle, 0)
    deadline = time.monotonic() + 10
    while not result.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert result.read_text(encoding="utf-8") == "False 启动器已消失"


# ---- 错误与退出 ----

TWO_RANKS = """
import atexit, os, sys, torch, torch.distributed as dist
from finetune.process.interruption import Interruption, leave
dist.init_process_group("gloo")
rank = dist.get_rank()
action = sys.argv[1]
try:
    if action == "error":
        Interruption().agreed(torch.device("cpu"), OSError("磁盘已满") if rank == 0 else None)
    elif action == "dead":
        dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), 9)
        dist.barrier()
    elif action == "held":
        class Finalized:
            def __del__(self):
                os.write(1, b"finalized ")
        held = Finalized(), dist.new_group()
        atexit.register(os.write, 1, b"atexit ")
        sys.stdout.write("unflushed ")
except RuntimeError as error:
    print(rank, type(error).__name__, str(error).splitlines()[0], flush=True)
leave({{"error": 0, "dead": 1, "held": 75}}[action])
"""


def two_ranks(tmp_path, action: str) -> tuple[list[int], list[str]]:
    """两个 gloo 进程 → (退出码, 各自的输出)。"""
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS.format(root=str(ROOT)), encoding="utf-8")
    port = str(free_port())
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), action], env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [run.communicate(timeout=60)[0] for run in runs]
    return [run.returncode for run in runs], outputs


def test_an_error_of_rank_0_reaches_everyone_at_once(tmp_path):
    codes, outputs = two_ranks(tmp_path, "error")
    assert codes == [0, 0], outputs
    assert [f"{rank} AgreedError rank 0：磁盘已满" in output for rank, output in enumerate(outputs)] == [True, True]


def test_leaving_does_not_wait_for_a_dead_process(tmp_path):
    codes, outputs = two_ranks(tmp_path, "dead")
    assert codes == [1, -signal.SIGKILL], outputs


def test_leaving_runs_atexit_and_flushes_but_never_finalizes_the_interpreter(tmp_path):
    """引擎一直持有通信组：gloo 的线程在解释器收尾时放下张量，要取 GIL，做完了的训练就以 SIGABRT 结束。"""
    codes, outputs = two_ranks(tmp_path, "held")
    assert codes == [75, 75], outputs
    assert [sorted(output.splitlines()[-1].split()) for output in outputs] == [["atexit", "unflushed"]] * 2
