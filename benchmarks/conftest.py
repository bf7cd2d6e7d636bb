"""Every benchmark stands beside its floor: `pytest benchmarks` prints one table a group, the fastest first."""

import torch


def pytest_benchmark_update_machine_info(config, machine_info):  # noqa: ARG001
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
