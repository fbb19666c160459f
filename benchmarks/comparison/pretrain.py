"""给微型检查点一点知识：在通用文本与任务格式的行上从头训练，供 build_tiny_model.py --pretrain 使用。

纯文本按段落切成块，每个 token 都是目标；JSON 行按 train.py 的 plain 格式编码，也每个 token 都是目标，回答部分另加权重
（分类的回答只有一两个 token，不加权就淹没在正文里）。样本并排（各看各的），权重与 Adam 的状态是 fp32，计算用 bf16。
token 少，从输入里抄一段这件事要先学会才谈得上抽取：初值带一点抄写的倾向（lean_to_copying），很短的样本先学。
次序、初值与线程数都固定：同一种机器上，同样的参数得到逐位相同的权重。
"""

import hashlib
import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from finetune.terminal import long_job, watched

BLOCK_TOKENS = 256  # 纯文本一块的长度，也是任务行的上限
STEP_TOKENS = 1024  # 一步并排的 token 数；token 少，步数比每步的大小要紧
SHORT_TOKENS = 34  # 至多这么长的样本先学：抄写在短的里容易学会
LEARNING_RATE, WEIGHT_DECAY, BETAS = 1e-3, 0.1, (0.9, 0.95)
WARMUP_SHARE, MIN_LR_RATIO, CLIP_NORM = 0.05, 0.02, 1.0
ANSWER_WEIGHT = 2.0
EMBEDDING_SCALE, QUERY_SCALE, OUTPUT_SCALE = 5.0, 2.0, 0.2  # lean_to_copying 的三个倍数

Block = tuple[list[int], int]  # (token id, 回答从第几个 token 起；纯文本为其长度，没有回答)


def text_blocks(text: str, encode, eos: int) -> list[Block]:
    """纯文本 → 块：各段落依次相接，段落之间是换行，空行处加 eos；切成 BLOCK_TOKENS 长。"""
    ids: list[int] = []
    for line in watched(text.splitlines(keepends=True), "预训练：分词", "行"):
        ids += encode(line) if line.strip() else [eos]
    return [(ids[i : i + BLOCK_TOKENS], len(ids[i : i + BLOCK_TOKENS])) for i in range(0, len(ids), BLOCK_TOKENS)]


