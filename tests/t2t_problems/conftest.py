"""These tests are for the environments of Tensor2Tensor: `make test-t2t` and `make test-t2t-tf1`."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("tensor2tensor") else ["test_*.py"]
