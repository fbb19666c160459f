"""用训练好的检查点预测：一条样本、一个文件（可同时评测）、几个检查点的对照、终端对话，或 HTTP 服务。

启动：
    python predict.py --model_path output-baichuan/epoch-2-step-80 --instruction "……" --input "……"
    python predict.py --model_path CKPT --test_path data/spo_1.json --output_path out.jsonl --metric triple_f1
    python predict.py --compare CKPT1 CKPT2 --test_path data/spo_1.json
    python predict.py --model_path CKPT                                   # 终端对话，/clear 清空，/exit 退出
    python predict.py --model_path BASE --adapter CKPT1 CKPT2             # 对话中用 /adapter 切换
    python predict.py --model_path BASE --adapter CKPT1 CKPT2 --serve     # OpenAI 写法的 HTTP 服务，见 docs/serving.md
"""

from finetune.cli.predict_checks import Plan, first_look, prepare
from finetune.cli.predict_flags import PredictOptions, parse_args

if __name__ == "__main__":
    first_look()  # 命令行写错了马上说：下面的库要载入好几秒

import sys
from pathlib import Path

import torch

from finetune.inference.chat import chat
from finetune.inference.predict_file import partial_path, predict_file
from finetune.inference.predictor import Predictor
from finetune.inference.serve import serve
from finetune.inference.side_by_side import compare
from finetune.process.libraries import quiet_libraries
from finetune.process.threads import choose_threads
from finetune.terminal import format_table, note
from utils import seed_everything


def run(args: PredictOptions, plan: Plan) -> None:
    """按命令行做事：对照、文件、一条样本、服务，或对话。"""
    if args.compare:
        predictors = [Predictor(args, checkpoint) for checkpoint in plan.checkpoints]
        compare(predictors, plan.rows, plan.device, Path(args.output_path))
        return
    predictor = Predictor(args, plan.checkpoints[0], plan.adapters)
    prompts = predictor.encode_rows(plan.rows)
    if args.test_path is not None:
        predict_file(predictor, plan.rows, prompts, plan.device, args.num_gpus)
        return
    predictor.load_model(plan.device)
    if plan.listener is not None:
        serve(predictor, plan.listener, args.api_key)
        return
    if not plan.rows:
        chat(predictor)
        return
    [record] = predictor.predict(plan.rows, prompts)
    print(record["prediction"])
    if args.label_scores:
        lines = [
            [name, f"{score['log_prob']:.4f}", f"{score['probability']:.4f}"]
            for name, score in record["label_scores"].items()
        ]
        print(format_table(["标签", "对数概率", "归一化概率"], lines))


def main(argv: list[str] | None = None) -> int:
    """命令行入口；返回退出码。"""
    args = parse_args(argv)
    quiet_libraries(args.log_level)
    kept = ""
    try:
        plan = prepare(args)
        seed_everything(args.seed)
        if plan.device.type == "cpu":
            num_threads, reason = choose_threads(args.num_threads)
            torch.set_num_threads(num_threads)
            note(f"线程：{num_threads} 个（{reason}）")
        if args.test_path is not None and not args.compare:
            kept = f"；做完的行留在 {partial_path(Path(args.output_path))}，用同样的命令可以接着做"
        run(args, plan)
    except ValueError as error:
        note(f"错误：\n{error}")
        return 2
    except torch.OutOfMemoryError:
        note(f"错误：显存不够，请调小 --batch_size（现在是 {args.batch_size}）或 --max_new_tokens{kept}")
        return 1
    except OSError as error:
        note(f"错误：写不了 {error.filename or args.output_path}：{error.strerror}，请检查磁盘空间与权限{kept}")
        return 1
    except RuntimeError as error:
        if not args.num_gpus > 1:
            raise
        note(f"错误：{error}{kept}")
        return 1
    except KeyboardInterrupt:
        note(f"已停下{kept}")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
