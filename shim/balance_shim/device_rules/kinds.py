"""Kinds of devices by name, in one table with a source per row. Standard library only: read while arming."""

from functools import partial
from typing import Literal, NamedTuple

from ..units import GIB

Runtime = Literal["cuda", "hip", "npu", "xpu", "other"]
Capability = tuple[int, int]


class Architecture(NamedTuple):
    """The facts that decide which kernels run on a device.

    Attributes:
        runtime: "cuda" or "hip" behind `torch.cuda`, else the type of the device module.
        capability: CUDA's compute capability, (8, 0) for an A100; of HIP the two first digits of the gfx number,
            (9, 4) for gfx942, as torch gives them; None where the runtime knows no such thing.
    """

    runtime: Runtime = "cuda"
    capability: Capability | None = (8, 0)


# transformers' own switch, since 5.2x: grouped queries go to torch as they are, whatever kernel that means.
INSISTS_ON_GROUPS = "TRANSFORMERS_SDPA_FORCE_GQA"
DEFAULT_ARCHITECTURE = Architecture()  # of simulated devices that are given by their size alone


Link = Literal["nvlink", "infinity fabric", "hccs", "pcie"]  # between two devices of a machine


class Rates(NamedTuple):
    """The peak rates of a device, in FLOP/s and bytes/s.

    Attributes:
        float16, bfloat16, float32: FLOPs of dense matrix products, accumulated in float32. PyTorch computes float32
            without TF32 unless it is told otherwise. Without bfloat16 in hardware it is that of float32.
        memory: bytes to and from the device's memory.
        link: what joins it with the other devices of its machine.
        link_bytes: bytes over it in one direction.
        host_bytes: bytes between the device and the host in one direction.
    """

    float16: float
    bfloat16: float
    float32: float
    memory: float
    link: Link
    link_bytes: float
    host_bytes: float


class DeviceKind(NamedTuple):
    """One model of accelerator.

    Attributes:
        name: as it is written in a list of devices.
        product: as the driver names it (`torch.cuda.get_device_name`).
        memory: bytes, as torch reports the total: a few percent less than the vendor names.
        architecture: which rules it follows.
        rates: peak rates.
        source: where `memory`, `architecture` and `rates` are from.
        aliases: further names that drivers give the same product.
    """

    name: str
    product: str
    memory: int
    architecture: Architecture
    rates: Rates
    source: str
    aliases: tuple[str, ...] = ()


# Compute capabilities are those of developer.nvidia.com/cuda-gpus; gfx numbers those of ROCm's list of supported
# hardware. "reported": the total that torch's out-of-memory errors name in public issues; it differs by up to 0.2 GiB
# with driver and ECC. "read": seen in nvidia-smi on such a machine. "unchecked": written from memory, not looked up.
# "data sheet": the vendor's size, of which torch will report 1 to 3 % less.
_CUDA_GPUS = "capability: developer.nvidia.com/cuda-gpus; memory: "
_ROCM_GPUS = "gfx number: rocm.docs.amd.com, supported GPUs; memory: "


# Rates: those of the vendor's data sheet or white paper, dense and nominal, written from memory. float16 of H100, H200,
# H20, B200, A100, A40, L40S, L4, V100, T4, RTX 3090, 4090, 5090 and A6000, MI300X and 910B agrees with tables in public
# repositories. Links and PCIe are those of one direction.
_RATES = "; rates: data sheet"
_TERA, _GIGA = 1e12, 1e9


def _rates(
    float16: float, float32: float, memory: float, link: Link, link_bytes: float, pcie: float, bfloat16: bool = True
) -> Rates:
    """Return rates from TFLOP/s and GB/s."""
    half, single = float16 * _TERA, float32 * _TERA
    brain = half if bfloat16 else single
    return Rates(half, brain, single, memory * _GIGA, link, link_bytes * _GIGA, pcie * _GIGA)


def _on_pcie(float16: float, float32: float, memory: float, pcie: float = 32, bfloat16: bool = True) -> Rates:
    return _rates(float16, float32, memory, "pcie", pcie, pcie, bfloat16)


def _kind(
    name: str,
    product: str,
    gib: float,
    architecture: Architecture,
    rates: Rates,
    source: str,
    aliases: tuple[str, ...] = (),
) -> DeviceKind:
    return DeviceKind(name, product, int(gib * GIB), architecture, rates, source + _RATES, aliases)


def _gpu(
    runtime: Runtime,
    name: str,
    product: str,
    gib: float,
    capability: Capability,
    rates: Rates,
    memory_source: str,
    *aliases: str,
) -> DeviceKind:
    source = (_CUDA_GPUS if runtime == "cuda" else _ROCM_GPUS) + memory_source
    return _kind(name, product, gib, Architecture(runtime, capability), rates, source, aliases)


