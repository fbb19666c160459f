"""命令行参数：用户的命令逐字可用；布尔值按字面；全部错误一次列出；别的方法的参数不被悄悄忽略。"""

import json
import re
import shlex
import shutil

import pytest
from asserting import lacks
from commands import USER_COMMAND
from paths import ROOT

from finetune.checkpoint.options import MODEL_FAMILIES
from finetune.checkpoint.output_dir import choose_checkpoint
from finetune.cli.train_checks import validate_args
from finetune.cli.train_flags import build_parser, describe_flags, parse_args
from finetune.methods.registry import TRAIN_METHODS, TRAIN_TYPE_ALIASES
from finetune.options import flags_of

REQUIRED = ["--train_path", "data/spo_0.json", "--model_name_or_path", "m/", "--output_dir", "out"]
BOOL_FLAGS = ("is_skip", "drop_duplicates", "packing", "prefix_projection")


def parse(*flags: str):
    return parse_args([*REQUIRED, *map(str, flags)])


@pytest.fixture
def required(tiny_checkpoint, tmp_path) -> list[str]:
    """三个必填参数，指向真实存在的文件。"""
    return [
        "--train_path",
        str(ROOT / "data" / "spo_0.json"),
        "--model_name_or_path",
        str(tiny_checkpoint("baichuan2-7b")),
        "--output_dir",
        str(tmp_path / "output"),
        "--ds_file",
        str(ROOT / "ds_zero2_no_offload.json"),
    ]


def problems_of(*flags: str) -> list[str]:
    with pytest.raises(ValueError) as caught:
        validate_args(parse_args([*map(str, flags)]))
    return str(caught.value).split("\n")


# ---- 解析 ----


def test_the_settled_flags_are_listed_once_with_the_given_ones_marked():
    text = describe_flags(parse("--train_type", "lora", "--lora_dim", 4))
    words = re.split(r"[：，\n]\s*", text)
    assert [word for word in words if word.lstrip("*").startswith("lora_")][:2] == ["*lora_dim 4", "lora_alpha 30"]
    assert {"*train_path data/spo_0.json", "learning_rate 0.0002", "max_len 1024"} <= set(words)
    assert not any(word.startswith(("pre_seq_len", "eval_path", "replay_by", "local_rank")) for word in words)
    assert len(text.splitlines()) == 6


def test_user_command_parses():
    args = parse_args(shlex.split(USER_COMMAND.replace("\\\n", " ")))
    expected = {
        "train_path": "data/spo_0.json",
        "model_name_or_path": "baichuan-6B/",
        "per_device_train_batch_size": 1,
        "max_len": 1560,
        "max_src_len": 1024,
        "learning_rate": 1e-4,
        "weight_decay": 0.1,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 4,
        "warmup_ratio": 0.1,
        "mode": "baichuan",
        "train_type": "freeze",
        "freeze_module_name": "layers.27.,layers.26.,layers.25.,layers.24.",
        "seed": 1234,
        "ds_file": "ds_zero2_no_offload.json",
        "gradient_checkpointing": "all",
        "show_loss_step": 10,
        "output_dir": "./output-baichuan",
    }
    assert {name: getattr(args, name) for name in expected} == expected
    assert list(args.given) == sorted(expected)


def test_user_command_is_the_one_in_shared(shared_dir):
    text = (shared_dir / "commands.md").read_text(encoding="utf-8")
    block = re.search(r"```\n(.*?)```", text, re.DOTALL)[1]
    assert block == "CUDA_VISIBLE_DEVICES=0 deepspeed --master_port 520 train.py \\" + USER_COMMAND
    assert re.findall(r"\| (\d) \| `(.*?)` \| `(.*?)` \|", text) == [
        ("1", "CUDA_VISIBLE_DEVICES=0", "baichuan-6B/"),
        ("2", "CUDA_VISIBLE_DEVICES=0,1,2,3", "baichuan-6B/"),
        ("3", "CUDA_VISIBLE_DEVICES=0", "baichuan2-6B/"),
        ("4", "CUDA_VISIBLE_DEVICES=0,1,2,3", "baichuan2-6B/"),
    ]


