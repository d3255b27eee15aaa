"""Imports and configures DeepSpeed, without its log output and without JIT compilation."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch

from reformer_dist.config import DeepSpeedConfig, OptimConfig, Precision
from reformer_dist.errors import ConfigError


def import_deepspeed() -> Any:
    """Imports deepspeed without its log output, and disables the JIT build of its shared-memory CPU collective.

    That build takes a minute on CPU, and fails without a compiler.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("LOCAL_RANK", "0")  # required even by a single process
    # DeepSpeed still uses deprecated names of collectives
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed")
    import deepspeed
    import deepspeed.ops
    import deepspeed.runtime.torch_autocast

    # set by a stage 0 engine in bf16, it would make engines after it in this process reduce gradients in bf16
    deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_dict(
    zero: DeepSpeedConfig, optim: OptimConfig, precision: Precision, micro_batch: int, n_micro: int
) -> dict[str, Any]:
    """DeepSpeed's configuration. Raises ConfigError for combinations that it does not support."""
    if precision is Precision.fp16:
        if not torch.cuda.is_available():
            raise ConfigError("trainer.precision=fp16: needs a GPU; use bf16 or fp32 on a CPU")
        if zero.stage == 0:
            raise ConfigError("trainer.precision=fp16: needs deepspeed.stage of 1, 2 or 3; or use bf16")
    zero_optimization: dict[str, Any] = {"stage": zero.stage, "reduce_bucket_size": zero.reduce_bucket_size}
    if zero.stage == 3:
        zero_optimization["stage3_param_persistence_threshold"] = zero.param_persistence_threshold
    if zero.offload_optimizer:
        zero_optimization["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": n_micro,
        # without ZeRO, TrainEngine clips, since DeepSpeed does not report the norm
        "gradient_clipping": optim.grad_clip if zero.stage > 0 else 0.0,
        "steps_per_print": 2**62,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero_optimization,
    }
    if zero.stage > 0 and precision is not Precision.fp32:
        config["communication_data_type"] = "fp32"
    if zero.stage == 3:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if precision is Precision.fp16:
        config["fp16"] = {"enabled": True}
    elif precision is Precision.bf16 and zero.stage == 0:
        # without ZeRO there is no sharded master copy: parameters stay float32, and matmuls run in bf16
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif precision is Precision.bf16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return config


def keep_float32_gradients(engine: Any, stage: int) -> None:
    """Makes gradients of low-precision weights float32 from autograd to the optimizer; engine: newly initialized.

    Autograd then sums the gradients of a weight's uses in float32 (tied embeddings, shared layers, micro-batches),
    and does not round sums over tokens that were made in float32.
    """
    for parameter in engine.module.parameters():
        parameter.grad_dtype = torch.float32
    if stage < 3:
        # not by `grad_accum_dtype`: with it, stage 1 accumulates and reduces the whole gradient on every rank, and
        # stage 2 still rounds each micro-batch's gradient
        engine.optimizer.gradient_accumulation_dtype = torch.float32
        engine.optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32