_cuda, _rocm = partial(_gpu, "cuda"), partial(_gpu, "hip")


KINDS = (
    _cuda("B200", "NVIDIA B200", 178.3, (10, 0),
          _rates(2250, 75, 8000, "nvlink", 900, 64),
          "unchecked (183,359 MiB in nvidia-smi)"),
    _cuda("H200", "NVIDIA H200", 139.7, (9, 0),
          _rates(989.4, 66.9, 4800, "nvlink", 450, 64),
          "read (143,771 MiB in nvidia-smi)"),
    _cuda("H100", "NVIDIA H100 80GB HBM3", 79.1, (9, 0),
          _rates(989.4, 66.9, 3350, "nvlink", 450, 64),
          "read (81,559 MiB in nvidia-smi)", "NVIDIA H100"),
    _cuda("H100-PCIe", "NVIDIA H100 PCIe", 79.1, (9, 0),
          _on_pcie(756, 51.2, 2000, 64),
          "unchecked (81,559 MiB in nvidia-smi)"),
    _cuda("H20", "NVIDIA H20", 95.0, (9, 0),
          _rates(148, 44, 4000, "nvlink", 450, 64),
          "unchecked (97,871 MiB in nvidia-smi)"),
    _cuda("A100-80GB", "NVIDIA A100-SXM4-80GB", 79.1, (8, 0),
          _rates(312, 19.5, 2039, "nvlink", 300, 32),
          "reported (levihsu/OOTDiffusion#235: 79.25)"),
    _cuda("A100-40GB", "NVIDIA A100-SXM4-40GB", 39.39, (8, 0),
          _rates(312, 19.5, 1555, "nvlink", 300, 32),
          "bottlerocket-os/bottlerocket#3873: 42,298,834,944"),
    _cuda("A100-80GB-PCIe", "NVIDIA A100 80GB PCIe", 79.1, (8, 0),
          _on_pcie(312, 19.5, 1935),
          "unchecked (81,920 MiB in nvidia-smi)"),
    _cuda("A100-40GB-PCIe", "NVIDIA A100-PCIE-40GB", 39.39, (8, 0),
          _on_pcie(312, 19.5, 1555),
          "unchecked (as A100-40GB)"),
    _cuda("A40", "NVIDIA A40", 44.4, (8, 6),
          _on_pcie(149.7, 37.4, 696),
          "unchecked (46,068 MiB in nvidia-smi)"),
    _cuda("A10", "NVIDIA A10", 22.0, (8, 6),
          _on_pcie(125, 31.2, 600),
          "unchecked (23,028 MiB in nvidia-smi)"),
    _cuda("A10G", "NVIDIA A10G", 22.0, (8, 6),
          _on_pcie(70, 35, 600),
          "unchecked (23,028 MiB in nvidia-smi)"),
    _cuda("L40S", "NVIDIA L40S", 44.4, (8, 9),
          _on_pcie(362.05, 91.6, 864),
          "unchecked (46,068 MiB in nvidia-smi)"),
    _cuda("L4", "NVIDIA L4", 22.0, (8, 9),
          _on_pcie(121, 30.3, 300),
          "unchecked (23,034 MiB in nvidia-smi)"),
    _cuda("V100-32GB", "Tesla V100-SXM2-32GB", 31.7, (7, 0),
          _rates(125, 15.7, 900, "nvlink", 150, 16, bfloat16=False),
          "unchecked (32,768 MiB in nvidia-smi)"),
    _cuda("V100-16GB", "Tesla V100-SXM2-16GB", 15.77, (7, 0),
          _rates(125, 15.7, 900, "nvlink", 150, 16, bfloat16=False),
          "unchecked (16,384 MiB in nvidia-smi)"),
    _cuda("P100", "Tesla P100-PCIE-16GB", 15.89, (6, 0),
          _on_pcie(18.7, 9.3, 732, 16, bfloat16=False),
          "unchecked (16,384 MiB in nvidia-smi)"),
    _cuda("T4", "Tesla T4", 14.56, (7, 5),
          _on_pcie(65, 8.1, 320, 16, bfloat16=False),
          "reported (Zheng-Chong/CatVTON#133; older drivers 14.75)"),
    _cuda("RTX-PRO-6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 94.9, (12, 0),
          _on_pcie(503.8, 125, 1792, 64),
          "unchecked"),
    _cuda("RTX6000-Ada", "NVIDIA RTX 6000 Ada Generation", 47.5, (8, 9),
          _on_pcie(364.2, 91.1, 960),
          "unchecked (49,140 MiB in nvidia-smi)"),
    _cuda("RTX-A6000", "NVIDIA RTX A6000", 47.5, (8, 6),
          _on_pcie(154.8, 38.7, 768),
          "unchecked (49,140 MiB in nvidia-smi)"),
    _cuda("RTX5090", "NVIDIA GeForce RTX 5090", 31.36, (12, 0),
          _on_pcie(209.5, 104.8, 1792, 64),
          "unchecked (32,607 MiB in nvidia-smi)"),
    _cuda("RTX5080", "NVIDIA GeForce RTX 5080", 15.5, (12, 0),
          _on_pcie(112.6, 56.3, 960, 64),
          "unchecked (16,303 MiB in nvidia-smi)"),
    _cuda("RTX4090", "NVIDIA GeForce RTX 4090", 23.64, (8, 9),
          _on_pcie(165.2, 82.6, 1008),
          "reported (3DTopia/Phidias-Diffusion#8)"),
    _cuda("RTX4080", "NVIDIA GeForce RTX 4080", 15.7, (8, 9),
          _on_pcie(97.5, 48.7, 717),
          "unchecked (16,376 MiB in nvidia-smi)"),
    _cuda("RTX4070", "NVIDIA GeForce RTX 4070", 11.7, (8, 9),
          _on_pcie(58.3, 29.1, 504),
          "unchecked (12,282 MiB in nvidia-smi)"),
    _cuda("RTX4060", "NVIDIA GeForce RTX 4060", 7.75, (8, 9),
          _on_pcie(30.2, 15.1, 272, 16),
          "reported (ESRSchao/EdgeRegNet#2)"),
    _cuda("RTX3090", "NVIDIA GeForce RTX 3090", 23.69, (8, 6),
          _on_pcie(71, 35.6, 936),
          "unchecked (24,576 MiB in nvidia-smi)"),
    _cuda("RTX3080", "NVIDIA GeForce RTX 3080", 9.77, (8, 6),
          _on_pcie(59.5, 29.8, 760),
          "unchecked (10,240 MiB in nvidia-smi)"),
    _cuda("RTX3060", "NVIDIA GeForce RTX 3060", 11.76, (8, 6),
          _on_pcie(25.5, 12.7, 360),
          "unchecked (12,288 MiB in nvidia-smi)"),
    _cuda("RTX2080Ti", "NVIDIA GeForce RTX 2080 Ti", 10.75, (7, 5),
          _on_pcie(53.8, 13.4, 616, 16, bfloat16=False),
          "reported (RenYurui/StructureFlow#35: 10.76)"),
    _rocm("MI300X", "AMD Instinct MI300X", 191.98, (9, 4),
          _rates(1307.4, 163.4, 5300, "infinity fabric", 64, 64),
          "201,310,208 KiB (ROCm/legacy-rocm-build#4414)"),
    _rocm("MI250X", "AMD Instinct MI250X", 63.98, (9, 0),
          _rates(191.5, 23.9, 1600, "infinity fabric", 50, 32),
          "data sheet, one of the two dies that torch shows"),
    _kind("910B", "Ascend910B", 60.97, Architecture("npu", None),
          _rates(354, 88, 1600, "hccs", 28, 32),
          "memory: reported (zai-org/CogVideo#63)",
          ("Ascend910B1", "Ascend910B2", "Ascend910B3", "Ascend910B4")),
)  # fmt: skip