def test_only_three_flags_are_required():
    args = parse()
    assert args.given == ("model_name_or_path", "output_dir", "train_path")
    defaults = {
        "mode": "baichuan",
        "train_type": "lora",
        "lora_dim": 8,
        "lora_alpha": 30,
        "lora_dropout": 0.1,
        "lora_module_name": "W_pack",
        "prefix_projection": False,
        "ptuning_version": 2,
        "prompt_format": "auto",
        "precision": "auto",
        "packing": True,
        "is_skip": False,
        "drop_duplicates": False,
        "eval_path": None,
        "eval_step": 0,
        "eval_metric": "nll",
        "eval_max_new_tokens": 128,
        "early_stopping_patience": 0,
        "save_total_limit": 0,
        "general_path": None,
        "forgetting_threshold": None,
        "replay_path": None,
        "replay_ratio": None,
        "logging_dir": None,
        "report_to": "tensorboard",
        "max_steps": -1,
        "save_model_step": 0,
        "gradient_checkpointing": "none",
        "ds_file": "ds_zero2_no_offload.json",
        "weight_decay": 0.1,
        "warmup_ratio": 0.1,
    }
    assert {name: getattr(args, name) for name in defaults} == defaults


@pytest.mark.parametrize("missing", ["train_path", "model_name_or_path", "output_dir"])
def test_a_missing_required_flag_ends_the_program(missing, capsys):
    index = REQUIRED.index(f"--{missing}")
    with pytest.raises(SystemExit) as caught:
        parse_args(REQUIRED[:index] + REQUIRED[index + 2 :])
    assert caught.value.code == 2
    assert f"--{missing}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ("--no_such_flag", "1"),
        ("--train_type", "qlora"),
        ("--mode", "llama"),
        ("--precision", "int8"),
        ("--ptuning_version", "3"),
        ("--max_len", "many"),
        ("--prompt_format", "alpaca"),
        ("--learn", "1e-4"),  # 缩写会在日后加参数时改变意思
    ],
)
def test_an_unknown_flag_or_value_ends_the_program(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*flags)
    assert caught.value.code == 2
    output = capsys.readouterr().out
    assert "参数错误：" in output
    assert flags[0] in output
    assert flags[0] in output
    assert flags[1] in output or flags[0] in ("--no_such_flag", "--learn")


@pytest.mark.parametrize("name", BOOL_FLAGS)
@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (["--{}"], True),
        (["--{}", "True"], True),
        (["--{}", "true"], True),
        (["--{}", "1"], True),
        (["--{}", "yes"], True),
        (["--{}", "False"], False),
        (["--{}", "false"], False),
        (["--{}", "0"], False),
        (["--{}", "no"], False),
        (["--no-{}"], False),
        (["--no-{}", "True"], False),
        (["--no-{}", "False"], True),
        (["--{}", "--no-{}"], False),
        (["--no-{}", "--{}"], True),
    ],
)
def test_bool_flags_mean_what_they_say(name, form, expected):
    flags = [part.format(name) for part in form]
    assert getattr(parse(*flags), name) is expected
    assert name in parse(*flags).given


def test_bool_flag_refuses_other_words(capsys):
    with pytest.raises(SystemExit):
        parse("--prefix_projection", "maybe")
    assert "--prefix_projection 只接受 True 或 False，得到 'maybe'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "learning_rate"), [("freeze", 1e-4), ("lora", 2e-4), ("ptuning", 5e-3), ("full", 1e-5)]
)
def test_learning_rate_defaults_by_method(method, learning_rate):
    assert parse("--train_type", method).learning_rate == learning_rate
    assert parse("--train_type", method, "--learning_rate", "3e-4").learning_rate == 3e-4


def test_the_row_above_names_every_method():
    assert list(TRAIN_METHODS) == ["freeze", "lora", "ptuning", "full"]


def test_all_is_an_alias_of_full():
    assert parse("--train_type", "all").train_type == "full"
    assert parse("--train_type", "all").learning_rate == TRAIN_METHODS["full"].learning_rate
    assert set(TRAIN_TYPE_ALIASES.values()) <= set(TRAIN_METHODS)


def test_gradient_checkpointing_takes_an_optional_value():
    assert parse("--gradient_checkpointing").gradient_checkpointing == "all"
    assert parse("--gradient_checkpointing", "none").gradient_checkpointing == "none"
    assert parse("--gradient_checkpointing", "--seed", "1").gradient_checkpointing == "all"


def test_packing_is_off_by_itself_for_ptuning_version_1():
    assert parse("--train_type", "ptuning", "--ptuning_version", 1).packing is False
    assert parse("--train_type", "ptuning").packing is True


