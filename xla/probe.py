"""What this host's XLA device is, for `train-large time-steps --device xla`, which imports no torch:

    python -m xla.probe

prints it as JSON, or ends with one sentence where there is none.
"""

from __future__ import annotations

import json
import sys

from train_large.errors import UserError
from xla import device


def main() -> None:
    import torch
    import torch_xla  # after `device`, which keeps it from taking the CPU unasked

    try:
        name = device.choose_device()
        count = device.local_devices(name)
        found = {
            "torch": f"{torch.__version__}, torch_xla {torch_xla.__version__}",
            "threads": torch.get_num_threads(),
            "device": f"XLA {device.kind(name)} x {count}",
            "devices": count,
            "hosts": device.hosts(name),
            "own_memory": name != "CPU",
        }
    except UserError as error:
        sys.exit(str(error))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