def row_blocks(path: Path, tokenizer) -> list[Block]:
    """JSON 行 → 块：与 train.py 的 plain 格式逐个 id 相同；超长的截断。"""
    from finetune.data.prompting import encode_sample
    from finetune.data.samples import read_samples

    samples = watched(read_samples(path), f"预训练：分词 {path.name}", "条")
    encoded = [encode_sample(s, tokenizer, "plain", BLOCK_TOKENS, BLOCK_TOKENS * 3 // 4) for s in samples]
    return [(list(sample.input_ids), sample.num_src_tokens) for sample in encoded]


def read_blocks(files: Sequence[Path], tokenizer) -> list[Block]:
    """全部文件的块；同一个文件写几次就用几遍。文件不存在或没有内容时抛 ValueError。"""
    blocks: list[Block] = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"--pretrain 的文件 {file} 不存在，请检查路径")
        if file.suffix in (".json", ".jsonl"):
            blocks += row_blocks(file, tokenizer)
        else:
            blocks += text_blocks(file.read_text(encoding="utf-8"), tokenizer.encode_plain, tokenizer.eos_token_id)
    blocks = [block for block in blocks if len(block[0]) > 1]
    if not blocks:
        raise ValueError(f"--pretrain 的文件里没有可训练的文字：{'、'.join(map(str, files))}")
    return blocks


def deal_steps(blocks: list[Block], max_tokens: int | None, seed: int) -> list[list[Block]]:
    """打乱后依次装成各步，短的在前，每步至多 STEP_TOKENS；到 max_tokens 为止，不够就再来一遍（另一个次序）。"""
    total = sum(len(ids) for ids, _ in blocks)
    remaining = total if max_tokens is None else max_tokens
    steps: list[list[Block]] = [[]]
    rng, used = random.Random(seed), 0
    while remaining > 0:
        mixed = rng.sample(blocks, len(blocks))
        for block in sorted(mixed, key=lambda block: len(block[0]) > SHORT_TOKENS):
            size = len(block[0])
            if used + size > STEP_TOKENS and steps[-1]:
                steps.append([])
                used = 0
            steps[-1].append(block)
            used += size
            remaining -= size
            if remaining <= 0:
                break
    return steps


def lean_to_copying(weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """初值带一点抄写的倾向（仿照 Trockman 与 Kolter 2023 的 mimetic initialization）；其余的仍是随机的。

    R 是一个随机的正交阵。注意力把看到的 token 的词嵌入经 R 写进输出（W_o W_v ∝ R），词表投影的各行是词嵌入经 R，
    所以「看到什么」直接加到「说什么」上；第二层起键读 R 的那一边（W_k = W_q Rᵀ），查询因此找到「前一个是我」的位置。
    """
    generator = torch.Generator().manual_seed(seed)
    size = weights["model.norm.weight"].numel()

    def orthogonal() -> torch.Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]

    leaning, rotation = dict(weights), orthogonal()
    embedding = weights["model.embed_tokens.weight"] * EMBEDDING_SCALE
    rows = embedding.clone()
    rows[0] = rows[1]  # 补齐行是 0，没有方向
    leaning["model.embed_tokens.weight"] = embedding
    leaning["lm_head.weight"] = rows @ rotation.T / rows.norm(dim=1).mean()
    for name in [name for name in weights if name.endswith("W_pack.weight")]:
        query, key, _ = weights[name].split(size)
        value = orthogonal()
        if ".layers.0." not in name:
            query = query * QUERY_SCALE
            key = query @ rotation.T
        leaning[name] = torch.cat([query, key, value])
        leaning[name.replace("W_pack", "o_proj")] = OUTPUT_SCALE * rotation @ value.T
    return leaning


def learning_rate(step: int, num_steps: int) -> float:
    """第 step 步（从 0 起）的学习率：线性预热，之后余弦下降。"""
    warmup = max(1, round(num_steps * WARMUP_SHARE))
    if step < warmup:
        return LEARNING_RATE * (step + 1) / warmup
    share = (step - warmup) / max(1, num_steps - warmup)
    return LEARNING_RATE * (MIN_LR_RATIO + (1 - MIN_LR_RATIO) * 0.5 * (1 + math.cos(math.pi * share)))


def step_loss(model, blocks: list[Block], device: torch.device) -> tuple[torch.Tensor, float]:
    """并排的一步 → (损失, 每个 token 的平均损失)：全部 token 的平均，加上 ANSWER_WEIGHT × 回答 token 的平均。"""
    ids = torch.tensor([token for block, _ in blocks for token in block], device=device)
    rows, answers, begin = [], [], 0
    for block, answer in blocks:
        rows += range(begin, begin + len(block) - 1)  # 末尾的 token 没有下一个
        answers += range(begin + answer - 1, begin + len(block) - 1)
        begin += len(block)
    hidden = model.model(
        input_ids=ids[None], document_lengths=[len(block) for block, _ in blocks], use_cache=False
    ).last_hidden_state[0]

    def mean_loss(places: list[int]) -> torch.Tensor:
        where = torch.tensor(places, device=device)
        return model.lm_head(hidden[where], ids[where + 1]) / len(places)

    everything = mean_loss(rows)
    loss = everything + ANSWER_WEIGHT * mean_loss(answers) if answers else everything
    return loss, float(everything.detach())


def pretrain(
    directory: Path,
    weights: dict[str, torch.Tensor],
    files: Sequence[Path],
    *,
    max_tokens: int | None = None,
    num_threads: int = 2,
    seed: int = 1234,
) -> dict[str, torch.Tensor]:
    """从 weights（fp32，先经 lean_to_copying）训练，返回训练后的权重（fp32）；directory 里已有 config.json 与分词器。

    max_tokens 缺省为各文件恰好一遍。结果由随机种子、CPU 的种类与 num_threads 决定，逐位可重现，
    与环境里的线程数（OMP_NUM_THREADS）、机器忙不忙无关。
    """
    from baichuan import BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer
    from finetune.process.precision import TORCH_DTYPES, choose_precision

    config = BaichuanConfig.from_pretrained(directory)
    tokenizer = BaichuanTokenizer.from_pretrained(directory)
    steps = deal_steps(read_blocks(files, tokenizer), max_tokens, seed)
    precision, reason = choose_precision("auto")
    precision = "fp32" if precision == "fp16" else precision
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    previous_threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)  # 在初值之前：它的 QR 也随线程数变
    weights = lean_to_copying(weights, seed)
    model = BaichuanForCausalLM(config)
    missing, unexpected = model.load_state_dict(
        {name: tensor for name, tensor in weights.items() if not name.endswith("inv_freq")}, strict=False
    )
    assert not missing and not unexpected, (missing, unexpected)
    masters = {name: p.detach().clone().to(device) for name, p in model.named_parameters()}
    model = model.to(device=device, dtype=TORCH_DTYPES[precision]).train()
    groups = [
        {"params": [p for p in masters.values() if (p.ndim > 1) == is_matrix], "weight_decay": decay}
        for is_matrix, decay in ((True, WEIGHT_DECAY), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
    num_tokens = sum(len(ids) for step in steps for ids, _ in step)
    print(f"预训练：{num_tokens:,} token，{len(steps)} 步，{num_threads} 个线程，{precision}（{reason}）", flush=True)
    try:
        with long_job("预训练", num_tokens, "token") as job:
            for index, blocks in enumerate(steps):
                loss, mean = step_loss(model, blocks, device)
                loss.backward()
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(index, len(steps))
                for name, parameter in model.named_parameters():
                    masters[name].grad = parameter.grad.float()
                    parameter.grad = None
                torch.nn.utils.clip_grad_norm_(masters.values(), CLIP_NORM)
                optimizer.step()
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        parameter.copy_(masters[name])
                if not math.isfinite(mean):
                    raise ValueError(f"预训练第 {index + 1} 步的损失是 {mean}，请检查文本")
                job.update(sum(len(ids) for ids, _ in blocks), f"loss {mean:.3f}")
        print(f"预训练：做完 {len(steps)} 步，末步的 loss {mean:.4f}", flush=True)
    finally:
        torch.set_num_threads(previous_threads)
    return {**weights, **{name: tensor.detach().cpu() for name, tensor in masters.items()}}


def weights_hash(weights: dict[str, torch.Tensor]) -> str:
    """全部权重的 SHA-256：名字与数值，次序按名字，与存储格式和分片无关。"""
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(name.encode())
        total.update(weights[name].contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