def test_help_names_every_registry_key_and_explains_every_flag():
    parser = build_parser()
    text = parser.format_help()
    for key in (*MODEL_FAMILIES, *TRAIN_METHODS, *TRAIN_TYPE_ALIASES):
        assert re.search(rf"\b{key}\b", text), f"--help 没有提到 {key}"
    for action in parser._actions:
        if action.dest != "help":
            assert re.search(r"[\u4e00-\u9fff]", action.help or ""), f"--{action.dest} 没有中文说明"


def test_every_method_flag_is_a_real_flag():
    dests = {action.dest for action in build_parser()._actions}
    for method in TRAIN_METHODS.values():
        assert {field.name for field in flags_of(method.options)} <= dests


# ---- 检查 ----


def test_valid_arguments_give_both_configs(required):
    ds_config, config = validate_args(parse_args(required))
    assert ds_config["zero_optimization"]["stage"] == 2
    assert (config.model_type, config.norm_head, config.position_embedding) == ("baichuan", True, "rope")


def test_all_problems_are_listed_at_once(tmp_path):
    empty = tmp_path / "empty.json"
    empty.touch()
    a_file = tmp_path / "a_file"
    a_file.touch()
    found = problems_of(
        *("--train_path", empty, "--eval_path", tmp_path / "absent.json"),
        *("--model_name_or_path", tmp_path / "no-model", "--output_dir", a_file, "--ds_file", tmp_path / "no-ds.json"),
        *("--max_len", 16, "--max_src_len", 16, "--num_train_epochs", 0, "--max_steps", 0, "--save_model_step", -1),
        *("--learning_rate", 0, "--weight_decay", -0.1, "--warmup_ratio", 1, "--seed", -3),
        *("--train_type", "freeze", "--lora_dim", 4),
    )
    named = [
        *(str(tmp_path / "no-ds.json"), "--num_train_epochs(0)", "--max_steps(0)", "--learning_rate(0.0)"),
        *("--weight_decay(-0.1)", "--warmup_ratio(1.0)", "--seed(-3)", "--save_model_step(-1)"),
        *("--lora_dim", "--freeze_module_name", f"--output_dir {a_file}", "--max_src_len(16)", str(empty)),
        *(str(tmp_path / "absent.json"), f"--model_name_or_path {tmp_path / 'no-model'}"),
    ]
    assert len(found) == len(named)
    for name in named:
        assert sum(name in problem for problem in found) == 1, f"{name} 应恰好在一条里：{found}"


@pytest.mark.parametrize(
    "name",
    [
        "max_len",
        "max_src_len",
        "num_train_epochs",
        "per_device_train_batch_size",
        "lora_dim",
        "lora_alpha",
        "gradient_accumulation_steps",
        "show_loss_step",
    ],
)
def test_counts_must_be_positive(required, name):
    assert f"--{name}(0) 必须至少为 1" in problems_of(*required, f"--{name}", 0)


@pytest.mark.parametrize(("max_len", "max_src_len"), [(1024, 1024), (1024, 1025), (1, 1)])
def test_max_src_len_must_be_smaller(required, max_len, max_src_len):
    assert problems_of(*required, "--max_len", max_len, "--max_src_len", max_src_len) == [
        f"--max_src_len({max_src_len}) 必须小于 --max_len({max_len})，请调小前者"
    ]


def test_the_default_max_src_len_is_named_as_such(required):
    assert problems_of(*required, "--max_len", 512) == [
        "--max_src_len(缺省 768) 必须小于 --max_len(512)，请写上小些的，如 --max_src_len 384"
    ]


def write_ds(path, **changes) -> str:
    """项目自己的 DeepSpeed 配置，改掉几处。"""
    config = json.loads((ROOT / "ds_zero2_no_offload.json").read_text(encoding="utf-8"))
    for place, value in changes.items():
        *parents, name = place.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[name] = value
    path.write_text(json.dumps(config), encoding="utf-8")
    return str(path)


