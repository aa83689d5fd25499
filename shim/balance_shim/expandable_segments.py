"""Has torch's CUDA allocator grow its segments instead of adding new ones, which removes most of fragmentation.

It has to be in the environment before torch is imported, so only programs that `balance-shim run` starts get it.
"""

import platform
import sys
from collections.abc import Mapping
from importlib.util import find_spec

from .versions import version_of, version_text
from .virtual import allocator_settings

VALUE = "expandable_segments:True"
# torch 2.9 and before ignore PYTORCH_ALLOC_CONF=expandable_segments on CUDA (pytorch#183387); from 2.8 on they call the
# other name deprecated, in some versions with a warning.
UNIFIED_NAME_SINCE = (2, 10)


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variable that switches expandable segments on; nothing where the user or the platform is against it.

    They need Linux and the CUDA driver's virtual memory; without CUDA the variable changes nothing. ROCm and WSL lack
    support in many versions. vLLM's sleep mode before 0.20.1 refuses to start with them (vllm#14189).
    """
    if allocator_settings.is_set(environ) or environ.get("PYTORCH_HIP_ALLOC_CONF", "").strip():
        return {}
    if not sys.platform.startswith("linux") or "microsoft" in platform.release().lower():
        return {}
    if not version_text("torch") or "rocm" in version_text("torch") or find_spec("vllm") is not None:
        return {}
    name = "PYTORCH_ALLOC_CONF" if version_of("torch") >= UNIFIED_NAME_SINCE else "PYTORCH_CUDA_ALLOC_CONF"
    return {name: VALUE}
