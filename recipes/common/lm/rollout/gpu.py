"""Whether there is a CUDA GPU, and how much of its memory this process may have. Imports torch only when called."""


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def memory_limit() -> int:
    """Bytes of the current GPU that this process may have."""
    import torch

    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return int(total * torch.cuda.get_per_process_memory_fraction())


def free_bytes() -> int:
    """Bytes of the current GPU that this process can still allocate."""
    import torch

    from common.lm.cuda_graph import HELD

    free, _ = torch.cuda.mem_get_info()
    allocated, reserved = torch.cuda.memory_allocated() + sum(HELD.values()), torch.cuda.memory_reserved()
    return min(free + reserved - allocated, memory_limit() - allocated)