def test_numbers_fixed_by_the_ds_file_are_told(required, tmp_path, capsys):
    path = write_ds(
        tmp_path / "ds.json", optimizer__params__lr=3e-4, optimizer__params__weight_decay=0.02,
        train_micro_batch_size_per_gpu=2, scheduler__params__total_num_steps=100,
        scheduler__params__warmup_num_steps=5,
    )  # fmt: skip
    args = parse_args([*required, "--ds_file", path])
    validate_args(args)
    assert (args.learning_rate, args.weight_decay, args.per_device_train_batch_size) == (3e-4, 0.02, 2)
    told = [
        ("per_device_train_batch_size ", "train_micro_batch_size_per_gpu ", "：2（", " 4）"),
        ("learning_rate ", "optimizer.params.lr ", "：0.0003（", " 0.0002）"),
        ("weight_decay ", "optimizer.params.weight_decay ", "：0.02（", " 0.1）"),
        ("scheduler.params.warmup_num_steps（5）", "--warmup_ratio 0.1"),
        ("scheduler.params.total_num_steps ", " 100"),
    ]
    lines = capsys.readouterr().out.splitlines()
    assert [lacks(line, "注意：", f"{path} ", *parts) for line, parts in zip(lines, told, strict=True)] == [[]] * 5


def test_numbers_fixed_twice_are_refused(required, tmp_path):
    path = write_ds(
        tmp_path / "ds.json", optimizer__params__lr=3e-4, optimizer__params__weight_decay=0.02,
        scheduler__params__warmup_num_steps=5,
    )  # fmt: skip
    given = ("--learning_rate", "1e-4", "--weight_decay", "0.02", "--warmup_ratio", "0.1")
    rate, warmup = problems_of(*required, "--ds_file", path, *given)
    assert f"--learning_rate 0.0001 与 {path} 的 optimizer.params.lr（0.0003）" in rate
    assert f"--warmup_ratio 与 {path} 的 scheduler.params.warmup_num_steps（5）" in warmup
    path = write_ds(tmp_path / "half.json", gradient_accumulation_steps=2.5)
    (found,) = problems_of(*required, "--ds_file", path)
    assert f"{path}: gradient_accumulation_steps " in found and "2.5" in found


def test_broken_rows_are_told_with_the_arguments(required, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text('{"instruction": "问", "output": "答"}\n{"instruction": 3, "output": "答"}\n', encoding="utf-8")
    total, row, spike = problems_of(*required, "--train_path", rows, "--loss_spike_factor", "1")
    assert f"{rows} 有 1 处" in total
    assert row.startswith(f"  {rows}:2: instruction: ")
    assert spike.startswith("--loss_spike_factor '1' 应为 0（不看）、大于 1 的数")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "warmup_ratio", "lora_dropout"])
def test_rates_must_be_finite(required, name, value):
    assert any(problem.startswith(f"--{name}({value})") for problem in problems_of(*required, f"--{name}={value}"))


FOREIGN_FLAGS = [(method, flag, value) for method, flag, value in [
    ("freeze", "freeze_module_name", "layers.0."),
    ("freeze", "cache_frozen", "none"),
    ("lora", "lora_dim", "8"),
    ("lora", "lora_alpha", "30"),
    ("lora", "lora_dropout", "0.1"),
    ("lora", "lora_module_name", "W_pack"),
    ("lora", "load_in_4bit", "False"),
    ("lora", "load_in_8bit", "False"),
    ("lora", "use_rslora", "False"),
    ("lora", "use_dora", "False"),
    ("lora", "loraplus_ratio", "16"),
    ("ptuning", "pre_seq_len", "16"),
    ("ptuning", "prefix_projection", "True"),
    ("ptuning", "prefix_hidden_size", "512"),
    ("ptuning", "ptuning_version", "2"),
]]  # fmt: skip


@pytest.mark.parametrize(("owner", "flag", "value"), FOREIGN_FLAGS)
def test_flags_of_another_method_are_refused(required, owner, flag, value):
    for method in TRAIN_METHODS:
        own = ["--freeze_module_name", "layers.0."] if method == "freeze" and flag != "freeze_module_name" else []
        args = parse_args([*required, "--train_type", method, *own, f"--{flag}", value])
        if method == owner:
            if flag != "prefix_hidden_size":
                validate_args(args)
            continue
        with pytest.raises(ValueError, match=rf"--{flag} 属于 --train_type {owner}，对 {method} 不起作用，请去掉"):
            validate_args(args)


def test_the_rows_above_name_every_method_flag():
    assert sorted((owner, flag) for owner, flag, _ in FOREIGN_FLAGS) == sorted(
        (name, field.name) for name, method in TRAIN_METHODS.items() for field in flags_of(method.options)
    )


