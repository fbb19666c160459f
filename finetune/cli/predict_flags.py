"""predict.py 的全部参数。"""

from dataclasses import dataclass

from finetune.cli.other_names import PREDICT_NAMES
from finetune.cli.parser import Parser
from finetune.data.prompting import prompt_format_choice
from finetune.data.samples import separator_choice
from finetune.inference.options import GenerationOptions, ServeOptions
from finetune.options import at_least, flag, split_words


@dataclass
class CheckpointOptions:
    """哪个模型。"""

    config: str | None = flag(
        None,
        "参数写在这个文件里：YAML 或 JSON；命令行胜过它（缺省没有）",
    )
    model_path: str | None = flag(
        None, "检查点目录：训练器写的、合并后的，或官方布局的基座（必填，除非用 --compare；缺省没有）"
    )
    adapter: list[str] | None = flag(
        None,
        "挂在 --model_path（任何完整的模型）上的适配器；对话时可给几个，用 /adapter 切换（缺省没有）",
        nargs="+",
        metavar="目录",
    )
    compare: list[str] | None = flag(
        None,
        "同样的提示词依次交给这几个检查点，回答并排显示，并写成 HTML；代替 --model_path（缺省没有）",
        nargs="+",
        metavar="目录",
    )
    base_model_path: str | None = flag(None, "适配器的基座移动过时的新位置（缺省按 run_config.json 的记录寻找）")
    device: str = flag("auto", "auto、cpu，或加速卡的种类与编号，如 cuda、cuda:1、npu:0；auto 有卡用卡")
    num_threads: int | None = flag(
        None,
        "CPU 线程数（缺省先看 OMP_NUM_THREADS，再由空着的核决定，加速卡上不动）",
        kind=int,
        check=at_least(1),
    )
    num_gpus: int = flag(1, "文件预测分给几个进程，各用一块 GPU（CPU 上就是几个进程；缺省 1）")
    load_in_4bit: bool = flag(False, "基座量化成 4 位（nf4），要 bitsandbytes（缺省不量化）")
    load_in_8bit: bool = flag(False, "基座量化成 8 位（LLM.int8），要 bitsandbytes（缺省不量化）")
    prompt_format: str = flag(
        "auto",
        "提示格式，auto 取训练时的格式，基座看 generation_config.json；也可以是一个模板文件，见 docs/data.md",
        kind=prompt_format_choice,
        metavar="auto|plain|chat|文件.json",
    )


@dataclass
class InputOptions:
    """预测什么，写到哪里。"""

    instruction: str | None = flag(None, "一条样本的指令（缺省没有）")
    input: str | None = flag(None, "一条样本的输入，接在指令之后（缺省没有）")
    test_path: str | None = flag(None, "要预测的文件：写法同训练文件，回答可缺，也可是列表（缺省没有）")
    input_separator: str | None = flag(
        None,
        r"instruction 与 input 之间的文字，\n 是换行（缺省取训练时的值，没有则直接相接）",
        kind=separator_choice,
        metavar="文字",
    )
    ignore_fields: str | None = flag(None, "当作没有的字段，逗号分隔（缺省取训练时的值）")
    output_path: str | None = flag(
        None,
        "预测结果（JSON 行，次序同输入，加 prediction 字段；缺省为 测试文件名.predictions.jsonl）；"
        "做完的行先在 输出文件名.partial，中断后用同样的命令接着做；"
        "已有的不同的结果改名为 *.previous-N。--compare 时是 HTML（缺省 compare.html）",
    )


# 帮助里的标题 → 其下的各组
GROUPS = {
    "模型": (CheckpointOptions,),
    "输入与输出（都不给则在终端对话）": (InputOptions,),
    "生成（缺省贪心）": (GenerationOptions,),
    "服务（代替输入与输出）": (ServeOptions,),
}


@dataclass
class PredictOptions(ServeOptions, GenerationOptions, InputOptions, CheckpointOptions):
    """predict.py 的全部参数；要其中一组的函数可以直接拿它。"""

    given: tuple[str, ...] = ()  # 命令行明确写出的参数名


def build_parser() -> Parser:
    """predict.py 的解析器；结果里只有命令行写出的参数。"""
    return Parser("predict.py", "用训练好的检查点预测、评测、对照、在终端里对话，或开 HTTP 服务", GROUPS, PREDICT_NAMES)


def parse_args(argv: list[str] | None = None) -> PredictOptions:
    """解析命令行。"""
    found, given = build_parser().read(argv)
    for name in ("compare", "label_scores"):  # 只有一个没有意义：那是逗号分开的几个
        if len(found.get(name) or ()) == 1:
            found[name] = split_words(found[name][0])
    return PredictOptions(**found, given=given)
