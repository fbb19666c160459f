"""预测的测试共用：逐个 token 的贪心续写作对照，小的适配器与 Predictor，几种写法的行。"""

import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

from baichuan import BaichuanForCausalLM
from finetune.cli.predict_checks import prepare
from finetune.cli.predict_flags import parse_args
from finetune.inference.generation import generate_batch, plan_batches
from finetune.inference.predictor import Predictor

ROWS = [
    {"instruction": "抽取三元组：", "input": "发动机水温高，风扇不转。", "output": "发动机_部件故障_水温高", "id": 7},
    {"instruction": "抽取", "input": "", "output": ["风扇_部件故障_不转", "风扇_性能故障_不转"]},
    {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好！"}]},
    {"instruction": "抽取三元组：", "input": "空调压缩机异响，更换后正常。" * 3, "output": ""},
]


def by_hand(model, prompt, num_tokens):
    """没有缓存、没有填充的贪心续写。"""
    ids = list(prompt)
    for _ in range(num_tokens):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == model.config.eos_token_id:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


def make_adapter(base, path, seed=0, kind="lora"):
    """peft 布局的适配器，结果与基座不同。"""
    torch.manual_seed(seed)
    config = {
        "lora": LoraConfig(task_type="CAUSAL_LM", r=2 + seed, target_modules=["W_pack"], init_lora_weights=False),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }[kind]
    get_peft_model(BaichuanForCausalLM.from_pretrained(base, dtype=torch.float32), config).save_pretrained(path)
    return path


def make_predictor(*flags):
    args = parse_args([str(flag) for flag in (*flags, "--device", "cpu", "--precision", "fp32", "--max_new_tokens", 6)])
    plan = prepare(args)
    predictor = Predictor(args, plan.checkpoints[0], plan.adapters)
    predictor.load_model(plan.device)
    return predictor


def generate_all(model, prompts, config, batch_size=8, on_batch=lambda count: None, **options) -> list[list[int]]:
    """全部提示词的续写，次序与输入相同；怎样成批见 plan_batches。

    on_batch 在每批之后以该批行数调用（进度条）。
    """
    results: list[list[int]] = [[] for _ in prompts]
    for batch in plan_batches(prompts, batch_size):
        for index, ids in zip(
            batch, generate_batch(model, [prompts[i] for i in batch], config, **options), strict=True
        ):
            results[index] = ids
        on_batch(len(batch))
    return results
