"""The variables in Chinese, for `balance-shim env` and docs/zh-CN/variables.md.

A test fails while a variable of `settings.VARIABLES` is missing here, or names other values.
"""

from typing import NamedTuple


class Translation(NamedTuple):
    """What `settings.Variable` has under the same names."""

    allowed: str
    default: str
    meaning: str


_SCRIPTS = "脚本的设置"
_WHOLE = "不小于 1 的整数"
_SIZE = "形如 20GiB、512MiB 或 8e9 的大小"

VARIABLES: dict[str, Translation] = {
    "BALANCE_MODE": Translation(
        "balanced、map、auto、zero3、off 之一",
        "balanced",
        "训练采用的方案；`auto` 预测每种方案的显存和每步耗时，选用放得下的方案中最快的一个；"
        "模式名写错时本工具不启用，并给出提示",
    ),
    "BALANCE_INTERCEPT": Translation(
        "auto、balanced、balanced_low_0、sequential、none 的列表，用逗号分隔",
        "auto,balanced",
        "要替换的 `device_map` 取值；明确指定的 map 始终保留。`none` 指没有写 `device_map`：在 N 张 CUDA 卡上，"
        "这样的脚本会训练 N 份拷贝（`torch.nn.DataParallel`），batch 也是 N 倍；替换后只训练一份，"
        "并用一行日志给出前后两种 batch",
    ),
    "BALANCE_DEVICE_MAP": Translation(
        "JSON 文件的路径，或 JSON", "", "你自己的 device map，层名 -> 设备；只设置它就等于使用 `map` 模式"
    ),
    "BALANCE_MAX_MEMORY": Translation(
        f"{_SIZE}，0=20GiB,1=45GiB，或 JSON",
        "空闲显存",
        "每张卡的上限；`2=0` 表示不使用该卡，也不查询它的显存。为了兼容，可以写 `cpu` 和 `disk`，但会被忽略",
    ),
    "BALANCE_RESERVE": Translation(
        f"{_SIZE}，或小于 100% 的百分比",
        "8%，CUDA 设备上至少 768 MiB",
        "规划时每张卡预留不用的显存，默认不超过该卡的五分之一；torch 分配器预计保留的显存也必须放得下",
    ),
    "BALANCE_BATCH_SIZE": Translation(_WHOLE, "Trainer 的设置，没有则为 1", "在 Trainer 的设置已知之前假定的微批次"),
    "BALANCE_SEQ_LEN": Translation(
        _WHOLE,
        "Trainer 的设置，没有则为 2048",
        "在第一个 batch 到来之前假定的每条序列 token 数；决定激活值和 logits 的大小。"
        "如果第一个 batch 比后面的短很多，请设置它",
    ),
    "BALANCE_TUNING": Translation(
        "full、lora、frozen 之一", "full", "训练哪些参数：全部参数、adapter，或除视觉和音频编码器之外的全部参数"
    ),
    "BALANCE_OPTIMIZER": Translation(
        "与 TrainingArguments(optim=...) 相同的名称，如 adamw_torch、adamw_8bit 或 adafactor",
        "Trainer 的设置，没有则为 adamw_torch",
        "在 Trainer 的设置已知之前假定的优化器",
    ),
    "BALANCE_PRECISION": Translation("bf16、fp16、fp32 之一", _SCRIPTS, "加载权重所用的数据类型和训练的混合精度"),
    "BALANCE_MICRO_BATCH": Translation(
        f"{_WHOLE}，或 auto", _SCRIPTS, "每个微批次的序列数，或预测放得下的最大值；梯度累加使有效 batch 保持不变"
    ),
    "BALANCE_GRADIENT_CHECKPOINTING": Translation(
        "1、0 或 auto", _SCRIPTS, "对所有层重计算激活值、都不重计算，或只对放得下所需的最少几层重计算"
    ),
    "BALANCE_MONITOR": Translation("1 或 0", "0", "记录每一步的显存，增长时发出警告"),
    "BALANCE_REBALANCE": Translation("1 或 0", "0", "如果前几步所需的显存与规划不同，就在两步之间移动 block"),
    "BALANCE_LOSS": Translation(
        "auto、chunked、full 之一",
        "auto",
        "分块计算因果语言模型的 loss，不生成完整的 logits：对本工具放置的模型、对 Trainer 训练的任何模型，或都不使用",
    ),
    "BALANCE_REPLICAS": Translation(
        f"{_WHOLE}，或 auto",
        "1",
        "`balanced` 和 `auto` 模式：训练多少个数据并行的副本，每个副本使用一部分设备；`auto`：放得下的最大数目。"
        "使用启动器时，由它在本机启动的进程数决定",
    ),
    "BALANCE_PIPELINE": Translation(
        f"{_WHOLE}、auto 或 off",
        "off",
        "使用 device map 时，同时在途的微批次数，让各卡同时计算；`auto`：一次梯度累加中放得下的最大数目；"
        "`1`：只改变设备之间的传输。尚未在 GPU 上实测",
    ),
    "BALANCE_ZERO_CONFIG": Translation(
        "DeepSpeed JSON 文件的路径，或 JSON", "", "`zero3` 模式：合并到本工具的 DeepSpeed 配置之上"
    ),
    "BALANCE_OFFLOAD": Translation(
        "none、optimizer、all 之一", "none", "`zero3` 模式：把优化器状态（all 则连同权重）放在主机内存"
    ),
    "BALANCE_NPROC": Translation(
        _WHOLE, "每张卡一个", "`zero3` 模式：在本机启动的进程数；没有加速卡时为 CPU 进程"
    ),
    "BALANCE_NCCL_TIMEOUT": Translation(
        "秒数，不小于 1 的整数",
        "脚本的 `ddp_timeout`，没有则为 1800",
        "`zero3` 模式：集合通信中各 rank 互相等待的最长时间",
    ),
    "BALANCE_REPORT": Translation(
        "text、off，或可写的目录",
        "text",
        "规划和 map 输出到哪里：标准错误输出、不输出，或者另外在目录中写入 `plan.json` 和 `device_map.json`，"
        "以及 `balance-shim report` 要读取的内容",
    ),
    "BALANCE_SIMULATE": Translation(
        "设备列表，如 4x24GiB、2x80GiB+2x24GiB 或 4xRTX4090",
        "",
        "在模拟设备上运行，也可以写设备名，如 `2xA100-40GB+2xT4` 或 `4x20GiB@RTX4090`；末尾加 `:shapes` 则只模拟形状。"
        "设置了报告目录时，`simulation.json` 中有各设备的峰值",
    ),
    "BALANCE_CACHE": Translation("目录，或 off", "~/.cache/balance_shim", "保存模型的显存数据和修复结果的位置"),
    "BALANCE_STRICT": Translation("1 或 0", "0", "内部出错或任何变量取值错误都会终止程序"),
    "BALANCE_LANG": Translation(
        "en、zh 之一",
        "中文 locale 下为 zh，否则为 en",
        "`balance-shim env`、`plan` 和显存不足建议所用的语言；locale 依次取 `LC_ALL`、`LC_MESSAGES`、`LANG`",
    ),
    "BALANCE_LOG_LEVEL": Translation("debug、info、warning、error 之一", "info", "显示哪个级别以上的日志"),
}  # fmt: skip