def test_settings_without_effect_are_refused(required):
    ptuning = [*required, "--train_type", "ptuning"]
    (problem,) = problems_of(*ptuning, "--prefix_hidden_size", 64)
    assert lacks(problem, "--prefix_hidden_size", "--prefix_projection", "--ptuning_version 1") == []
    validate_args(parse_args([*ptuning, "--prefix_projection", "--prefix_hidden_size", "64"]))
    validate_args(parse_args([*ptuning, "--ptuning_version", "1", "--prefix_hidden_size", "64"]))
    (problem,) = problems_of(*ptuning, "--ptuning_version", 1, "--packing")
    assert lacks(problem, "--ptuning_version 1", "--packing") == []
    (problem,) = problems_of(*ptuning, "--ptuning_version", 1, "--prefix_projection")
    assert "--prefix_projection" in problem


@pytest.mark.parametrize("names", ["", " , ,", ","])
def test_freeze_needs_names(required, names):
    (problem,) = problems_of(*required, "--train_type", "freeze", "--freeze_module_name", names)
    assert problem.startswith("--train_type freeze 需要 --freeze_module_name")


def test_a_config_of_another_model_is_refused(required, tiny_checkpoint, tmp_path):
    other = shutil.copytree(tiny_checkpoint("baichuan2-7b"), tmp_path / "other")
    content = json.loads((other / "config.json").read_text(encoding="utf-8"))

    def with_config(text: str) -> str:
        (other / "config.json").write_text(text, encoding="utf-8")
        (problem,) = problems_of(*required, "--model_name_or_path", other)
        return problem

    problem = with_config(json.dumps({**content, "model_type": "llama"}))
    assert lacks(problem, f"{other / 'config.json'} ", "model_type", "'llama'", "baichuan") == []
    assert "config.json" in with_config("{broken")
    assert "hidden_size(64) 必须能被 num_attention_heads(5) 整除" in with_config(
        json.dumps({**content, "num_attention_heads": 5})
    )


# ---- 不是错误，但要说的；目录给浅了 ----


def test_a_max_len_above_the_trained_length_is_said(required, tiny_checkpoint, capsys):
    short = ["--max_src_len", "40", "--model_name_or_path", str(tiny_checkpoint("baichuan2-13b", model_max_length=64))]
    validate_args(parse_args([*required, *short, "--max_len", "64"]))
    assert "--max_len" not in capsys.readouterr().out
    validate_args(parse_args([*required, *short, "--max_len", "65"]))
    assert re.search(r"--max_len 65 .*64（config\.json）", capsys.readouterr().out)


@pytest.mark.parametrize("below", ["train_00220B", "snapshots/0f1e2d", "models--owner--name/snapshots/0f1e2d"])
def test_a_directory_above_the_checkpoint_is_answered_with_it(required, tiny_checkpoint, tmp_path, below):
    target = tmp_path / "above" / below
    shutil.copytree(tiny_checkpoint("baichuan2-7b"), target)
    [problem] = problems_of(*required, "--model_name_or_path", tmp_path / "above")
    assert f"{tmp_path / 'above'} 里没有 config.json" in problem and str(target) in problem
    with pytest.raises(ValueError, match=re.escape(str(target))):
        choose_checkpoint(tmp_path / "above")


def test_an_adapter_and_a_whole_model_are_told_apart(required, tiny_checkpoint, tmp_path):
    """适配器给成了基座，完整的模型给成了适配器，训练的输出目录给成了适配器：各说应当给在哪里。"""
    adapter, whole = tmp_path / "run" / "epoch-1-step-4", tiny_checkpoint("baichuan2-7b")
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    for given in (adapter, adapter.parent):
        [problem] = problems_of(*required, "--model_name_or_path", given)
        assert f"{given} 里是适配器" in problem and "--adapter_path" in problem
    assert str(adapter) in problem
    [problem] = problems_of(*required, "--adapter_path", adapter.parent)
    assert str(adapter) in problem
    [problem] = problems_of(*required, "--adapter_path", whole)
    assert "它是完整的模型，请用 --model_name_or_path" in problem
    shutil.copytree(whole, tmp_path / "run" / "base")  # 下面既有适配器又有完整的模型：指到完整的模型
    [problem] = problems_of(*required, "--model_name_or_path", tmp_path / "run")
    assert str(tmp_path / "run" / "base") in problem and "里是适配器" not in problem
