"""predict.py 的命令行参数。"""

import argparse

from finetune.cli.parser import Parser
from finetune.data.prompting import PROMPT_FORMATS
from finetune.inference.serve import DEFAULT_ADDRESS
from finetune.metrics.registry import METRICS
from finetune.process.precision import PRECISIONS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """定义并解析命令行参数。"""
    parser = Parser(
        prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_argument_group("模型")
    model.add_argument(
        "--model_path", help="检查点目录：训练器写的、合并后的，或官方布局的基座（必填，除非用 --compare）"
    )
    model.add_argument(
        "--adapter", nargs="+", metavar="目录",
        help="挂在 --model_path（任何完整的模型）上的适配器；对话时可给几个，用 /adapter 切换",
    )  # fmt: skip
    model.add_argument(
        "--compare", nargs="+", metavar="目录",
        help="同样的提示词依次交给这几个检查点，回答并排显示，并写成 HTML；代替 --model_path",
    )  # fmt: skip
    model.add_argument("--base_model_path", help="适配器的基座移动过时的新位置（缺省按 run_config.json 的记录寻找）")
    model.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N；auto 有 GPU 用 GPU（缺省 auto）")
    model.add_argument(
        "--num_gpus", type=int, default=1, help="文件预测分给几个进程，各用一块 GPU（CPU 上就是几个进程；缺省 1）"
    )
    model.add_argument("--load_in_4bit", action="store_true", help="基座量化成 4 位（nf4），要 bitsandbytes")
    model.add_argument("--load_in_8bit", action="store_true", help="基座量化成 8 位（LLM.int8），要 bitsandbytes")
    model.add_argument("--precision", default="auto", choices=PRECISIONS, help="计算精度，auto 按设备决定（缺省 auto）")
    model.add_argument(
        "--prompt_format", default="auto", choices=("auto", *PROMPT_FORMATS),
        help="提示词格式，auto 取训练时的格式，基座看 generation_config.json（缺省 auto）",
    )  # fmt: skip

    data = parser.add_argument_group("输入与输出（都不给则在终端对话）")
    data.add_argument("--instruction", help="一条样本的指令")
    data.add_argument("--input", help="一条样本的输入，直接接在指令之后")
    data.add_argument("--test_path", help="要预测的文件：JSON 行或 JSON 数组，字段同训练文件，output 可缺，也可是列表")
    data.add_argument(
        "--output_path",
        help="预测结果（JSON 行，次序同输入，加 prediction 字段；缺省为 测试文件名.predictions.jsonl）；"
        "做完的行先在 输出文件名.partial，中断后用同样的命令接着做；"
        "已有的不同的结果改名为 *.previous-N。--compare 时是 HTML（缺省 compare.html）",
    )
    data.add_argument("--metric", choices=list(METRICS), help="按文件里的 output 评测，结果写到 *.metrics.json")
    data.add_argument(
        "--label_scores", nargs="*", metavar="标签",
        help="分类：各标签的得分，即模型恰好回答这个标签（连同 eos）的对数概率（nat，不除以长度），"
        "以及在各标签之间归一化的概率；不写标签时取文件里 output 出现过的全部",
    )  # fmt: skip
    data.add_argument("--batch_size", type=int, help="文件预测每批的行数（缺省 8）")

    service = parser.add_argument_group("服务（代替输入与输出）")
    service.add_argument(
        "--serve", nargs="?", const=DEFAULT_ADDRESS, metavar="主机:端口",
        help="开 OpenAI 写法的 HTTP 服务，模型名是目录名，--adapter 的各是一个模型；要 uvicorn 与 starlette。"
        f"只写 --serve 是 {DEFAULT_ADDRESS}；采样等设置写在请求里，--max_new_tokens 是请求没写 max_tokens 时的值，"
        "--batch_size 是同时生成的请求数（缺省 8）",
    )  # fmt: skip
    service.add_argument("--api_key", help="要求请求带上 Authorization: Bearer 与这个值（缺省不要求）")

    generation = parser.add_argument_group("生成（缺省贪心）")
    generation.add_argument(
        "--max_new_tokens", type=int, help="最多生成的 token 数（缺省 512，上下文不足 1024 的模型取上下文的一半）"
    )
    generation.add_argument(
        "--max_src_len",
        type=int,
        help="提示词的 token 上限，截断规则同训练（缺省取训练时的值，没有则只受上下文长度限制）",
    )
    generation.add_argument("--do_sample", action="store_true", help="采样；不给则贪心")
    generation.add_argument("--temperature", type=float, help="采样温度，大于 0（缺省 1.0，需要 --do_sample）")
    generation.add_argument("--top_p", type=float, help="核采样的累计概率，(0, 1]（缺省 1.0，需要 --do_sample）")
    generation.add_argument("--top_k", type=int, help="只从概率最高的 k 个里采样，0 为不限（缺省 0，需要 --do_sample）")
    generation.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="重复惩罚，1.0 为没有（缺省 1.0，不取检查点自带的值）"
    )
    generation.add_argument(
        "--stop", nargs="+", metavar="文字", help="出现任一文字就停，结果不含它；\\n 是换行（缺省只在 eos 处停）"
    )
    generation.add_argument("--seed", type=int, default=1234, help="采样的随机种子（缺省 1234）")
    return parser.parse_args(argv)
