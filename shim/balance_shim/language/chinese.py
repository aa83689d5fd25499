"""Chinese for the messages of `balance-shim env`, `balance-shim plan` and the out-of-memory advice.

English template -> Chinese one with the same fields. A test fails while one of them is missing here. Terms are those of
docs/zh-CN/glossary.md.
"""

MESSAGES: dict[str, str] = {
    # Between the entries of lists.
    ", ": "、",
    "; ": "；",
    " and ": "，并且 ",
    # balance-shim env, and values that cannot be used.
    "{name} (not set: {default})": "{name}（未设置：{default}）",
    "none": "无",
    "    allowed: {values}": "    可选值：{values}",
    "error: {line}": "错误：{line}",
    "warning: {line}": "警告：{line}",
    "{fault}; {consequence}": "{fault}；{consequence}",
    "{name} is for BALANCE_MODE={modes} only": "{name} 只用于 BALANCE_MODE={modes}",
    "{name}={text} is not {values}": "{name}={text} 不是有效取值，可选：{values}",
    "{name} is not a variable (did you mean {near}?)": "{name} 不是变量名（是否想写 {near}？）",
    "BALANCE_DEVICE_MAP is set but BALANCE_MODE={mode}": "设置了 BALANCE_DEVICE_MAP，但 BALANCE_MODE={mode}",
    "BALANCE_MODE=map needs BALANCE_DEVICE_MAP, the path of a JSON file or JSON": (
        "BALANCE_MODE=map 需要设置 BALANCE_DEVICE_MAP（JSON 文件的路径，或 JSON）"
    ),
    "using the default ({default})": "使用默认值（{default}）",
    "it is ignored": "将被忽略",
    "no model will be loaded": "不会加载任何模型",
    "no model will be loaded with this map": "不会用这个 map 加载模型",
    "the shim stays off": "本工具不启用",
    "nothing is simulated and the program stops before it touches a device": "不进行模拟，程序会在使用设备之前停止",
    "the map is not used (BALANCE_MODE=map uses it)": "该 map 不会使用（BALANCE_MODE=map 才会使用）",
    "BALANCE_STRICT stops the program": "BALANCE_STRICT 会终止程序",
    # Heads of tables.
    "device": "设备",
    "blocks": "block",
    "weights": "权重",
    "gradients": "梯度",
    "optimizer": "优化器",
    "activations": "激活值",
    "temporary": "临时",
    "overhead": "额外开销",
    "peak": "峰值",
    "capacity": "容量",
    "used": "占用",
    "reserved": "已保留",
    "placed by auto": "auto 的放置",
    "balanced": "balanced",
    "auto": "auto",
    "as planned": "规划预测",
    "for this batch": "此批次预测",
    "measured": "实测",
    "others": "其他进程",
    "of": "总显存",
    # Blocks of a device.
    "nothing": "无",
    "the whole model": "整个模型",
    "{names}, {number} more": "{names}，另有 {number} 个",
    # balance-shim plan.
    "{model}, {billions} B parameters in {dtype}, on {devices} (of which {reserve} is kept free)": (
        "{model}，参数量 {billions} B，{dtype}，设备 {devices}（其中预留 {reserve}）"
    ),
    "{devices}, the weakest of {number} shares": "{devices}，{number} 份中显存最少的一份",
    "{share}, at least {least},": "{share}，至少 {least}",
    "{tuning}, {optimizer}, {batch_size} x {seq_len} tokens, accumulation {accumulation}{in_flight}{extra}": (
        "{tuning}，{optimizer}，{batch_size} x {seq_len} 个 token，梯度累加 {accumulation}{in_flight}{extra}"
    ),
    " with {count} in flight": "（同时在途 {count} 个）",
    ", checkpointing": "，梯度检查点",
    "note: {note}": "说明：{note}",
    "balanced map, predicted (GiB):": "均衡的 device map，预测值（GiB）：",
    "fullest device: {device} with {most}; lower bound for any map: {least} (this plan is within {gap} of it)": (
        "占用最高的设备：{device}，{most}；任何 map 的下界：{least}（本规划与下界相差不超过 {gap}）"
    ),
    "it fits": "放得下",
    "{name} fits": "{name}：放得下",
    "ZeRO-3 has no device map; the balanced map is shown for comparison": (
        "ZeRO-3 没有 device map；此处的均衡 map 仅供比较"
    ),
    "predicted not to fit{guess}: {device} {needs}, {missing} too much. What would fit: {remedies}": (
        "预测放不下{guess}：{device} {needs}，超出 {missing}。以下做法放得下：{remedies}"
    ),
    " (assuming sequences of {number} tokens)": "（假定每条序列 {number} 个 token）",
    "needs {needed} of {capacity}": "需要 {needed}，容量为 {capacity}",
    "has tensors of {tensors}, for which its allocator needs to reserve {reserved} of {available}": (
        "上的 tensor 共 {tensors}，分配器为此需要保留 {reserved}，可用 {available}"
    ),
    "none of the usual changes alone; more or larger devices": (
        "单独采用任何一种常用办法都不够；请使用更多或显存更大的设备"
    ),
    "does not fit: its weights alone are {weights}, {missing} more than {devices}; "
    "use more or larger devices, 4- or 8-bit loading, or a half-precision dtype": (
        "放不下：仅权重就有 {weights}，比 {devices} 多 {missing}；"
        "请使用更多或显存更大的设备、4 或 8 bit 量化加载，或半精度数据类型"
    ),
    "does not fit: blocks are not split, and some fit on none of {devices} together with the others; "
    "use larger devices, 4- or 8-bit loading, or a half-precision dtype": (
        "放不下：block 不可切分，其中有的与其他 block 一起放不进 {devices} 中的任何一张；"
        "请使用显存更大的设备、4 或 8 bit 量化加载，或半精度数据类型"
    ),
    "transformers' auto fails for this model: {reason}": "transformers 的 auto 在此不可用：{reason}",
    "transformers' auto on the same devices, predicted in the same way (GiB): {verdict}": (
        "transformers 的 auto 在同样的设备上，用同样的方法预测（GiB）：{verdict}"
    ),
    "not trainable, because part of it stays on {places}": "无法训练，因为有一部分留在 {places} 上",
    "out of memory on {devices}": "{devices} 显存不足",
    "fits; fullest device {size}": "放得下；占用最高的设备为 {size}",
    "{names} and {last}": "{names} 和 {last}",
    "{place}: auto leaves {size} of weights there ({blocks}), which cannot be trained": (
        "{place}：auto 把 {size} 的权重留在这里（{blocks}），这部分无法训练"
    ),
    "{number} replicas: {shares}; the map is that of the share with the least memory": (
        "{number} 个副本：{shares}；所示为显存最少的一份的 map"
    ),
    "rank {rank} on {devices}": "rank {rank} 使用 {devices}",
    "1 replica: a second one does not fit": "1 个副本：放不下第二个",
    "accelerate refuses device maps in several processes": "accelerate 不允许在多进程中使用 device map",
    "the config names no dtype, assuming bf16; set --precision": (
        "config 没有写明数据类型，假定为 bf16；请设置 --precision"
    ),
    "sequence length unknown, assuming {number} tokens; set --seq-len": (
        "序列长度未知，假定为 {number} 个 token；请设置 --seq-len"
    ),
    "memory of the blocks: {method}": "各 block 显存的估算方式：{method}",
    "{number} layers are recomputed in the backward pass, {enough}": "反向传播时重计算 {number} 层，{enough}",
    "as many as possible": "已是最多",
    "as few as fit": "是放得下所需的最少层数",
    "BALANCE_LOSS=chunked would save {size} on {device}": "BALANCE_LOSS=chunked 可在 {device} 上节省 {size}",
    # Step time, and mode auto.
    "predicted step: {time}": "预测每步耗时：{time}",
    "{time}, {bound}, {rates}": "{time}，{bound}，{rates}",
    "bound by the devices": "受限于设备计算",
    "one device computes at a time": "同一时刻只有一张卡在计算",
    "bound by the host, which launches operations": "受限于主机下发运算的速度",
    "bound by the links between devices": "受限于卡间通信",
    "rates of data sheets": "按产品手册的速率",
    "measured rates": "按实测速率",
    "rates in part measured": "部分按实测速率",
    "candidates of mode auto:": "auto 模式的候选方案：",
    "candidate": "方案",
    "fullest device": "最高占用",
    "step": "每步",
    "tokens/s": "token/s",
    "reason": "理由",
    "one device": "单卡",
    "balanced map": "均衡的 map",
    "balanced map, micro-batches in flight": "均衡的 map，多个微批次同时在途",
    "balanced map, {count} micro-batches in flight": "均衡的 map，{count} 个微批次同时在途",
    "{number} of a map": "{number}，各用一个 map",
    "ZeRO-3 on {number}": "ZeRO-3，{number}",
    "ZeRO-3 on {number}, {what} in host memory": "ZeRO-3，{number}，{what}放在主机内存",
    "weights and optimizer state": "权重和优化器状态",
    "optimizer state": "优化器状态",
    "{name}, layers recomputed": "{name}，重计算",
    "1 rank": "1 个 rank",
    "{count} ranks": "{count} 个 rank",
    "1 replica": "1 个副本",
    "{count} replicas": "{count} 个副本",
    "mode auto chooses {name}: {reason}": "auto 模式选择：{name}：{reason}",
    "mode auto: nothing fits; the smallest change that would fit: {change}": (
        "auto 模式：都放不下；改动最小的可行做法：{change}"
    ),
    "mode auto: nothing fits; use more or larger devices, 4- or 8-bit loading, or LoRA": (
        "auto 模式：都放不下；请使用更多或显存更大的设备、4 或 8 bit 量化加载，或 LoRA"
    ),
    "the first that fits; the kind of the devices, and so their speed, is unknown": (
        "第一个放得下的方案；设备型号未知，因此速度未知"
    ),
    "the only one that fits": "唯一放得下的方案",
    "the fastest that fits": "放得下的方案中最快",
    "as fast as any that fits, and the simplest of these": "与放得下的最快方案一样快，并且最简单",
    "does not fit: not even its weights do": "放不下：仅权重就放不下",
    "does not fit: {fill} of the fullest device": "放不下：占用最高的设备达到 {fill}",
    "fits; how fast it is compared to what was chosen is unknown": "放得下；与所选方案相比的速度未知",
    "{factor} times the speed of what was chosen": "速度为所选方案的 {factor} 倍",
    "hardly faster than what was chosen, which is simpler": "与所选方案相比几乎不更快，而所选方案更简单",
    "there is one micro-batch in a step": "每步只有一个微批次",
    "BALANCE_PIPELINE is off": "BALANCE_PIPELINE 为 off",
    "BALANCE_PIPELINE=1 has one micro-batch in flight": "BALANCE_PIPELINE=1 只允许一个微批次在途",
    "ranks would use devices that are left out here": "各进程会用到此处排除的设备",
    "{number} devices of {size}": "{number} 张 {size} 的卡",
    "{change}, with gradient checkpointing": "{change}，并开启梯度检查点",
    # Notes of plans.
    "{device} (training alone: {size})": "{device}（仅训练：{size}）",
    "evaluation ({evaluation}) decides the peak of {devices}": "{devices} 的峰值由评估（{evaluation}）决定",
    " on compute capability {versions}": "（计算能力 {versions}）",
    "another attn_implementation": "改用其他 attn_implementation",
    "{dtype} or another attn_implementation": "改用 {dtype} 或其他 attn_implementation",
    "attention in {dtype} has no fused kernel{on}: each layer keeps a matrix of sequence length squared "
    "for every head; {others} may avoid that": (
        "{dtype} 的注意力没有融合 kernel{on}：每层为每个头保留一个“序列长度的平方”大小的矩阵；{others} 可能避免这一点"
    ),
    "the map has had no dry run: {reason}": "该 map 没有经过试运行：{reason}",
    "{device}: in a dry run activations and gradients take {seen}, where {predicted} was predicted": (
        "{device}：试运行中激活值和梯度占用 {seen}，预测为 {predicted}"
    ),
    "{note}; the figures here include it": "{note}；表中数字已计入",
    "{names} and {number} more": "{names}，另有 {number} 个",
    "not reached by the dry run, so kept together on {device}: {names}": (
        "试运行没有经过，因此一起放在 {device} 上：{names}"
    ),
    "not reached by the dry run, and too large to be kept together on {device}: {names}": (
        "试运行没有经过，又太大，无法一起放在 {device} 上：{names}"
    ),
    "a device that this one may not use": "本模型不能使用的设备上",
    "{device}, and this one does not fit there": "{device} 上，而本模型的输出头放不进去",
    "map chosen for a short step; the memory-balanced map fills its fullest device to {part} and takes {seconds} s": (
        "此 map 以单步时间为准；以显存为准的 map 最满设备占用 {part}，单步 {seconds} 秒"
    ),
    "the head of another model of the same vocabulary is on {where}": "词表相同的另一个模型的输出头在 {where}",
    # What would fit.
    "{change} (fullest device {size})": "{change}（占用最高的设备 {size}）",
    "fewer replicas, each on more devices": "减少副本数，让每个副本使用更多的卡",
    "remedy {number}: fewer replicas, each on more devices (not predicted)": (
        "解决办法 {number}：减少副本数，让每个副本使用更多的卡（未预测）"
    ),
    "gradient checkpointing (BALANCE_GRADIENT_CHECKPOINTING=1)": "梯度检查点（BALANCE_GRADIENT_CHECKPOINTING=1）",
    "a micro-batch of 1 (BALANCE_MICRO_BATCH=1)": "微批次设为 1（BALANCE_MICRO_BATCH=1）",
    "an 8-bit optimizer": "8 bit 优化器",
    "LoRA": "LoRA",
    "LoRA with gradient checkpointing": "LoRA 加梯度检查点",
    "sequences of {number} tokens": "序列长度设为 {number} 个 token",
    # Out of memory.
    "out of memory on {device} in the {phase}{where}{inside}, step {step}{batch}: {allocated} in tensors{wanted}, "
    "of {total}": (
        "{device} 显存不足，发生在{phase}{where}{inside}，第 {step} 步{batch}："
        "tensor 已占 {allocated}{wanted}，共 {total}"
    ),
    "forward pass": "前向传播",
    "backward pass": "反向传播",
    "optimizer step": "优化器更新",
    "gradient clipping": "梯度裁剪",
    "evaluation": "评估",
    "training": "训练",
    " of {module}": "，模块 {module}",
    ", recomputing {module}": "，正在重计算 {module}",
    " ({blocks})": "（{blocks}）",
    " (block {name})": "（block {name}）",
    ", batch of {size} tokens": "，batch 为 {size} 个 token",
    ", {size} more requested": "，还需要 {size}",
    "block unknown: autograd and optimizers do not report it": "无法确定 block：autograd 和优化器不会给出",
    "the traceback does not name the block; blocks of {device}: {blocks}": (
        "traceback 没有给出 block；{device} 上的 block：{blocks}"
    ),
    "cause: other processes use {size} of the {total} of {device}": "原因：{device} 共 {total}，其他进程占用了 {size}",
    "cause: up to {size} of {device} are paged optimizer state, which torch does not count": (
        "原因：{device} 上最多有 {size} 是分页的优化器状态，torch 不统计这一部分"
    ),
    "cause: this micro-batch has {rows} x {tokens} tokens, the plan was for {planned}{assumed}": (
        "原因：这个微批次有 {rows} x {tokens} 个 token，而规划是按 {planned} 做的{assumed}"
    ),
    ", assumed": "（假定值）",
    "cause: this micro-batch is {times} times as large as any before": "原因：这个微批次是此前最大值的 {times} 倍",
    "cause: {size} of {device} are reserved by the allocator and cannot be used (fragmentation); "
    "PYTORCH_ALLOC_CONF=expandable_segments:True (PYTORCH_CUDA_ALLOC_CONF before torch 2.9) usually ends that": (
        "原因：{device} 上有 {size} 被分配器保留却无法使用（显存碎片）；"
        "PYTORCH_ALLOC_CONF=expandable_segments:True（torch 2.9 之前为 PYTORCH_CUDA_ALLOC_CONF）通常可以解决"
    ),
    "cause: tensors have been retained since step {step}, {rate} per step; their owner is named above": (
        "原因：从第 {step} 步起有 tensor 没有释放，每步 {rate}；持有者见上文"
    ),
    "cause: the map that was given is wrong for this training; see below": ("原因：所给的 map 不适合这次训练；见下文"),
    "cause: unknown; {size} more than predicted is in use on {device}. "
    "BALANCE_MONITOR=1 shows what grows from step to step": (
        "原因：未知；{device} 的占用比预测多 {size}。BALANCE_MONITOR=1 可以显示是什么在逐步增长"
    ),
    "remedy: release them (detach() tensors kept for logging, or keep numbers with item())": (
        "解决办法：释放它们（对为日志保存的 tensor 调用 detach()，或者用 item() 只保存数值）"
    ),
    "{devices} had room: the {what} was wrong": "{devices} 还有空间：{what}有误",
    "The {what} was wrong": "{what}有误",
    "map": "device map ",
    "plan": "规划",
    "remedy {number}: {setting} (predicted {needed} of {capacity} on {device})": (
        "解决办法 {number}：{setting}（预测 {device} 占用 {needed}，容量 {capacity}）"
    ),
    "no setting of the shim would have fit; use more or larger devices, or a smaller model": (
        "本工具的任何设置都放不下；请使用更多或显存更大的设备，或者更小的模型"
    ),
    "{value}, as device_map= in the script (it gives none that BALANCE_INTERCEPT replaces)": (
        "在脚本中把 {value} 作为 device_map= 的值（脚本没有写 BALANCE_INTERCEPT 可以替换的取值）"
    ),
    "optim={name} in the script": "在脚本中设置 optim={name}",
    "LoRA (PEFT) in the script": "在脚本中使用 LoRA（PEFT）",
    "sequences of at most {number} tokens in the script": "在脚本中把序列长度限制为 {number} 个 token",
}
