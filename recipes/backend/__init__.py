"""Runs NeMo, Megatron-Core and ModelOpt on the device that this machine has, CUDA or CPU."""