def kind_named(name: str) -> DeviceKind:
    """Return the kind called `name`; case, spaces, dashes and underscores do not matter.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    plain_name = _plain(name)
    for kind in KINDS:
        if _plain(kind.name) == plain_name:
            return kind
    raise ValueError(f"unknown device {name.strip()!r}; {_nearest(plain_name)}")


def kind_of_product(product: str) -> DeviceKind | None:
    """Return the kind that the driver calls `product`; None for one that is not in the table.

    The whole name is compared: an RTX 4060 Ti is no RTX 4060, and half of a divided card (MIG) is another device.
    """
    plain_product = _plain(product).removeprefix("nvidia")
    for kind in KINDS:
        if plain_product in [_plain(name).removeprefix("nvidia") for name in (kind.product, *kind.aliases)]:
            return kind
    return None


def is_kind(name: str) -> bool:
    """Whether there is a kind called `name`."""
    return any(_plain(kind.name) == _plain(name) for kind in KINDS)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _nearest(plain_name: str) -> str:
    import difflib  # only for those who mistyped

    names = {_plain(kind.name): kind.name for kind in KINDS}
    variants = [name for plain, name in names.items() if plain_name and plain.startswith(plain_name)]
    near = variants or [names[plain] for plain in difflib.get_close_matches(plain_name, names, n=3, cutoff=0.5)]
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names.values())}"
