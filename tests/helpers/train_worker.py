"""test_train.py 拉起的训练进程：运行 train.py 自己的 main()，只在旁边观察，所见写进 OBSERVE_DIR 供测试比较。

    OBSERVE_DIR=DIR python tests/train_worker.py <train.py 的参数>
        观察一次训练：各步的行、检查点的 logits、各进程的切分
    OBSERVE_DIR=DIR python tests/train_worker.py --gradients TASKS.json
        逐个任务取第一步更新前的完整梯度
    OBSERVE_DIR=DIR python tests/train_worker.py --failures TASKS.json
        逐个任务运行 train.run_main()，记下退出码与输出
TASKS.json 是 {任务名: [train.py 的参数]}。
"""

import contextlib
import io
import json
import os
import sys
import threading
import traceback
import zlib
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file

import train
from benchmarks.speed.protocol import process_memory_mb
from finetune.process.interruption import leave
from utils import global_rank

OBSERVE_DIR = Path(os.environ.get("OBSERVE_DIR", "."))
# 两行 token，第二行右侧填充；测试进程用同样的输入算读回的模型
PROBE_IDS = torch.stack([torch.arange(260, 276), torch.arange(300, 316)])
PROBE_MASK = torch.ones_like(PROBE_IDS)
PROBE_MASK[1, 11:] = 0


class CapturedError(Exception):
    """梯度已经取到，不必更新。"""


def write(name: str, content):
    (OBSERVE_DIR / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def wrap(name: str, around):
    """把 train 模块里的函数换成 around(原函数, *参数)。"""
    original = getattr(train, name)
    setattr(train, name, lambda *args, **kwargs: around(original, *args, **kwargs))


# ---------------------------------------------------------------------------------------------------------------------
# 观察一次训练


class MemoryMeter(threading.Thread):
    """取样本进程匿名内存（不含映射的文件页）的峰值，MB。"""

    def __init__(self):
        super().__init__(daemon=True)
        self.running, self.start_mb = True, self.now()
        self.peak_mb = self.start_mb

    @staticmethod
    def now() -> float:
        return process_memory_mb("RssAnon", "RssShmem")

    def run(self):
        while self.running:
            self.peak_mb = max(self.peak_mb, self.now())
            threading.Event().wait(0.002)

    def stop(self) -> dict[str, float]:
        self.running = False
        self.join()
        return {"start_mb": self.start_mb, "peak_mb": max(self.peak_mb, self.now())}


def observe():
    """装上各处的观察点；它们不改变训练。"""
    seen = {"steps": [], "memory": {}, "parts": {}, "initial": {}, "dropout": []}

    def build_model(original, *args, **kwargs):
        meter = MemoryMeter()
        meter.start()
        model = original(*args, **kwargs)
        seen["memory"] = meter.stop()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not hasattr(parameter, "ds_tensor"):
                seen["initial"][name] = zlib.crc32(parameter.detach().float().numpy().tobytes())
        return model

    def build_engine(original, *args, **kwargs):
        result = original(*args, **kwargs)
        module = result[0].module
        for name, parameter in module.named_parameters():
            local = parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel()
            seen["parts"][name] = [getattr(parameter, "ds_numel", parameter.numel()), local]
        dropouts = [m for m in module.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
        if dropouts:
            state = torch.get_rng_state()
            seen["dropout"] = (dropouts[0](torch.ones(64)) != 0).tolist()
            torch.set_rng_state(state)
        return result

    def train_step(original, engine, step, *args, **kwargs):
        result = original(engine, step, *args, **kwargs)
        batches = [
            {k: v.tolist() if torch.is_tensor(v) else v for k, v in batch.items()} for batch in step.micro_batches
        ]
        seen["steps"].append(
            {"step": engine.global_steps, "rows": step.rows, "targets": step.num_target_tokens, "batches": batches}
        )
        return result

    def save_checkpoint(original, engine, *args, **kwargs):
        path = original(engine, *args, **kwargs)
        engine.eval()
        with torch.no_grad():
            logits = engine(
                input_ids=PROBE_IDS.to(engine.device), attention_mask=PROBE_MASK.to(engine.device), use_cache=False
            ).logits
        engine.train()
        if global_rank() == 0:
            save_file({"logits": logits.float().cpu()}, OBSERVE_DIR / f"{path.name}.safetensors")
        return path

    for function in (build_model, build_engine, train_step, save_checkpoint):
        wrap(function.__name__, function)
    code = train.run_main()
    write(f"seen-{global_rank()}.json", seen)
    return code


# ---------------------------------------------------------------------------------------------------------------------
# 一步的梯度


def fill_adapter(model: torch.nn.Module) -> torch.nn.Module:
    """给适配器的参数填上只由名字决定的非零值：LoRA 的 B 从 0 开始时，A 的梯度全是 0，看不出对错。"""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_" in name or name.startswith("prompt_encoder.")):
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def capture_gradients(tasks: dict[str, list[str]]):
    """逐个任务走到第一次更新之前，存下各可训练参数的完整梯度。"""

    def train_step(original, engine, step, *args, **kwargs):
        update = engine.step

        def capture(*step_args, **step_kwargs):
            if not engine.is_gradient_accumulation_boundary():
                return update(*step_args, **step_kwargs)
            trainable = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
            gradients = {name: safe_get_full_grad(p) for name, p in trainable}
            if global_rank() == 0:
                gradients = {name: g.detach().float().cpu().clone() for name, g in gradients.items()}
                save_file(gradients, OBSERVE_DIR / f"{current}.safetensors")
                write(f"{current}.json", {"micro_batches": len(step.micro_batches), "targets": step.num_target_tokens})
            engines.append(engine)
            raise CapturedError

        engine.step = capture
        original(engine, step, *args, **kwargs)

    engines, current = [], ""
    wrap("train_step", train_step)
    wrap("build_model", lambda original, *args, **kwargs: fill_adapter(original(*args, **kwargs)))
    for current in tasks:  # 上面的 capture 用 current
        sys.argv = ["train.py", *tasks[current]]
        with contextlib.suppress(CapturedError):
            train.main()
        engines.pop().destroy()
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# 用户的错误


def collect_failures(tasks: dict[str, list[str]]):
    """逐个任务运行 train.run_main()，记下退出码与打印的内容；抛出的异常记下回溯。"""
    for name, argv in tasks.items():
        sys.argv = ["train.py", *argv]
        with contextlib.redirect_stdout(io.StringIO()) as output:
            try:
                code = train.run_main()
            except SystemExit as error:
                code = error.code
            except BaseException:
                code = "traceback"
                print(traceback.format_exc())
        if global_rank() == 0:
            write(f"{name}.json", {"code": code, "output": output.getvalue()})
    return 0


def main() -> int:
    torch.set_num_threads(1)
    modes = {"--gradients": capture_gradients, "--failures": collect_failures}
    if len(sys.argv) == 3 and sys.argv[1] in modes:
        code = modes[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
    else:
        code = observe()
    return code


if __name__ == "__main__":
    leave(main())
